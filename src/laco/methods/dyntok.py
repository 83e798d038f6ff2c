"""DynTok (arXiv 2506.03990): neighbours in a row that look alike become one token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.base import Method
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class DynTok(Selector):
    """Every row of every frame is read from left to right; a token joins the group of its left neighbour if the
    encoder's features of the two are more alike than `threshold`, else it opens a group. Groups become their mean.

    The number of tokens depends on the picture. A chain compares neighbours, not the group's mean; groups end with
    the row.

    Args:
        threshold: cosine above which neighbours join; 1 = every token stays, below -1 = one token a row.
    """

    name: ClassVar[str] = "dyntok"
    title: ClassVar[str] = "DynTok"
    paper: ClassVar[str] = "DynTok: Dynamic Compression of Visual Tokens for Video Understanding, arXiv 2506.03990"
    confirmed: ClassVar[str] = "groups in rows by neighbours' cosine, means, raster order (from notes on the paper)"
    assumed: ClassVar[str] = "threshold 0.6 (a figure's); features at the resolution of the tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    static_count: ClassVar[bool] = False
    equivariant: ClassVar[bool] = False

    keep: None = None  # type: ignore[assignment]
    threshold: float = 0.6

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        if self.threshold > 1:
            raise LacoError(f"dyntok: threshold is a cosine, at most 1; got {self.threshold}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.features is not None
        x_RWC = normalize(signals.features[signals.prefix :].float(), dim=-1).unflatten(0, (-1, signals.grid.width))
        opens_RW = torch.ones(x_RWC.shape[:2], dtype=torch.bool, device=x_RWC.device)
        # Rounding makes the cosine of equal neighbours a little more than 1.
        opens_RW[:, 1:] = (x_RWC[:, 1:] * x_RWC[:, :-1]).sum(dim=-1).clamp(max=1) <= self.threshold
        group_N = opens_RW.flatten().cumsum(0) - 1
        first = opens_RW.flatten().nonzero().flatten()
        weights = torch.zeros(len(first), len(group_N), device=group_N.device)
        weights[group_N, torch.arange(len(group_N), device=group_N.device)] = 1
        return Plan(first, weights / weights.sum(dim=1, keepdim=True))
