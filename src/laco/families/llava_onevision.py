"""LLaVA-OneVision: tiles of any resolution with `image_newline` and unpadding, several pictures, videos.

The model packs tiles and pools frames by `image_size // patch_size`, the processor counts by
`num_image_tokens`.
"""

from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedConfig,
)

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.connector import ConnectorForConditionalGeneration, ConnectorModel
from laco.families.encoders import CLIP, SIGLIP


class LacoLlavaOnevisionConfig(LlavaOnevisionConfig):
    model_type = "laco_llava_onevision"


class LacoLlavaOnevisionModel(ConnectorModel, LlavaOnevisionModel):
    config: LacoLlavaOnevisionConfig


class LacoLlavaOnevisionForConditionalGeneration(
    ConnectorForConditionalGeneration, LlavaOnevisionForConditionalGeneration
):
    config: LacoLlavaOnevisionConfig
    model_class = LacoLlavaOnevisionModel


class LlavaOnevision(Family):
    name = "llava_onevision"
    holds = "tiles of any resolution, several pictures, batches, videos"
    stock = LlavaOnevisionForConditionalGeneration
    stock_model = LlavaOnevisionModel
    stock_config = LlavaOnevisionConfig
    compressed = LacoLlavaOnevisionForConditionalGeneration
    compressed_model = LacoLlavaOnevisionModel
    compressed_config = LacoLlavaOnevisionConfig
    encoders = (SIGLIP, CLIP)
    connects = True

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            # With a prefix token: the processor takes it off again, and the root of g * g + 1 still rounds to
            # g.
            "num_image_tokens": self.grid(config).tokens + self.prefix(config),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }

    def check_processor(self, processor: Any, config: PreTrainedConfig) -> None:
        super().check_processor(processor, config)
        ours = [tuple(size) for size in processor.image_processor.image_grid_pinpoints]
        if ours != [tuple(size) for size in config.image_grid_pinpoints]:
            raise LacoError("the processor does not match the model: their image_grid_pinpoints differ")
