"""SCOPE (arXiv 2510.24214): tokens that cover all others, the salient ones first.

gain_j = a_j^alpha sum_i max(0, cos(x_i, x_j) - b_i),    b_i = what the picks cover of token i so far
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from laco.errors import LacoError
from laco.methods.greedy import coverage
from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class Scope(Selector):
    """Saliency-weighted coverage of the encoder's features.

    Args:
        alpha: exponent of the saliency a, the attention of CLS summed over heads; 0 = coverage alone.
        combine: `multiply` the coverage by a^alpha, or `add` it, the other form in the authors' code. A token covers
            many others, so that there the saliency decides among nearly equal ones only.
    """

    name: ClassVar[str] = "scope"
    title: ClassVar[str] = "SCOPE"
    paper: ClassVar[str] = "SCOPE: Saliency-Coverage Oriented Token Pruning, NeurIPS 2025, arXiv 2510.24214"
    confirmed: ClassVar[str] = (
        "gain, product and sum, alpha = 1, CLS attention summed over heads, CLS not kept, spatial order"
    )
    assumed: ClassVar[str] = "attention received where there is no CLS (as the AngelSlim port); venue from memory"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "cls_attention"})
    applies_to: ClassVar = "features"

    alpha: float = 1.0
    combine: Literal["multiply", "add"] = "multiply"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise LacoError(f"scope: alpha must be 0 or more; got {self.alpha}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.features is not None
        picks = self.picks(cosines(signals.features[signals.prefix :]), signals.saliency("sum"))
        return Plan(picks.sort().values + signals.prefix)

    def picks(self, similarity_NN: Tensor, saliency_N: Tensor) -> Tensor:
        """(K,) what is kept, in the order of picking."""
        count, saliency_N = self.budget(len(saliency_N)), saliency_N.double() ** self.alpha
        if self.combine == "multiply":
            return coverage(similarity_NN, count, saliency_N)
        return coverage(similarity_NN, count, bonus_N=saliency_N)
