"""FlexSelect (arXiv 2506.00993): a layer of a language model that knows the question scores the tokens of long videos.

score_j = max over heads and tokens of the question of their attention to visual token j
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.question import QuestionSelector
from laco.methods.selector import Plan, Signals


@dataclass(frozen=True, kw_only=True)
class FlexSelect(QuestionSelector):
    """Keeps what the question attends to in a middle layer of the same or of a small language model.

    A long video is scored in `groups` of frames, each with the whole prompt around it, and each keeps its share. In a
    model, the choice costs a prefill of all tokens up to the scoring layer; that of what is left comes on top.

    Args:
        score: `max` or `mean` over heads and tokens of text.
        scoring_depth: layers that run before the scoring layer, as a fraction: 19 of 28 for Qwen2-7B.
        max_frames: of one scoring pass.
        whole_frames: a budget is first rounded up to a multiple of a frame's tokens (the authors' code for Qwen2.5-VL).

    `strict_reference`: every group keeps floor(budget / groups), so that up to groups - 1 tokens fewer remain; here the
    shares differ by one where they must.
    """

    name: ClassVar[str] = "flexselect"
    title: ClassVar[str] = "FlexSelect"
    paper: ClassVar[str] = (
        "FlexSelect: Flexible Token Selection for Efficient Long Video Understanding, arXiv 2506.00993"
    )
    confirmed: ClassVar[str] = "scoring layer, maximum and mean, strided groups of 64 frames, equal shares, order"
    assumed: ClassVar[str] = "the same relative depth of the scoring layer in other models; keep = 0.0625 of 512 frames"

    keep: int | float = 0.0625
    score: Literal["max", "mean"] = "max"
    scoring_depth: float = 19 / 28
    max_frames: int = 64
    whole_frames: bool = False
    strict_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_frames < 1:
            raise LacoError(f"flexselect: max_frames is 1 or more; got {self.max_frames}")

    def groups(self, frames: int) -> list[range]:
        """The frames of each scoring pass: every G-th, so that each pass sees the whole video."""
        count = ceil(frames / self.max_frames)
        return [range(group, frames, count) for group in range(count)]

    def scores(self, signals: Signals) -> Tensor:
        """(N,)."""
        assert signals.text_attention is not None
        rows_RN = signals.text_attention.float().flatten(0, 1)
        return rows_RN.amax(dim=0) if self.score == "max" else rows_RN.mean(dim=0)

    def plan(self, signals: Signals) -> Plan:
        frames, total = signals.grid.frames, signals.grid.tokens
        size, budget = total // frames, self.budget(total)
        if self.whole_frames:
            budget = min(ceil(budget / size) * size, total)
        score_Fn = self.scores(signals).view(frames, size)
        index_Fn = torch.arange(total, device=score_Fn.device).view(frames, size)
        groups = self.groups(frames)
        if budget == total:
            return Plan(index_Fn.flatten())
        kept, rest = [], budget
        for left, group in zip(range(len(groups), 0, -1), reversed(groups), strict=True):  # the smallest comes first
            share = min(budget // len(groups) if self.strict_reference else rest // left, len(group) * size)
            best = score_Fn[group].flatten().argsort(descending=True, stable=True)[:share]
            kept.append(index_Fn[group].flatten()[best])
            rest -= share
        return Plan(torch.cat(kept).sort().values)
