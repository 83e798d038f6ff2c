"""The contract of methods that drop or merge tokens inside the vision encoder, layer by layer.

An encoder layer is two residual steps, and a reducer may speak before each of them:

    x, state = reducer.before_layer(x, state, index, module)
    x = x + attention(norm1(x))                     with reducer.attention_weights or attention_bias
    x, state = reducer.before_mlp(x, state, index, signals)
    x = x + mlp(norm2(x))

At the beginning stands `reducer.start`, behind the last layer `reducer.after_layers`. What is remembered between
layers is the `State`, a value that nobody changes, so that a reducer itself holds nothing and layers can be
computed anew.

Shape letters: B pictures, S tokens at the beginning and N now, prefix tokens (CLS, distillation, registers) first;
K of them after a step; C channels, H heads of width d.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.base import MergerModule, Method, Place


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.promote_types(x.dtype, torch.float32))


def indices(x_BN: Tensor) -> Tensor:
    """(B, N): 0 .. N - 1 in every row."""
    return torch.arange(x_BN.shape[1], device=x_BN.device).expand(x_BN.shape[0], -1)


def take(x_BN: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of (B, N, ...) by (B, K) -> (B, K, ...).

    Whole rows by one index, not channel by channel as `gather` does it, which is slower on a CPU.
    """
    if x_BN.ndim == 2:
        return x_BN.gather(1, index_BK)
    if x_BN.shape[0] == 1:
        return x_BN.index_select(1, index_BK[0])
    return x_BN.flatten(0, 1).index_select(0, in_batch(index_BK, x_BN.shape[1])).unflatten(0, index_BK.shape)


def in_batch(index_BK: Tensor, rows: int) -> Tensor:
    """(B * K,) where these rows of pictures are if the `rows` of every picture follow those of the one before."""
    if index_BK.shape[0] == 1:
        return index_BK[0]
    return (index_BK + rows * torch.arange(len(index_BK), device=index_BK.device)[:, None]).flatten()


@dataclass(frozen=True)
class Merge:
    """Where every token goes in one step: these stay, these join one of them, and all others are dropped.

    Args:
        tokens: before the step, N.
        kept_BK: the token that stands for each row of the result; the row has its place in the picture.
        joining_BR, target_BR: further tokens, and the row of the result that each of them joins; `slot_BN` alone also
            reads them where a token leaves the row that it stands for (SPViT), whose sums are the method's own.
    """

    tokens: int
    kept_BK: Tensor
    joining_BR: Tensor | None = None
    target_BR: Tensor | None = None

    @cached_property
    def slot_BN(self) -> Tensor:
        """The row of the result in which each token is; K, one past the last, if it is dropped."""
        batch, kept = self.kept_BK.shape
        slot_BN = self.kept_BK.new_full((batch, self.tokens), kept).scatter(1, self.kept_BK, indices(self.kept_BK))
        if self.joining_BR is None or self.target_BR is None:
            return slot_BN
        return slot_BN.scatter(1, self.joining_BR, self.target_BR)

    def ordered(self, order_BK: Tensor) -> "Merge":
        """With these rows of the result one behind the other."""
        kept_BK, target_BR = self.kept_BK.gather(1, order_BK), self.target_BR
        if target_BR is not None:
            target_BR = order_BK.argsort(dim=1).gather(1, target_BR)
        return Merge(self.tokens, kept_BK, self.joining_BR, target_BR)

    def sum(self, x_BN: Tensor) -> Tensor:
        """(B, N, ...) -> (B, K, ...)."""
        y_BK = take(x_BN, self.kept_BK)
        return y_BK if self.joining_BR is None else self.add(y_BK, take(x_BN, self.joining_BR))

    def mean(self, x_BN: Tensor, size_BN: Tensor, total_BK: Tensor | None = None) -> Tensor:
        """(B, N, ...) -> (B, K, ...) mean weighted by size; in float32 at least, given back in the dtype of x.

        Args:
            size_BN: it has no gradient.
            total_BK: `sum` of the sizes, where it is there already.
        """
        if self.joining_BR is None or self.target_BR is None:
            return take(x_BN, self.kept_BK)
        total_BK = self.sum(size_BN) if total_BK is None else total_BK
        y_BK = self.share(x_BN, self.kept_BK, size_BN, total_BK)
        z_BR = self.share(x_BN, self.joining_BR, size_BN, total_BK.gather(1, self.target_BR))
        return self.add(y_BK, z_BR).to(x_BN.dtype)

    def share(self, x_BN: Tensor, index_BK: Tensor, size_BN: Tensor, total_BK: Tensor) -> Tensor:
        """What these tokens are of the mean that they become part of."""
        y_BK = at_least_float32(take(x_BN, index_BK))
        part_BK = size_BN.gather(1, index_BK).to(y_BK.dtype) / total_BK
        for _ in range(x_BN.ndim - 2):
            part_BK = part_BK.unsqueeze(-1)
        return y_BK.mul_(part_BK)  # new in any case

    def add(self, y_BK: Tensor, z_BR: Tensor) -> Tensor:
        """y, to whose rows the rows of z are added that join them, in place."""
        assert self.target_BR is not None
        if y_BK.ndim == 2:
            return y_BK.scatter_add_(1, self.target_BR, z_BR)
        if y_BK.shape[0] == 1:
            return y_BK.index_add_(1, self.target_BR[0], z_BR)
        rows = in_batch(self.target_BR, y_BK.shape[1])
        return y_BK.flatten(0, 1).index_add_(0, rows, z_BR.flatten(0, 1)).view_as(y_BK)

    def then(self, later: "Merge") -> "Merge":
        """This step and a later one as one; neither drops tokens."""
        kept_BK = take(self.kept_BK, later.kept_BK)
        if self.joining_BR is None or self.target_BR is None:
            joining_BR = None if later.joining_BR is None else take(self.kept_BK, later.joining_BR)
            return Merge(self.tokens, kept_BK, joining_BR, later.target_BR)
        joining_BR, target_BR = self.joining_BR, later.slot_BN.gather(1, self.target_BR)
        if later.joining_BR is not None and later.target_BR is not None:
            joining_BR = torch.cat([joining_BR, take(self.kept_BK, later.joining_BR)], dim=1)
            target_BR = torch.cat([target_BR, later.target_BR], dim=1)
        return Merge(self.tokens, kept_BK, joining_BR, target_BR)

    def unmerge(self, y_BK: Tensor) -> Tensor:
        """(B, K, ...) -> (B, N, ...): every token gets what it was merged into; zero if it was dropped."""
        return take(torch.cat([y_BK, torch.zeros_like(y_BK[:, :1])], dim=1), self.slot_BN)

    def follow(self, slot_BS: Tensor) -> Tensor:
        """Where tokens are after this step that were in these rows before it."""
        nowhere_B1 = torch.full_like(self.slot_BN[:, :1], self.kept_BK.shape[1])
        return torch.cat([self.slot_BN, nowhere_B1], dim=1).gather(1, slot_BS)


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known of the tokens between layers.

    Args:
        num_layers, last: layers of the encoder, and how many of them are used.
        prefix: tokens at the beginning that are never dropped or merged.
        sources: original tokens, S.
        size_BN: how many original tokens each stands for.
        merges: what was dropped or merged, step by step. What follows from them is worked out when it is asked for.
        packages: tokens at the end that gather dropped ones and stay (SPViT).
        policy_BN: 1 = alive, 0 = masked out or padding, where not all pictures keep equally many; None = all alive.
        memory: what else a reducer keeps.
    """

    num_layers: int
    last: int
    prefix: int
    sources: int
    size_BN: Tensor
    merges: tuple[Merge, ...] = ()
    packages: int = 0
    policy_BN: Tensor | None = None
    memory: Any = None

    def after(self, merge: Merge) -> "State":
        return replace(
            self,
            size_BN=merge.sum(self.size_BN),
            policy_BN=None if self.policy_BN is None else take(self.policy_BN, merge.kept_BK),
            merges=(*self.merges, merge),
        )

    def merged(self, x_BNC: Tensor, merge: Merge) -> tuple[Tensor, "State"]:
        """Tokens and state after a step in which tokens become their mean, weighted by size."""
        state = self.after(merge)
        return merge.mean(x_BNC, self.size_BN, state.size_BN), state

    @property
    def original_BS(self) -> Tensor:
        return torch.arange(self.sources, device=self.size_BN.device).expand(len(self.size_BN), -1)

    @cached_property
    def slot_BS(self) -> Tensor:
        """In which token every original one is now; N = in none."""
        return reduce(lambda slot_BS, merge: merge.follow(slot_BS), self.merges, self.original_BS)

    @cached_property
    def place_BN(self) -> Tensor:
        """The original token whose place in the picture each has: for rotary tables and for the order."""
        return reduce(lambda place_BN, merge: take(place_BN, merge.kept_BK), self.merges, self.original_BS)

    @property
    def sources_BNS(self) -> Tensor:
        """(B, N, S), true where an original token is part of a token of now."""
        return self.slot_BS[:, None] == indices(self.place_BN)[..., None]


@dataclass(frozen=True, kw_only=True)
class LayerSignals:
    """What a reducer may look at before the MLP of a layer. Its `needs` are the names of the fields that must be given.

    Args:
        keys: (B, H, N, d) of this layer.
        cls_attention: (B, H, N), softmax attention of the first prefix token to all tokens.
        received: (B, N), attention that each token receives, mean over heads and queries. Of encoders without
            prefix tokens it stands in for `cls_attention`.
    """

    keys: Tensor | None = None
    cls_attention: Tensor | None = None
    received: Tensor | None = None

    @property
    def saliency_BN(self) -> Tensor | None:
        """Attention of CLS, mean over heads; of encoders without CLS, attention received."""
        return self.received if self.cls_attention is None else at_least_float32(self.cls_attention).mean(dim=1)


class LayerTokens(NamedTuple):
    """Visual tokens, without prefix, that the two halves of a layer compute."""

    attention: int
    mlp: int


@dataclass(frozen=True, kw_only=True)
class Reducer(Method):
    """A method that drops or merges tokens inside the vision encoder.

    Class data `moment`: tokens change before a whole `layer` or before its `mlp`.

    Args:
        depth, layer: so many layers run before the first that reduces; without either, what the paper has.
        strict_reference: with the quirks of the authors' code, which the class names; and tokens are given in the
            order in which that code leaves them. In models they stand in raster order in any case.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"encoder"})
    trained: ClassVar[bool] = False
    moment: ClassVar[Literal["layer", "mlp"]] = "mlp"

    strict_reference: bool = False

    @property
    def drops(self) -> bool:
        """Whether tokens leave without a trace. None may where a model joins neighbours behind the encoder."""
        return False

    # What is known before any feature exists.

    @abstractmethod
    def layers(self, num_layers: int, last: int | None = None) -> tuple[int, ...]:
        """The layers, counted from 0, in which tokens change; of an encoder of which `last` layers are used."""

    def points(self, num_layers: int, last: int | None, depths: tuple[float, ...]) -> tuple[int, ...]:
        """The layer of `depth` or `layer`; if neither is given, those of several relative depths."""
        last = num_layers if last is None else last
        if self.depth is None and self.layer is None:
            return tuple(dict.fromkeys(min(max(round(depth * num_layers), 1), last - 1) for depth in depths))
        if (point := self.layer_in(num_layers, last)) == last:
            raise LacoError(f"{self.name} works inside the encoder: layer must be below {last}; got {point}")
        return (point,)

    def left(self, tokens: int, index: int, num_layers: int, last: int | None = None) -> int:
        """How many of so many visual tokens a layer of `layers` leaves."""
        raise LacoError(f"{self.name}: the number of tokens depends on the picture")

    def layer_tokens(self, tokens: int, num_layers: int, last: int | None = None) -> list[LayerTokens]:
        """For each layer that is used, how many visual tokens its attention and its MLP compute."""
        counts, reducing = [], self.layers(num_layers, last)
        for index in range(num_layers if last is None else last):
            before = tokens
            if index in reducing:
                tokens = self.left(tokens, index, num_layers, last)
            counts.append(LayerTokens(before if self.moment == "mlp" else tokens, tokens))
        return counts

    def num_tokens(self, tokens: int, num_layers: int, last: int | None = None) -> int:
        """How many visual tokens leave the encoder."""
        return self.layer_tokens(tokens, num_layers, last)[-1].mlp

    def build(self, width: int) -> MergerModule | None:
        """What is trained at each of `layers`, for tokens of `width` channels; handed to `before_layer`."""
        return None

    # What is done to tokens.

    def start(self, x_BNC: Tensor, num_layers: int, last: int | None = None, prefix: int = 0) -> State:
        """The state before the first layer."""
        return State(
            num_layers=num_layers,
            last=num_layers if last is None else last,
            prefix=prefix,
            sources=x_BNC.shape[1],
            size_BN=torch.ones(x_BNC.shape[:2], device=x_BNC.device),
        )

    def reduces(self, state: State, index: int) -> bool:
        return index in self.layers(state.num_layers, state.last)

    def check(self, signals: LayerSignals) -> None:
        """Raises `LacoError` where a signal is missing that the method needs."""
        for name in sorted(self.needs):
            if (signals.saliency_BN if name == "cls_attention" else getattr(signals, name)) is None:
                raise LacoError(f"{self.name} needs {name}, which is not there")

    def before_layer(
        self, x_BNC: Tensor, state: State, index: int, module: MergerModule | None = None
    ) -> tuple[Tensor, State]:
        """Before a layer; `module` is what `build` gave for it."""
        return x_BNC, state

    def attention_bias(self, state: State) -> Tensor | None:
        """(B, 1, 1, N) to be added to the logits of attention, or None."""
        return None

    def attention_weights(self, logits_BHNN: Tensor, state: State) -> Tensor:
        """Softmax over the keys as this method has it; for attention that is written out."""
        bias = self.attention_bias(state)
        return (logits_BHNN if bias is None else logits_BHNN + bias.to(logits_BHNN.dtype)).softmax(dim=-1)

    def before_mlp(self, x_BNC: Tensor, state: State, index: int, signals: LayerSignals) -> tuple[Tensor, State]:
        """Between attention and MLP of a layer."""
        return x_BNC, state

    def after_layers(self, x_BNC: Tensor, state: State) -> tuple[Tensor, State]:
        """Behind the last layer: the tokens in raster order of their places."""
        if self.strict_reference or not state.merges:
            return x_BNC, state
        order_BN = state.place_BN.argsort(dim=1, stable=True)
        return take(x_BNC, order_BN), state.after(Merge(x_BNC.shape[1], order_BN))
