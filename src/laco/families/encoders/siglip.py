"""SigLIP: no prefix token, a learned position for every patch, all before the first layer."""

from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer
from laco.families.encoders.halves import Halves
from laco.families.encoders.reducing import ReducingLayer


class LacoSiglipVisionConfig(FixedGridVisionConfig, SiglipVisionConfig):
    model_type = "laco_siglip_vision_model"


class LacoSiglipEncoderLayer(MergingLayer, SiglipEncoderLayer):
    pass


class LacoSiglipReducingLayer(ReducingLayer, SiglipEncoderLayer):
    pass


class LacoSiglipVisionModel(FixedGridVisionModel, SiglipVisionModel):
    config: LacoSiglipVisionConfig
    layer_class = LacoSiglipEncoderLayer
    reducing_class = LacoSiglipReducingLayer
    halves = Halves()
    _no_split_modules = [  # noqa: RUF012
        *SiglipVisionModel._no_split_modules,
        "LacoSiglipEncoderLayer",
        "LacoSiglipReducingLayer",
    ]


SIGLIP = Encoder("siglip", SiglipVisionModel, SiglipVisionConfig, LacoSiglipVisionModel, LacoSiglipVisionConfig)
