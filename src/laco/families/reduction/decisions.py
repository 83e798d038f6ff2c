"""What a method inside the vision encoder means for training: tokens that are missing, and a loss of its own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laco.errors import LacoError
from laco.families.encoders.reducing import ReducingLayer
from laco.families.reduction.hooks import hooked
from laco.families.reduction.lesson import LESSON, Taught


@contextmanager
def around_missing(projector: nn.Module) -> Iterator[None]:
    """While this lasts, a projector reads zeros where a token is missing, and still puts out NaN.

    The gradient of its weights sums over all tokens, and 0 * NaN is NaN.
    """
    missing: list[Tensor] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        missing.append(args[0][..., :1].isnan())
        return (args[0].masked_fill(missing[-1], 0), *args[1:]), kwargs

    def leave(_: Any, __: Any, ___: Any, out: Tensor) -> Tensor:
        if (out.isnan().any(dim=-1, keepdim=True) & ~missing[-1]).any():
            raise LacoError("the vision encoder or the projector puts out NaN")
        return out.masked_fill(missing.pop(), torch.nan)

    with hooked(projector, enter, leave):
        yield


@contextmanager
def teaching_reducer(encoder: Any) -> Iterator[None]:
    """Gives the lesson, if there is one, the loss of the encoder's reducer for one call of the encoder."""
    lesson, reducer = LESSON.get(), getattr(encoder.config, "reducing_method", None)
    if lesson is None or not encoder.training or not isinstance(reducer, Taught):
        yield
        return
    keeps_BM: list[Tensor] = []

    def note(layer: ReducingLayer, _: Any, __: Any, out: Any) -> None:
        state = out[1]
        # Masked tokens keep their places in training; package tokens stand behind them.
        keeps_BM.append(state.policy_BN[:, state.prefix : state.sources])

    deciding = [layer for layer in encoder.layers if isinstance(layer, ReducingLayer) and layer.compressor is not None]
    with ExitStack() as stack:
        for layer in deciding:
            stack.enter_context(hooked(layer, leave=note))
        yield
    lesson.give(reducer, reducer.loss(keeps_BM, None, None))
