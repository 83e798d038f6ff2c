"""Prompts in which a placeholder stands for every visual token that is left, not for every one that there was.

So a processor writes them where it knows how many a method leaves. Everything between the prompt and the language model
goes on counting all tokens: such a prompt is lengthened before, and its language model puts out what belongs to the
tokens that were given. To the outside they are the sequence, in masks, caches and positions; only to the language model
does a token behind a picture stand where it stands in the full sequence, unless positions are renumbered.

Shape letters: l tokens of a prompt as it was given, L of the full one.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from laco.errors import LacoError
from laco.families.reduction.kept import Kept


@dataclass(frozen=True)
class Short:
    """How the tokens of short prompts lie in the full ones.

    Args:
        source_BL: which token of the prompt each is: tokens that have no placeholder count as copies of their
            picture's last one. -1 = padding in front of samples that gain fewer than others.
        chosen_BL: true where tokens are of pictures of which some have no placeholder.
    """

    source_BL: Tensor
    chosen_BL: Tensor

    @classmethod
    def of(cls, ids_Bl: Tensor, pictures: Mapping[int, tuple[Sequence[int], Sequence[int]]]) -> "Short | None":
        """Of a prompt; None where it is a full one.

        Args:
            pictures: by the placeholder that stands for them, how many tokens and how many placeholders each has.
        """
        repeats_Bl, chosen_Bl = torch.ones_like(ids_Bl), torch.zeros_like(ids_Bl, dtype=torch.bool)
        for placeholder, (full, standing) in pictures.items():
            if full == standing:
                continue
            counts = torch.tensor([full, standing], device=ids_Bl.device)
            rows, columns = (ids_Bl == placeholder).nonzero().unbind(1)
            last = counts[1].cumsum(0) - 1
            repeats_Bl[rows[last], columns[last]] += counts[0] - counts[1]
            chosen_Bl[rows, columns] = (counts[0] > counts[1]).repeat_interleave(counts[1])
        if not chosen_Bl.any():
            return None
        batch, length = ids_Bl.shape
        length_B = repeats_Bl.sum(dim=1)
        place_L = torch.arange(int(length_B.max()), device=ids_Bl.device)
        there_BL = place_L >= len(place_L) - length_B[:, None]
        source_BL = torch.full_like(there_BL, -1, dtype=torch.long)
        every = torch.arange(length, device=ids_Bl.device).repeat(batch)
        source_BL[there_BL] = every.repeat_interleave(repeats_Bl.flatten())
        return cls(source_BL, there_BL & chosen_Bl.gather(1, source_BL.clamp(min=0)))

    @property
    def padding_BL(self) -> Tensor:
        return self.source_BL < 0

    @property
    def first_Bl(self) -> Tensor:
        """Where in the full prompt each token comes first."""
        begins_BL = pad(self.source_BL, (1, 0), value=-1).diff(dim=1) > 0
        return begins_BL.nonzero()[:, 1].view(len(self.source_BL), -1)

    def gained(self, column_Bl: Tensor) -> Tensor:
        """(B, l) how many tokens lie before each token that the prompt does not have; it is in this column."""
        given_l = torch.arange(column_Bl.shape[1], device=column_Bl.device)
        return column_Bl - self.padding_BL.sum(dim=1, keepdim=True) - given_l

    def behind(self, column_Bl: Tensor) -> Tensor:
        """(B, l) where what follows each token, in these columns, begins: for the last, past the end."""
        return pad(column_Bl[:, 1:], (0, 1), value=self.source_BL.shape[1])

    # From the prompt as given to the full one.

    def full(self, x_Bl: Tensor, padding: Any) -> Tensor:
        """(B, l, ...) -> (B, L, ...)."""
        rows = torch.arange(len(x_Bl), device=x_Bl.device)[:, None]
        padding_BL = self.padding_BL.view(*self.source_BL.shape, *[1] * (x_Bl.ndim - 2))
        return torch.where(padding_BL, padding, x_Bl[rows, self.source_BL.clamp(min=0)])

    def mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """An attention mask of l tokens, (B, read + l) or (B, 1, l, l); None stays where nothing is padded."""
        if mask is None:
            if not self.padding_BL.any():
                return None
            mask = torch.ones(len(self.source_BL), length, dtype=torch.long, device=self.source_BL.device)
        if mask.ndim == 2:
            read = mask.shape[1] - length
            return torch.cat([mask[:, :read], self.full(mask[:, read:], 0)], dim=1)
        rows = torch.arange(len(mask), device=mask.device)[:, None, None]
        source_BL = self.source_BL.clamp(min=0)
        pairs_BLL = mask[:, 0].expand(len(source_BL), -1, -1)[rows, source_BL[:, :, None], source_BL[:, None]]
        every_L = torch.arange(source_BL.shape[1], device=mask.device)
        # Copies of one placeholder stand one behind the other.
        later = (source_BL[:, :, None] == source_BL[:, None]) & (every_L > every_L[:, None])
        no: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        hidden = (later | self.padding_BL[:, None]) & ~torch.eye(len(every_L), dtype=torch.bool, device=mask.device)
        return pairs_BLL.masked_fill(hidden, no)[:, None]

    def positions(self, position_ids: Tensor) -> Tensor:
        """Plain ones, (..., B or 1, l) -> (..., B, L): as if the prompt had all its tokens."""
        batch, length = self.source_BL.shape
        given = position_ids.expand(*position_ids.shape[:-2], batch, -1)
        source_BL = self.source_BL.clamp(min=0)
        column_BL = torch.arange(length, device=given.device) - self.padding_BL.sum(dim=1, keepdim=True)
        copies = given.gather(-1, source_BL.expand(*given.shape[:-2], -1, -1))
        return torch.where(self.padding_BL, 0, copies + column_BL - source_BL)

    # And back, in the language model.

    def given(self, kept: Kept) -> Kept:
        """The tokens of the prompt as it was given, where `kept` are all that enter the language model.

        `LacoError` where a method leaves other numbers of tokens than have placeholders.
        """
        given = Kept.of(kept.keep_BL | ~(self.chosen_BL | self.padding_BL))
        if given.columns_BK.shape != self.first_Bl.shape or (given.columns_BK < 0).any():
            raise LacoError(
                "a method leaves another number of visual tokens than it says beforehand; where that depends on what is"
                " seen, its static_count is False"
            )
        return given

    def numbered(self, given: Kept, column_BK: Tensor) -> Tensor:
        """Tokens of the full prompt, -1 = padding, as those of the prompt that was given."""
        return torch.where(column_BK >= 0, given.slots(column_BK), -1)


SHORT: ContextVar[Short | None] = ContextVar("laco_short", default=None)
