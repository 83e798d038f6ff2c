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
        strict_reference: with `keep` and `grid`, the grid of the authors' fixed ratio (1/8 in their training): as many
            spaced tokens as were chosen, from the middle of the first step on. Some may be kept twice, and are then
            neighbours of themselves; as many tokens as that, the first of those not kept, are merged into nothing.
    """

    name: ClassVar[str] = "prumerge"
    title: ClassVar[str] = "LLaVA-PruMerge"
    paper: ClassVar[str] = "LLaVA-PruMerge: Adaptive Token Reduction, ICCV 2025, arXiv 2403.15388"
    confirmed: ClassVar[str] = (
        "outlier rule, order by attention, 32 neighbours by keys, extra token, grids of PruMerge+"
    )
    assumed: ClassVar[str] = (
        "quartiles per picture (the reference: per batch); the adaptive grid with a fixed number, too, no token twice,"
        " unless strict_reference; fewer neighbours in small pictures; attention received where there is no CLS"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"features", "keys", "queries"})
    looks_at: ClassVar = "last"
    applies_to: ClassVar = "features"
    static_count: ClassVar[bool] = False
    equivariant: ClassVar[bool] = False

    keep: int | float | None = None  # type: ignore[assignment]
    grid: bool = False
    strict_reference: bool = False

    def __post_init__(self) -> None:
        if self.keep is None:
            Method.__post_init__(self)
        else:
            super().__post_init__()

    def plan(self, signals: Signals) -> Plan:
        attention_N, tokens = self.attention(signals), signals.grid.tokens
        if self.keep is None:
            ratio = outlier_ratio(attention_N)
            return self.at_ratio(signals, ratio, self.whole(tokens * ratio))
        return self.at_ratio(signals, (count := self.budget(tokens)) / tokens, count)

    def whole(self, value: float) -> int:
        """The whole number below; what binary fractions take away from one does not count, except for the reference."""
        return int(value if self.strict_reference else round(value, 9))

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
            step, fixed = self.whole(1 / ratio), self.strict_reference and self.keep is not None
            first, step = (step // 2, step) if fixed else (0, max(1, step // 3))
            spaced = torch.arange(first, tokens - 1, step, device=kept.device)
            kept = torch.cat([kept, spaced if fixed else spaced[~torch.isin(spaced, kept)]])
        stays_N = torch.zeros_like(attention_N, dtype=torch.bool).index_fill_(0, kept, True)
        rest = (~stays_N).nonzero().flatten()
        if not len(rest):
            return Plan(prefix + torch.arange(tokens, device=kept.device))
        twice = len(kept) + len(rest) - tokens
        weights = merging_weights(attention_N, cosines(signals.keys[prefix:].flatten(1)), kept, rest[twice:])
        weights = torch.cat([weights.new_zeros(len(weights), prefix), weights], dim=1)
        return Plan(torch.cat([kept, rest[attention_N[rest].argmax()][None]]) + prefix, weights)


def outlier_ratio(attention: Tensor) -> float:
    """Share of values above Q3 + 1.5 (Q3 - Q1)."""
    values = attention.double()
    low, high = torch.quantile(values, values.new_tensor([0.25, 0.75])).tolist()
    return float((attention > high + 1.5 * (high - low)).double().mean())


def merging_weights(attention_N: Tensor, similarity_NN: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    """(K + 1, N): each kept token with its nearest others by attention, then the rest.

    Others are those kept and the rest; what is kept twice counts twice.
    """
    pool, own = torch.cat([kept, rest]), torch.arange(len(kept), device=kept.device)
    near_KP = similarity_NN[kept][:, pool]
    near_KP[own, own] = -torch.inf
    nearest = pool[near_KP.topk(min(NEIGHBOURS, len(pool) - 1), dim=1).indices]
    weights = torch.zeros(len(kept) + 1, len(attention_N), device=attention_N.device)
    weights[:-1].scatter_add_(1, nearest, attention_N[nearest])
    weights[own, kept] += 1
    weights[-1, rest] = attention_N[rest]
    return weights
