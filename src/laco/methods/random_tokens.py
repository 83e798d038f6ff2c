"""Tokens chosen at random: the baseline that any choice has to beat, at any budget."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from laco.methods.random_keep import scrambled
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Selector):
    """Random tokens of the picture, as they are.

    Which ones is random but fixed: it depends on the seed and on how many there are, not on the picture, its batch or
    the device. What a small budget keeps, a larger one keeps too. `RandomKeep` is the same idea within windows, where a
    grid has to remain.

    Args:
        seed: chooses the tokens.
    """

    name: ClassVar[str] = "random_tokens"
    title: ClassVar[str] = "random tokens"
    paper: ClassVar[str] = "baseline; that random keeps up with many methods: UniPruneBench, arXiv 2511.02650"
    confirmed: ClassVar[str] = "tokens are kept or dropped, never changed"
    assumed: ClassVar[str] = "the same tokens of every picture of the same size"
    equivariant: ClassVar[bool] = False

    seed: int = 0

    def plan(self, signals: Signals) -> Plan:
        order = scrambled(torch.arange(signals.grid.tokens, device=signals.device), self.seed).argsort(stable=True)
        return Plan(order[: self.budget(len(order))].sort().values)
