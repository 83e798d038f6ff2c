"""A cache that holds fewer tokens than were read, and still says how many were read.

Everything outside of the language model (slicing of a dialogue's next turn, position ids of the next token) reckons
with the tokens that were read; only masks inside the language model need what is held.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from laco.errors import LacoError


class ReducedCacheLayer(DynamicLayer):
    """Of one layer of a language model.

    Attributes:
        columns_BK: which token of the sequence each entry is; -1 = padding.
        computed_BK: the same of all that the layer has computed, also of entries that were taken out again.
        moved_BL: by how much the position of what follows each token that was read is lower than in the full sequence.
        counts_entries: whether `get_seq_length` says how many tokens are held, instead of `read`.
    """

    keys: Tensor
    values: Tensor
    columns_BK: Tensor
    computed_BK: Tensor
    moved_BL: Tensor
    counts_entries: bool = False

    @property
    def read(self) -> int:
        """Tokens of the sequence so far."""
        return self.moved_BL.shape[1]

    @property
    def moved_B(self) -> Tensor:
        """By how much the positions of later tokens are lower."""
        return self.moved_BL[:, -1:].sum(dim=1)  # 0 where nothing has been read

    def get_seq_length(self) -> int:
        held = super().get_seq_length()
        return held if self.counts_entries or not held else self.read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, 0

    def extend(self, columns_BQ: Tensor, moved_BL: Tensor) -> None:
        """Notes what tokens the newest entries are, and how the positions of all that were read have moved."""
        self.columns_BK = torch.cat([self.columns_BK, columns_BQ], dim=1)
        self.computed_BK = torch.cat([self.computed_BK, columns_BQ], dim=1)
        self.moved_BL = torch.cat([self.moved_BL, moved_BL], dim=1)
        assert self.columns_BK.shape[1] == self.keys.shape[-2]

    def keep_of_newest(self, slot_BK: Tensor, columns_BK: Tensor, number: int) -> None:
        """Of the newest `number` entries only those in these slots stay, which are these tokens."""
        first = self.keys.shape[-2] - number
        index_BGKd = slot_BK[:, None, :, None].expand(-1, self.keys.shape[1], -1, 1)
        for name in ("keys", "values"):
            x = getattr(self, name)
            newest = x[..., first:, :].gather(2, index_BGKd.expand(*index_BGKd.shape[:-1], x.shape[-1]))
            setattr(self, name, torch.cat([x[..., :first, :], newest], dim=2))
        self.columns_BK = torch.cat([self.columns_BK[:, :first], columns_BK], dim=1)

    def pick(self, rows: Any) -> None:
        for name in ("columns_BK", "computed_BK", "moved_BL"):
            setattr(self, name, getattr(self, name)[rows])

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.pick(beam_idx.to(self.columns_BK.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.pick(torch.arange(len(self.columns_BK), device=self.columns_BK.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """The last tokens that were read leave, as far as they are held.

        A positive number, before transformers 5.18, is how many stay.
        """
        left = min(tokens_to_remove, self.read) if tokens_to_remove > 0 else max(self.read + tokens_to_remove, 0)
        columns_BK, computed_BK = (x.where(x < left, -1) for x in (self.columns_BK, self.computed_BK))
        some_K = (columns_BK >= 0).any(dim=0)
        self.keys, self.values = self.keys[..., some_K, :], self.values[..., some_K, :]
        self.columns_BK = columns_BK[:, some_K]
        self.computed_BK = computed_BK[:, (computed_BK >= 0).any(dim=0)]
        self.moved_BL = self.moved_BL[:, :left]

    def reset(self) -> None:
        """As new: what is read next may be dropped or not."""
        layer: Any = self
        layer.keys = layer.values = None
        layer.is_initialized = False
        for name in ("columns_BK", "computed_BK", "moved_BL"):
            delattr(layer, name)
        layer.__class__ = DynamicLayer


def check_cache(past: Cache | None) -> None:
    """Raises `LacoError` where a cache cannot hold fewer tokens than were read."""
    for layer in () if past is None else past.layers:
        if not isinstance(layer, ReducedCacheLayer) and type(layer) is not DynamicLayer:
            raise LacoError(
                f"visual tokens can be dropped with a dynamic cache alone, not with a {type(layer).__name__}; leave out"
                " cache_implementation, or compress by a merger"
            )


def reduce_cache(past: Cache, batch: int, read: int, device: torch.device) -> None:
    """Lets every layer of a cache, which holds all of `read` tokens, count what it holds."""
    check_cache(past)
    for layer in past.layers:
        if isinstance(layer, ReducedCacheLayer):
            continue
        held: Any = layer
        held.__class__ = ReducedCacheLayer
        held.columns_BK = held.computed_BK = torch.arange(read, device=device).repeat(batch, 1)
        held.moved_BL = torch.zeros(batch, read, dtype=torch.long, device=device)


@contextmanager
def counting_entries(past: Cache | None) -> Iterator[None]:
    """While masks are made, the cache's length is that of what it holds."""
    layers = [] if past is None else [layer for layer in past.layers if isinstance(layer, ReducedCacheLayer)]
    for layer in layers:
        layer.counts_entries = True
    try:
        yield
    finally:
        for layer in layers:
            layer.counts_entries = False


def kept_columns(past: Cache | None) -> list[Tensor] | None:
    """For each layer, (B, K) which tokens of the sequence its cache holds, -1 = padding; None if it holds all."""
    return columns_of(past, "columns_BK")


def computed_columns(past: Cache | None) -> list[Tensor] | None:
    """The same of those that the layer has computed; a method may have taken some out again."""
    return columns_of(past, "computed_BK")


def columns_of(past: Cache | None, name: str) -> list[Tensor] | None:
    if past is None or not past.layers or not isinstance(past.layers[0], ReducedCacheLayer):
        return None
    return [getattr(layer, name) for layer in past.layers]
