"""LLaVA 1.5 and everything in its architecture: one square picture after another, no tiles.

Model and processor count placeholder tokens by `patch_size`, so nothing but the encoder changes where they are merged.
Where single tokens leave, the processor's `num_additional_image_tokens` says how many are left.
"""

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, PreTrainedConfig

from laco.families.base import Family
from laco.families.connector import ConnectorForConditionalGeneration, ConnectorModel
from laco.families.encoders import AIMV2, CLIP, DINOV2, SIGLIP
from laco.families.reduction import ReducedConfig, ReducedForConditionalGeneration, ReducedModel
from laco.families.reduction.pictures import Pictures
from laco.grid import Grid


class LacoLlavaConfig(ReducedConfig, LlavaConfig):
    model_type = "laco_llava"


class LacoLlavaModel(ReducedModel, ConnectorModel, LlavaModel):
    config: LacoLlavaConfig
    pictures = Pictures()


class LacoLlavaForConditionalGeneration(
    ReducedForConditionalGeneration, ConnectorForConditionalGeneration, LlavaForConditionalGeneration
):
    config: LacoLlavaConfig
    model_class = LacoLlavaModel


class Llava(Family):
    name = "llava"
    holds = "several pictures, batches"
    stock = LlavaForConditionalGeneration
    stock_model = LlavaModel
    stock_config = LlavaConfig
    compressed = LacoLlavaForConditionalGeneration
    compressed_model = LacoLlavaModel
    compressed_config = LacoLlavaConfig
    encoders = (SIGLIP, CLIP, AIMV2, DINOV2)
    connects = True
    one_grid = True

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        # Read with the prefix tokens unless the strategy is to drop (one of) them.
        prefix = self.prefix(config)
        return grid.tokens + prefix - (config.vision_feature_select_strategy == "default")

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        tokens = self.visual_tokens(config, self.grid(config))
        return {
            "patch_size": config.vision_config.patch_size,
            # Below 0 where a method leaves fewer tokens than the grid has.
            "num_additional_image_tokens": self.prefix(config) + self.counts(config).placeholders(tokens) - tokens,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
