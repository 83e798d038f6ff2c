"""Qwen2.5-VL: pictures of any size and videos, at positions in three dimensions (M-RoPE).

Frames of videos are placed by their seconds.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLProcessor
from transformers.vision_utils import get_vision_window_index

from laco.families.counts import counting
from laco.families.encoders.qwen2_5_vl import QWEN2_5_VL, LacoQwen2_5_VLVisionConfig
from laco.families.qwen import PackedPictures, QwenConfig, QwenForConditionalGeneration, QwenModel, QwenVL


class LacoQwen2_5_VLConfig(QwenConfig, Qwen2_5_VLConfig):
    model_type = "laco_qwen2_5_vl"
    vision_class = LacoQwen2_5_VLVisionConfig


class WindowedPictures(PackedPictures):
    def window_order(self, body: Any, inputs: Mapping[str, Any], video: bool) -> Tensor:
        config = body.visual.config
        grids = inputs["video_grid_thw" if video else "image_grid_thw"]
        return get_vision_window_index(
            grids, body.visual.spatial_merge_size, config.window_size, config.patch_size, kwargs={}
        )[0]


class LacoQwen2_5_VLModel(QwenModel, Qwen2_5_VLModel):
    config: LacoQwen2_5_VLConfig
    pictures = WindowedPictures()


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


counting(Qwen2_5_VLProcessor)
