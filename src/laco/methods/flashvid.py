"""FlashVID (arXiv 2602.08024): of every frame of a video the attended and diverse tokens; the rest merges over time,
then in space.

ADTS   farthest points of D_ij = (1 - cos(x_i, x_j)) w_j,    w = attention received [* relevance to the segment]
TSTM   every other token joins its like in the frame before, where cos > threshold: trees, whose roots stand for them
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from laco.errors import LacoError
from laco.methods.decoder import DecoderSignals, ScoringMethod
from laco.methods.dpc_knn import averaging, density_peaks
from laco.methods.greedy import farthest_points
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class FlashVID(Selector):
    """Attention- and diversity-based token selection, and tree-based spatiotemporal token merging, segment by segment.

    How many tokens remain depends on the video: about `keep * expansion`, of which `FlashVIDLate` drops more inside the
    language model.

    Args:
        keep: share of the tokens before the expansion.
        attended: share of a frame's tokens that is chosen; the others come of merging.
        relevance: whether diversity also weighs how much a token is like the segment (the authors' `attn_div_v2`).
        merge_above: cosine above which a token joins one of the frame before.
        cut_below: cosine of neighbouring frames below which a segment ends.
        min_segments: as many there are at least.

    `strict_reference`: a tree is divided by one more than the direct children of its root, not by its size, so that
    what hangs deeper weighs too much; of segments of one frame the tokens that were chosen are merged as well; of
    videos with fewer frames than `min_segments` some segments are empty (`segments`); products slightly above a whole
    number, by binary fractions, are rounded up; centres as `density_peaks` says.
    """

    name: ClassVar[str] = "flashvid"
    title: ClassVar[str] = "FlashVID"
    paper: ClassVar[str] = (
        "FlashVID: Training-free Tree-based Spatiotemporal Token Merging, ICLR 2026, arXiv 2602.08024"
    )
    confirmed: ClassVar[str] = "segments, selection, trees, their lower bound, spatial merging, order, default settings"
    assumed: ClassVar[str] = "means over whole trees; no token twice; no noise in densities"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "cls_attention"})
    static_count: ClassVar[bool] = False
    equivariant: ClassVar[bool] = False

    keep: int | float = 0.25
    expansion: float = 1.25
    attended: float = 0.7
    relevance: bool = True
    merge_above: float = 0.8
    cut_below: float = 0.9
    min_segments: int = 8
    strict_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.attended <= 1 or self.expansion <= 0 or self.min_segments < 1 or self.merge_above < -1:
            raise LacoError(
                "flashvid: attended is a share in 0 .. 1, expansion is above 0, min_segments 1 or more, merge_above"
                " a cosine"
            )

    def per_frame(self, size: int, frames: int) -> tuple[int, int]:
        """Of a frame of so many tokens, how many are chosen and how many come of merging."""
        ratio = self.keep if isinstance(self.keep, float) else self.budget(size * frames) / (size * frames)
        total = min(rounded_up(size * ratio * self.expansion, self.strict_reference), size)
        chosen = rounded_up(total * self.attended, self.strict_reference)
        return chosen, total - chosen

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        frames, total = signals.grid.frames, signals.grid.tokens
        size = total // frames
        x_FnD = signals.tokens.float().view(frames, size, -1)
        attention_Fn = signals.saliency("mean").view(frames, size)
        chosen, merged = self.per_frame(size, frames)
        kept, weights, start = [], [], 0
        for length in segments(x_FnD, self.cut_below, self.min_segments, self.strict_reference):
            if not length:
                continue
            part = slice(start, start + length)
            plan = self.of_segment(x_FnD[part], attention_Fn[part], chosen, merged)
            kept.append(plan.kept + start * size)
            assert plan.weights is not None
            weights.append(plan.weights)
            start += length
        kept_K = torch.cat(kept)
        order = kept_K.argsort(stable=not self.strict_reference)
        return Plan(kept_K[order], torch.block_diag(*weights)[order])

    def of_segment(self, x_FnD: Tensor, attention_Fn: Tensor, chosen: int, merged: int) -> Plan:
        """The plan of the tokens of one segment: chosen ones, then merged ones."""
        frames, size, _ = x_FnD.shape
        picks_Fk = select(x_FnD, attention_Fn, chosen, self.relevance)
        free_Fn = torch.ones(frames, size, dtype=torch.bool, device=x_FnD.device).scatter(1, picks_Fk, False)
        picks = (picks_Fk + size * torch.arange(frames, device=x_FnD.device)[:, None]).flatten()
        if frames > 1:
            trees = merge_over_time(x_FnD, free_Fn, self.merge_above, chosen + merged, self.strict_reference)
        else:
            every = torch.arange(size, device=x_FnD.device)
            trees = Plan(every if self.strict_reference else every[free_Fn[0]])
        roots = trees(x_FnD.flatten(0, 1))
        centres, clusters = merge_in_space(roots, trees.kept // size, merged * frames, self.strict_reference)
        own = one_hot(trees.kept, frames * size).float() if trees.weights is None else trees.weights
        weights = torch.cat([one_hot(picks, frames * size).float(), clusters @ own])
        return Plan(torch.cat([picks, trees.kept[centres]]), weights)


def rounded_up(value: float, strict_reference: bool) -> int:
    """The whole number above; what binary fractions add does not count, except for the reference."""
    return ceil(value if strict_reference else round(value, 9))


def segments(x_FnD: Tensor, cut_below: float, minimum: int, strict_reference: bool = False) -> list[int]:
    """Lengths of the segments: a cut where the means of neighbouring frames are unlike, and where they are least alike
    until there are enough.

    Args:
        strict_reference: a cut counts as a cosine of 1 when further ones are looked for, so that it may be made twice
            where there are too few; the segment between is empty.
    """
    frame_FD = normalize(x_FnD.float().mean(dim=1), dim=-1)
    similarity = (frame_FD[1:] * frame_FD[:-1]).sum(dim=-1)
    cut = similarity < cut_below
    cuts = cut.nonzero().flatten()
    if (missing := minimum - 1 - len(cuts)) > 0:
        if strict_reference:
            more = similarity.masked_fill(cut, 1).topk(min(missing, len(cut)), largest=False).indices
        else:
            more = similarity.masked_fill(cut, torch.inf).argsort(stable=True)[: min(missing, len(cut) - len(cuts))]
        cuts = torch.cat([cuts, more]).sort().values
    ends = [*(cuts + 1).tolist(), len(x_FnD)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def select(x_FnD: Tensor, attention_Fn: Tensor, count: int, relevance: bool) -> Tensor:
    """(F, count) tokens of every frame of a segment, ascending: attended and diverse (ADTS)."""
    if not count:
        return torch.empty(len(x_FnD), 0, dtype=torch.long, device=x_FnD.device)
    unit_FnD = normalize(x_FnD.float(), dim=-1)
    weight_Fn = 1e6 * attention_Fn.float()
    if relevance:
        means_FD = x_FnD.float().mean(dim=1)
        weight_Fn = weight_Fn * (x_FnD.float() @ means_FD.T).mean(dim=-1)
    distance_Fnn = (1 - unit_FnD @ unit_FnD.mT) * weight_Fn[:, None]
    return farthest_points(distance_Fnn, count).sort(dim=1).values


def merge_over_time(x_FnD: Tensor, free_Fn: Tensor, threshold: float, per_frame: int, direct: bool = False) -> Plan:
    """Trees over the frames of a segment (TSTM): the plan of the free tokens, whose roots stand for them.

    Args:
        free_Fn: tokens that were not chosen; the others neither join nor are joined.
        per_frame: so many tokens of a frame shall remain on average, chosen ones included; if fewer would, the
            threshold rises to the similarity at which they do not.
        direct: divide a tree by one more than the direct children of its root, not by its size.
    """
    frames, size, _ = x_FnD.shape
    unit_FnD = normalize(x_FnD.float(), dim=-1)
    both_free = free_Fn[1:, :, None] & free_Fn[:-1, None]
    cosine_Fnn = (unit_FnD[1:] @ unit_FnD[:-1].mT).clamp(max=1)  # of equal tokens it may come out above 1
    best, parent = cosine_Fnn.masked_fill(~both_free, -1).max(dim=-1)
    best_N = torch.cat([best.new_full((size,), -1), best.flatten()])
    places = torch.arange(frames * size, device=x_FnD.device)
    parent_N = torch.cat([places[:size], (parent + places.view(frames, size)[:-1, :1]).flatten()])
    joins_N = best_N > threshold
    if (bound := per_frame * frames) > frames * size - int(joins_N.sum()):
        ranked = best_N.sort(descending=True).values
        joins_N &= best_N > (ranked[max(frames * size - bound, 1) - 1] if bound < frames * size else torch.inf)
    parent_N = torch.where(joins_N, parent_N, places)
    root_N = parent_N
    for _ in range(frames.bit_length()):  # a path of frames - 1 steps, each time twice as long
        root_N = root_N[root_N]
    counted_N = parent_N if direct else root_N
    divisor_N = torch.bincount(counted_N, minlength=len(places))
    roots = places[~joins_N & free_Fn.flatten()]
    return Plan(roots, (root_N == roots[:, None]).float() / divisor_N[roots, None])


def merge_in_space(x_ND: Tensor, frame_N: Tensor, count: int, strict_reference: bool = False) -> tuple[Tensor, Tensor]:
    """Clusters what is left of every frame, so that about `count` tokens of the segment remain.

    Args:
        frame_N: the frame of each token, ascending.
        strict_reference: as in `FlashVID`.

    Returns:
        (K,) centres, frame after frame, and (K, N) weights that average their clusters.
    """
    centres, weights, start = [], [], 0
    for size in torch.bincount(frame_N).tolist():
        part_ND, ratio = x_ND[start : start + size], count / len(x_ND)
        clusters = min(rounded_up(size * ratio, strict_reference), size)
        if ratio >= 1:
            found, matrix = torch.arange(size, device=x_ND.device), torch.eye(size, device=x_ND.device)
        elif clusters:
            found, joined = density_peaks(part_ND, clusters, min(clusters, 7), strict_reference, strict_reference)
            matrix = averaging(joined, clusters)
        else:
            found, matrix = frame_N[:0], x_ND.new_zeros(0, size)
        centres.append(found + start)
        weights.append(matrix)
        start += size
    if not centres:
        return frame_N, x_ND.new_zeros(0, 0)
    return torch.cat(centres), torch.block_diag(*weights)


@dataclass(frozen=True, kw_only=True)
class FlashVIDLate(ScoringMethod):
    """The last stage of FlashVID: FastV's rule deep in the language model, on the tokens that `FlashVID` leaves.

    `strict_reference`: a product like 0.55 * 100, which is slightly more than 55 in binary fractions, is rounded up.
    """

    name: ClassVar[str] = "flashvid_late"
    title: ClassVar[str] = "FlashVID's pruning inside the language model"
    paper: ClassVar[str] = (
        "FlashVID: Training-free Tree-based Spatiotemporal Token Merging, ICLR 2026, arXiv 2602.08024"
    )
    confirmed: ClassVar[str] = (
        "before layer 20 of 28, attention of the last token in the layer before, 30 %, rounded up"
    )
    assumed: ClassVar[str] = "the same relative depth where there are not 28 layers"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    default_depths: ClassVar[tuple[float, ...]] = (20 / 28,)

    keep: int | float | tuple[int | float, ...] = 0.3

    def rounded(self, tokens: float) -> int:
        return rounded_up(tokens, self.strict_reference)

    def score(self, signals: DecoderSignals) -> Tensor:
        return signals.attended
