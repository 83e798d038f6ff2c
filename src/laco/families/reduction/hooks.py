"""Looking at what passes through a module for a while, in one thread: a model may serve several at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import get_ident
from typing import Any

from torch import Tensor, nn


@contextmanager
def hooked(
    module: nn.Module, enter: Callable[..., Any] | None = None, leave: Callable[..., Any] | None = None
) -> Iterator[None]:
    """While this lasts, calls of a module by this thread have these hooks.

    Args:
        enter: (module, args, kwargs) -> None, or new (args, kwargs).
        leave: (module, args, kwargs, output) -> None, or a new output.
    """
    thread = get_ident()

    def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def run(*given: Any) -> Any:
            return hook(*given) if get_ident() == thread else None

        return run

    handles = []
    if enter is not None:
        handles.append(module.register_forward_pre_hook(of_this_thread(enter), with_kwargs=True))
    if leave is not None:
        handles.append(module.register_forward_hook(of_this_thread(leave), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Tap:
    """A layer or a part of one: its input, its other arguments, its output."""

    layer: Any
    entered: Tensor | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    put_out: Tensor | None = None


@contextmanager
def tapped(layer: Any) -> Iterator[Tap]:
    """Notes what passes through a layer while this lasts, the last time."""
    tap = Tap(layer)

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.entered = (args[0] if args else kwargs["hidden_states"]).detach()
        names = ("hidden_states", "attention_mask")  # of layers that take the mask by place
        tap.kwargs = {**dict(zip(names, args, strict=False)), **kwargs}

    def leave(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        tap.put_out = out[0] if isinstance(out, tuple) else out

    with hooked(layer, enter, leave):
        yield tap
