"""Vision encoders with mergers inside, one file each."""

from transformers import PreTrainedConfig

from laco.errors import LacoError
from laco.families.encoders.aimv2 import AIMV2
from laco.families.encoders.base import CompressedVisionModel, Encoder, merge_tokens
from laco.families.encoders.clip import CLIP
from laco.families.encoders.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from laco.families.encoders.idefics3 import IDEFICS3, SMOLVLM
from laco.families.encoders.internvit import INTERNVIT
from laco.families.encoders.llama4 import LLAMA4
from laco.families.encoders.minicpmv import MINICPMV
from laco.families.encoders.pixtral import PIXTRAL
from laco.families.encoders.qwen2_5_vl import QWEN2_5_VL
from laco.families.encoders.qwen2_vl import QWEN2_VL
from laco.families.encoders.qwen3_vl import QWEN3_VL
from laco.families.encoders.siglip import SIGLIP
from laco.families.encoders.siglip2 import SIGLIP2

__all__ = ["CLIP", "ENCODERS", "SIGLIP", "CompressedVisionModel", "Encoder", "encoder_of", "merge_tokens"]

ENCODERS: tuple[Encoder, ...] = (
    SIGLIP,
    CLIP,
    INTERNVIT,
    IDEFICS3,
    SMOLVLM,
    LLAMA4,
    MINICPMV,
    SIGLIP2,
    PIXTRAL,
    DINOV2,
    DINOV2_WITH_REGISTERS,
    AIMV2,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
)
for encoder in ENCODERS:
    encoder.register()


def encoder_of(config: PreTrainedConfig) -> Encoder:
    """The encoder that a vision configuration, stock or compressed, belongs to; `LacoError` if to none."""
    for encoder in ENCODERS:
        if encoder.owns(config):
            return encoder
    known = ", ".join(encoder.name for encoder in ENCODERS)
    raise LacoError(f"the vision encoder {config.model_type!r} is not supported; there are {known}")
