"""Llama 4: square tiles of one size, separated by tokens of their own, and a thumbnail; several pictures.

The adapter at the end of the encoder joins `1 / pixel_shuffle_ratio` neighbours in both directions, finding the grid as
the root of the number of tokens; mergers stand before it. The processor counts by `patch_size`.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Llama4Config, Llama4ForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.encoders.llama4 import LLAMA4, LacoLlama4VisionConfig, LacoLlama4VisionModel
from laco.families.steps import Step
from laco.grid import Grid


class LacoLlama4Config(Llama4Config):
    model_type = "laco_llama4"

    def __post_init__(self, **kwargs: Any) -> None:
        # The stock class makes its own encoder of a dictionary, whatever `model_type` that has.
        if isinstance(self.vision_config, dict):
            self.vision_config = LacoLlama4VisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class LacoLlama4ForConditionalGeneration(Llama4ForConditionalGeneration):
    config: LacoLlama4Config

    def __init__(self, config: Any):
        super().__init__(config)  # which names the class of its encoder
        self.vision_model = LacoLlama4VisionModel(config.vision_config)
        self.post_init()


class Llama4(Family):
    name = "llama4"
    holds = "tiles with a thumbnail, several pictures, batches"
    packs = False  # attention in chunks of positions
    stock = stock_model = Llama4ForConditionalGeneration
    stock_config = Llama4Config
    compressed = compressed_model = LacoLlama4ForConditionalGeneration
    compressed_config = LacoLlama4Config
    encoders = (LLAMA4,)
    encoder_at = "vision_model"
    projector_at = "multi_modal_projector"

    def body(self, model: PreTrainedModel) -> nn.Module:
        return model

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        return bool(steps)

    def check_steps(self, config: Any, steps: Sequence[Step], read: int | list[int] | None = None) -> None:
        super().check_steps(config, steps, read)
        grid, side = self.own_grid(config), shuffled_side(config)
        for step in steps:
            grid = step.merger.num_tokens(grid)
        if grid.height % side:
            raise LacoError(
                f"llama4's adapter joins {side} x {side} tokens, which do not divide the {grid.height} x"
                f" {grid.width} that would remain; choose another factor or odd rule"
            )

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        return grid.tokens // shuffled_side(config) ** 2

    def projections(self, config: Any) -> list[tuple[int, int]]:
        vision = config.vision_config
        adapter = [
            (vision.intermediate_size, vision.projector_input_dim),
            (vision.projector_output_dim, vision.projector_output_dim),
        ]
        return [*adapter, (vision.vision_output_dim, config.text_config.hidden_size)]

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"patch_size": config.vision_config.patch_size, "downsample_ratio": shuffled_side(config) ** 2}

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        # The processor's own `image_token_id` is the token that announces the thumbnail.
        placeholder = processor.tokenizer.convert_tokens_to_ids(processor.img_patch_token)
        return super().picture_numbers(processor, config) | {"image_token_id": (placeholder, config.image_token_id)}


def shuffled_side(config: Any) -> int:
    """Side of the windows that the adapter joins."""
    return round(1 / config.vision_config.pixel_shuffle_ratio)
