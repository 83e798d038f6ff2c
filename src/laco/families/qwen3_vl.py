"""Qwen3-VL: pictures of any size and videos, at positions in three dimensions (M-RoPE).

Frames of videos are pictures, each behind its timestamp.
"""

from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLProcessor

from laco.families.counts import counting
from laco.families.encoders.qwen3_vl import QWEN3_VL, LacoQwen3VLVisionConfig
from laco.families.qwen import QwenConfig, QwenForConditionalGeneration, QwenModel, QwenVL
from laco.methods import DecoderMethod, Method


class LacoQwen3VLConfig(QwenConfig, Qwen3VLConfig):
    model_type = "laco_qwen3_vl"
    vision_class = LacoQwen3VLVisionConfig


class LacoQwen3VLModel(QwenModel, Qwen3VLModel):
    config: LacoQwen3VLConfig


class LacoQwen3VLForConditionalGeneration(QwenForConditionalGeneration, Qwen3VLForConditionalGeneration):
    config: LacoQwen3VLConfig
    model_class = LacoQwen3VLModel


class Qwen3VL(QwenVL):
    name = "qwen3_vl"
    stock = Qwen3VLForConditionalGeneration
    stock_model = Qwen3VLModel
    stock_config = Qwen3VLConfig
    compressed = LacoQwen3VLForConditionalGeneration
    compressed_model = LacoQwen3VLModel
    compressed_config = LacoQwen3VLConfig
    encoders = (QWEN3_VL,)
    behind_video = None  # every frame has placeholders of its own

    def why_not(self, config: Any, method: Method) -> str | None:
        levels = len(config.vision_config.deepstack_visual_indexes)
        if isinstance(method, DecoderMethod):
            first = method.points(config.text_config.num_hidden_layers)[0]
            if first < levels:
                return (
                    f"its language model adds visual features behind each of the first {levels} layers (DeepStack), so"
                    f" tokens may leave after layer {levels} or later; got {first}"
                )
        return super().why_not(config, method)


counting(Qwen3VLProcessor)
