"""Every merger after every layer, and external, in every family: it runs, and the language model reads fewer tokens."""

from copy import deepcopy

import pytest
import torch

import laco
import tiny
from families.matrix import ONE, built
from laco.families import family_of
from laco.methods import Merger, registry

MERGERS = [name for name, method in registry().items() if issubclass(method, Merger)]


@pytest.mark.parametrize("kind", MERGERS)
@pytest.mark.parametrize("name", tiny.CASES)
def test_everywhere(name, kind):
    stock, processor = built(name, "stock")
    last = max(family_of(stock).read_layers(stock.config))
    before = visual_tokens(stock, tiny.CASES[name].inputs(processor, ONE))
    for layer in range(1, last + 1):
        model, counting = laco.compress(*deepcopy((stock, processor)), laco.methods.get(kind)(layer=layer))
        batch = tiny.CASES[name].inputs(counting, ONE)
        assert 0 < visual_tokens(model, batch) < before
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()


def visual_tokens(model, batch) -> int:
    return int((batch["input_ids"] == model.config.image_token_id).sum())
