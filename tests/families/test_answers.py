"""Answers that are read with the prompt, in training: methods look at questions, not at what has seen an answer."""

from copy import deepcopy
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

import laco
import tiny
from families.test_glimpse_prune import deep
from families.test_question_selectors import left_of
from laco.families.reduction.prompt import ANSWERS, Prompt, prompt_of, within

NAME = "llava-siglip"


def compressed(method: Any) -> Any:
    torch.manual_seed(1)
    return laco.compress(*deepcopy(deep(NAME)), method)


def packed(processor: Any) -> dict[str, Tensor]:
    """Two questions about a picture in one sequence, with answers, and a newline behind each, that no one says."""
    batch = tiny.CASES[NAME].inputs(processor, ("w <image>", [tiny.picture(1, 50, 120)]))
    picture = batch["input_ids"][0]
    ids, labels, blocks, places = [picture], [picture * 0 - 100], [picture * 0], [torch.arange(len(picture))]
    for number, (question, answer) in enumerate((("is it red?", "yes"), ("how many are there?", "two")), start=1):
        parts = [processor.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (question, answer, "\n")]
        said = torch.cat([parts[0] * 0, parts[1] * 0 + 1, parts[2] * 0]).bool()
        ids.append(torch.cat(parts))
        labels.append(ids[-1].where(said, -100))
        blocks.append(torch.full_like(ids[-1], number))
        places.append(torch.arange(len(ids[-1])) + len(picture))
    block_L = torch.cat(blocks)
    shared_LL = (block_L == 0) | (block_L == block_L[:, None])
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(places)[None],
        "attention_mask": (torch.ones_like(shared_LL).tril() & shared_LL)[None, None],
        "pixel_values": batch["pixel_values"],
    }


def prompt_with(model: Any, batch: dict[str, Tensor], mask: Tensor | None) -> Prompt:
    with within(ANSWERS, batch["labels"]):
        return prompt_of(model.base_model, batch["input_ids"], mask)


def test_which_text_is_looked_at():
    """Of packed questions all; else up to the first answer, as what follows has seen it."""
    model, processor = compressed(laco.FlexSelect(keep=0.3))
    batch = packed(processor)
    questions = [
        processor.tokenizer.decode(batch["input_ids"][0, prompt_with(model, batch, mask).text_places(0)])
        for mask in (batch["attention_mask"], torch.zeros(1, 1, 1, 1).where(batch["attention_mask"], -1e9), None)
    ]
    assert questions == ["w is it red?how many are there?"] * 2 + ["w is it red?"]


@pytest.mark.parametrize("method", [laco.FlexSelect(keep=0.3), laco.CDPruner(keep=0.3)], ids=lambda x: x.name)
def test_text_behind_an_answer_changes_nothing(method):
    model, processor = compressed(method)
    batch = {key: x for key, x in packed(processor).items() if key not in ("attention_mask", "position_ids")}
    end = int(batch["labels"][0].ge(0).int().argmax())
    short = {**batch, "input_ids": batch["input_ids"][:, :end], "labels": batch["labels"][:, :end]}
    assert [column for column in left_of(model, batch) if column < end] == left_of(model, short)


@pytest.mark.parametrize(
    "method",
    [laco.methods.PyramidDrop(keep=0.3, layer=2), laco.GlimpsePrune(layer=2, width=16, condition=16)],
    ids=lambda method: method.name,
)
def test_a_method_inside_the_language_model_looks_at_what_the_mask_shows(monkeypatch, method):
    """Of packed questions, the attention of one to the others is none; a token of its own sees all that it is given."""
    model, processor = compressed(method)
    batch = packed(processor)
    seen: list[Any] = []
    plan = type(method).plan
    monkeypatch.setattr(type(method), "plan", lambda self, *given: (seen.append(given[0]), plan(self, *given))[1])
    with torch.no_grad():
        model(**batch)
    (signals,) = seen
    rows = method.queries(signals)
    length = signals.length - signals.trailing
    want = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
    want[:length, :length] = batch["attention_mask"][0, 0, :length, :length]
    for row, attention_HL in zip(rows.tolist(), signals.attention.unbind(dim=1), strict=True):
        assert ((attention_HL > 0) == want[row, : signals.length]).all()


def test_labels_by_place():
    """The prompt ends where answers begin, whichever way they are given."""
    model, processor = compressed(laco.FastV(layer=2, keep=0.3))
    batch = packed(processor)
    names = ("input_ids", "pixel_values")
    by_name = model(**{name: batch[name] for name in names}, labels=batch["labels"])
    stock_names = list(signature(model.forward).parameters)
    given = [batch[name] if name in names else None for name in stock_names[: stock_names.index("labels")]]
    by_place = model(*given, batch["labels"])
    assert torch.equal(by_place.logits, by_name.logits)
    assert by_place.loss == by_name.loss
