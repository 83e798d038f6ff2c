"""LLaVA 1.5 and everything in its architecture: one square picture after another, no tiles.

Model and processor count placeholder tokens by `patch_size` alone, so nothing but the encoder changes.
"""

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, PreTrainedConfig

from laco.families.base import Family
from laco.families.connector import ConnectorForConditionalGeneration, ConnectorModel


class LacoLlavaConfig(LlavaConfig):
    model_type = "laco_llava"


class LacoLlavaModel(ConnectorModel, LlavaModel):
    config: LacoLlavaConfig


class LacoLlavaForConditionalGeneration(ConnectorForConditionalGeneration, LlavaForConditionalGeneration):
    config: LacoLlavaConfig
    model_class = LacoLlavaModel


class Llava(Family):
    name = "llava"
    holds = "several pictures, batches"
    stock = LlavaForConditionalGeneration
    stock_model = LlavaModel
    stock_config = LlavaConfig
    connected = LacoLlavaForConditionalGeneration
    connected_config = LacoLlavaConfig

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": self.prefix(config),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
