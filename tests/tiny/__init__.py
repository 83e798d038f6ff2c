"""Tiny random models with their processors, made from configurations and an in-memory tokenizer: no hub.

Every family has a file in `families/` that builds it and names its `CASES`, which the contract tests in
`tests/families/` run over.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from transformers import BatchFeature, LlavaProcessor, ProcessorMixin

from tiny import families
from tiny.case import Case, Prompt
from tiny.families.llava import llava
from tiny.families.llava_onevision import llava_onevision
from tiny.parts import awake, picture, scramble, text_config, tokenizer, vision_config

__all__ = [
    "CASES",
    "ENCODERS",
    "FAMILIES",
    "Case",
    "awake",
    "inputs",
    "llava",
    "llava_onevision",
    "picture",
    "scramble",
    "text_config",
    "tokenizer",
    "vision_config",
]

_modules = [import_module(f"{families.__name__}.{module.name}") for module in iter_modules(families.__path__)]
CASES: dict[str, Case] = {case.name: case for module in _modules for case in module.CASES}

# The two families that tests of everything else use, with their two encoders.
FAMILIES = {"llava": llava, "llava_onevision": llava_onevision}
ENCODERS = ("siglip", "clip")


def inputs(processor: ProcessorMixin, *prompts: Prompt) -> BatchFeature:
    """A left-padded batch of prompts for a processor of these two families."""
    texts = [text for text, _ in prompts]
    pictures: Any = [pictures for _, pictures in prompts if pictures]
    if isinstance(processor, LlavaProcessor):
        pictures = [picture for some in pictures for picture in some]
    return processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
