"""HoloV (arXiv 2510.02912): every region of a picture keeps tokens, in proportion to the attention that it draws."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.selector import Plan, Selector, Signals

ATTENTION_SCALE, VARIANCE_WEIGHT, EPS = 1e3, 0.09, 1e-6


@dataclass(frozen=True, kw_only=True)
class HoloV(Selector):
    """Tokens in raster order are cut into crops; a crop's quota follows its score, its tokens are chosen by attention.

    The score adds to the attention a variance of similarities that the reference rescales to the crop's mean
    attention, so in effect it is 1.09 times the mean attention.

    Args:
        crops: pieces of equal length, the first ones longer by one where they do not divide. None = the fewer, the more
            is kept, int(16/9 N / K), as the authors have it for Qwen-VL.
        strict_reference: quota that a crop is too small for is lost, and zero vectors fill the budget (`quotas`
            says how many each crop gets). By default it goes to the crops that follow in score.
    """

    name: ClassVar[str] = "holov"
    title: ClassVar[str] = "HoloV"
    paper: ClassVar[str] = "HoloV: Holistic Visual Token Pruning, NeurIPS 2025, arXiv 2510.02912"
    confirmed: ClassVar[str] = "crops, scores, quotas, choice by attention (mean over heads), 16 crops, order in a crop"
    assumed: ClassVar[str] = "quota beyond a crop's size goes to other crops; attention received without CLS"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "cls_attention"})
    equivariant: ClassVar[bool] = False

    crops: int | None = 16
    strict_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None and self.crops < 1:
            raise LacoError(f"holov: crops must be 1 or more; got {self.crops}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        attention_N, count = signals.saliency("mean"), self.budget(signals.grid.tokens)
        crops = int(1024 / 576 * len(attention_N) / count) if self.crops is None else self.crops
        parts = torch.arange(len(attention_N), device=attention_N.device).tensor_split(crops)
        parts = tuple(part for part in parts if len(part))
        score = torch.stack([crop_score(signals.tokens[part], attention_N[part]) for part in parts])
        quota = quotas(score, count)
        if not self.strict_reference:
            quota = redistribute(quota, [len(part) for part in parts], count, score)
        chosen = []
        for part, wanted in zip(parts, quota, strict=True):
            order = part if wanted >= len(part) else part[attention_N[part].argsort(descending=True, stable=True)]
            chosen.append(order[:wanted])
        kept = torch.cat(chosen)[:count]
        if len(kept) == count:
            return Plan(kept)
        weights = torch.zeros(count, len(attention_N), device=kept.device)
        weights[torch.arange(len(kept)), kept] = 1
        return Plan(torch.cat([kept, kept.new_full((count - len(kept),), -1)]), weights)


def crop_score(x_ND: Tensor, attention_N: Tensor) -> Tensor:
    """How much of the budget a crop deserves; one of a single token its plain attention, which is next to nothing."""
    if len(x_ND) == 1:
        return attention_N.mean()
    z_ND = x_ND.float()
    z_ND = z_ND / (z_ND.norm(dim=-1, keepdim=True) + EPS)
    similarity_NN = (z_ND @ z_ND.T).fill_diagonal_(0)
    others = len(x_ND) - 1
    mean_N = similarity_NN.sum(dim=1) / others
    variance_N = (similarity_NN - mean_N[:, None]).square().sum(dim=1) / others
    scaled_N = ATTENTION_SCALE * attention_N
    variance_N = variance_N * scaled_N.abs().mean() / (variance_N.abs().mean() + EPS)
    return (scaled_N + VARIANCE_WEIGHT * variance_N).mean()


def quotas(score: Tensor, count: int) -> list[int]:
    """`count` tokens over the crops in proportion to their scores; what rounding down leaves, to the best crops."""
    share = score / (score.sum() + EPS)
    quota = (share * count).floor().long()
    left = count - int(quota.sum())
    quota[share.argsort(descending=True, stable=True)[:left]] += 1
    return quota.tolist()


def redistribute(quota: list[int], sizes: list[int], count: int, score: Tensor) -> list[int]:
    """Quotas within the crops' sizes and `count` in all: what goes beyond a size goes to other crops, best first."""
    quota = [min(wanted, size) for wanted, size in zip(quota, sizes, strict=True)]
    for crop in score.argsort(descending=True, stable=True).tolist():
        quota[crop] += min(sizes[crop] - quota[crop], count - sum(quota))
    return quota
