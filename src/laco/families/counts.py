"""How many visual tokens are left of a picture before anything of it is seen, and processors that go by it.

Where a number of the stock processor says how many placeholders a picture has, it is set (`Family.processor_numbers`).
Where there is none, as grids differ from picture to picture, the processor gets a class of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

from transformers import AutoProcessor, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import MultiModalData

from laco.errors import LacoError
from laco.methods import Reducer, Selector, from_dict


@dataclass(frozen=True)
class Counts:
    """What methods inside the encoder and behind it leave.

    Args:
        reducer, selector: those that a model has.
        layers, last: of its vision encoder, and how many of them the language model uses.
        prefix: tokens of the encoder that pass the projector by themselves, where a method keeps them.
        grid: visual tokens of a picture, where that is one number. One more, CLS or a line break, stays; of several,
            how many stay depends on what is seen.
        behind_video: line breaks behind a video; None where other tokens stand between its frames.
    """

    reducer: Reducer | None = None
    selector: Selector | None = None
    layers: int = 0
    last: int = 0
    prefix: int = 0
    grid: int | None = None
    behind_video: int | None = 0

    def left(self, tokens: int, frames: int = 0) -> int | None:
        """How many tokens the language model reads of a picture, or of a video of so many frames, of which it reads so
        many without a method; None where that depends on what is seen.

        Raises:
            LacoError: a budget above all tokens.
        """
        further = self.behind_video if frames else 0 if self.grid is None else tokens - self.grid
        methods = [method for method in (self.reducer, self.selector) if method is not None]
        if not methods:
            return tokens
        if further not in (0, 1) or not all(method.static_count for method in methods):
            return None
        left = tokens - further
        if self.reducer is not None:
            if frames:  # their tokens are joined behind the encoder
                return None
            left = self.reducer.num_tokens(left, self.layers, self.last)
        if self.selector is not None:
            left = self.selector.left(left, 0 if frames else self.prefix, max(frames, 1))
        return left + further

    def placeholders(self, tokens: int, frames: int = 0) -> int:
        """How many placeholder tokens stand for them: as many as are `left`, if that is known; else all, and the
        language model takes out what is not there, or refuses the budget.
        """
        try:
            left = self.left(tokens, frames)
        except LacoError:
            return tokens
        return tokens if left is None else left

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        methods = {"reducer": self.reducer, "selector": self.selector}
        return vars(self) | {name: None if method is None else method.to_dict() for name, method in methods.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        methods: Any = {name: from_dict(data[name]) if data[name] else None for name in ("reducer", "selector")}
        return cls(**{**data, **methods})


class CountingProcessor(ProcessorMixin):
    """Mixin of a processor that writes as many placeholders as there will be tokens."""

    _laco_stock: ClassVar[type[ProcessorMixin]]
    image_token: str
    video_token: str
    counts: Counts = Counts()

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        text = super().replace_image_token(image_inputs, image_idx, **kwargs)
        return with_fewer(text, self.image_token, self.counts)

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        text = super().replace_video_token(video_inputs, video_idx, **kwargs)
        if "video_grid_thw" in video_inputs:
            frames = int(video_inputs["video_grid_thw"][video_idx][0])
        else:
            frames = len(video_inputs["pixel_values_videos"][video_idx])
        return with_fewer(text, self.video_token, self.counts, frames)

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """What servers ask for before there is a picture."""
        data = super()._get_num_multimodal_tokens(image_sizes, video_sizes, **kwargs)  # type: ignore[misc]
        if image_sizes is not None:
            data.num_image_tokens = [self.counts.placeholders(int(tokens)) for tokens in data.num_image_tokens]
        if video_sizes is not None:
            joined = getattr(self.video_processor, "temporal_patch_size", 1)
            data.num_video_tokens = [
                self.counts.placeholders(int(tokens), -(-size[0] // joined))
                for tokens, size in zip(data.num_video_tokens, video_sizes, strict=True)
            ]
        return data

    def __reduce__(self) -> Any:
        return revived, (self._laco_stock, self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "counts": self.counts.to_dict()}

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        settings = dict(processor_dict)
        try:
            counts = Counts.from_dict(settings.pop("counts"))
        except (KeyError, TypeError) as error:
            raise LacoError(f"the configuration of a {cls.__name__} does not say what its model leaves") from error
        made = super().from_args_and_dict(args, settings, **kwargs)
        processor = made[0] if isinstance(made, tuple) else made
        processor.counts = counts
        return made


def with_fewer(text: str, token: str, counts: Counts, frames: int = 0) -> str:
    """What stands for a picture, or a video of so many frames, in a prompt, with as many placeholders as are left."""
    return re.sub(
        f"(?:{re.escape(token)})+",
        lambda run: token * counts.placeholders(len(run[0]) // len(token), frames),
        text,
    )


@cache
def counting(kind: Any) -> Any:
    """The class of processors like this one that go by `Counts`, known to `AutoProcessor` from now on."""
    ours: Any = type(f"Laco{kind.__name__}", (CountingProcessor, kind), {"_laco_stock": kind})
    # AutoProcessor looks classes up by name, among those of configurations.
    marker = type(f"{ours.__name__}Config", (PreTrainedConfig,), {"model_type": f"laco_processor_{kind.__name__}"})
    AutoProcessor.register(marker, ours)
    return ours


def revived(kind: Any, state: dict[str, Any]) -> Any:
    """A processor of `counting(kind)` from its attributes, for copies in other processes."""
    processor = kind.__new__(counting(kind))
    processor.__dict__.update(state)
    return processor


def count(processor: Any, counts: Counts) -> None:
    """Lets a processor, in place, write as many placeholders as are left; all, where there is no method."""
    if isinstance(processor, CountingProcessor):
        del processor.counts
        processor.__class__ = processor._laco_stock  # type: ignore[assignment]
    if counts.reducer is not None or counts.selector is not None:
        kind: Any = type(processor)
        processor.__class__ = counting(kind)
        processor.counts = counts
