"""What models put out beside logits, where tokens are dropped."""

from copy import deepcopy
from typing import Any

import pytest
import torch

import laco
import tiny
from families.matrix import ONE
from families.test_glimpse_prune import deep
from families.test_turns import METHODS
from laco.families import family_of
from laco.families.reduction import computed_columns, kept_columns

NAME = "llava-siglip"
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def compressed(method: Any) -> Any:
    torch.manual_seed(1)
    return laco.compress(*deepcopy(deep(NAME)), method)


@every_method
def test_hidden_states_and_attentions(method):
    """One of every layer, of what it computes; the last hidden states, of every token, are what the head reads."""
    model, processor = compressed(method)
    model.set_attn_implementation("eager")
    batch = tiny.CASES[NAME].inputs(processor, ONE)
    with torch.no_grad():
        alone = model(**batch).logits
        out = model(**batch, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert torch.equal(out.logits, alone)
    computed = [columns.shape[1] for columns in computed_columns(out.past_key_values)]
    assert [attention.shape[-2:] for attention in out.attentions] == [(count, count) for count in computed]
    assert len(out.hidden_states) == len(computed) + 1
    assert [states.shape[1] for states in out.hidden_states[1:-1]] == computed[:-1]
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("version", ["1", "plus"])
def test_text_between_pictures_gets_its_own_logits(version):
    """Also where tokens that stand for others come behind all that stays of the pictures."""
    model, processor = compressed(laco.methods.SparseVLM(layer=2, keep=0.3, version=version))
    pictures = [tiny.picture(2, 90, 40), tiny.picture(3)]
    batch = tiny.CASES[NAME].inputs(processor, ("<image> and <image> why?", pictures))
    seen: list[Any] = []
    family_of(model).language_model(model).norm.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        want = model.lm_head(seen[-1])[0]
    columns = kept_columns(out.past_key_values)[-1][0]
    assert (columns.diff() < 0).any() == (version == "1")
    text = [slot for slot, column in enumerate(columns) if batch["input_ids"][0, column] != model.config.image_token_id]
    torch.testing.assert_close(out.logits[0, columns[text]], want[text])
