"""WTC, the windowed token compression of LLaVA-UHD v3 (arXiv 2511.21150): a learned mean of every window.

z_i = MLP(concat(x_i, mean(x_1 .. x_R))),    y = sum_i softmax_i(z_i) * x_i,    per channel
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from laco.methods.base import Merger, MergerModule


@dataclass(frozen=True, kw_only=True)
class WTC(Merger):
    """Every channel weighs the window's tokens by their content; no norm, no residual.

    Starts as the plain mean, its last map zero, so that an inserted model works at once. In the reference all maps are
    zero at first, so that no gradient reaches any of them and it would stay the mean for ever. The reference also views
    the channels as 16 heads, which changes nothing but that their number must divide by 16; here it need not.
    """

    name: ClassVar[str] = "wtc"
    title: ClassVar[str] = "windowed token compression (LLaVA-UHD v3)"
    paper: ClassVar[str] = "LLaVA-UHD v3: Progressive Visual Compression, arXiv 2511.21150"
    confirmed: ClassVar[str] = "formula, start as the mean, 2 x 2 windows after two or three layers (4 and 18 of 27)"
    assumed: ClassVar[str] = "depth 1/4 for a single one; odd grids padded (the reference raises)"
    trained: ClassVar[bool] = True
    default_depth: ClassVar[float] = 1 / 4

    def build(self, width: int) -> "WindowedCompression":
        return WindowedCompression(width)


class WindowedCompression(MergerModule):
    """(..., R, C) windows -> (..., C). See `WTC`."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * width, width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter in self.fc2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_RC: Tensor) -> Tensor:
        mean_RC = x_RC.mean(dim=-2, keepdim=True).expand_as(x_RC)
        logits_RC = self.fc2(self.act(self.fc1(torch.cat([x_RC, mean_RC], dim=-1))))
        return (logits_RC.softmax(dim=-2) * x_RC).sum(dim=-2)
