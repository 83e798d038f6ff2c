"""SmolVLM 2: Idefics 3 in other sizes, and videos, whose frames are pictures of one tile.

The first SmolVLM checkpoints are Idefics 3 by their configuration.
"""

from typing import Any

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMModel

from laco.families.encoders.idefics3 import SMOLVLM, LacoSmolVLMVisionConfig, LacoSmolVLMVisionTransformer
from laco.families.idefics3 import TiledFamily, TiledForConditionalGeneration, TiledModel, as_config
from laco.families.reduction import ReducedConfig


class LacoSmolVLMConfig(ReducedConfig, SmolVLMConfig):
    model_type = "laco_smolvlm"

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = as_config(LacoSmolVLMVisionConfig, self.vision_config)
        super().__post_init__(**kwargs)


class LacoSmolVLMModel(TiledModel, SmolVLMModel):
    config: LacoSmolVLMConfig
    encoder_class = LacoSmolVLMVisionTransformer


class LacoSmolVLMForConditionalGeneration(TiledForConditionalGeneration, SmolVLMForConditionalGeneration):
    config: LacoSmolVLMConfig
    model_class = LacoSmolVLMModel


class SmolVLM(TiledFamily):
    name = "smolvlm"
    holds = "tiles with the whole picture, several pictures, batches, videos"
    stock = SmolVLMForConditionalGeneration
    stock_model = SmolVLMModel
    stock_config = SmolVLMConfig
    compressed = LacoSmolVLMForConditionalGeneration
    compressed_model = LacoSmolVLMModel
    compressed_config = LacoSmolVLMConfig
    encoders = (SMOLVLM,)
