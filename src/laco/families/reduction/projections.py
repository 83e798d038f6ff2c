"""What attention in a layer of a language model compares and mixes, by the layer's own norm and projections.

Shape letters as in `laco.methods.decoder`.
"""

import sys
from typing import Any

from torch import Tensor, nn


def at(x: Tensor, row: int) -> Tensor:
    """(..., B or 1, L, d) -> (..., L, d)."""
    return x[..., row if x.shape[-3] > 1 else 0, :, :]


def queries_keys(layer: Any, x_LD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(H, L, d) queries and (G, L, d) keys, rotated, that a layer computes for its input."""
    attention = layer.self_attn
    x_1LD = layer.input_layernorm(x_LD)[None]
    q_1HLd, k_1GLd = (
        norm(project(x_1LD).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
        for project, norm in (
            (attention.q_proj, getattr(attention, "q_norm", nn.Identity())),
            (attention.k_proj, getattr(attention, "k_norm", nn.Identity())),
        )
    )
    # Every family rotates by a function of its own module.
    module = sys.modules[stock_class(type(attention)).__module__]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    sections = getattr(module, "apply_multimodal_rotary_pos_emb", None)
    if sections is not None and cos.ndim == 4:
        q_1HLd, k_1GLd = sections(q_1HLd, k_1GLd, cos, sin, layer.self_attn.config.rope_parameters["mrope_section"])
    else:
        q_1HLd, k_1GLd = module.apply_rotary_pos_emb(q_1HLd, k_1GLd, cos, sin)
    return q_1HLd[0], k_1GLd[0]


def values(layer: Any, x_LD: Tensor) -> Tensor:
    """(G, L, d) values that a layer computes for its input."""
    attention = layer.self_attn
    return attention.v_proj(layer.input_layernorm(x_LD)).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)


def stock_class(kind: type) -> type:
    return getattr(kind, "_laco_stock", kind)
