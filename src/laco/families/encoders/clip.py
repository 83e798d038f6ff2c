"""CLIP: a CLS token in front, which passes by every merger."""

from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer


class LacoCLIPVisionConfig(FixedGridVisionConfig, CLIPVisionConfig):
    model_type = "laco_clip_vision_model"


class LacoCLIPEncoderLayer(MergingLayer, CLIPEncoderLayer):
    @staticmethod
    def prefix_of(config: PreTrainedConfig) -> int:
        return 1


class LacoCLIPVisionModel(FixedGridVisionModel, CLIPVisionModel):
    config: LacoCLIPVisionConfig
    layer_class = LacoCLIPEncoderLayer
    _no_split_modules = [*CLIPVisionModel._no_split_modules, "LacoCLIPEncoderLayer"]  # noqa: RUF012


CLIP = Encoder("clip", CLIPVisionModel, CLIPVisionConfig, LacoCLIPVisionModel, LacoCLIPVisionConfig)
