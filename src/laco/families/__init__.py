"""Families of models that compressors can be put into, and the registration of compressed models.

Importing this package makes the Auto classes of transformers know every compressed configuration and model.
"""

from typing import Any

from torch import nn

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.encoders import ENCODERS
from laco.families.llava import Llava
from laco.families.llava_onevision import LlavaOnevision
from laco.families.steps import Step

__all__ = ["FAMILIES", "Family", "Step", "catalogue", "family_of"]

FAMILIES: tuple[Family, ...] = (Llava(), LlavaOnevision())
for family in FAMILIES:
    family.register()


def family_of(model: nn.Module) -> Family:
    """The family of a model; `LacoError` naming the known ones if there is none."""
    for family in FAMILIES:
        if family.owns(model):
            return family
    known = ", ".join(family.stock.__name__ for family in FAMILIES)
    raise LacoError(f"{type(model).__name__} belongs to no family that laco knows; it knows {known}")


def catalogue() -> list[dict[str, Any]]:
    """One row a family for `laco families`: name, architectures, encoders, and what holds."""
    return [
        {
            "name": family.name,
            "architectures": [family.stock.__name__, family.connected.__name__],
            "encoders": [encoder.name for encoder in ENCODERS],
            "holds": family.holds,
        }
        for family in FAMILIES
    ]
