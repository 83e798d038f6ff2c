"""Guards"""

import pytest
import torch

import laco
import tiny
from families.matrix import ONE, differ, holds, identity
from laco.families import family_of


@holds("the picture and the compressor matter", places=("inside", "external", "map"), of_stock=False)
def test_matters(subject):
    one, other = (subject.inputs(("a <image> b", [tiny.picture(seed, 50, 70)])) for seed in (1, 2))
    logits = subject.logits(one)
    assert differ(logits, subject.logits(other))
    (compressor,) = subject.family.compressors(subject.model).values()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.mul_(0.5)
    assert differ(logits, subject.logits(one))


@holds("factor 1 with a zero MLP is the stock model", places=("stock",), of_stock=False)
def test_factor_one(subject):
    settings = {**subject.case.method, "factor": 1}
    batch = subject.inputs(*subject.prompts)
    stock = subject.logits(batch)
    for depth in (1 / 4, 1):
        laco.compress(subject.model, subject.processor, laco.LaCo(depth=depth, **settings))
        again = subject.inputs(*subject.prompts)
        assert torch.equal(again["input_ids"], batch["input_ids"])
        torch.testing.assert_close(subject.logits(again), stock, rtol=0, atol=1e-6)


@holds("several mergers", places=("stock",), of_stock=False)
def test_several_mergers(subject):
    """As many tokens as one merger with the product of their factors leaves."""
    layers = max(subject.family.read_layers(subject.model.config))
    factor = laco.AveragePool(**subject.case.method).factor
    other = subject.stock()
    for count, layer in enumerate((1, 2, layers), start=1):
        laco.compress(subject.model, subject.processor, laco.AveragePool(**{**subject.case.method, "layer": layer}))
        fresh = subject.stock()
        settings = {**subject.case.method, "layer": 1, "factor": factor**count}
        laco.compress(fresh.model, fresh.processor, laco.AveragePool(**settings))
        batch = subject.inputs(*subject.prompts)
        assert torch.equal(batch["input_ids"], fresh.inputs(*subject.prompts)["input_ids"])
        assert subject.logits(batch).isfinite().all()
    laco.decompress(subject.model, subject.processor)
    assert torch.equal(subject.logits(subject.inputs(ONE)), other.logits(other.inputs(ONE)))


def refuses(model, processor, method, message: str) -> None:
    before = identity(model, processor)
    with pytest.raises(laco.LacoError, match=message) as refusal:
        laco.compress(model, processor, method)
    assert family_of(model).name in str(refusal.value)
    assert identity(model, processor) == before


@holds("processors that do not match are refused", of_stock=False)
def test_other_processors(subject):
    stock = subject.stock()
    method = laco.AveragePool(**{**subject.case.method, "layer": 1})
    refuses(subject.model, stock.processor, method, "processor does not match")
    refuses(stock.model, subject.processor, method, "processor does not match")


@holds("what cannot be is refused", of_stock=False)
def test_refused(subject):
    model, processor, settings = subject.model, subject.processor, subject.case.method
    family, config = subject.family, subject.model.config
    refuses(model, processor, subject.method, "already compressed after layer")
    layers = family.encoder_kind(config).num_layers(family.vision_config(config))
    past = laco.AveragePool(**{**settings, "layer": layers + 1})
    refuses(model, processor, past, f"layer {layers + 1} is past the end")
    if not subject.case.any_factor:
        stock = subject.stock()
        odd = laco.AveragePool(**{**settings, "layer": 1, "factor": 7, "odd": "error"})
        refuses(stock.model, stock.processor, odd, "factor 7")
