"""Qwen2.5-VL: pictures of any size and videos, at positions in three dimensions (M-RoPE).

Frames of videos are placed by their seconds.
"""

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from laco.families.encoders.qwen2_5_vl import QWEN2_5_VL, LacoQwen2_5_VLVisionConfig
from laco.families.qwen import QwenConfig, QwenForConditionalGeneration, QwenModel, QwenVL


class LacoQwen2_5_VLConfig(QwenConfig, Qwen2_5_VLConfig):
    model_type = "laco_qwen2_5_vl"
    vision_class = LacoQwen2_5_VLVisionConfig


class LacoQwen2_5_VLModel(QwenModel, Qwen2_5_VLModel):
    config: LacoQwen2_5_VLConfig


class LacoQwen2_5_VLForConditionalGeneration(QwenForConditionalGeneration, Qwen2_5_VLForConditionalGeneration):
    config: LacoQwen2_5_VLConfig
    model_class = LacoQwen2_5_VLModel


class Qwen2_5_VL(QwenVL):
    name = "qwen2_5_vl"
    stock = Qwen2_5_VLForConditionalGeneration
    stock_model = Qwen2_5_VLModel
    stock_config = Qwen2_5_VLConfig
    compressed = LacoQwen2_5_VLForConditionalGeneration
    compressed_model = LacoQwen2_5_VLModel
    compressed_config = LacoQwen2_5_VLConfig
    encoders = (QWEN2_5_VL,)
