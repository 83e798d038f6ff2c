"""Average pooling to any number of tokens: the baseline where no square window comes near the budget.

A frame of H x W tokens that may keep k becomes h = round(sqrt(k H / W)) bands of rows, and band i

    floor((i + 1) k / h) - floor(i k / h)    regions side by side, each of which becomes its mean.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class GridPool(Selector):
    """Exactly K regions, nearly square and nearly of one size; the same for every picture.

    K = h w of the picture's own shape gives the windows of adaptive pooling: of 12 x 12 tokens, 36 are 2 x 2 windows.
    Frames share the budget; with fewer tokens than frames, neighbouring frames become one token.
    """

    name: ClassVar[str] = "grid_pool"
    title: ClassVar[str] = "average pooling to a budget"
    paper: ClassVar[str] = "baseline; none"
    confirmed: ClassVar[str] = "plain means of regions that do not overlap, no parameters"
    assumed: ClassVar[str] = "the shape of the regions; a region's place is that of its first token"
    equivariant: ClassVar[bool] = False

    def plan(self, signals: Signals) -> Plan:
        (frames, height, width), device = signals.grid, signals.device
        tokens, count = signals.grid.tokens, self.budget(signals.grid.tokens)
        clips = min(frames, count)  # of neighbouring frames
        place_F11 = torch.arange(frames, device=device)[:, None, None] * clips // frames
        row_H1, column_W = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)

        first_F11, own_F11 = pieces(place_F11, count, clips)
        bands_F11 = (own_F11 * height / width).sqrt().round().long()
        bands_F11 = bands_F11.clamp(min=-(-own_F11 // width), max=own_F11.clamp(max=height))
        first_FH1, own_FH1 = pieces(row_H1 * bands_F11 // height, own_F11, bands_F11)
        region_N = (first_F11 + first_FH1 + column_W * own_FH1 // width).flatten()

        place_N = torch.arange(tokens, device=device)
        weights_KN = torch.zeros(count, tokens, device=device)
        weights_KN[region_N, place_N] = 1
        kept_K = place_N.new_full((count,), tokens).scatter_reduce(0, region_N, place_N, "amin")
        return Plan(kept_K, weights_KN / weights_KN.sum(dim=1, keepdim=True))


def pieces(index: Tensor, total: int | Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Where piece `index` begins if a total is cut into so many of nearly one size, and its size."""
    first = index * total // count
    return first, (index + 1) * total // count - first
