"""The matrix: every property of a compressed model, for every family and encoder, inside the encoder and external.

A property is a test function with `@holds`. Where `Case.cannot` names it, the stock model cannot do it either,
and that is what the test checks instead.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

import laco
import tiny
from laco.families import Family, family_of
from laco.methods import Merger
from tiny.case import Case, Prompt

METHODS: dict[str, Callable[..., Merger]] = {
    "inside": lambda **settings: laco.LaCo(depth=1 / 2, shortcut="saliency", **settings),
    # In the place of the projector where the family lets it, else before the family's own.
    "external": lambda **settings: laco.TokenPacker(**settings),
    # Sees the whole map instead of windows.
    "map": lambda **settings: laco.LDPv2(depth=1 / 2, **settings),
}

ONE: Prompt = ("what is <image> here?", [tiny.picture(1, 50, 120)])
TWO: Prompt = ("<image> and <image>", [tiny.picture(2, 90, 40), tiny.picture(3)])
NONE: Prompt = ("no picture", [])
SQUARE: Prompt = ("say <image>", [tiny.picture(4, 48, 48)])


@dataclass
class Subject:
    """A model of a case, compressed at a place or stock, for one test to use up."""

    case: Case
    place: str
    model: PreTrainedModel
    processor: ProcessorMixin

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def method(self) -> Merger:
        return METHODS[self.place](**self.case.method)

    def stock(self) -> "Subject":
        """The model before compressing, a copy of its own."""
        return subject_of(self.case, "stock")

    @property
    def prompts(self) -> list[Prompt]:
        """Unequal ones, as far as the family takes them: pictures of several sizes, two pictures, none."""
        prompts = [ONE, SQUARE]
        if "several_pictures" not in self.case.cannot:
            prompts.insert(1, TWO)
        if "text_only" not in self.case.cannot:
            prompts.insert(2, NONE)
        return prompts

    def inputs(self, *prompts: Prompt) -> BatchFeature:
        return self.case.inputs(self.processor, *prompts)

    def logits(self, batch: BatchFeature) -> Tensor:
        """Of the last token of every prompt."""
        with torch.no_grad():
            return self.model(**batch).logits[:, -1]

    def encoder_inputs(self) -> dict[str, Any]:
        return self.case.tower_inputs(self.model, self.inputs(ONE))


def differ(logits: Tensor, other: Tensor) -> bool:
    return float((logits - other).abs().max()) > 1e-3


def identity(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, Any]:
    """The objects, classes and numbers that a model and its processor consist of."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "tensors": {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "configurations": [type(config) for config in (model.config, model.config.vision_config)],
        "config": deepcopy(model.config.to_dict()),
        "processor": deepcopy(processor.to_dict()),
    }


@cache
def built(name: str, place: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    if place == "stock":
        return tiny.CASES[name].build()
    model, processor = deepcopy(built(name, "stock"))
    torch.manual_seed(0)
    laco.compress(model, processor, METHODS[place](**tiny.CASES[name].method))
    tiny.scramble(model)
    return model, processor


def subject_of(case: Case, place: str) -> Subject:
    return Subject(case, place, *deepcopy(built(case.name, place)))


@dataclass(frozen=True)
class Property:
    """Something that holds for every case, unless the stock model cannot do it either.

    Args:
        name: the test function's, without `test_`; the key of `Case.cannot`.
        title: in docs/families.md.
        theme: first line of the test file's docstring.
        order: file and line.
        applies: for which cases there is such a thing at all.
    """

    name: str
    title: str
    theme: str
    order: tuple[str, int]
    applies: Callable[[Case], bool]


PROPERTIES: dict[str, Property] = {}


def holds(
    title: str,
    places: tuple[str, ...] = ("inside", "external"),
    applies: Callable[[Case], bool] = lambda case: True,
    of_stock: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test function of a `subject` a property, which runs over all cases at these places.

    Args:
        of_stock: the test also says something about a stock model; only then a case may be unable to do it.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        name = body.__name__.removeprefix("test_")
        theme = (sys.modules[body.__module__].__doc__ or "").splitlines()[0]
        code = body.__code__
        PROPERTIES[name] = Property(name, title, theme, (code.co_filename, code.co_firstlineno), applies)

        @wraps(body)
        def test(subject: Subject, **fixtures: Any) -> None:
            if name not in subject.case.cannot:
                body(subject, **fixtures)
                return
            assert of_stock, f"{name} is about compression alone; it has to hold for every family"
            with pytest.raises(Exception) as failure:  # noqa: PT011 - however a stock model fails
                body(subject.stock(), **fixtures)
            assert not isinstance(failure.value, Warning), failure.value

        rows = [(case, place) for case in tiny.CASES.values() if applies(case) for place in places]
        if of_stock:  # what `cannot` relies on: the test itself is right for a stock model
            rows.append((tiny.CASES["llava_onevision-siglip"], "stock"))
        ids = [f"{case.name}-{place}" for case, place in rows]
        return pytest.mark.parametrize("subject", rows, ids=ids, indirect=True)(test)

    return decorate
