"""Which tokens of a batch stay, and what follows for masks and positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.families.reduction.cache import ReducedCacheLayer
from laco.methods.selector import Positions


@dataclass(frozen=True)
class Kept:
    """Which of L tokens of a batch stay. Samples that keep fewer than others are padded in front.

    Args:
        keep_BL: true where one stays.
        columns_BK: which tokens these are, -1 = padding.
    """

    keep_BL: Tensor
    columns_BK: Tensor

    @classmethod
    def of(cls, keep_BL: Tensor) -> "Kept":
        count_B1 = keep_BL.sum(dim=1, keepdim=True)
        most = int(count_B1.max())
        slot_BL = torch.where(keep_BL, keep_BL.cumsum(dim=1) - 1 + most - count_B1, most)
        every_BL = torch.arange(keep_BL.shape[1], device=keep_BL.device).expand_as(slot_BL)
        columns_BK = every_BL.new_full((len(keep_BL), most + 1), -1).scatter(1, slot_BL, every_BL)
        return cls(keep_BL, columns_BK[:, :most])

    def after(self, orders: Sequence[Tensor]) -> "Kept":
        """What is left when of each sample only these of the K stay, in this order."""
        most = max(len(order) for order in orders)
        rows = [self.columns_BK[row, order] for row, order in enumerate(orders)]
        columns_BK = torch.stack([torch.nn.functional.pad(row, (most - len(row), 0), value=-1) for row in rows])
        there_BL = torch.zeros_like(torch.nn.functional.pad(self.keep_BL, (1, 0)))  # -1 comes first
        return Kept(there_BL.scatter(1, columns_BK + 1, True)[:, 1:], columns_BK)

    def slots(self, columns_BK: Tensor) -> Tensor:
        """(B, K') which of the K hold these tokens; any for padding."""
        slot_BL = torch.zeros_like(self.keep_BL, dtype=torch.long)
        slot_BL = torch.nn.functional.pad(slot_BL, (1, 0))
        every_BK = torch.arange(self.columns_BK.shape[1], device=slot_BL.device).expand_as(self.columns_BK)
        return slot_BL.scatter(1, self.columns_BK + 1, every_BK)[:, 1:].gather(1, columns_BK.clamp(min=0))

    @property
    def real_BK(self) -> Tensor:
        return self.columns_BK >= 0

    def take(self, x_BL: Tensor, padding: Any = 0) -> Tensor:
        """(B, L, ...) -> (B, K, ...)."""
        rows = torch.arange(len(x_BL), device=x_BL.device)[:, None]
        real_BK = self.real_BK.view(*self.columns_BK.shape, *[1] * (x_BL.ndim - 2))
        return torch.where(real_BK, x_BL[rows, self.columns_BK], padding)

    def spread(self, y_BK: Tensor) -> Tensor:
        """(B, K, ...) -> (B, L, ...): every token gets what the last kept one up to it has."""
        every_L = torch.arange(self.keep_BL.shape[1], device=y_BK.device)
        last_BL = torch.where(self.keep_BL, every_L, 0).cummax(dim=1).values
        return y_BK[torch.arange(len(y_BK), device=y_BK.device)[:, None], self.slots(last_BL)]


def renumbered(position_BK: Tensor, real_BK: Tensor) -> Tensor:
    """(B, K) or (B, K, 3 or 4) positions without gaps: each becomes its rank among those of its sample.

    Equal ones stay equal, so the rows and columns of M-RoPE do too. The first of four is the plain position that some
    models carry beside the three.
    """
    if position_BK.ndim == 3 and position_BK.shape[-1] == 4:
        plain, others = position_BK[..., 0], position_BK[..., 1:]
        return torch.cat([renumbered(plain, real_BK)[..., None], renumbered(others, real_BK)], dim=-1)
    out = position_BK.clone()
    for row, real in zip(out, real_BK, strict=True):
        rank = torch.unique(row[real], return_inverse=True)[1]
        row[real] = rank + (row[real].min() if len(rank) else 0)
    return out


def largest(position_ids: Tensor) -> Tensor:
    """(B,) of positions (B, L), or (3 or 4, B, L) of M-RoPE. The next token has the number after it."""
    return position_ids.reshape(-1, *position_ids.shape[-2:])[-3:].amax(dim=(0, 2))


def kept_mask(mask: Any, kept: Kept, past: ReducedCacheLayer | None, read: int) -> Tensor:
    """The attention mask of what stays: (B, held + K), or (B, 1, K, K) of one in four dimensions.

    Never None: of positions with gaps and no mask, transformers takes every gap for the beginning of a new text. Flash
    attention does so too where the mask hides nothing; there `DroppingLayer` hides the positions.
    """
    real_BK = kept.real_BK
    if mask is not None and not isinstance(mask, dict) and mask.ndim == 4:
        if read:
            raise LacoError("dropping visual tokens behind a cache needs a mask of two dimensions")
        rows = torch.arange(len(mask), device=mask.device)[:, None, None]
        columns_BK = kept.columns_BK.clamp(min=0)
        picked_BKK = mask[:, 0].expand(len(real_BK), -1, -1)[rows, columns_BK[:, :, None], columns_BK[:, None]]
        no: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        yes: Any = True if mask.dtype == torch.bool else 0.0
        picked_BKK = torch.where(real_BK[:, None], picked_BKK, no)
        itself = torch.eye(real_BK.shape[1], dtype=torch.bool, device=mask.device)
        return torch.where(itself & ~real_BK[:, None], yes, picked_BKK)[:, None]
    if isinstance(mask, dict):
        raise LacoError(
            "dropping visual tokens needs an attention mask of two dimensions, not one for each kind of layer"
        )
    batch, length = kept.keep_BL.shape
    if mask is None:
        mask = torch.ones(batch, read + length, dtype=torch.long, device=real_BK.device)
    if mask.shape[1] < read + length:  # of what is new alone
        mask = torch.cat([mask.new_ones(batch, read + length - mask.shape[1]), mask], dim=1)
    new_BK = kept.take(mask[:, -length:])
    if past is None:
        return torch.cat([mask[:, :read], new_BK], dim=1)
    held_BK = mask.gather(1, past.columns_BK.clamp(min=0)) * (past.columns_BK >= 0)
    return torch.cat([held_BK.to(new_BK.dtype), new_BK], dim=1)


class Entry(NamedTuple):
    """What a language model computes when only some tokens of its input enter it.

    Args:
        kept: those.
        arguments: of its forward.
        moved_BL: by how much the position of what follows each token is lower than in the full sequence.
    """

    kept: Kept
    arguments: dict[str, Any]
    moved_BL: Tensor


def entry(
    keep_BL: Tensor,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    others: Mapping[str, Any],
    *,
    positions: Positions = "keep",
    past: ReducedCacheLayer | None = None,
    read: int = 0,
) -> Entry:
    """The arguments of a language model's forward for the tokens that stay.

    Args:
        keep_BL: true where one stays.
        others: further arguments; those of DeepStack, which count visual tokens, are narrowed too.
        positions: of what stays: as in the full sequence, or counted anew.
        past: the first layer of the cache, if that holds fewer tokens than were read.
        read: how many were read before.

    Raises:
        LacoError: positions begin anew, as of several texts that are told apart by them alone.
    """
    kept, others, batch = Kept.of(keep_BL), dict(others), len(keep_BL)
    moved_B = keep_BL.new_zeros(batch, dtype=torch.long) if past is None else past.moved_B
    position_ids = placed(position_ids, read, keep_BL)
    given = kept.take(position_ids.movedim(-2, 0).movedim(-1, 1))
    mask = kept_mask(attention_mask, kept, past, read)
    if mask.ndim == 2 and (given.ndim == 2 or given.shape[-1] == 4):  # else they are no plain ones
        plain_BK, seen_BK = given.view(*given.shape[:2], -1)[..., 0], mask[:, -given.shape[1] :].bool()
        if ((plain_BK.diff() < 0) & seen_BK[:, 1:] & seen_BK[:, :-1]).any():
            raise LacoError(
                "visual tokens cannot be dropped from several texts in one sequence that positions alone tell apart;"
                " give each a row of its own"
            )
    now = given - moved_B.view(-1, *[1] * (given.ndim - 1))
    if positions == "renumber":
        now = renumbered(now, kept.real_BK)
    if (visual := others.get("visual_pos_masks")) is not None:  # DeepStack: features for the layers that follow
        others["visual_pos_masks"] = kept.take(visual, False)
        rows = keep_BL[visual]
        others["deepstack_visual_embeds"] = [level[rows] for level in others["deepstack_visual_embeds"]]
    placed_now = now.movedim(1, -1).movedim(0, -2)
    moved_BL = kept.spread((given - now).reshape(*kept.columns_BK.shape, -1)[..., -1])  # of M-RoPE any axis
    if positions == "renumber":  # the last tokens may have been dropped
        moved_BL[:, -1] = largest(position_ids) - largest(placed_now)
    arguments = {
        **others,
        "inputs_embeds": kept.take(inputs_embeds, inputs_embeds.new_zeros(())),
        "attention_mask": mask,
        "position_ids": placed_now,
        "one_text": True,
    }
    return Entry(kept, arguments, moved_BL)


def placed(position_ids: Tensor | None, read: int, keep_BL: Tensor) -> Tensor:
    """(B, L) or (3 or 4, B, L) positions of a whole input; those that follow what was read, if none are given."""
    batch, length = keep_BL.shape
    if position_ids is None:
        position_ids = torch.arange(read, read + length, device=keep_BL.device)[None]
    return position_ids.expand(*position_ids.shape[:-2], batch, length)
