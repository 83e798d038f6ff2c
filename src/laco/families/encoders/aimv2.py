"""AIMv2, the main encoder of the LaCo paper: no prefix token, RMSNorm, a gated MLP, positions before the first layer.

Checkpoints for native resolutions (`is_native`) make positions for square pictures of any size.
"""

from typing import Any

from transformers import Aimv2VisionConfig, Aimv2VisionModel
from transformers.models.aimv2.modeling_aimv2 import Aimv2EncoderLayer

from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer
from laco.families.encoders.halves import Halves
from laco.families.encoders.reducing import ReducingLayer


class LacoAimv2VisionConfig(FixedGridVisionConfig, Aimv2VisionConfig):
    model_type = "laco_aimv2_vision_model"


class LacoAimv2EncoderLayer(MergingLayer, Aimv2EncoderLayer):
    pass


class LacoAimv2ReducingLayer(ReducingLayer, Aimv2EncoderLayer):
    pass


class LacoAimv2VisionModel(FixedGridVisionModel, Aimv2VisionModel):
    config: LacoAimv2VisionConfig
    layer_class = LacoAimv2EncoderLayer
    reducing_class = LacoAimv2ReducingLayer
    halves = Halves(
        attention="attention",
        norm=("rms_norm1",),
        queries=("attention.q_proj",),
        keys=("attention.k_proj",),
        values=("attention.v_proj",),
        out=("attention.out_proj",),
        feed_forward=("rms_norm2", "ffn"),
    )
    _no_split_modules = [  # noqa: RUF012
        *Aimv2VisionModel._no_split_modules,
        "LacoAimv2EncoderLayer",
        "LacoAimv2ReducingLayer",
    ]


class Aimv2(Encoder):
    def interpolates(self, config: Any) -> bool:
        return config.is_native

    def mlp(self, config: Any) -> tuple[int, bool]:
        return config.intermediate_size, True


AIMV2 = Aimv2("aimv2", Aimv2VisionModel, Aimv2VisionConfig, LacoAimv2VisionModel, LacoAimv2VisionConfig)
