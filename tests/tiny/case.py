"""One tiny model of a family, and what the contract tests have to know to use it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from laco.families import family_of

Prompt = tuple[str, list[Image.Image]]  # a text with `<image>` for every one of its pictures


def given_to_encoder(model: PreTrainedModel, batch: BatchFeature) -> dict[str, Tensor]:
    """The tensors that a model gives to its vision encoder for this batch, by argument."""
    encoder, seen = family_of(model).encoder(model), {}

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature(type(module).forward).bind(module, *args, **kwargs).arguments
        seen.update({name: value for name, value in bound.items() if isinstance(value, Tensor)})

    hook = encoder.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen


@dataclass(frozen=True)
class Case:
    """A family with one vision encoder, as `tests/families/` runs it through everything that has to hold.

    Args:
        name: family, hyphen, encoder.
        build: makes the uncompressed model, awake and in eval mode, with its processor; no argument is needed.
        image: what stands for a picture in a text for this processor.
        nested: whether the processor takes the pictures of a batch as one list a prompt, or all in one list.
        method: settings that every method gets here, where the defaults do not fit (a factor, an odd rule).
        any_factor: whether the processor sizes pictures so that the factors divide every grid.
        videos: makes a batch of one prompt about a video of so many frames, from a seed; None where the
            family has no videos.
        tower_inputs: arguments of the vision encoder's forward for a batch; by default the tensors that the
            model gives it.
        cannot: property of the matrix -> why the stock model cannot either. Shown in docs/families.md.
    """

    name: str
    build: Callable[..., tuple[PreTrainedModel, ProcessorMixin]]
    image: str = "<image>"
    nested: bool = False
    method: Mapping[str, Any] = field(default_factory=dict)
    any_factor: bool = False
    videos: Callable[[PreTrainedModel, ProcessorMixin, int, int], BatchFeature] | None = None
    tower_inputs: Callable[[PreTrainedModel, BatchFeature], dict[str, Any]] = given_to_encoder
    cannot: Mapping[str, str] = field(default_factory=dict)

    def inputs(self, processor: ProcessorMixin, *prompts: Prompt) -> BatchFeature:
        """A left-padded batch."""
        texts = [text.replace("<image>", self.image) for text, _ in prompts]
        pictures: Any = [pictures for _, pictures in prompts if pictures]
        if not self.nested:
            pictures = [picture for some in pictures for picture in some]
        return processor(text=texts, images=pictures or None, padding=True, padding_side="left", return_tensors="pt")
