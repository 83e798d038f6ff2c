"""CLIP: a CLS token in front, which passes by every merger."""

from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer
from laco.families.encoders.halves import Halves
from laco.families.encoders.reducing import ReducingLayer


class LacoCLIPVisionConfig(FixedGridVisionConfig, CLIPVisionConfig):
    model_type = "laco_clip_vision_model"


class LacoCLIPEncoderLayer(MergingLayer, CLIPEncoderLayer):
    @staticmethod
    def prefix_of(config: PreTrainedConfig) -> int:
        return 1


class LacoCLIPReducingLayer(ReducingLayer, CLIPEncoderLayer):
    pass


class LacoCLIPVisionModel(FixedGridVisionModel, CLIPVisionModel):
    config: LacoCLIPVisionConfig
    layer_class = LacoCLIPEncoderLayer
    reducing_class = LacoCLIPReducingLayer
    halves = Halves()
    _no_split_modules = [  # noqa: RUF012
        *CLIPVisionModel._no_split_modules,
        "LacoCLIPEncoderLayer",
        "LacoCLIPReducingLayer",
    ]


CLIP = Encoder("clip", CLIPVisionModel, CLIPVisionConfig, LacoCLIPVisionModel, LacoCLIPVisionConfig)
