"""V-CAST (arXiv 2603.27650): more tokens for frames where a video turns, and of each the distinct and strong ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class VCast(Selector):
    """Frame budgets by the curvature of the path that the frames' means take, token scores within a frame.

    Args:
        temperature: of the softmax over frames.
        at_least: tokens that stay of each frame.
        strict_reference: what rounding leaves over goes to one frame until it is full, then to the next, because the
            reference does not take that frame off its list. By default the frames with the largest remainders get
            one each.
    """

    name: ClassVar[str] = "v_cast"
    title: ClassVar[str] = "V-CAST"
    paper: ClassVar[str] = "V-CAST, arXiv 2603.27650"
    confirmed: ClassVar[str] = "curvature, temperature 0.7, token score, at least one token a frame, keep = 25 %"
    assumed: ClassVar[str] = "largest remainders, one each, unless strict_reference"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    temperature: float = 0.7
    at_least: int = 1
    strict_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or self.at_least < 0:
            raise LacoError(
                "v_cast: temperature must be above 0 and at_least 0 or more;"
                f" got {self.temperature} and {self.at_least}"
            )

    def left(self, tokens: int, prefix: int = 0, frames: int = 1) -> int:
        return max(self.budget(tokens), min(self.at_least, tokens // frames) * frames)

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        frames, size = signals.grid.frames, signals.grid.height * signals.grid.width
        x_FnD = signals.tokens.float().view(frames, size, -1)
        means_FD = normalize(x_FnD.mean(dim=1), dim=-1)
        share_F = (curvature(means_FD) / self.temperature).softmax(dim=0)
        counts = allocate(share_F, self.left(frames * size, frames=frames), size, self.at_least, self.strict_reference)
        score_Fn = distinct(x_FnD, means_FD)
        order_Fn = score_Fn.argsort(dim=1, descending=True, stable=True)
        chosen = [frame * size + order_Fn[frame, :count].sort().values for frame, count in enumerate(counts)]
        return Plan(torch.cat(chosen))


def curvature(means_FD: Tensor) -> Tensor:
    """(F,) 1 - cosine between the steps into and out of a frame; 1 at both ends."""
    steps = means_FD.diff(dim=0)
    inner = 1 - torch.cosine_similarity(steps[:-1], steps[1:], dim=-1) if len(means_FD) > 2 else steps.new_empty(0)
    ends = means_FD.new_ones(min(len(means_FD), 2))
    return torch.cat([ends[:1], inner, ends[1:]])


def distinct(x_FnD: Tensor, means_FD: Tensor) -> Tensor:
    """(F, n) distance from the frame's mean by cosine, plus the norm scaled to 0 .. 1 within the frame."""
    far_Fn = 1 - torch.cosine_similarity(x_FnD, means_FD[:, None], dim=-1)
    norm_Fn = x_FnD.norm(dim=-1)
    low, high = norm_Fn.amin(dim=1, keepdim=True), norm_Fn.amax(dim=1, keepdim=True)
    return far_Fn + (norm_Fn - low) / (high - low).clamp(min=1e-12)


def allocate(share_F: Tensor, total: int, size: int, least: int, strict_reference: bool) -> list[int]:
    """Splits `total` tokens over frames of `size`: `least` for each, the others by shares, at most all of a frame.

    All get `least` tokens, or as many as they have; `total` must be enough for that.
    """
    least = min(least, size)
    ideal = [least + (total - least * len(share_F)) * share for share in share_F.tolist()]
    counts = [min(int(value), size) for value in ideal]
    remainder = [value % 1 for value in ideal]
    for _ in range(total - sum(counts)):
        frame = max((f for f, count in enumerate(counts) if count < size), key=remainder.__getitem__)
        counts[frame] += 1
        if not strict_reference:
            remainder[frame] -= 1
    return counts
