"""Checkpoints with the key names of transformers 4, as most on the hub: they load, into compressed configurations too.

For the families with SigLIP or CLIP, whose keys were renamed most. What transformers itself writes, mostly in that
format too, is a property of the matrix.
"""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import laco
import tiny
from families.matrix import Subject, subject_of

CASES = {name: case for name, case in tiny.CASES.items() if name.endswith(("-siglip", "-clip"))}


def in_hub_format(model: PreTrainedModel) -> dict[str, Tensor]:
    prefixes = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.": "",
    }
    renamed = {}
    for key, tensor in model.state_dict().items():
        old = next((old for old in prefixes if key.startswith(old)), None)
        if old is not None:
            renamed[prefixes[old] + key.removeprefix(old)] = tensor
        elif not model.config.tie_word_embeddings:
            renamed["language_model." + key] = tensor
    return renamed


@pytest.mark.parametrize("place", ["inside", "external"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hub_checkpoints_load_and_are_saved_again(case, place, tmp_path):
    stock, subject = subject_of(case, "stock"), subject_of(case, place)
    laco.save_pretrained(stock.model, stock.processor, tmp_path / "hub")
    save_file(in_hub_format(stock.model), tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})

    def loaded(directory) -> Subject:
        return Subject(case, place, *laco.from_pretrained(directory))

    again = loaded(tmp_path / "hub")
    assert torch.equal(again.logits(again.inputs(*again.prompts)), stock.logits(stock.inputs(*stock.prompts)))
    laco.compress(again.model, again.processor, subject.method)
    tiny.scramble(again.model)
    laco.save_pretrained(again.model, again.processor, tmp_path / "compressed")
    third = loaded(tmp_path / "compressed")
    batch = third.inputs(*third.prompts)
    assert torch.equal(third.logits(batch), again.logits(batch))

    config = deepcopy(subject.model.config)
    _, info = type(subject.model).from_pretrained(tmp_path / "hub", config=config, output_loading_info=True)
    assert info["missing_keys"] == {key for key in subject.model.state_dict() if ".compressor." in key}
