"""Gemma 3: one square picture size (and crops of it by pan and scan), a projector that averages p x p tokens.

What compression means here: the projector keeps its window p, so the language model reads 1/r^2 of the tokens
as in every other family, and `mm_tokens_per_image`, from which the stock classes derive p, follows the grid.
It is the only number outside of the encoder that changes, and p and the grid give the original one again.

Classes of our own, because the stock configuration of older transformers (5.19) names its vision configuration.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Model,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.encoders.siglip import SIGLIP, LacoSiglipVisionConfig
from laco.families.steps import Step
from laco.grid import Grid


class LacoGemma3Config(Gemma3Config):
    model_type = "laco_gemma3"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = LacoSiglipVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class LacoGemma3Model(Gemma3Model):
    config: LacoGemma3Config


class LacoGemma3ForConditionalGeneration(Gemma3ForConditionalGeneration):
    config: LacoGemma3Config

    def __init__(self, config: LacoGemma3Config):
        super().__init__(config)
        self.model.__class__ = LacoGemma3Model  # which adds nothing to the class that the stock constructor names


class Gemma3(Family):
    name = "gemma3"
    holds = "several pictures, batches, pan and scan"
    packs = False  # tokens of a picture see one another
    stock = Gemma3ForConditionalGeneration
    stock_model = Gemma3Model
    stock_config = Gemma3Config
    compressed = LacoGemma3ForConditionalGeneration
    compressed_model = LacoGemma3Model
    compressed_config = LacoGemma3Config
    encoders = (SIGLIP,)

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        return bool(steps)

    def pooled(self, config: Any) -> int:
        """Side p of the windows that the projector averages, derived as the stock projector does."""
        side, tokens = self.grid(config).height, config.mm_tokens_per_image
        pooled = side // math.isqrt(tokens)
        if not pooled or (side // pooled) ** 2 != tokens:
            raise LacoError(
                f"gemma3: mm_tokens_per_image is {tokens}, which no average pooling of {side} x {side} visual tokens"
                " gives; correct the configuration first"
            )
        return pooled

    def check_steps(self, config: Any, steps: Sequence[Step], read: int | list[int] | None = None) -> None:
        super().check_steps(config, steps, read)
        pooled, grid = self.pooled(config), self.own_grid(config)
        for step in steps:
            grid = step.merger.num_tokens(grid)
        if steps and grid.height % pooled:
            raise LacoError(
                f"gemma3: the projector averages {pooled} x {pooled} visual tokens and would cut off a part of the"
                f" {grid.height} x {grid.width} that remain; choose a factor and an odd rule that leave a multiple"
                f" of {pooled}"
            )

    def with_steps(self, config: Any, steps: Sequence[Step]) -> Any:
        new = super().with_steps(config, steps)
        new.mm_tokens_per_image = (self.grid(new).height // self.pooled(config)) ** 2
        return new

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        pooled = self.pooled(model.config)
        super().set_encoder(model, encoder)
        side = self.grid(model.config).height
        model.config.mm_tokens_per_image = (side // pooled) ** 2
        projector: Any = self.projector(model)
        projector.patches_per_image, projector.tokens_per_side = side, side // pooled

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        return (grid.height // self.pooled(config)) ** 2

    def projections(self, config: Any) -> list[tuple[int, int]]:
        return [self.widths(config)]

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"image_seq_length": config.mm_tokens_per_image}

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        words = processor.tokenizer
        placeholder, sequence = getattr(words, "image_token", None), getattr(processor, "full_image_sequence", "")
        return {
            **super().picture_numbers(processor, config),
            # The processor's own `image_token_id` is the token that begins a picture.
            "image_token_id": (getattr(words, "image_token_id", None), config.image_token_id),
            "the number of tokens in full_image_sequence": (
                sequence.count(placeholder or "<image>"),
                config.mm_tokens_per_image,
            ),
        }

    def set_processor(self, processor: Any, config: PreTrainedConfig) -> None:
        super().set_processor(processor, config)
        words = processor.tokenizer
        tokens = words.image_token * processor.image_seq_length
        processor.full_image_sequence = f"\n\n{words.boi_token}{tokens}{words.eoi_token}\n\n"
