"""The first layers of a language model alone: what would enter a layer, before the whole model runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laco.families.reduction.hooks import hooked
from laco.families.reduction.kept import Entry


class Reached(Exception):
    """Ends a pass before a layer, with what the layer would have read."""

    def __init__(self, x_BKD: Tensor, kwargs: Mapping[str, Any]) -> None:
        self.x_BKD, self.kwargs = x_BKD, kwargs


@torch.compiler.disable  # what ends the pass is no part of a graph
def run_up_to(model: Any, number: int, entry: Entry) -> Reached:
    """What enters the layer with this number, from 0; nothing behind it is computed."""

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"], kwargs)

    try:
        with hooked(model.layers[number], enter=stop):
            model.stock_forward(**entry.arguments | {"use_cache": False})
    except Reached as reached:
        return reached
    raise AssertionError("the layers of a language model run one after another")
