"""VisPruner (arXiv 2412.01818): the tokens that CLS looks at, and of the rest those that are no duplicates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.selector import Plan, Selector, Signals, cosines

NEAR = 32


@dataclass(frozen=True, kw_only=True)
class VisPruner(Selector):
    """A share of the budget by CLS attention (mean over heads), the rest by dropping near-duplicates.

    Args:
        important: that share; 1 = by attention alone (FasterVLM).
        step: near-duplicates dropped at a time.
    """

    name: ClassVar[str] = "vispruner"
    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = "Beyond Text-Visual Attention: Exploiting Visual Cues, ICCV 2025, arXiv 2412.01818"
    confirmed: ClassVar[str] = "share 0.5, CLS attention averaged, parity splits of the list, 8 a step, spatial order"
    assumed: ClassVar[str] = (
        "odd numbers of remaining tokens (the reference fails there); attention received without CLS"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"features", "cls_attention"})
    equivariant: ClassVar[bool] = False

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1 or self.step < 1:
            raise LacoError("vispruner: important lies in 0 .. 1 and step is 1 or more")

    def plan(self, signals: Signals) -> Plan:
        assert signals.features is not None
        count = self.budget(signals.grid.tokens)
        order = signals.saliency("mean").argsort(descending=True, stable=True)
        first = int(count * self.important)
        features = signals.features[signals.prefix :]
        rest = without_duplicates(cosines(features), order[first:], count - first, self.step)
        return Plan(torch.cat([order[:first], rest]).sort().values)


def without_duplicates(similarity_NN: Tensor, rest: Tensor, count: int, step: int) -> Tensor:
    """Drops from a list of tokens, a few at a time, those with a near twin, until `count` are left.

    Every other token of the list, from the first on, is compared with those between; the tokens that remain of the
    former go to the front, the most redundant first.

    A nearest twin is looked for among the `NEAR` tokens most like a token of all, computed once; in the whole list only
    where none of these is left.
    """
    near = similarity_NN.topk(min(NEAR, len(similarity_NN)), dim=1)
    while len(rest) > count:
        dropped = min(step, len(rest) - count, (len(rest) + 1) // 2)
        even, odd = rest[::2], rest[1::2]
        is_odd_N = torch.zeros_like(similarity_NN[0], dtype=torch.bool).index_fill_(0, odd, True)
        twin = near.values[even].masked_fill_(~is_odd_N[near.indices[even]], -torch.inf).amax(dim=1)
        far = (twin == -torch.inf).nonzero()
        if len(odd):
            twin[far] = similarity_NN[even[far], odd].amax(dim=1, keepdim=True)
        rest = torch.cat([even[twin.argsort(descending=True, stable=True)[dropped:]], odd])
    return rest
