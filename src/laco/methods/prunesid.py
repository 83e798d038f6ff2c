"""PruneSID (arXiv 2603.09480): groups of tokens by principal components, and of each the salient and different ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class PruneSID(Selector):
    """Principal semantic components, non-maximum suppression within each, quotas by what survives it.

    Args:
        keep: tokens that stay, a CLS token among them.
        saliency: `attention` of CLS (the authors' code for LLaVA), or `loading` on the component (theirs for Qwen2-VL):
            of the tokens behind the projector, with a suppression threshold of its own; of more than 150 tokens the
            order is spatial.

    The reference takes a randomised PCA (two seeds share about 70 % of the tokens); here it is exact and deterministic.
    """

    name: ClassVar[str] = "prunesid"
    title: ClassVar[str] = "PruneSID"
    paper: ClassVar[str] = "PruneSID, ICLR 2026, arXiv 2603.09480"
    confirmed: ClassVar[str] = (
        "components, suppression thresholds, quotas, order by groups, CLS attention summed, loadings"
    )
    assumed: ClassVar[str] = (
        "exact instead of randomised PCA; attention received where there is no CLS; by loadings no lower limit of 16"
        " tokens"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"features", "cls_attention"})
    applies_to: ClassVar = "features"

    saliency: Literal["attention", "loading"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency == "loading":
            object.__setattr__(self, "needs", frozenset({"tokens"}))
            object.__setattr__(self, "applies_to", "tokens")

    def plan(self, signals: Signals) -> Plan:
        if self.saliency == "loading":
            assert signals.tokens is not None
            return self.by_loading(signals.tokens.float())
        assert signals.features is not None
        total, prefix = self.budget(signals.grid.tokens), signals.prefix
        patches = signals.features[prefix:].float()
        if total == len(patches):
            return Plan(torch.arange(len(signals.features), device=patches.device))
        total += 1 - prefix  # the reference's count has a CLS token in it
        groups_N = principal_groups(patches, max(1, total // 4))
        return self.choose(cosines(patches), signals.saliency("sum"), groups_N, total, prefix)

    def by_loading(self, x_ND: Tensor) -> Plan:
        """The plan without attention."""
        count, total = len(x_ND), self.budget(len(x_ND))
        if total == count:
            return Plan(torch.arange(count, device=x_ND.device))
        components, similarity_NN = max(total // 4, 4), cosines(x_ND)
        loading_N, groups_N = loadings(x_ND, components).max(dim=1)
        # As the reference has it, a mean over the whole matrix, half of which is zero.
        threshold = max(18 * total / count, 1) * float(similarity_NN.triu().mean())
        ordered, survivors = suppressed(similarity_NN, loading_N, groups_N, components, threshold)
        counts = group_quotas([len(members) for members in ordered], survivors, total, lead=0)
        kept = torch.cat([members[:count] for members, count in zip(ordered, counts, strict=True)])
        return Plan(kept.sort().values if total > 150 else kept)

    def choose(self, similarity_NN: Tensor, saliency_N: Tensor, groups_N: Tensor, total: int, prefix: int) -> Plan:
        """The plan for given groups."""
        threshold = total / 32 * float(off_diagonal_mean(similarity_NN))
        ordered, survivors = suppressed(similarity_NN, saliency_N, groups_N, max(1, total // 4), threshold)
        counts = group_quotas([len(members) for members in ordered], survivors, total)
        chosen = [members[:count] for members, count in zip(ordered, counts, strict=True)]
        lead = torch.arange(prefix, device=groups_N.device)
        return Plan(torch.cat([lead, *(members + prefix for members in chosen)]))


def principal_groups(features_NC: Tensor, components: int) -> Tensor:
    """(N,) the component with the largest loading of each token: channels are samples, tokens are variables."""
    return loadings(features_NC, components).argmax(dim=1)


def loadings(features_NC: Tensor, components: int) -> Tensor:
    """(N, q) how much each token weighs in each of the first components, of which there are no more than channels."""
    samples_CN = features_NC.sigmoid().T
    _, _, loadings_qN = torch.linalg.svd(samples_CN - samples_CN.mean(dim=0), full_matrices=False)
    return loadings_qN[:components].abs().T


def off_diagonal_mean(similarity_NN: Tensor) -> Tensor:
    """Mean over all pairs of different tokens."""
    count = len(similarity_NN)
    return similarity_NN.triu(1).sum() / max(1, count * (count - 1) // 2)


def suppressed(
    similarity_NN: Tensor, saliency_N: Tensor, groups_N: Tensor, groups: int, threshold: float
) -> tuple[list[Tensor], list[int]]:
    """Members of each group, survivors of non-maximum suppression first, and how many these are; each by saliency."""
    ordered, survivors = [], []
    for group in range(groups):
        members = (groups_N == group).nonzero().flatten()
        members = members[saliency_N[members].argsort(descending=True, stable=True)]
        free, winners = torch.ones_like(members, dtype=torch.bool), []
        for place, member in enumerate(members):
            if free[place]:
                winners.append(place)
                free &= similarity_NN[member, members] <= threshold
        won = torch.zeros_like(members, dtype=torch.bool)
        won[winners] = True
        ordered.append(torch.cat([members[won], members[~won]]))
        survivors.append(len(winners))
    return ordered, survivors


def group_quotas(sizes: list[int], survivors: list[int], total: int, lead: int = 1) -> list[int]:
    """How many tokens of each group stay: `total` in all, with `lead` of no group, where there are so many."""
    low = [min(1, size) for size in sizes]
    high = [min(5 * -(-total // 64), size, alive) for size, alive in zip(sizes, survivors, strict=True)]
    while sum(high) < min(total, sum(sizes)):
        high = [min(limit + 1, size) for limit, size in zip(high, sizes, strict=True)]
    rest = max(0, total - sum(low) - lead)
    share = torch.tensor(survivors, dtype=torch.float) / max(1, sum(survivors))
    steps = (share.cumsum(0) * rest).round().long().diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    counts = [min(base + step, limit) for base, step, limit in zip(low, steps, high, strict=True)]
    missing = total - lead - sum(counts)
    for group in torch.tensor(survivors).argsort(descending=True).tolist():  # of equal ones as the reference has it
        added = min(high[group] - counts[group], max(0, missing))
        counts[group] += added
        missing -= added
    for group in range(len(counts)):  # more groups than tokens to give
        taken = min(counts[group], max(0, -missing))
        counts[group] -= taken
        missing += taken
    return counts
