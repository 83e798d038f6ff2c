"""Average pooling of windows: the parameter-free baseline that every merger has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from laco.methods.base import Merger, MergerModule


@dataclass(frozen=True, kw_only=True)
class AveragePool(Merger):
    """The mean of every r x r window: what LaCo's shortcut does alone, and what LaCo starts as."""

    name: ClassVar[str] = "average_pool"
    title: ClassVar[str] = "average pooling"
    paper: ClassVar[str] = "baseline; inside an encoder in LLaVA-UHD v4, arXiv 2605.08985, table 4"
    confirmed: ClassVar[str] = "plain mean, no parameters"
    assumed: ClassVar[str] = "odd grids padded by repeating the last row and column"
    trained: ClassVar[bool] = False

    def build(self, width: int) -> "WindowMean":
        return WindowMean()


class WindowMean(MergerModule):
    """(..., R, C) windows -> (..., C)."""

    def forward(self, x_RC: Tensor) -> Tensor:
        return x_RC.mean(dim=-2)
