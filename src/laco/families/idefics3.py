"""Idefics 3: a picture is split into tiles of one square size, and seen as a whole in one more.

Its connector joins `scale_factor` x `scale_factor` neighbours (pixel shuffle), taking the root of the number of
tokens for the side of their grid; mergers stand before it. The processor counts a tile as `image_seq_len`. The
model cuts the mask of pixels into patches by the encoder's `patch_size`, which therefore stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.encoders import encoder_of
from laco.families.encoders.idefics3 import IDEFICS3, LacoIdefics3VisionConfig, LacoIdefics3VisionTransformer
from laco.families.reduction import ReducedConfig, ReducedForConditionalGeneration, ReducedModel
from laco.families.reduction.pictures import Pictures, pooled
from laco.families.steps import Step
from laco.grid import Grid
from laco.methods import Merger


def as_config(kind: type[PreTrainedConfig], given: Any) -> PreTrainedConfig:
    """A part's configuration. The stock class would make its own of any dictionary, whatever `model_type` it has."""
    return given if isinstance(given, PreTrainedConfig) else kind(**(given or {}))


class ShuffledTiles(Pictures):
    """Every tile, overview or frame is a picture by itself, whose tokens the connector joins."""

    by_token = False

    def encoder(self, body: Any) -> Any:
        return body.vision_model

    def language_model(self, body: Any) -> Any:
        return body.text_model

    def tokens(self, body: Any, features: Any) -> list[Tensor]:
        config = body.config  # the model's own are those of all tiles of a sample
        grid = encoder_of(config.vision_config).grid(config.vision_config)
        size = grid.tokens // config.scale_factor**2
        return list(torch.cat([rows.flatten(0, -2) for rows in features]).split(size))

    def gathered(self, body: Any, x_TNC: Tensor, inputs: Mapping[str, Any], video: bool) -> list[Tensor]:
        return list(pooled(x_TNC, body.config.scale_factor))


class TiledModel(ReducedModel):
    """Mixin of a model with a compressed encoder; the stock constructor builds its own."""

    encoder_class: ClassVar[type[PreTrainedModel]]
    pictures = ShuffledTiles()

    def __init__(self, config: Any):
        super().__init__(config)
        self.build_encoder()
        self.post_init()

    def build_encoder(self) -> None:
        self.vision_model = self.encoder_class._from_config(self.config.vision_config)


class TiledForConditionalGeneration(ReducedForConditionalGeneration):
    """Mixin of such a model with its language-model head; the stock constructor builds the stock model."""

    model_class: ClassVar[type[TiledModel]]

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.build_encoder()
        self.model.extend_language_model()
        self.post_init()


class LacoIdefics3Config(ReducedConfig, Idefics3Config):
    model_type = "laco_idefics3"

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = as_config(LacoIdefics3VisionConfig, self.vision_config)
        super().__post_init__(**kwargs)


class LacoIdefics3Model(TiledModel, Idefics3Model):
    config: LacoIdefics3Config
    encoder_class = LacoIdefics3VisionTransformer


class LacoIdefics3ForConditionalGeneration(TiledForConditionalGeneration, Idefics3ForConditionalGeneration):
    config: LacoIdefics3Config
    model_class = LacoIdefics3Model


class TiledFamily(Family):
    """What Idefics 3 and SmolVLM have in common: all but their classes."""

    encoder_at = "model.vision_model"
    projector_at = "model.connector"

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        return bool(steps)

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return self.body(model).text_model

    def check_steps(self, config: Any, steps: Sequence[Step], read: int | list[int] | None = None) -> None:
        super().check_steps(config, steps, read)
        before = grid = self.own_grid(config)
        for step in steps:
            before, grid = grid, step.merger.num_tokens(grid)
        if steps and grid.height % config.scale_factor:
            scale, side = config.scale_factor, grid.height
            raise LacoError(
                f"the connector of {self.name} joins {scale} x {scale} visual tokens, which do not divide the"
                f" {side} x {side} that would remain; {advice(steps[-1].merger, before.height, scale)}"
            )

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        return grid.tokens // config.scale_factor**2

    def projections(self, config: Any) -> list[tuple[int, int]]:
        width, text_width = self.widths(config)
        return [(width * config.scale_factor**2, text_width)]

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        tokens = self.visual_tokens(config, self.grid(config))
        return {"image_seq_len": self.counts(config).placeholders(tokens)}

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        wanted = self.vision_config(config).image_size
        makers = [name for name in ("image_processor", "video_processor") if getattr(processor, name, None)]
        return {
            f"max_image_size of the {name}": (getattr(processor, name).max_image_size["longest_edge"], wanted)
            for name in makers
        }


def advice(merger: Merger, side: int, scale: int, most: int = 3) -> str:
    """What to use instead of a merger on a `side` x `side` grid, so that `scale` divides what remains."""
    works: dict[str, None] = {}
    for factor in sorted(range(2, side + 1), key=lambda factor: (abs(factor - merger.factor), factor)):
        for odd, remain in (("pad", -(-side // factor)), ("crop", side // factor)):
            if remain % scale == 0:
                rule = f' with odd="{odd}"' if side % factor else ""
                works[f"factor {factor}{rule}"] = None
    return f"use {' or '.join([*works][:most])}" if works else f"no factor leaves a multiple of {scale}"


class Idefics3(TiledFamily):
    name = "idefics3"
    holds = "tiles with the whole picture, several pictures, batches"
    stock = Idefics3ForConditionalGeneration
    stock_model = Idefics3Model
    stock_config = Idefics3Config
    compressed = LacoIdefics3ForConditionalGeneration
    compressed_model = LacoIdefics3Model
    compressed_config = LacoIdefics3Config
    encoders = (IDEFICS3,)
