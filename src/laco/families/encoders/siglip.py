"""SigLIP: no prefix token, a learned position for every patch, all before the first layer."""

from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer


class LacoSiglipVisionConfig(FixedGridVisionConfig, SiglipVisionConfig):
    model_type = "laco_siglip_vision_model"


class LacoSiglipEncoderLayer(MergingLayer, SiglipEncoderLayer):
    pass


class LacoSiglipVisionModel(FixedGridVisionModel, SiglipVisionModel):
    config: LacoSiglipVisionConfig
    layer_class = LacoSiglipEncoderLayer
    _no_split_modules = [*SiglipVisionModel._no_split_modules, "LacoSiglipEncoderLayer"]  # noqa: RUF012


SIGLIP = Encoder("siglip", SiglipVisionModel, SiglipVisionConfig, LacoSiglipVisionModel, LacoSiglipVisionConfig)
