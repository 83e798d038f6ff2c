"""DivPrune (arXiv 2503.02175): the most diverse tokens, by farthest-point selection.

first = argmax_j min_{i != j} d_ij,    then repeatedly argmax_j min_{i kept} d_ij,    d_ij = 1 - cos(x_i, x_j)
"""

from dataclasses import dataclass
from typing import ClassVar

from laco.methods.greedy import farthest_tokens
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class DivPrune(Selector):
    """Max-min diversity among the tokens that the language model would read; needs neither text nor attention.

    Of exact duplicates the reference picks the first again and again, once every distance is zero; here a token is
    picked once.
    """

    name: ClassVar[str] = "div_prune"
    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "DivPrune: Diversity-based Visual Token Pruning for LMMs, CVPR 2025, arXiv 2503.02175"
    confirmed: ClassVar[str] = "cosine distance, first pick, greedy order, spatial order of what is kept, keep = 9.8 %"
    assumed: ClassVar[str] = "float32 where the reference computes in half precision; no token twice; positions kept"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    keep: int | float = 0.098

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        return Plan(farthest_tokens(signals.tokens, self.budget(signals.grid.tokens)).sort().values)
