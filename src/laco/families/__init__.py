"""Families of models that compressors can be put into, and the registration of compressed models.

Importing this package makes the Auto classes of transformers know every compressed configuration and model.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.gemma3 import Gemma3
from laco.families.idefics3 import Idefics3
from laco.families.internvl import InternVL
from laco.families.llama4 import Llama4
from laco.families.llava import Llava
from laco.families.llava_next import LlavaNext
from laco.families.llava_onevision import LlavaOnevision
from laco.families.llava_pixtral import LlavaPixtral
from laco.families.minicpmv import MiniCPMV
from laco.families.mistral3 import Mistral3
from laco.families.paligemma import PaliGemma
from laco.families.qwen2_5_vl import Qwen2_5_VL
from laco.families.qwen2_vl import Qwen2VL
from laco.families.qwen3_vl import Qwen3VL
from laco.families.smolvlm import SmolVLM
from laco.families.steps import Step
from laco.families.vision_encoder import VisionEncoder

__all__ = ["FAMILIES", "Family", "Step", "catalogue", "family_of", "family_of_config"]

FAMILIES: tuple[Family, ...] = (
    LlavaPixtral(),  # before Llava, whose classes it shares
    Llava(),
    LlavaOnevision(),
    InternVL(),
    LlavaNext(),
    Gemma3(),
    PaliGemma(),
    Idefics3(),
    SmolVLM(),
    Llama4(),
    MiniCPMV(),
    Mistral3(),
    Qwen2VL(),
    Qwen2_5_VL(),
    Qwen3VL(),
    VisionEncoder(),
)
for family in FAMILIES:
    family.register()


def family_of(model: nn.Module) -> Family:
    """The family of a model; `LacoError` naming the known ones if there is none."""
    return _found(type(model).__name__, [family for family in FAMILIES if family.owns(model)])


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family of a configuration; `LacoError` naming the known ones if there is none."""
    return _found(type(config).__name__, [family for family in FAMILIES if family.owns_config(config)])


def _found(what: str, families: list[Family]) -> Family:
    if families:
        return families[0]
    known = ", ".join(dict.fromkeys(kind.__name__ for family in FAMILIES for kind in family.stock_classes))
    raise LacoError(f"{what} belongs to no family that laco knows; it knows {known}")


def catalogue() -> list[dict[str, Any]]:
    """One row a family for `laco families`: name, architectures, encoders, and what holds."""
    return [
        {
            "name": family.name,
            "architectures": [kind.__name__ for kind in (*family.stock_classes, *family.compressed_classes)],
            "encoders": [encoder.name for encoder in family.encoders],
            "holds": family.holds,
        }
        for family in FAMILIES
    ]
