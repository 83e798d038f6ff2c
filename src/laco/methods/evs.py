"""EVS, efficient video sampling (NVIDIA, in vLLM): what has not changed since the last frame is dropped.

d(t, i) = 1 - cos(x(t, i), x(t - 1, i)),    the first frame stays whole
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laco.grid import Grid
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class EVS(Selector):
    """The tokens that differ most from the same place one frame before; of videos.

    At least the first frame stays, so a still picture stays as it is. Kept tokens keep their places within the
    video; vLLM lets the text go on right behind the first position after the video (`positions="keep"` here).
    """

    name: ClassVar[str] = "evs"
    title: ClassVar[str] = "EVS"
    paper: ClassVar[str] = "Efficient Video Sampling, arXiv 2510.14624; vLLM 0.32, --video-pruning-rate"
    confirmed: ClassVar[str] = "dissimilarity, whole first frame, int(F n (1 - q)) tokens but at least n, stable order"
    assumed: ClassVar[str] = "the paper's number from memory; keep = 1 - q = 25 % is our default"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    equivariant: ClassVar[bool] = False
    video_only: ClassVar[bool] = True

    @staticmethod
    def rounding(count: float) -> int:
        return int(count)

    def left(self, tokens: int, prefix: int = 0, frames: int = 1) -> int:
        return max(tokens // frames, self.budget(tokens))

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        frames, size = signals.grid.frames, signals.grid.height * signals.grid.width
        x_FnD = torch.nn.functional.normalize(signals.tokens.float(), dim=-1).view(frames, size, -1)
        change_Fn = signals.tokens.new_full((frames, size), torch.inf, dtype=torch.float)
        change_Fn[1:] = 1 - (x_FnD[1:] * x_FnD[:-1]).sum(dim=-1)
        count = self.left(signals.grid.tokens, frames=frames)
        order = change_Fn.flatten().argsort(descending=True, stable=True)
        return Plan(order[:count].sort().values)


def media_positions(grid: Grid, tokens_per_second: float, seconds_per_frame: float) -> Tensor:
    """(N, 4): time, row and column of every token within its video, and the grid's width, by which text behind it
    goes on.

    Source: vLLM's positions for videos under EVS; rows of kept tokens are gathered.
    """
    frames, rows, columns = (torch.arange(side) for side in grid)
    times = (frames * (tokens_per_second * seconds_per_frame)).long()
    places = torch.cartesian_prod(times, rows, columns).view(-1, 3)
    return torch.cat([places, torch.full_like(places[:, :1], grid.width)], dim=1)
