"""InternVL: tiles with a thumbnail, several pictures, videos whose frames are pictures.

Its projector joins `1 / downsample_ratio` neighbours in both directions (pixel shuffle), finding the grid as the
root of the number of tokens; mergers stand before it. The processor counts a tile or frame as `image_seq_length`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.encoders.base import Size
from laco.families.encoders.internvit import INTERNVIT, LacoInternVLVisionConfig
from laco.families.reduction import ReducedConfig, ReducedForConditionalGeneration, ReducedModel
from laco.families.reduction.pictures import Pictures, pooled
from laco.families.steps import Step
from laco.grid import Grid


class LacoInternVLConfig(ReducedConfig, InternVLConfig):
    model_type = "laco_internvl"

    def __post_init__(self, **kwargs: Any) -> None:
        # The stock class makes its own encoder of a dictionary, whatever `model_type` that has.
        if isinstance(self.vision_config, dict):
            self.vision_config = LacoInternVLVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class ShuffledPictures(Pictures):
    """Every tile or frame is a picture by itself, whose tokens the projector joins, `factor` x `factor`."""

    by_token = False

    def gathered(self, body: Any, x_TNC: Tensor, inputs: Mapping[str, Any], video: bool) -> list[Tensor]:
        return list(pooled(x_TNC, shuffled_side(body.config)))


class LacoInternVLModel(ReducedModel, InternVLModel):
    config: LacoInternVLConfig
    pictures = ShuffledPictures()


class LacoInternVLForConditionalGeneration(ReducedForConditionalGeneration, InternVLForConditionalGeneration):
    config: LacoInternVLConfig

    def __init__(self, config: LacoInternVLConfig):
        super().__init__(config)
        self.model.__class__ = LacoInternVLModel  # the stock constructor names another
        self.model.extend_language_model()


class InternVL(Family):
    name = "internvl"
    holds = (
        "tiles with a thumbnail, several pictures, batches, videos (its processor wants them of one length in a batch)"
    )
    stock = InternVLForConditionalGeneration
    stock_model = InternVLModel
    stock_config = InternVLConfig
    compressed = LacoInternVLForConditionalGeneration
    compressed_model = LacoInternVLModel
    compressed_config = LacoInternVLConfig
    encoders = (INTERNVIT,)

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        return bool(steps)

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        # The configuration repeats the processor's number. Nothing reads it, so it may have been wrong before.
        config = model.config
        followed = config.image_seq_length == self.visual_tokens(config, self.grid(config))
        super().set_encoder(model, encoder)
        if followed:
            config.image_seq_length = self.visual_tokens(config, self.grid(config))

    def check_steps(self, config: Any, steps: Sequence[Step], read: int | list[int] | None = None) -> None:
        super().check_steps(config, steps, read)
        grid = self.own_grid(config)
        for step in steps:
            grid = step.merger.num_tokens(grid)
        self.visual_tokens(config, grid)  # raises where the projector cannot join them

    # Of a tile, whatever the size of the picture.

    def own_grid(self, config: PreTrainedConfig, size: Size | None = None) -> Grid:
        return super().own_grid(config)

    def grid(self, config: PreTrainedConfig, size: Size | None = None) -> Grid:
        return super().grid(config)

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        side = shuffled_side(config)
        if grid.height % side or grid.width % side:
            raise LacoError(
                f"internvl's projector joins {side} x {side} tokens, which do not divide the {grid.height} x"
                f" {grid.width} of its encoder; choose another factor or odd rule"
            )
        return grid.tokens // side**2

    def projections(self, config: Any) -> list[tuple[int, int]]:
        width, text_width = self.widths(config)
        return [(width * shuffled_side(config) ** 2, text_width), (text_width, text_width)]

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        tokens = self.visual_tokens(config, self.grid(config))
        return {"image_seq_length": self.counts(config).placeholders(tokens)}


def shuffled_side(config: Any) -> int:
    """Side of the windows that the projector joins, by the rule of its own constructor."""
    return int(1 / config.downsample_ratio)
