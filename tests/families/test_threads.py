"""One model that answers in several threads at once."""

from copy import deepcopy
from threading import Thread, get_ident
from typing import Any

import pytest
import torch

import laco
import tiny
from families.matrix import ONE
from families.test_glimpse_prune import deep
from laco.families import family_of

NAME = "llava-siglip"
METHODS = [
    laco.methods.TransPrune(keep=(0.8, 0.5, 0.2), depths=(0.25, 0.5, 0.75)),
    laco.GlimpsePrune(layer=2, keep=0.4, width=16, condition=16, threshold=0.0),
    laco.FlexSelect(keep=0.3),
    laco.VisionZip(keep=0.3),
    laco.CDPruner(keep=0.3),
    laco.FastV(layer=2, keep=0.3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_threads(method):
    """Whenever a layer or a part of one begins, another thread asks something else and gets its answer first."""
    torch.manual_seed(1)
    model, processor = laco.compress(*deepcopy(deep(NAME)), method)
    mine, others = (
        tiny.CASES[NAME].inputs(processor, prompt) for prompt in (ONE, ("and this <image> then?", [tiny.picture(5)]))
    )
    with torch.no_grad():
        want, want_of_others = (model(**batch).logits for batch in (mine, others))
    thread, asked, answers = get_ident(), [], []

    def answer() -> None:
        with torch.no_grad():
            answers.append(model(**others).logits)

    def between(*_: Any) -> None:
        if get_ident() == thread:
            asked.append(Thread(target=answer))
            asked[-1].start()
            asked[-1].join()

    for layer in (*family_of(model).layers(model), *family_of(model).language_model(model).layers):
        for part in (layer, layer.self_attn, layer.mlp):
            part.register_forward_pre_hook(between)
    with torch.no_grad():
        assert torch.equal(model(**mine).logits, want)
    assert len(answers) == len(asked) > 0
    assert all(torch.equal(logits, want_of_others) for logits in answers)
