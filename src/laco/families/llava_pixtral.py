"""LLaVA with Pixtral as its vision encoder: pictures of any size, and a token behind every row of theirs.

Model and processor count placeholder tokens by `patch_size` alone, so nothing but the encoder changes; the
processor also resizes pictures to whole effective patches. The projector gets tokens without their grids, so no
merger can take its place.
"""

from typing import Any

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from laco.families.base import Family
from laco.families.encoders.pixtral import PIXTRAL


class PixtralFamily(Family):
    """What follows from Pixtral's processor."""

    holds = "pictures of any size, several pictures, batches"
    encoders = (PIXTRAL,)

    def merged_side(self, config: Any) -> int:
        """Side of the windows that the family's own projector merges."""
        return 1

    def processor_numbers(self, config: Any) -> dict[str, Any]:
        return {"patch_size": config.vision_config.patch_size, "spatial_merge_size": self.merged_side(config)}

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        return {}


class LlavaPixtral(PixtralFamily):
    name = "llava_pixtral"
    stock = LlavaForConditionalGeneration
    stock_model = LlavaModel
    stock_config = LlavaConfig

    def owns(self, model: nn.Module) -> bool:
        return super().owns(model) and self.owns_config(model.config)

    def owns_config(self, config: Any) -> bool:
        return super().owns_config(config) and PIXTRAL.owns(config.vision_config)
