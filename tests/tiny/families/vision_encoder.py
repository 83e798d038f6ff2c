"""Vision encoders alone, out of the tiny models of other families. `CASES`, which are whole models, is empty here."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel
from transformers.image_processing_utils import BaseImageProcessor

import laco
import tiny
from laco.families import FAMILIES, family_of
from tiny.case import Case
from tiny.families.llava_aimv2 import REGISTERS
from tiny.parts import awake, picture

CASES: list[Case] = []

NAMES = [encoder.name for family in FAMILIES if family.name == "vision_encoder" for encoder in family.encoders]
PROMPT = ("look at <image> now", [picture(1, 50, 120)])


@dataclass
class Tower:
    """An encoder, the image processor of its model, and what a tiny model around it would give it.

    `whole` is such a model with its processor, None where there is none.
    """

    encoder: PreTrainedModel
    pictures: BaseImageProcessor
    inputs: Callable[..., dict[str, Any]]
    whole: tuple[PreTrainedModel, Any] | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    cannot: Mapping[str, str] = field(default_factory=dict)


def tower(name: str) -> Tower:
    """A new stock encoder by name. Its `inputs` are for it compressed by the method that they are given."""
    return deepcopy(built(name))


@cache
def built(name: str) -> Tower:
    if name == "siglip2":
        return siglip2()
    found = next((case for case in tiny.CASES.values() if case.name.endswith(f"-{name}")), REGISTERS)
    assert found.name.endswith(f"-{name}"), f"no tiny model has the encoder {name}"
    model, processor = found.build()

    def inputs(method: laco.methods.Method | None = None) -> dict[str, Any]:
        whole, counting = deepcopy((model, processor))
        if method is not None:
            laco.compress(whole, counting, method)
        return found.tower_inputs(whole, found.inputs(counting, PROMPT))

    encoder = deepcopy(family_of(model).encoder(model))
    pictures = deepcopy(processor.image_processor)
    return Tower(encoder, pictures, inputs, (model, processor), found.method, found.cannot)


def siglip2() -> Tower:
    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        patch_size=8,
        num_patches=36,
    )
    pictures = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=36)

    def inputs(method: laco.methods.Method | None = None) -> dict[str, Any]:
        return dict(pictures(images=[*PROMPT[1], picture(2)], return_tensors="pt"))

    return Tower(awake(Siglip2VisionModel(config)), pictures, inputs)
