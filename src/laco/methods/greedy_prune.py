"""GreedyPrune (arXiv 2506.13166): the tokens most like the question, none too like another.

maximise sum_S w_i,    cos(v_i, v_j) <= tau for all i != j in S,    solved greedily in the order of w
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.selector import Plan, Selector, Signals, cosines


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
        saliency_N = normalize(signals.tokens.float(), dim=-1) @ normalize(query_D.float(), dim=-1)
        picks, _ = independent_set(
            saliency_N, cosines(signals.tokens), self.threshold, self.budget(signals.grid.tokens)
        )
        return Plan(picks.sort().values)


def independent_set(weight_N: Tensor, similarity_NN: Tensor, threshold: float, count: int) -> tuple[Tensor, int]:
    """(count,) picks in order, and how many of them keep the threshold; the others fill up by weight."""
    order = weight_N.argsort(descending=True, stable=True)
    free_N = torch.ones_like(weight_N, dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < count:
        left = order[free_N[order]]
        if not len(left):
            break
        picks.append(int(left[0]))
        free_N &= similarity_NN[left[0]] <= threshold
        free_N[left[0]] = False
    chosen = torch.tensor(picks, dtype=torch.long, device=order.device)
    rest = order[~torch.isin(order, chosen)]
    return torch.cat([chosen, rest[: count - len(picks)]]), len(picks)
