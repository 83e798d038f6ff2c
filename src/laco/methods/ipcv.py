"""IPCV (arXiv 2512.18747): most of the encoder runs on the tokens that still change; at its end the others are rebuilt.

    s_i = || h_i(K) - h_i(K - 1) ||,    h_i(l) = hidden state that enters layer l, from 0
    rebuilt_i(l) = h_i(K) + mean over the T kept tokens j nearest to h_i(K) of (h_j(l) - h_j(K))

Kept are the tokens with the largest s_i.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.base import MergerModule
from laco.methods.reducer import LayerSignals, LayerTokens, Merge, Reducer, State, at_least_float32, indices, take


class Memory(NamedTuple):
    """What is needed to rebuild tokens. R removed ones, T neighbours of each.

    Args:
        whole: the state before tokens were removed, x_BNC the tokens of then.
        kept_BK, removed_BR: places in it, ascending.
        neighbours_BRT: rows of the kept tokens of the whole batch, so b * K + k.
    """

    whole: State
    x_BNC: Tensor
    kept_BK: Tensor
    removed_BR: Tensor
    neighbours_BRT: Tensor


@dataclass(frozen=True, kw_only=True)
class IPCV(Reducer):
    """The language model gets as many tokens as ever, in their order; the encoder's later layers compute few of them.

    Attention stabilisation: the first layers behind the choice still let all tokens attend, the removed ones
    rebuilt, and only their MLP runs on the kept tokens alone. Tokens of one row of the batch are chosen together: a
    picture, a tile, or all frames of a video.

    Args:
        depth, layer: K layers run before tokens are removed, by default 3/32 of them (3 of 32; the authors also
            take 7 of 45).
        keep: fraction of the visual tokens that is kept, rounded down.
        stabilise: layers with attention of all tokens.
        neighbours: T kept tokens that stand for a removed one, prefix tokens among them.

    `strict_reference`: neighbours are sought among the kept tokens of the whole batch, so that pictures depend on one
    another; a product like 0.35 * 180, which is slightly less than 63 in binary fractions, is rounded down to 62; and
    of a packed sequence the first token of a frame is counted to the frame before (`lengths_left`).
    """

    name: ClassVar[str] = "ipcv"
    title: ClassVar[str] = "IPCV"
    paper: ClassVar[str] = "IPCV: Information-Preserving Compression for MLLM Visual Encoders, arXiv 2512.18747"
    confirmed: ClassVar[str] = "score, count, neighbours, reconstruction, stabilised layers, K, A, T of Qwen2-VL"
    assumed: ClassVar[str] = "K as a relative depth; K = 1 allowed; neighbours within a picture"
    default_depth: ClassVar[float] = 3 / 32

    keep: float = 0.35
    stabilise: int = 7
    neighbours: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise LacoError(f"ipcv: keep is a fraction of the visual tokens in (0, 1]; got {self.keep}")
        if self.stabilise < 0 or self.neighbours < 1:
            raise LacoError("ipcv: stabilise is 0 or more layers, neighbours 1 or more tokens")

    def first(self, num_layers: int, last: int | None = None) -> int:
        """K."""
        if (point := self.points(num_layers, last, (self.default_depth,))[0]) < 1:
            raise LacoError("ipcv compares two hidden states, so it needs an encoder of two layers or more")
        return point

    def layers(self, num_layers: int, last: int | None = None) -> tuple[int, ...]:
        """The layer before K, whose input is remembered, K itself, and those that are stabilised."""
        first, last = self.first(num_layers, last), num_layers if last is None else last
        return tuple(range(first - 1, min(first + max(self.stabilise, 1), last)))

    def left(self, tokens: int, index: int = 0, num_layers: int = 0, last: int | None = None) -> int:
        return max(int(tokens * self.keep if self.strict_reference else round(tokens * self.keep, 9)), 1)

    def layer_tokens(self, tokens: int, num_layers: int, last: int | None = None) -> list[LayerTokens]:
        first, kept = self.first(num_layers, last), self.left(tokens)
        return [
            LayerTokens(tokens if index < first + self.stabilise else kept, tokens if index < first else kept)
            for index in range(num_layers if last is None else last)
        ]

    def num_tokens(self, tokens: int, num_layers: int, last: int | None = None) -> int:
        return tokens

    def before_layer(
        self, x_BNC: Tensor, state: State, index: int, module: MergerModule | None = None
    ) -> tuple[Tensor, State]:
        first = self.first(state.num_layers, state.last)
        if index == first - 1:
            return x_BNC, replace(state, memory=x_BNC)
        if index == first:
            state = replace(state, memory=self.choose(x_BNC, state.memory, state))
            return (x_BNC, state) if self.stabilise else drop(x_BNC, state)
        return rebuild(x_BNC, state) if first < index < first + self.stabilise else (x_BNC, state)

    def before_mlp(self, x_BNC: Tensor, state: State, index: int, signals: LayerSignals) -> tuple[Tensor, State]:
        first = self.first(state.num_layers, state.last)
        return drop(x_BNC, state) if first <= index < first + self.stabilise else (x_BNC, state)

    def after_layers(self, x_BNC: Tensor, state: State) -> tuple[Tensor, State]:
        return rebuild(x_BNC, state)

    @torch.no_grad()
    def choose(self, x_BNC: Tensor, before_BNC: Tensor, state: State) -> Memory:
        """Which tokens stay, by the states that enter layers K and K - 1, and the neighbours of the others."""
        prefix, place_BN = state.prefix, indices(x_BNC)
        x = at_least_float32(x_BNC)
        change_BN = (x - at_least_float32(before_BNC)).norm(dim=-1)[:, prefix:]
        ranked_BN = prefix + change_BN.argsort(dim=1, descending=True, stable=True)
        chosen_BK, removed_BR = ranked_BN.tensor_split([self.left(change_BN.shape[1])], dim=1)
        kept_BK = torch.cat([place_BN[:, :prefix], chosen_BK.sort(dim=1).values], dim=1)
        removed_BR = removed_BR.sort(dim=1).values

        if not self.strict_reference:  # what tokens have in common costs digits, as distances are made of products
            x = x - x.mean(dim=1, keepdim=True)
        candidates = take(x, kept_BK)
        first_B11 = kept_BK.shape[1] * torch.arange(len(x), device=x.device)[:, None, None]
        if self.strict_reference:
            candidates, first_B11 = candidates.flatten(0, 1).expand(len(x), -1, -1), torch.zeros_like(first_B11)
        distance_BRK = torch.cdist(take(x, removed_BR), candidates)
        nearest = distance_BRK.topk(min(self.neighbours, distance_BRK.shape[2]), largest=False).indices
        return Memory(replace(state, memory=None), x_BNC, kept_BK, removed_BR, first_B11 + nearest)

    def lengths_left(self, kept_K: Tensor, lengths_F: Tensor) -> Tensor:
        """(F,) how many of the tokens kept of a packed sequence are of each of its frames, which had these lengths."""
        ends_F = lengths_F.cumsum(dim=0)
        if self.strict_reference:
            starts_F = ends_F - lengths_F
            frame_K = (torch.searchsorted(starts_F, kept_K) - 1).clamp(min=0)
        else:
            frame_K = torch.searchsorted(ends_F, kept_K, right=True)
        return torch.bincount(frame_K, minlength=len(lengths_F))


def drop(x_BNC: Tensor, state: State) -> tuple[Tensor, State]:
    """All tokens -> the kept ones."""
    memory: Memory = state.memory
    return take(x_BNC, memory.kept_BK), state.after(Merge(x_BNC.shape[1], memory.kept_BK))


def rebuild(x_BKC: Tensor, state: State) -> tuple[Tensor, State]:
    """The kept tokens -> all, each of the others moved as its neighbours moved since the choice."""
    memory: Memory = state.memory
    then_BNC = at_least_float32(memory.x_BNC)
    now_BKC = at_least_float32(x_BKC)
    moved_BKC = now_BKC - take(then_BNC, memory.kept_BK)
    moved_BRC = moved_BKC.flatten(0, 1)[memory.neighbours_BRT].mean(dim=2)
    rebuilt_BRC = take(then_BNC, memory.removed_BR) + moved_BRC
    order_BN = torch.cat([memory.kept_BK, memory.removed_BR], dim=1).argsort(dim=1)
    all_BNC = take(torch.cat([now_BKC, rebuilt_BRC], dim=1), order_BN)
    return all_BNC.to(x_BKC.dtype), replace(memory.whole, memory=memory)
