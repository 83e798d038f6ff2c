"""A token of a method's own that looks at the prompt from behind it.

It is the last one, so no other token sees it, and it needs no place in the sequence: it is computed beside it, as the
only query of every layer, and is in no mask, no cache and no output. Keys and values of the prompt, which the layer has
too, are computed anew.
"""

from collections.abc import Mapping
from contextvars import Context
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache

from laco.families.reduction.projections import queries_keys, values


@runtime_checkable
class BringsToken(Protocol):
    """What a method trains, if it brings such a token."""

    def token(self, layer: int) -> Tensor:
        """(1, D) what is added to it before a layer, counted from 0; of layer 0, its embedding."""


class TokenBeside:
    """That of each sample of a batch."""

    def __init__(self, model: Any, module: BringsToken) -> None:
        self.model, self.module = model, module
        self.state: dict[int, Tensor] = {}  # (1, D), as it enters the newest layer
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}  # rotary, with the dimensions of the model's

    def enter(self, row: int, number: int, position_ids: Tensor) -> None:
        """Adds what it gets before a layer. `position_ids` (..., L) of the prompt: it stands one past their last."""
        added_1D = self.module.token(number)
        if number == 0:
            # Of M-RoPE in all three axes; a plain position may stand before them.
            axes = position_ids[-3:] if position_ids.ndim > 1 else position_ids
            place = (axes.amax() + 1).expand(*axes.shape[:-1], 1, 1)
            self.tables[row] = self.model.rotary_emb(added_1D[None], place)
            self.state[row] = added_1D
        else:
            self.state[row] = self.state[row] + added_1D

    def pass_through(
        self, row: int, number: int, x_LD: Tensor, tables: tuple[Tensor, Tensor], kwargs: Mapping[str, Any]
    ) -> None:
        """Through a layer, which the prompt's tokens enter as `x_LD`, with their rotary tables."""
        layer = self.model.layers[number]
        with torch.no_grad():  # the prompt's tokens are what they are
            k_GLd, v_GLd = queries_keys(layer, x_LD, *tables)[1], values(layer, x_LD)
        prompt = DynamicCache()
        prompt.update(k_GLd[None], v_GLd[None], number)
        # The stock class's forward: the layer's own would drop the cache where activations are checkpointed. In a
        # context of its own, so that transformers does not put out this attention among that of the prompt.
        out = Context().run(
            type(layer)._laco_stock.forward,
            layer,
            self.state[row][None],
            **{
                **kwargs,
                "attention_mask": None,
                "position_ids": None,
                "past_key_values": prompt,
                "position_embeddings": self.tables[row],
            },
        )
        self.state[row] = (out[0] if isinstance(out, tuple) else out)[0]
