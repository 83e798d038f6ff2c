"""Caches of dialogues with pictures in several turns, of which tokens were dropped: cut, used again, in batches."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import laco
import tiny
from families.matrix import ONE, built
from families.test_glimpse_prune import deep
from laco.families.reduction import computed_columns, kept_columns

NAME = "llava-siglip"
METHODS = {
    "div_prune": laco.DivPrune(keep=0.3),
    "renumbered": laco.DivPrune(keep=0.3, positions="renumber"),
    "flexselect": laco.FlexSelect(keep=0.3),
    "fastv": laco.FastV(layer=2, keep=0.3),
    "fastv_renumbered": laco.FastV(layer=2, keep=0.3, positions="renumber"),
    "sparsevlm": laco.methods.SparseVLM(layer=2, keep=0.3),
    "pyramid_drop": laco.methods.PyramidDrop(keep=(0.5, 0.3, 0.2), positions="renumber"),
    "glimpse_prune": laco.GlimpsePrune(layer=2, keep=0.4, width=16, condition=16, threshold=0.0),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SECOND = ("so <image> what now?", [tiny.picture(9)])
MORE = torch.tensor([[70, 71]])


def compressed(method: Any) -> Any:
    torch.manual_seed(1)
    return laco.compress(*deepcopy(deep(NAME)), method)


@torch.no_grad()
def read(model: Any, batch: Any, past: Any = None, **further: Any) -> Any:
    return model(**batch, past_key_values=past, use_cache=True, **further)


def turn(processor: Any, *prompts: Any) -> Any:
    return {key: x for key, x in tiny.CASES[NAME].inputs(processor, *prompts).items() if key != "attention_mask"}


@every_method
@pytest.mark.parametrize("rows", [1, 2])
def test_a_turn_that_is_cut_off_is_forgotten(method, rows):
    model, processor = compressed(method)
    second = turn(processor, *[SECOND] * rows)
    past = read(model, turn(processor, *[ONE] * rows)).past_key_values
    before = deepcopy(past)
    read(model, second, past)
    past.crop(-second["input_ids"].shape[1])
    assert past.get_seq_length() == before.get_seq_length()
    for columns in (kept_columns, computed_columns):
        assert [x.tolist() for x in columns(past)] == [x.tolist() for x in columns(before)]
    more = {"input_ids": MORE.repeat(rows, 1)}
    torch.testing.assert_close(read(model, more, past).logits, read(model, more, before).logits)


@every_method
def test_text_behind_a_picture_is_cut_off(method):
    """With three tokens more read at once, and cut off, all is as without them."""
    model, processor = compressed(method)
    first, second = turn(processor, ONE), turn(processor, SECOND)
    past = read(model, first).past_key_values
    read(model, second, past)
    longer = read(model, {"input_ids": torch.tensor([[72, 73, 74]])}, deepcopy(past)).past_key_values
    longer.crop(-3)
    assert longer.get_seq_length() == past.get_seq_length()
    want = read(model, {"input_ids": MORE}, past).logits
    torch.testing.assert_close(read(model, {"input_ids": MORE}, longer).logits, want)


ENDING = "USER: <image>"
ENDED = {
    **{f"{name}, div_prune": (name, [METHODS["div_prune"]]) for name in (NAME, "internvl-internvit")},
    **{f"{name}, renumbered": (name, [METHODS["renumbered"]]) for name in (NAME, "qwen2_5_vl-qwen2_5_vl")},
    "qwen2_5_vl-qwen2_5_vl, div_prune": ("qwen2_5_vl-qwen2_5_vl", [METHODS["div_prune"]]),
    "evit": (NAME, [laco.EViT(keep=0.5)]),
    "visionzip": ("llava-clip", [laco.VisionZip(keep=0.4)]),
}


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize(("name", "methods"), ENDED.values(), ids=ENDED)
@torch.no_grad()
def test_a_question_behind_a_cache_that_ends_with_a_picture(name, methods, full):
    """Also where the picture's last tokens were dropped, the question stands where it does when all is read at once."""
    model, processor = built(name, "stock")
    its = deepcopy(processor)
    model, processor = deepcopy((model, processor))
    torch.manual_seed(1)
    for method in methods:
        laco.compress(model, processor, method)
    tiny.scramble(model)
    for seed in range(4):
        first, whole = (
            {
                key: x
                for key, x in tiny.CASES[name].inputs(its if full else processor, prompt).items()
                if "mask" not in key
            }
            for prompt in ((ENDING, [tiny.picture(seed)]), (f"{ENDING} what is it? ASSISTANT:", [tiny.picture(seed)]))
        )
        past = model(**first, use_cache=True).past_key_values
        question = whole["input_ids"][:, first["input_ids"].shape[1] :]
        got = model(input_ids=question, past_key_values=past).logits[:, -1]
        torch.testing.assert_close(got, model(**whole).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [METHODS["div_prune"], METHODS["renumbered"]], ids=lambda x: x.positions)
def test_generating_behind_a_picture_with_and_without_a_cache(method):
    model, processor = compressed(method)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    for seed in range(3):
        batch = turn(processor, (ENDING, [tiny.picture(seed)]))
        cached, anew = (torch.stack(model.generate(**batch, **settings, use_cache=use).logits) for use in (True, False))
        torch.testing.assert_close(cached, anew, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [METHODS["renumbered"], METHODS["flexselect"]], ids=lambda x: x.name)
def test_a_turn_is_cut_within(method):
    """Text behind the picture, read in one call with it: what is left has its own positions still."""
    model, processor = compressed(method)
    second = turn(processor, SECOND)
    pasts = [read(model, turn(processor, ONE)).past_key_values for _ in range(2)]
    read(model, second, pasts[0])
    pasts[0].crop(-4)
    behind = second["input_ids"][:, -4:]
    went_on = read(model, {"input_ids": behind}, pasts[0]).logits
    torch.testing.assert_close(went_on, read(model, second, pasts[1]).logits[:, -4:])


def test_a_batch_of_which_rows_lose_unequal_numbers_of_tokens():
    """Cut in the middle of pictures, of which every row keeps others, in prompts with a placeholder for each token."""
    model, _ = compressed(METHODS["div_prune"])
    its = deep(NAME)[1]
    prompts = [(SECOND[0], [tiny.picture(seed)]) for seed in (3, 4)]
    past = read(model, turn(its, *prompts)).past_key_values
    alone = [read(model, turn(its, prompt)).past_key_values for prompt in prompts]
    for cache in (past, *alone):
        cache.crop(-24)
    got = read(model, {"input_ids": MORE.repeat(2, 1)}, past).logits
    want = torch.cat([read(model, {"input_ids": MORE}, cache).logits for cache in alone])
    assert len({int((columns >= 0).sum()) for columns in kept_columns(past)[0]}) == 2
    torch.testing.assert_close(got, want)


def padded(model: Any, processor: Any, prompts: Any) -> tuple[Tensor, list[list[int]]]:
    """Logits behind a second turn, and which of its tokens are kept in the last layer."""
    first, second = (tiny.CASES[NAME].inputs(processor, *some) for some in (prompts, [SECOND] * len(prompts)))
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    length = first["input_ids"].shape[1]
    past = read(model, first, position_ids=places[:, :length]).past_key_values
    out = read(model, {**second, "attention_mask": mask}, past, position_ids=places[:, length:])
    rows = kept_columns(past)[-1].tolist()
    return out.logits[:, -1], [[column - length for column in row if column >= length] for row in rows]


@every_method
def test_the_second_turn_of_a_padded_batch(method):
    model, processor = compressed(method)
    prompts = [("what is the matter with this <image> here?", [tiny.picture(1)]), ("w <image>?", [tiny.picture(2)])]
    logits, kept = padded(model, processor, prompts)
    for row, prompt in enumerate(prompts):
        alone, (kept_alone,) = padded(model, processor, [prompt])
        assert kept[row] == kept_alone
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-3, atol=1e-5)


@every_method
def test_a_cache_that_is_emptied(method):
    model, processor = compressed(method)
    first = turn(processor, ONE)
    out = read(model, first)
    out.past_key_values.reset()
    assert out.past_key_values.get_seq_length() == 0
    again = read(model, first, out.past_key_values)
    assert torch.equal(again.logits, out.logits)
    assert again.past_key_values is out.past_key_values


@every_method
def test_a_cache_that_is_given_without_use_cache(method):
    """It grows, as that of a stock model does."""
    model, processor = compressed(method)
    first = turn(processor, ONE)
    pasts = [read(model, first).past_key_values, DynamicCache()]
    with torch.no_grad():
        model(**first, past_key_values=pasts[1], use_cache=False)
        for past in pasts:
            model(input_ids=MORE, past_key_values=past, use_cache=False)
    logits = [read(model, {"input_ids": MORE}, past).logits for past in pasts]
    assert torch.equal(*logits)
