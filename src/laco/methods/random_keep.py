"""Keeping one token of every window, chosen at random: the baseline that any choice or mean has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laco.grid import to_windows
from laco.methods.base import Merger, MergerModule


def scrambled(index: Tensor, seed: int) -> Tensor:
    """A number in 0 .. 2^32 - 1 that looks random for every (index, seed): the finaliser of MurmurHash3.

    Plain integer arithmetic instead of a generator, so that it is the same on every device and compiles into
    one graph.
    """
    x = (index + 0x9E3779B1 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True, kw_only=True)
class RandomKeep(Merger):
    """One token of each r x r window stays as it is, the others are dropped.

    Which one is random but fixed: it depends on the seed and on the window's place, not on the picture.

    Args:
        seed: chooses the tokens.
    """

    name: ClassVar[str] = "random_keep"
    title: ClassVar[str] = "random token of each window"
    paper: ClassVar[str] = "baseline; that random keeps up with many methods: UniPruneBench, arXiv 2511.02650"
    confirmed: ClassVar[str] = "tokens are kept or dropped, never changed"
    assumed: ClassVar[str] = "one of every window instead of a random quarter of all, so that a grid remains"
    trained: ClassVar[bool] = False

    seed: int = 0

    def build(self, width: int) -> "KeptToken":
        return KeptToken(self.factor, self.seed)


class KeptToken(MergerModule):
    """(B, H, W, C) map -> (B, H/r, W/r, C)."""

    sees: ClassVar = "map"

    def __init__(self, factor: int, seed: int):
        super().__init__()
        self.factor, self.seed = factor, seed

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BhwRC = to_windows(x_BHWC, self.factor)
        _, h, w, size, _ = x_BhwRC.shape
        place_hw = torch.arange(h * w, device=x_BHWC.device).view(h, w)
        kept_hw = scrambled(place_hw, self.seed) % size
        return torch.take_along_dim(x_BhwRC, kept_hw[None, :, :, None, None], dim=-2).squeeze(-2)
