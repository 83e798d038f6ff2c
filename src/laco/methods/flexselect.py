"""FlexSelect (arXiv 2506.00993): a layer of a language model that knows the question scores the tokens of long videos.

score_j = max over heads and tokens of the question of their attention to visual token j

FlexSelect-Lite leaves that to a small causal transformer with a projector of its own, whose last layer's attention
learns the order of the large one's scores:

loss = 1 - Pearson(softrank(score), rank(large one's score)),    softrank_i = sum_j sigmoid((s_i - s_j) / 1e-4) - 1/2
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods.base import MergerModule
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
        lite: layers before the scoring one of FlexSelect-Lite's own transformer; 0 = the language model scores. It
            needs training (`loss`); then no prefill of all tokens is left.
        width: channels of that transformer, a multiple of its 4 heads.

    The authors' FlexSelect-Lite is a pretrained language model of 0.5 B parameters behind the shared vision encoder.
    Here it begins at random, reads the language model's input embeddings, and has no positions but the causal order.

    `strict_reference`: every group keeps floor(budget / groups), so that up to groups - 1 tokens fewer remain; here the
    shares differ by one where they must.
    """

    name: ClassVar[str] = "flexselect"
    title: ClassVar[str] = "FlexSelect"
    paper: ClassVar[str] = (
        "FlexSelect: Flexible Token Selection for Efficient Long Video Understanding, arXiv 2506.00993"
    )
    confirmed: ClassVar[str] = "scoring layer, maximum and mean, strided groups of 64 frames, equal shares, order"
    assumed: ClassVar[str] = (
        "the same relative depth of the scoring layer in other models; keep = 0.0625 of 512 frames; of lite, its"
        " size and that it begins at random"
    )

    keep: int | float = 0.0625
    score: Literal["max", "mean"] = "max"
    scoring_depth: float = 19 / 28
    max_frames: int = 64
    whole_frames: bool = False
    strict_reference: bool = False
    lite: int = 0
    width: int = 256
    learns_from: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lite < 0 or self.width < 1 or self.width % LiteScorer.heads:
            raise LacoError(
                f"flexselect: lite is 0 or more layers, of a width that {LiteScorer.heads} heads divide; got"
                f" {self.lite} and {self.width}"
            )
        if self.lite:  # a scorer of its own sees the question itself
            object.__setattr__(self, "needs", frozenset({"tokens", "text"}))
            object.__setattr__(self, "trained", True)
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

    def build(self, width: int) -> "LiteScorer | None":
        return LiteScorer(width, self.lite, self.width) if self.lite else None

    def lite_scores(self, signals: Signals, module: MergerModule | None) -> list[Tensor]:
        """(frames of it * n,) for each of the `groups`, with a gradient."""
        assert signals.tokens is not None
        assert signals.text is not None
        if not isinstance(module, LiteScorer):
            raise LacoError("flexselect: lite needs the module that its build gives")
        tokens_FnD = signals.tokens.unflatten(0, (signals.grid.frames, -1))
        maps = [module(tokens_FnD[group].flatten(0, 1), signals.text) for group in self.groups(signals.grid.frames)]
        return [self.scores(Signals(grid=signals.grid, text_attention=map_HMN)) for map_HMN in maps]

    def loss(self, signals: Signals, module: MergerModule | None, target: Tensor) -> Tensor:
        """Of `lite`, for one picture or video, `target` being `text_attention` of the scoring layer; mean over groups.

        0 where both order the tokens alike, 2 where one is the other reversed.
        """
        frames = signals.grid.frames
        theirs_Fn = self.scores(Signals(grid=signals.grid, text_attention=target)).view(frames, -1)
        pairs = zip(self.lite_scores(signals, module), self.groups(frames), strict=True)
        return torch.stack([order_loss(mine, theirs_Fn[group].flatten()) for mine, group in pairs]).mean()

    def plan_with(self, signals: Signals, module: MergerModule) -> Plan:
        frames = signals.grid.frames
        scores = self.lite_scores(signals, module)
        score_Fn = scores[0].new_empty(frames, signals.grid.tokens // frames)
        for score_N, group in zip(scores, self.groups(frames), strict=True):
            score_Fn[group] = score_N.view(len(group), -1)
        return self.best(signals, score_Fn)

    def plan(self, signals: Signals) -> Plan:
        if self.lite:
            raise LacoError("flexselect: lite needs the module that its build gives")
        return self.best(signals, self.scores(signals).view(signals.grid.frames, -1))

    def left(self, tokens: int, prefix: int = 0, frames: int = 1) -> int:
        return sum(self.shares(tokens, frames))

    def shares(self, tokens: int, frames: int) -> list[int]:
        """How many tokens stay of each of the `groups`."""
        size, budget, groups = tokens // frames, self.budget(tokens), self.groups(frames)
        if self.whole_frames:
            budget = min(ceil(budget / size) * size, tokens)
        if budget == tokens:
            return [len(group) * size for group in groups]
        shares, rest = [], budget
        for left, group in zip(range(len(groups), 0, -1), reversed(groups), strict=True):  # the smallest comes first
            shares.append(min(budget // len(groups) if self.strict_reference else rest // left, len(group) * size))
            rest -= shares[-1]
        return shares[::-1]

    def best(self, signals: Signals, score_Fn: Tensor) -> Plan:
        """The plan by (frames, tokens of one) scores."""
        frames, total = signals.grid.frames, signals.grid.tokens
        index_Fn = torch.arange(total, device=score_Fn.device).view(frames, -1)
        kept = []
        for group, share in zip(self.groups(frames), self.shares(total, frames), strict=True):
            best = score_Fn[group].flatten().argsort(descending=True, stable=True)[:share]
            kept.append(index_Fn[group].flatten()[best])
        return Plan(torch.cat(kept).sort().values)


class LiteScorer(MergerModule):
    """(N, D) visual tokens and (M, D) text behind them -> (H, M, N) attention of the text to the visual tokens.

    Args:
        channels: D.
        layers: before the one whose attention it is; each is causal, with norms in front.
        width: channels inside.
    """

    heads: ClassVar[int] = 4

    def __init__(self, channels: int, layers: int, width: int):
        super().__init__()
        self.visual, self.words = nn.Linear(channels, width), nn.Linear(channels, width)
        self.layers = nn.ModuleList(LiteLayer(width, self.heads) for _ in range(layers))
        self.norm, self.q, self.k = nn.RMSNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.reset_parameters()

    def forward(self, tokens_ND: Tensor, text_MD: Tensor) -> Tensor:
        dtype = self.visual.weight.dtype
        x_LC = torch.cat([self.visual(tokens_ND.to(dtype)), self.words(text_MD.to(dtype))])
        for layer in self.layers:
            x_LC = layer(x_LC)
        x_LC, count = self.norm(x_LC), len(tokens_ND)
        q_HMd = self.q(x_LC[count:]).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        k_HLd = self.k(x_LC).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        logits_HML = (q_HMd @ k_HLd.mT).float() / q_HMd.shape[-1] ** 0.5
        later_ML = torch.ones(logits_HML.shape[1:], dtype=torch.bool, device=logits_HML.device).triu(count + 1)
        return logits_HML.masked_fill(later_ML, -torch.inf).softmax(dim=-1)[..., :count]


class LiteLayer(nn.Module):
    """(L, C) -> (L, C): causal attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_LC: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_LC)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)[:, None]
        mixed_LC = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)
        x_LC = x_LC + self.out(mixed_LC)
        return x_LC + self.mlp(self.norm2(x_LC))


def order_loss(score_N: Tensor, teacher_N: Tensor, temperature: float = 1e-4) -> Tensor:
    """1 - correlation of the soft ranks of the scores with the ranks of the teacher's; 0 where one token is alone."""
    score_N = score_N.float()
    soft_N = ((score_N[:, None] - score_N) / temperature).sigmoid().sum(dim=1) - 0.5
    rank_N = teacher_N.argsort(stable=True).argsort(stable=True).float()
    mine, theirs = (rank - rank.mean() for rank in (soft_N, rank_N))
    return float(len(rank_N) > 1) - F.cosine_similarity(mine, theirs, dim=0)
