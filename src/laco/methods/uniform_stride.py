"""Tokens at even distances: the baseline that knows neither picture nor question.

kept = floor((2 i + 1) N / (2 K)),    i = 0 .. K - 1
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class UniformStride(Selector):
    """K of N tokens, each in the middle of one of K equal pieces of the sequence; the same for every picture.

    The sequence is in raster order, frame after frame. Where the stride divides a row, the same columns are kept in
    every row.
    """

    name: ClassVar[str] = "uniform_stride"
    title: ClassVar[str] = "uniform stride"
    paper: ClassVar[str] = "baseline; none"
    confirmed: ClassVar[str] = "tokens are kept or dropped, never changed"
    assumed: ClassVar[str] = "the middle of each piece, so that both ends of the sequence are equally far"
    equivariant: ClassVar[bool] = False

    def plan(self, signals: Signals) -> Plan:
        tokens = signals.grid.tokens
        count = self.budget(tokens)
        return Plan((2 * torch.arange(count, device=signals.device) + 1) * tokens // (2 * count))
