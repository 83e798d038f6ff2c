"""What is known of the prompt while a model runs: where its visual tokens are, and where it ends.

Methods that look at the question, and those inside the language model, need it in places that are not handed it. It
lives as long as one call of `forward` or `generate`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.families.reduction.pictures import View


@dataclass(frozen=True)
class Encoded:
    """What is known of pictures, or of videos, besides their features: for methods that choose in the language model.

    Args:
        placeholder: the token that stands for one of their rows in a prompt.
        lengths: rows of each that the language model reads.
        views: of each.
        maps: of each, what a method wants of layers of the vision encoder: (N, C), one view after the other.
    """

    placeholder: int
    lengths: Sequence[int]
    views: Sequence[Sequence[View]]
    maps: Sequence[Sequence[Tensor]]


class Shown(NamedTuple):
    """A picture in a sample: where in the sequence its rows are, its views and its maps."""

    columns: Tensor
    views: Sequence[View]
    maps: Sequence[Tensor]

    @property
    def places(self) -> Tensor:
        """(N,) where in the sequence the tokens of its views are, line breaks left out."""
        return torch.cat([self.columns[view.rows.to(self.columns.device)] for view in self.views])


@dataclass(frozen=True)
class Prompt:
    """Of a batch.

    Args:
        visual_BL: where placeholders of pictures and videos are.
        real_BL: where there is no padding.
        said_BL: where answers are, which no method may look at.
        told_BL: where tokens see an answer, or are one: all from the first answer on, but not in a question that a mask
            of pairs of tokens keeps apart from it.
        end_B: how long the prompt is, up to the first answer.
        embedding: of tokens, (B, L) -> (B, L, D).
        ids_BL: the tokens.
        encoded: what has been encoded for it so far.
        grids: arguments of `generate` that say how large pictures and videos are, where the family has such.
    """

    ids_BL: Tensor
    visual_BL: Tensor
    real_BL: Tensor
    said_BL: Tensor
    told_BL: Tensor
    end_B: Tensor
    embedding: Any
    encoded: list[Encoded] = field(default_factory=list)
    grids: Mapping[str, Any] = field(default_factory=dict)

    def text_places(self, row: int) -> Tensor:
        """(L,) true where the text of a sample is that knows of no answer."""
        return self.real_BL[row] & ~self.visual_BL[row] & ~self.told_BL[row]

    def behind(self, row: int) -> Tensor:
        """(L,) true where the text behind the last visual token of a sample is."""
        behind_L = self.text_places(row)
        if len(places := self.visual_BL[row].nonzero()):
            behind_L[: int(places[-1])] = False
        return behind_L

    def text(self, row: int) -> Tensor:
        """(M, D) embeddings of the text behind the last visual token of a sample; of all text, if there is none."""
        behind_L = self.behind(row)
        return self.embedding(self.ids_BL[row][behind_L if behind_L.any() else self.text_places(row)])

    def pictures(self, name: str) -> list[list[Shown]]:
        """Of each sample what has been encoded for it. Beams of a sample, which follow each other, share that.

        `LacoError`, on behalf of the method called `name`, if not all visual tokens are known.
        """
        out: list[list[Shown]] = [[] for _ in self.ids_BL]
        for encoded in self.encoded:
            columns = [(ids_L == encoded.placeholder).nonzero().flatten() for ids_L in self.ids_BL]
            beams = sum(map(len, columns)) // sum(encoded.lengths)
            following = iter(zip(encoded.lengths, encoded.views, encoded.maps, strict=True))
            for first in range(0, len(columns), beams):
                taken = 0
                while taken < len(columns[first]):
                    length, views, maps = next(following)
                    for row in range(first, first + beams):
                        out[row].append(Shown(columns[row][taken : taken + length], views, maps))
                    taken += length
        known = sum(len(shown.columns) for row in out for shown in row)
        if known != int(self.visual_BL.sum()):
            raise LacoError(f"{name} needs the question: give the model pictures and input_ids together")
        return out


PROMPT: ContextVar[Prompt | None] = ContextVar("laco_prompt", default=None)
ANSWERS: ContextVar[int | Tensor | None] = ContextVar("laco_answers", default=None)


@contextmanager
def within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def knowing(model: Any, inputs: Any) -> Iterator[None]:
    """Lets pictures be encoded, outside of a call of the model, as they will be for this prompt."""
    with within(PROMPT, prompt_of(model.base_model, inputs["input_ids"], inputs.get("attention_mask"))):
        yield


def seen_pairs(mask: Tensor) -> Tensor:
    """Of a mask of pairs of tokens, (B, 1, L, L), true where one sees another."""
    return mask if mask.dtype == torch.bool else mask >= 0


def prompt_of(
    model: Any, input_ids: Tensor, attention_mask: Any, grids: Mapping[str, Any] = MappingProxyType({})
) -> Prompt:
    """The prompt of a call. `ANSWERS` is the prompt's length in `generate`, or the labels in training.

    An `attention_mask` that `generate` has made ready for each kind of layer comes with a cache that `check_cache`
    refuses, unless nothing is dropped.
    """
    mask = attention_mask if isinstance(attention_mask, Tensor) else None
    config = model.config
    placeholders = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    visual_BL = torch.isin(
        input_ids, torch.tensor([number for number in placeholders if number is not None], device=input_ids.device)
    )
    length = input_ids.shape[1]
    real_BL = torch.ones_like(visual_BL)
    if mask is not None and mask.ndim == 2:
        real_BL = mask[:, -length:].bool()
    answers, said_BL = ANSWERS.get(), torch.zeros_like(visual_BL)
    if isinstance(answers, int):
        said_BL[:, answers:] = True
    elif answers is not None and answers.shape == input_ids.shape:
        said_BL = answers >= 0
        if mask is not None and mask.ndim == 4:  # no text comes behind the last answer: padding
            real_BL = said_BL.flip(1).cumsum(dim=1).flip(1) > 0 | ~said_BL.any(dim=1, keepdim=True)
    told_BL = said_BL.cumsum(dim=1) > 0
    if mask is not None and mask.ndim == 4:
        told_BL = (seen_pairs(mask)[:, 0, :, -length:] & said_BL[:, None]).any(dim=-1)
    end_B = torch.where(said_BL.any(dim=1), said_BL.int().argmax(dim=1), length)
    embedding = model.get_input_embeddings()
    return Prompt(input_ids, visual_BL, real_BL, said_BL, told_BL, end_B, embedding, grids=grids)
