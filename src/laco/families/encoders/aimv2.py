"""AIMv2, the main encoder of the LaCo paper: no prefix token, RMSNorm, a gated MLP, positions before the first layer.

Checkpoints for native resolutions (`is_native`) make positions for square pictures of any size.
"""

from typing import Any

from transformers import Aimv2VisionConfig, Aimv2VisionModel
from transformers.models.aimv2.modeling_aimv2 import Aimv2EncoderLayer

from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer


class LacoAimv2VisionConfig(FixedGridVisionConfig, Aimv2VisionConfig):
    model_type = "laco_aimv2_vision_model"


class LacoAimv2EncoderLayer(MergingLayer, Aimv2EncoderLayer):
    pass


class LacoAimv2VisionModel(FixedGridVisionModel, Aimv2VisionModel):
    config: LacoAimv2VisionConfig
    layer_class = LacoAimv2EncoderLayer
    _no_split_modules = [*Aimv2VisionModel._no_split_modules, "LacoAimv2EncoderLayer"]  # noqa: RUF012


class Aimv2(Encoder):
    def interpolates(self, config: Any) -> bool:
        return config.is_native

    def mlp(self, config: Any) -> tuple[int, bool]:
        return config.intermediate_size, True


AIMV2 = Aimv2("aimv2", Aimv2VisionModel, Aimv2VisionConfig, LacoAimv2VisionModel, LacoAimv2VisionConfig)
