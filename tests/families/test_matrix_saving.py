"""In and out"""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import laco
from families.matrix import ONE, Subject, holds, identity
from laco.families import family_of


def equal(one: Subject, other: Subject) -> None:
    batch, again = one.inputs(*one.prompts), other.inputs(*one.prompts)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert torch.equal(one.logits(batch), other.logits(again))


@holds("Auto classes load what was saved", places=("inside", "external", "map"))
def test_auto_classes(subject, tmp_path):
    subject.model.save_pretrained(tmp_path)
    subject.processor.save_pretrained(tmp_path)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is type(subject.model)
    assert family_of(model).steps(model.config) == subject.family.steps(subject.model.config)
    equal(subject, Subject(subject.case, subject.place, model, AutoProcessor.from_pretrained(tmp_path)))


@holds("stock checkpoints load, only the compressor is new", of_stock=False)
@pytest.mark.parametrize("keys", ["as saved", "as in the model"])  # transformers writes old names where it has them
def test_stock_checkpoint(subject, keys, tmp_path, monkeypatch):
    model, stock = subject.model, subject.stock().model
    stock.save_pretrained(tmp_path)
    if keys == "as in the model":
        tensors = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (compressor,) = subject.family.compressors(model).values()

    def fill(self):
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, 0.5)

    monkeypatch.setattr(type(compressor), "reset_parameters", fill)
    again, info = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    mine, theirs = model.state_dict().keys(), stock.state_dict().keys()
    assert info["missing_keys"] == {key for key in mine if ".compressor." in key} == mine - theirs
    assert info["unexpected_keys"] == theirs - mine
    assert not info["mismatched_keys"]
    (found,) = subject.family.compressors(again).values()
    assert all(bool((parameter == 0.5).all()) for parameter in found.parameters())
    kept = again.state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in stock.state_dict().items() if key in kept)


@holds("compressors saved alone", of_stock=False)
def test_adapter(subject, tmp_path):
    laco.save_compressor(subject.model, tmp_path / "compressor")
    fresh = subject.stock()
    laco.load_compressor(fresh.model, fresh.processor, tmp_path / "compressor")
    equal(subject, fresh)


@holds("decompressing is exact", of_stock=False)
def test_decompress(subject):
    stock = subject.stock()
    before, logits = identity(stock.model, stock.processor), stock.logits(stock.inputs(*stock.prompts))
    laco.compress(stock.model, stock.processor, subject.method)
    assert stock.inputs(ONE)["input_ids"].shape[1] < subject.stock().inputs(ONE)["input_ids"].shape[1]
    stock.logits(stock.inputs(*stock.prompts))
    laco.decompress(stock.model, stock.processor)
    for part, after in identity(stock.model, stock.processor).items():
        assert after == before[part], part
    assert torch.equal(stock.logits(stock.inputs(*stock.prompts)), logits)
