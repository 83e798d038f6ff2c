"""GreedyPrune (arXiv 2506.13166): the tokens most like the question, none too like another.

maximise sum_S w_i,    cos(v_i, v_j) <= tau for all i != j in S,    solved greedily in the order of w
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.greedy import gram, independent_set
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class GreedyPrune(Selector):
    """Saliency is the cosine with the question: its last token (the paper, as summarised), or the mean of its
    tokens (a port).

    When every remaining token is too like one that was kept, the most salient of them fill the budget.

    Args:
        threshold: tau.
        query: `last` token of the question, or the `mean` of all.
    """

    name: ClassVar[str] = "greedy_prune"
    title: ClassVar[str] = "GreedyPrune"
    paper: ClassVar[str] = "GreedyPrune, arXiv 2506.13166"
    confirmed: ClassVar[str] = "objective, constraint and greedy order, from summaries of the paper"
    assumed: ClassVar[str] = "tau = 0.9 and the filling rule (a third party's port); at the language model's input"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "text"})

    threshold: float = 0.9
    query: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise LacoError(f"greedy_prune: threshold is a cosine in -1 .. 1; got {self.threshold}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        assert signals.text is not None
        query_D = signals.text[-1] if self.query == "last" else signals.text.float().mean(dim=0)
        unit_ND = normalize(signals.tokens.float(), dim=-1)
        saliency_N = unit_ND @ normalize(query_D.float(), dim=-1)
        # No cosine is above 1, but as computed those of equal tokens are.
        threshold = self.threshold if self.threshold < 1 else inf
        picks, _ = independent_set(saliency_N, gram(unit_ND), threshold, self.budget(signals.grid.tokens))
        return Plan(picks.sort().values)
