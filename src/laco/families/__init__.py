"""Families of models that compressors can be put into, and the registration of compressed models.

Importing this package makes the Auto classes of transformers know every compressed configuration and model.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.llava import Llava
from laco.families.llava_onevision import LlavaOnevision
from laco.families.steps import Step

__all__ = ["FAMILIES", "Family", "Step", "catalogue", "family_of", "family_of_config"]

FAMILIES: tuple[Family, ...] = (Llava(), LlavaOnevision())
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
    known = ", ".join(family.stock.__name__ for family in FAMILIES)
    raise LacoError(f"{what} belongs to no family that laco knows; it knows {known}")


def catalogue() -> list[dict[str, Any]]:
    """One row a family for `laco families`: name, architectures, encoders, and what holds."""
    return [
        {
            "name": family.name,
            "architectures": [kind.__name__ for kind in (family.stock, family.compressed) if kind],
            "encoders": [encoder.name for encoder in family.encoders],
            "holds": family.holds,
        }
        for family in FAMILIES
    ]
