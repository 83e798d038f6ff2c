"""Reducers inside a vision encoder: layers that drop or merge tokens, and the way back to the full grid.

Between layers there are as many tokens as the reducer leaves. What comes out of the encoder, `last_hidden_state` and
every one of `hidden_states`, is on the full grid again: a row of NaN says that its token is not there. Norms and
pooling heads of the encoder run before that, so they never see such a row.

What is known of the tokens, the reducer's `State`, goes from layer to layer. The stock loops over the layers know
nothing of it, so a layer's `__call__` takes it from, and gives it to, the call of the encoder that is running. Its
`forward`, which is what a checkpoint of activations computes anew, is a function of tokens and state alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laco.attention import cls_rows, received
from laco.errors import LacoError
from laco.families.encoders.halves import Attended, Halves
from laco.methods import MergerModule, Reducer
from laco.methods.reducer import LayerSignals, State, in_batch, take

JOINED = (
    "{} drops tokens inside the vision encoder, but the model joins neighbours behind it, of which none may be missing;"
    " use a method that merges them"
)
# Behind every reducing layer that has run in this call of the encoder.
STATES: ContextVar[list[State]] = ContextVar("laco_states")


@contextmanager
def noting_states() -> Iterator[list[State]]:
    states: list[State] = []
    token = STATES.set(states)
    try:
        yield states
    finally:
        STATES.reset(token)


@dataclass(frozen=True)
class Reduction:
    """What all layers of one encoder share.

    Args:
        halves: of its layers.
        layers, last: how many there are, and how many of them the language model uses.
        prefix: tokens at the beginning that stay.
        width: channels of a token.
    """

    reducer: Reducer
    halves: Halves
    layers: int
    last: int
    prefix: int
    width: int

    @cached_property
    def points(self) -> tuple[int, ...]:
        """The layers in which tokens change, counted from 0."""
        return self.reducer.layers(self.layers, self.last)

    @property
    def first(self) -> int:
        """From here on layers speak to the reducer; the last one always does."""
        return min((*self.points, self.last - 1))


class ReducingLayer(nn.Module):
    """Mixin of an encoder layer in which, or before which, tokens may have been dropped or merged.

    `compressor` is what the reducer trains in this layer, if anything.
    """

    gradient_checkpointing: bool
    compressor: MergerModule | None

    def __init__(self, config: Any, reduction: Reduction, index: int):
        super().__init__(config)
        self.reduction, self.index = reduction, index
        self.compressor = reduction.reducer.build(reduction.width) if index in reduction.points else None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (states := STATES.get(None)) is None:
            raise LacoError(
                "a layer that drops or merges tokens runs inside its encoder alone; checkpoint its activations with"
                " gradient_checkpointing_enable(), not by a wrapper around the layer"
            )
        self.check_checkpointing()
        x_BNC, state = super().__call__(hidden_states, *args, state=states[-1] if states else None, **kwargs)
        states.append(state)
        return x_BNC

    def check_checkpointing(self) -> None:
        if self.gradient_checkpointing and self.training:
            settings = getattr(getattr(self, "_gradient_checkpointing_func", None), "keywords", {})
            if settings.get("use_reentrant", True):
                raise LacoError(
                    f"{self.reduction.reducer.name} hands more than tokens from layer to layer, whose gradient is lost"
                    ' by reentrant checkpointing; use gradient_checkpointing_kwargs={"use_reentrant": False}'
                )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Tokens (B, prefix + N, C) and the `state` of them, None before the first such layer -> both behind it."""
        assert all(mask is None for mask in (*args, kwargs.get("attention_mask"))), "encoders here hide no token"
        x_BNC, given, index = hidden_states, self.reduction, self.index
        state: State | None = kwargs["state"]
        reducer, halves, used = given.reducer, given.halves, index < given.last
        if state is None:
            state = reducer.start(x_BNC, given.layers, given.last, given.prefix)
        if used:
            x_BNC, state = reducer.before_layer(x_BNC, state, index, self.compressor)
        bias = reducer.attention_bias(state)
        attended = halves.attend(self, x_BNC, bias, self.softmax(state))
        x_BNC = attended.x_BNC
        if used:
            signals = self.signals(attended, bias) if index in given.points else LayerSignals()
            x_BNC, state = reducer.before_mlp(x_BNC, state, index, signals)
        x_BNC = halves.feed(self, x_BNC)
        if index == given.last - 1:
            x_BNC, state = reducer.after_layers(x_BNC, state)
        return x_BNC, state

    def softmax(self, state: State) -> Callable[[Tensor], Tensor] | None:
        """The reducer's own, where which tokens are alive has a gradient, which the logarithm of zero has not."""
        if state.policy_BN is None or not state.policy_BN.requires_grad:
            return None
        return lambda logits_BHNN: self.reduction.reducer.attention_weights(logits_BHNN, state)

    def signals(self, attended: Attended, bias: Tensor | None) -> LayerSignals:
        """What the reducer needs to see of this layer, and no more."""
        needs, (_, q, k) = self.reduction.reducer.needs, attended
        looked_at, prefix = "cls_attention" in needs, self.reduction.prefix
        return LayerSignals(
            keys=k if "keys" in needs else None,
            cls_attention=cls_rows(q, k, mask=bias) if looked_at and prefix else None,
            received=received(q, k, mask=bias) if "received" in needs or (looked_at and not prefix) else None,
        )


def on_full_grid(x_BNC: Tensor, state: State, unmerge: bool) -> Tensor:
    """(B, prefix + N, C) of as many tokens as the encoder began with.

    Every token stands at its place in the picture; or, if `unmerge`, every original token gets what it was merged into.
    Rows of tokens that are not there are NaN.
    """
    if unmerge:
        return take(torch.cat([x_BNC, torch.full_like(x_BNC[:, :1], torch.nan)], dim=1), state.slot_BS)
    tokens = state.sources
    batch, _, channels = x_BNC.shape
    there_BN = state.size_BN > 0  # otherwise an empty package, or dropped and only masked
    rows = in_batch(state.place_BN, tokens).where(there_BN.flatten(), batch * tokens)
    full = x_BNC.new_full((batch * tokens + 1, channels), torch.nan)
    return full.index_copy_(0, rows, x_BNC.flatten(0, 1))[:-1].view(batch, tokens, channels)


class ReducingVisionModel(PreTrainedModel):
    """Mixin of a vision encoder in which a reducer may stand.

    Class data: `halves`, where it is known how a layer is two residual steps; `reducing_class`, its layer with
    `ReducingLayer`, or `cannot_reduce`, why there is none.
    """

    halves: ClassVar[Halves | None] = None
    reducing_class: ClassVar[type[ReducingLayer] | None] = None
    cannot_reduce: ClassVar[str] = ""

    layers: Any

    def put_reducer(self, reducer: Reducer, prefix: int, width: int) -> None:
        """Replaces the layers that speak to the reducer by those of `reducing_class`."""
        if self.reducing_class is None or self.halves is None:
            raise LacoError(f"{reducer.name} cannot run inside {type(self).__name__}: {self.cannot_reduce}")
        config: Any = self.config
        layers = len(self.layers)
        reduction = Reduction(reducer, self.halves, layers, config.reducer_last or layers, prefix, width)
        for index in range(reduction.first, layers):
            self.layers[index] = self.reducing_class(config, reduction, index)

    def compressors(self) -> dict[int, MergerModule]:
        """What reducers train, by the count of layers before it."""
        return {
            index: layer.compressor
            for index, layer in enumerate(self.layers)
            if isinstance(layer, ReducingLayer) and layer.compressor is not None
        }

    def on_full_grids(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `run`, the forward of this encoder, gives, all tokens at their places in the full grid."""
        config: Any = self.config
        if config.reducer is None:
            return run(*args, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        with noting_states() as states:
            outputs = run(*args, **kwargs, return_dict=True)
        state, unmerge, before = states[-1], config.reducer_unmerge, len(self.layers) - len(states)
        if unmerge and (state.slot_BS == state.size_BN.shape[1]).any():
            raise LacoError(JOINED.format(config.reducing_method.name))
        if outputs.last_hidden_state.isnan().any():  # which from here on means that a token is not there
            raise LacoError("the vision encoder puts out NaN")
        outputs.last_hidden_state = on_full_grid(outputs.last_hidden_state, state, unmerge)
        if outputs.get("hidden_states") is not None:  # the first is what enters layer 0
            outputs.hidden_states = outputs.hidden_states[: before + 1] + tuple(
                None if x_BNC is None else on_full_grid(x_BNC, state, unmerge)
                for x_BNC, state in zip(outputs.hidden_states[before + 1 :], states, strict=True)
            )
        if outputs.get("pooler_output") is not None and state.policy_BN is not None and not state.prefix:
            # Pooled over tokens that are masked out as well: better no result than a wrong one.
            outputs.pooler_output = torch.full_like(outputs.pooler_output, torch.nan)
        as_dict = getattr(config, "return_dict", True) if as_dict is None else as_dict
        return outputs if as_dict else outputs.to_tuple()
