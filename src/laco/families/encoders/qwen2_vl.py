"""Qwen2-VL's encoder: full attention within each frame, two-dimensional rotary positions."""

from typing import Any

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionBlock

from laco.families.encoders.qwen import (
    PackedLayer,
    PackedMergingLayer,
    PackedVisionConfig,
    PackedVisionModel,
    QwenEncoder,
)


class LacoQwen2VLVisionConfig(PackedVisionConfig, Qwen2VLVisionConfig):
    model_type = "laco_qwen2_vl_vision"


class LacoQwen2VLVisionBlock(PackedLayer, Qwen2VLVisionBlock):
    pass


class LacoQwen2VLMergingBlock(PackedMergingLayer, Qwen2VLVisionBlock):
    @staticmethod
    def width_of(config: Any) -> int:
        return config.embed_dim  # `hidden_size` is that of the language model


class LacoQwen2VisionTransformer(PackedVisionModel, Qwen2VisionTransformerPretrainedModel):
    config: LacoQwen2VLVisionConfig
    layer_class = LacoQwen2VLMergingBlock
    plain_class = LacoQwen2VLVisionBlock
    _no_split_modules = ["LacoQwen2VLVisionBlock", "LacoQwen2VLMergingBlock"]  # noqa: RUF012


class Qwen2VLEncoder(QwenEncoder):
    def mlp(self, config: Any) -> tuple[int, bool]:
        return int(config.embed_dim * config.mlp_ratio), False


QWEN2_VL = Qwen2VLEncoder(
    "qwen2_vl",
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLVisionConfig,
    LacoQwen2VisionTransformer,
    LacoQwen2VLVisionConfig,
)
