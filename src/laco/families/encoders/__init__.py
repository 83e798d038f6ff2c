"""Vision encoders with mergers inside, one file each."""

from transformers import PreTrainedConfig

from laco.errors import LacoError
from laco.families.encoders.base import CompressedVisionModel, Encoder, merge_tokens
from laco.families.encoders.clip import CLIP
from laco.families.encoders.siglip import SIGLIP

__all__ = ["CLIP", "ENCODERS", "SIGLIP", "CompressedVisionModel", "Encoder", "encoder_of", "merge_tokens"]

ENCODERS: tuple[Encoder, ...] = (
    SIGLIP,
    CLIP,
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
