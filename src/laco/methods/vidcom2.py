"""VidCom2 (arXiv 2505.14454): more tokens for unusual frames, and of each frame the unusual ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.selector import Plan, Selector, Signals

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


@dataclass(frozen=True, kw_only=True)
class VidCom2(Selector):
    """Tokens least like the centres of the video and of their frame, on the half of the channels that varies least.

    Every frame gets a budget by how unlike the video it is; at least one token of each stays. The fraction `keep`
    holds up to the rounding of every frame and the limit of whole frames.

    Args:
        temperature: of the softmax over frames.
        strict_reference: frames like the video lose tokens at keep = 1.0, too.
    """

    name: ClassVar[str] = "vidcom2"
    title: ClassVar[str] = "VidCom2"
    paper: ClassVar[str] = "Video Compression Commander, EMNLP 2025, arXiv 2505.14454"
    confirmed: ClassVar[str] = "channels, Gaussian similarities, frame budgets, temperature 0.01, keep = 25 %, order"
    assumed: ClassVar[str] = "a count as `keep` is the fraction that it is of all tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    static_count: ClassVar[bool] = False  # of videos: every frame is rounded, and is full at some point

    temperature: float = 0.01
    strict_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise LacoError(f"vidcom2: temperature must be above 0; got {self.temperature}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        frames, size = signals.grid.frames, signals.grid.height * signals.grid.width
        in_video_Fn, in_frame_Fn = centrality(signals.tokens.view(frames, size, -1))
        counts = (self.frame_rates(in_video_Fn) * size).round().clamp(1, size).long().tolist()
        order_Fn = (in_video_Fn + in_frame_Fn).argsort(dim=1, stable=True)
        chosen = [frame * size + order_Fn[frame, :count].sort().values for frame, count in enumerate(counts)]
        return Plan(torch.cat(chosen))

    def frame_rates(self, in_video_Fn: Tensor) -> Tensor:
        """(F,) fraction of each frame's tokens that stay."""
        rate = self.keep if isinstance(self.keep, float) else self.budget(in_video_Fn.numel()) / in_video_Fn.numel()
        unusual_F = -in_video_Fn.mean(dim=1)
        share_F = ((unusual_F - unusual_F.max()) / self.temperature).softmax(dim=0)
        if rate == 1 and not self.strict_reference:
            return torch.ones_like(share_F)
        return (rate * (1 + share_F - share_F.mean())).clamp(max=1)


def centrality(x_FnD: Tensor) -> tuple[Tensor, Tensor]:
    """(F, n) similarity of every token to the centre of the video, and to that of its frame.

    Gaussians of several widths, summed; centres are means of unit vectors, not made unit again.
    """
    x_FnD = x_FnD.float()
    steady = x_FnD.flatten(0, 1).var(dim=0, correction=0).topk(x_FnD.shape[-1] // 2, largest=False).indices
    y_FnD = normalize(x_FnD[..., steady], dim=-1)
    centres = y_FnD.mean(dim=(0, 1), keepdim=True), y_FnD.mean(dim=1, keepdim=True)
    far = [(y_FnD - centre).square().sum(dim=-1) for centre in centres]
    video_Fn, frame_Fn = (torch.stack([(-d / (2 * width)).exp() for width in WIDTHS]).sum(dim=0) for d in far)
    return video_Fn, frame_Fn


def with_newlines(kept: Tensor, frames: int, side: int) -> Tensor:
    """Where kept tokens are in LLaVA-Video's layout, in which a newline token follows every row of `side` tokens.

    Args:
        kept: (K,) indices without newlines, ascending.

    Returns:
        (K + frames * side,): of each frame the kept tokens, then all its newlines.
    """
    size = side * side
    frame, row, column = kept // size, kept % size // side, kept % side
    places = frame * side * (side + 1) + row * (side + 1) + column
    newlines = torch.arange(frames * side, device=kept.device).view(frames, side) * (side + 1) + side
    return torch.cat([torch.cat([places[frame == index], newlines[index]]) for index in range(frames)])
