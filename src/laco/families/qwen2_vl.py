"""Qwen2-VL: pictures of any size and videos, at positions in three dimensions (M-RoPE)."""

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel, Qwen2VLProcessor

from laco.families.counts import counting
from laco.families.encoders.qwen2_vl import QWEN2_VL, LacoQwen2VLVisionConfig
from laco.families.qwen import QwenConfig, QwenForConditionalGeneration, QwenModel, QwenVL


class LacoQwen2VLConfig(QwenConfig, Qwen2VLConfig):
    model_type = "laco_qwen2_vl"
    vision_class = LacoQwen2VLVisionConfig


class LacoQwen2VLModel(QwenModel, Qwen2VLModel):
    config: LacoQwen2VLConfig


class LacoQwen2VLForConditionalGeneration(QwenForConditionalGeneration, Qwen2VLForConditionalGeneration):
    config: LacoQwen2VLConfig
    model_class = LacoQwen2VLModel


class Qwen2VL(QwenVL):
    name = "qwen2_vl"
    stock = Qwen2VLForConditionalGeneration
    stock_model = Qwen2VLModel
    stock_config = Qwen2VLConfig
    compressed = LacoQwen2VLForConditionalGeneration
    compressed_model = LacoQwen2VLModel
    compressed_config = LacoQwen2VLConfig
    encoders = (QWEN2_VL,)


counting(Qwen2VLProcessor)
