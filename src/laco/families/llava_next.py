"""LLaVA-NeXT (LLaVA 1.6): a small whole picture and its tiles, with `image_newline` and unpadding.

Model and processor count placeholder tokens by `patch_size` alone, so nothing but the encoder changes.
"""

from typing import Any

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel, PreTrainedConfig

from laco.families.base import Family
from laco.families.connector import ConnectorForConditionalGeneration, ConnectorModel
from laco.families.encoders import CLIP, SIGLIP


class LacoLlavaNextConfig(LlavaNextConfig):
    model_type = "laco_llava_next"


class LacoLlavaNextModel(ConnectorModel, LlavaNextModel):
    config: LacoLlavaNextConfig


class LacoLlavaNextForConditionalGeneration(ConnectorForConditionalGeneration, LlavaNextForConditionalGeneration):
    config: LacoLlavaNextConfig
    model_class = LacoLlavaNextModel


class LlavaNext(Family):
    name = "llava_next"
    holds = "tiles of any resolution, several pictures, batches"
    stock = LlavaNextForConditionalGeneration
    stock_model = LlavaNextModel
    stock_config = LlavaNextConfig
    compressed = LacoLlavaNextForConditionalGeneration
    compressed_model = LacoLlavaNextModel
    compressed_config = LacoLlavaNextConfig
    encoders = (CLIP, SIGLIP)
    connects = True

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": self.prefix(config),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        sizes = getattr(processor.image_processor, "image_grid_pinpoints", []), config.image_grid_pinpoints
        found, wanted = ([list(size) for size in part] for part in sizes)
        return {**super().picture_numbers(processor, config), "image_grid_pinpoints": (found, wanted)}
