"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): as many tokens as CLS attention has outliers, the rest merged in.

a = softmax(q k^T / sqrt(C)), row of CLS, heads not split;    x'_i = x_i + sum_{j in 32 nearest by keys} a_j x_j
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laco.attention import cls_rows, received
from laco.methods.base import Method
from laco.methods.selector import Plan, Selector, Signals, cosines

NEIGHBOURS = 32


@dataclass(frozen=True, kw_only=True)
class PruMerge(Selector):
    """The tokens whose attention is an outlier (above Q3 + 1.5 IQR), and one extra token of all that is left.

    Their number depends on the picture. Queries and keys are those of the *last* encoder layer, features those that the
    language model reads. Where all tokens stay there is nothing to merge, and no extra token.

    Args:
        keep: None = the number of outliers; a count or fraction fixes how many stay by attention.
        grid: adds evenly spaced tokens, three times as many as those (PruMerge+), so that of a quarter nearly all stay.
    """

    name: ClassVar[str] = "prumerge"
    title: ClassVar[str] = "LLaVA-PruMerge"
    paper: ClassVar[str] = "LLaVA-PruMerge: Adaptive Token Reduction, ICCV 2025, arXiv 2403.15388"
    confirmed: ClassVar[str] = "outlier rule, order by attention, 32 neighbours by keys, extra token, grid of PruMerge+"
    assumed: ClassVar[str] = (
        "quartiles per picture (the reference: per batch); fewer neighbours in small pictures; attention received where"
        " there is no CLS"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"features", "keys", "queries"})
    looks_at: ClassVar = "last"
    applies_to: ClassVar = "features"
    static_count: ClassVar[bool] = False
    equivariant: ClassVar[bool] = False

    keep: int | float | None = None  # type: ignore[assignment]
    grid: bool = False

    def __post_init__(self) -> None:
        if self.keep is None:
            Method.__post_init__(self)
        else:
            super().__post_init__()

    def plan(self, signals: Signals) -> Plan:
        attention_N, tokens = self.attention(signals), signals.grid.tokens
        if self.keep is None:
            return self.at_ratio(signals, ratio := outlier_ratio(attention_N), int(tokens * ratio))
        return self.at_ratio(signals, (count := self.budget(tokens)) / tokens, count)

    def attention(self, signals: Signals) -> Tensor:
        """(N,) attention of CLS to the patches, heads not split; without CLS what they receive from all."""
        assert signals.keys is not None
        assert signals.queries is not None
        q, k = (x.flatten(1)[None, None] for x in (signals.queries, signals.keys))
        attention_N = cls_rows(q, k)[0, 0] if signals.prefix else received(q, k)[0]
        return attention_N[signals.prefix :].float()

    def at_ratio(self, signals: Signals, ratio: float, count: int) -> Plan:
        """The plan that keeps so many tokens by attention; `ratio`, what they are of all, gives the grid's step."""
        assert signals.keys is not None
        attention_N, prefix = self.attention(signals), signals.prefix
        tokens = len(attention_N)
        kept = attention_N.argsort(descending=True, stable=True)[:count]
        if self.grid and len(kept):
            spaced = torch.arange(0, tokens - 1, max(1, int(1 / ratio) // 3), device=kept.device)
            kept = torch.cat([kept, spaced[~torch.isin(spaced, kept)]])
        if len(kept) == tokens:
            return Plan(prefix + torch.arange(tokens, device=kept.device))
        weights = merging_weights(attention_N, cosines(signals.keys[prefix:].flatten(1)), kept)
        weights = torch.cat([weights.new_zeros(len(weights), prefix), weights], dim=1)
        rest = attention_N.clone()
        rest[kept] = -torch.inf
        return Plan(torch.cat([kept, rest.argmax()[None]]) + prefix, weights)


def outlier_ratio(attention: Tensor) -> float:
    """Share of values above Q3 + 1.5 (Q3 - Q1)."""
    values = attention.double()
    low, high = torch.quantile(values, values.new_tensor([0.25, 0.75])).tolist()
    return float((attention > high + 1.5 * (high - low)).double().mean())


def merging_weights(attention_N: Tensor, similarity_NN: Tensor, kept: Tensor) -> Tensor:
    """(K + 1, N): each kept token with its nearest others by attention, then all that is not kept."""
    near_KN = similarity_NN[kept].clone()
    near_KN[torch.arange(len(kept)), kept] = -torch.inf
    nearest = near_KN.topk(min(NEIGHBOURS, len(attention_N) - 1), dim=1).indices
    weights = torch.zeros(len(kept) + 1, len(attention_N), device=attention_N.device)
    weights[:-1].scatter_(1, nearest, attention_N[nearest])
    weights[torch.arange(len(kept)), kept] = 1
    weights[-1] = attention_N
    weights[-1, kept] = 0
    return weights
