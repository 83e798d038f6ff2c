"""SCOPE (arXiv 2510.24214): tokens that cover all others, the salient ones first.

gain_j = a_j^alpha sum_i max(0, cos(x_i, x_j) - b_i),    b_i = what the picks cover of token i so far
"""

from dataclasses import dataclass
from typing import ClassVar

from laco.errors import LacoError
from laco.methods.greedy import coverage
from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class Scope(Selector):
    """Saliency-weighted coverage of the encoder's features.

    Args:
        alpha: exponent of the saliency a, the attention of CLS summed over heads; 0 = coverage alone.
    """

    name: ClassVar[str] = "scope"
    title: ClassVar[str] = "SCOPE"
    paper: ClassVar[str] = "SCOPE: Saliency-Coverage Oriented Token Pruning, NeurIPS 2025, arXiv 2510.24214"
    confirmed: ClassVar[str] = "gain, alpha = 1, CLS attention summed over heads, CLS not kept, spatial order"
    assumed: ClassVar[str] = "attention received where there is no CLS (as the AngelSlim port); venue from memory"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "cls_attention"})
    applies_to: ClassVar = "features"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise LacoError(f"scope: alpha must be 0 or more; got {self.alpha}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.features is not None
        similarity_NN = cosines(signals.features[signals.prefix :])
        picks = coverage(similarity_NN, self.budget(signals.grid.tokens), signals.saliency("sum") ** self.alpha)
        return Plan(picks.sort().values + signals.prefix)
