"""GlimpsePrune (arXiv 2508.01548): a learned token glimpses at the picture; a small head says what stays.

u_l = RMSNorm(W g_l)                             added to the glimpse token before layer l; u_0 is its embedding
z = W a,    a_j = logits of the glimpse's attention to visual token j, all heads
z += attention(RMSNorm(z), c_t);    z += mlp(RMSNorm(z))     for each of some maps of the vision encoder, c_t = W_t map
keep where sigmoid(w z) > 1/2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods.base import MergerModule
from laco.methods.decoder import DecoderMethod, DecoderSignals
from laco.methods.selector import Plan

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in fractions of a picture's sides


@dataclass(frozen=True, kw_only=True)
class GlimpsePrune(DecoderMethod):
    """After 19 of 28 layers, tokens leave the sequence *and* the cache of the layers before; so does the glimpse token.

    It stands behind the prompt, its position one past the last. In training nothing is dropped; the loss is the
    language model's plus `localisation_loss`. The head sees pictures one by one; line breaks between rows stay.

    In models, answers never see the glimpse token. In the authors' training they do, standing behind it, so that the
    language model's loss teaches the token as well; here, with a frozen language model, `localisation_loss` alone does.

    Args:
        threshold: probability above which a token stays.
        keep: count or fraction of a sample's visual tokens that is never exceeded; 1.0 = no such limit.
        at_least: how many of a sample's visual tokens stay in any case.
        attention: `logits` (the authors' Qwen2.5-VL) or `log_softmax` over all keys (their LLaVA).
        width, condition, heads: of the head; its MLP has 2 * width channels.
    """

    name: ClassVar[str] = "glimpse_prune"
    title: ClassVar[str] = "GlimpsePrune"
    paper: ClassVar[str] = "A Glimpse to Compress: Dynamic Visual Token Pruning for LVLMs, arXiv 2508.01548"
    confirmed: ClassVar[str] = "layer, glimpse token, head, rotary positions, selection rule, losses, initialisation"
    assumed: ClassVar[str] = "the same relative depths in other models"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "maps", "grids"})
    trained: ClassVar[bool] = True
    static_count: ClassVar[bool] = False
    rewrites_cache: ClassVar[bool] = True
    default_depths: ClassVar[tuple[float, ...]] = (19 / 28,)
    # Relative depths in the vision encoder of the hidden states that the head reads.
    maps: ClassVar[tuple[float, ...]] = (1, 3 / 4, 1 / 2, 1 / 4)
    learns_from: ClassVar[str] = "boxes"

    keep: int | float | tuple[int | float, ...] = 1.0
    threshold: float = 0.5
    at_least: int = 1
    attention: Literal["logits", "log_softmax"] = "logits"
    width: int = 256
    condition: int = 512
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1 or self.at_least < 0:
            raise LacoError("glimpse_prune: threshold is a probability, and at_least is 0 or more")
        if len(self.depths_used) > 1:
            raise LacoError(f"glimpse_prune drops tokens once; got {len(self.depths_used)} depths")
        if self.width % self.heads or (self.width + self.condition) % (4 * self.heads):
            raise LacoError(
                f"glimpse_prune: {self.heads} heads must divide width, and 4 times as many width + condition, for"
                f" rotary positions in two directions; got {self.width} and {self.condition}"
            )

    def left(self, tokens: int, alive: int, stage: int = 0) -> int:
        raise LacoError("glimpse_prune: the number of tokens depends on the picture")

    def build(self, **sizes: Any) -> "GlimpseModule":
        """What is trained.

        Args:
            sizes: `layers` of the language model that run before the point, its `channels` and its attention `heads`,
                and `encoder_channels` of the vision encoder.
        """
        return GlimpseModule(self, **sizes)

    def features(self, signals: DecoderSignals) -> Tensor:
        """(N, H) what the head reads of the glimpse token's attention, the last row of it."""
        assert signals.logits is not None
        row_HL = signals.logits[:, -1].float()
        return (row_HL.log_softmax(dim=-1) if self.attention == "log_softmax" else row_HL)[:, signals.visual].T

    def importance(self, signals: DecoderSignals, module: MergerModule | None) -> Tensor:
        """(N,) logits of the head, with a gradient."""
        assert signals.maps is not None
        assert signals.grids is not None
        if not isinstance(module, GlimpseModule):
            raise LacoError("glimpse_prune needs the module that its build gives")
        return module.head(self.features(signals), signals.maps, signals.grids)

    def loss(self, signals: DecoderSignals, module: MergerModule | None, target: Sequence[Box]) -> Tensor:
        """`localisation_loss` of one sample, `target` being boxes around what its question is about."""
        assert signals.grids is not None
        importance_N = self.importance(signals, module)
        mask_N = torch.cat([box_mask(grid, target) for grid in signals.grids]).to(importance_N.device)
        return localisation_loss(importance_N, mask_N, signals.grids)

    def plan(self, signals: DecoderSignals, stage: int, module: MergerModule | None) -> Plan:
        return Plan(self.stays(self.importance(signals, module)).nonzero().flatten())

    def stays(self, importance_N: Tensor) -> Tensor:
        """(N,) true for what stays of a sample's visual tokens, the limits being those of all its pictures together."""
        probability_N, tokens, limit = importance_N.float().sigmoid(), len(importance_N), self.keeps[0]
        # The best come first, so that limits are lengths.
        number = int((probability_N > self.threshold).sum())
        if (number / tokens if isinstance(limit, float) else number) > limit:
            number = int(limit * tokens) if isinstance(limit, float) else limit
        number = max(number, min(self.at_least, tokens))
        stays_N = torch.zeros_like(probability_N, dtype=torch.bool)
        stays_N[importance_N.argsort(descending=True, stable=True)[:number]] = True
        return stays_N


class Linear(nn.Linear):
    """With the paper's initialisation."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class GlimpseModule(MergerModule):
    """The glimpse token and the head."""

    def __init__(
        self, method: GlimpsePrune, *, layers: int, channels: int, heads: int, encoder_channels: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.token = GlimpseToken(layers, channels, eps)
        self.head = ImportanceHead(
            heads, encoder_channels, len(method.maps), method.width, method.condition, method.heads, eps=eps
        )
        self.reset_parameters()


class GlimpseToken(MergerModule):
    """A vector a layer; what is added to the token before each."""

    def __init__(self, layers: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(layers, 1, channels))
        self.linear = Linear(channels, channels)
        self.norm = nn.RMSNorm(channels, eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.vectors, std=0.02)

    def forward(self, layer: int) -> Tensor:
        """(1, D) for the layer so numbered, from 0; that of layer 0 is the token's embedding."""
        return self.norm(self.linear(self.vectors[layer]))


class ImportanceHead(MergerModule):
    """How likely each visual token matters to the answer: the paper's visual importance predictor.

    Args:
        features: channels of the attention, all heads of all layers looked at.
        encoder_channels: of the maps.
        maps: how many of them, one block for each.
        width, condition, heads: of a block; `hidden` channels in its MLP, 2 * width if left out.
    """

    def __init__(
        self,
        features: int,
        encoder_channels: int,
        maps: int,
        width: int,
        condition: int,
        heads: int,
        hidden: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.inward = Linear(features, width)
        self.blocks = nn.ModuleList(
            HeadBlock(encoder_channels, width, condition, heads, hidden or 2 * width, eps) for _ in range(maps)
        )
        self.outward = Linear(width, 1)
        self.reset_parameters()

    def forward(self, features_NA: Tensor, maps: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """(N, A) attention and maps (N, C), deep ones first -> (N,) logits; each picture sees itself only."""
        if len(maps) != len(self.blocks):
            raise LacoError(f"glimpse_prune reads {len(self.blocks)} maps of the vision encoder; got {len(maps)}")
        sizes = [grid.tokens for grid in grids]
        if sum(sizes) != len(features_NA):
            raise LacoError(f"glimpse_prune got grids of {sum(sizes)} tokens for {len(features_NA)} visual tokens")
        z_NC = self.inward(features_NA.to(self.inward.weight.dtype))
        for block, map_NC in zip(self.blocks, maps, strict=True):
            pictures = zip(z_NC.split(sizes), map_NC.to(z_NC.dtype).split(sizes), grids, strict=True)
            z_NC = torch.cat([block(*picture) for picture in pictures])
        return self.outward(z_NC)[:, 0]


class HeadBlock(nn.Module):
    """Attention whose queries and keys also see a map of the vision encoder, and a gated MLP."""

    def __init__(self, encoder_channels: int, width: int, condition: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        both = width + condition
        self.heads = heads
        self.condition = Linear(encoder_channels, condition)
        self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.q, self.k = Linear(both, both, bias=False), Linear(both, both, bias=False)
        self.v, self.out = Linear(width, width, bias=False), Linear(width, width, bias=False)
        self.gate, self.up, self.down = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)

    def forward(self, z_NC: Tensor, map_NC: Tensor, grid: Grid) -> Tensor:
        normed_NC = self.norm1(z_NC)
        seen_NC = torch.cat([normed_NC, self.condition(map_NC)], dim=-1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for x in (self.q(seen_NC), self.k(seen_NC), self.v(normed_NC))
        )
        q, k = rotate_on_grid(q, grid), rotate_on_grid(k, grid)
        mixed_NC = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        z_NC = z_NC + self.out(mixed_NC)
        normed_NC = self.norm2(z_NC)
        return z_NC + self.down(F.silu(self.gate(normed_NC)) * self.up(normed_NC))


def rotate_on_grid(x_HNd: Tensor, grid: Grid, base: float = 1e4) -> Tensor:
    """Rotary positions in two directions: of each half's d / 2 angles d / 4 turn with the row, the others with the
    column."""
    quarter = x_HNd.shape[-1] // 4
    turns = base ** -(torch.arange(quarter, device=x_HNd.device) / quarter)
    place = torch.arange(grid.tokens, device=x_HNd.device) % (grid.height * grid.width)
    angles = torch.cat([(place // grid.width)[:, None] * turns, (place % grid.width)[:, None] * turns], dim=-1)
    cos, sin = angles.cos().to(x_HNd.dtype), angles.sin().to(x_HNd.dtype)
    first, second = x_HNd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def box_mask(grid: Grid, boxes: Sequence[Box]) -> Tensor:
    """(N,) 1 where a token of a picture touches a box (x1, y1, x2, y2), in fractions of its sides; 0 elsewhere."""
    mask = torch.zeros(grid.height, grid.width)
    for x1, y1, x2, y2 in boxes:
        if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
            raise LacoError(f"a box is x1, y1, x2, y2 in fractions of the picture's sides; got {(x1, y1, x2, y2)}")
        rows = slice(int(y1 * grid.height), min(int(y2 * grid.height), grid.height - 1) + 1)
        columns = slice(int(x1 * grid.width), min(int(x2 * grid.width), grid.width - 1) + 1)
        mask[rows, columns] = 1
    return mask.flatten().repeat(grid.frames)


def localisation_loss(importance_N: Tensor, mask_N: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Dice + 0.1 * binary cross-entropy between the head's logits and `box_mask`, each a mean over pictures."""
    losses = []
    sizes = [grid.tokens for grid in grids]
    for logits, mask in zip(importance_N.float().split(sizes), mask_N.float().split(sizes), strict=True):
        probability = logits.sigmoid()
        overlap, size = (probability * mask).sum(), probability.sum() + mask.sum()
        dice = 1 - (2 * overlap + 1e-6) / (size + 1e-6)
        losses.append(dice + 0.1 * F.binary_cross_entropy_with_logits(logits, mask))
    return torch.stack(losses).mean()
