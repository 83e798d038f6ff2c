"""A pre-norm layer of a vision encoder as its two residual steps, between which a reducer may speak.

    x = x + out(attention(norm(x)))
    x = x + feed_forward(x)

The parts are named, not copied: whatever stands in a layer under these names (adapters, quantised maps) is what runs,
and attention itself is computed by the implementation that the model is set to.

Shape letters: B pictures, N tokens, C channels, H heads of width d.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from laco.errors import LacoError
from laco.methods.base import LayerParts

Parts = tuple[str, ...]  # modules of a layer, one behind the other; a parameter among them is a factor
Softmax = Callable[[Tensor], Tensor]
getter = cache(attrgetter)  # making one takes longer than using it


def run(layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
    for name in parts:
        part = getter(name)(layer)
        x = part(x) if isinstance(part, nn.Module) else part * x
    return x


class Attended(NamedTuple):
    """Tokens behind the first half of a layer, (B, N, C), and what attention was made of, (B, H, N, d)."""

    x_BNC: Tensor
    queries_BHNd: Tensor
    keys_BHNd: Tensor


@dataclass(frozen=True)
class Halves:
    """The parts of a layer by name; as they are, those of SigLIP, CLIP and their like.

    Args:
        attention: the module that the attention function is called for; its `config` has the heads and `dropout`.
        norm, queries, keys, values, out, feed_forward: in the order in which they run.
    """

    attention: str = "self_attn"
    dropout: str = "attention_dropout"
    norm: Parts = ("layer_norm1",)
    queries: Parts = ("self_attn.q_proj",)
    keys: Parts = ("self_attn.k_proj",)
    values: Parts = ("self_attn.v_proj",)
    out: Parts = ("self_attn.out_proj",)
    feed_forward: Parts = ("layer_norm2", "mlp")

    def parts(self, layer: nn.Module) -> LayerParts | None:
        """The modules of a plain layer; None where there is more to it: other norms or maps, gates, factors."""
        *norm2, mlp = self.feed_forward
        paths = (self.norm, self.queries, self.keys, self.values, self.out, norm2, [f"{mlp}.fc1"], [f"{mlp}.fc2"])
        modules = dict(layer.named_modules())
        found: list[Any] = [modules.get(names[0]) if len(names) == 1 else None for names in paths]
        kinds = [nn.LayerNorm if names in (self.norm, norm2) else nn.Linear for names in paths]
        if not all(map(isinstance, found, kinds)):
            return None
        heads: int = getter(self.attention)(layer).config.num_attention_heads
        return LayerParts(heads, *found)

    def heads(self, layer: nn.Module, x_BNC: Tensor, *projections: Parts) -> list[Tensor]:
        """(B, H, N, d) by each of these projections, of tokens (B, N, C) that enter a layer."""
        module: Any = getter(self.attention)(layer)
        heads = getattr(module, "num_heads", None) or module.config.num_attention_heads  # which takes longer
        normed_BNC = run(layer, x_BNC, self.norm)
        split = (*x_BNC.shape[:2], heads, -1)
        return [run(layer, normed_BNC, parts).reshape(split).transpose(1, 2) for parts in projections]

    def queries_keys(self, layer: nn.Module, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, H, N, d), of tokens that enter a layer."""
        q, k = self.heads(layer, x_BNC, self.queries, self.keys)
        return q, k

    def attend(
        self, layer: nn.Module, x_BNC: Tensor, bias: Tensor | None = None, softmax: Softmax | None = None
    ) -> Attended:
        """The first half.

        Args:
            bias: (B, 1, 1, N), added to the logits of attention; `LacoError` if the implementation takes none.
            softmax: of logits (B, H, N, N), where no bias can say what it is; attention is then written out.
        """
        q, k, v = self.heads(layer, x_BNC, self.queries, self.keys, self.values)
        module: Any = getter(self.attention)(layer)
        settings = {
            "scaling": q.shape[-1] ** -0.5,
            "dropout": getattr(module.config, self.dropout) if layer.training else 0.0,
        }
        kind = module.config._attn_implementation
        if softmax is not None:
            y_BNHd, _ = written_out(module, q, k, v, None, softmax=softmax, **settings)
        else:
            if bias is not None and kind not in ("sdpa", "eager"):
                raise LacoError(
                    f"this compression weighs tokens in the vision encoder's attention, which {kind} cannot do; load"
                    ' the model with attn_implementation="sdpa" or "eager"'
                )
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(kind, written_out)
            bias = None if bias is None else bias.to(q.dtype)
            y_BNHd, _ = attention(module, q, k, v, bias, is_causal=False, **settings)
        return Attended(x_BNC + run(layer, y_BNHd.flatten(2), self.out), q, k)

    def feed(self, layer: nn.Module, x_BNC: Tensor) -> Tensor:
        """The second half."""
        return x_BNC + run(layer, x_BNC, self.feed_forward)


def written_out(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    softmax: Softmax | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as a function of transformers, with all N x N weights: what `eager` means, or with another softmax."""
    # N x N numbers are many to go through once more, or to keep for longer than needed.
    weights_BHNN = query * scaling @ key.mT
    if attention_mask is not None:
        weights_BHNN += attention_mask
    if softmax is None:
        weights_BHNN = weights_BHNN.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    else:
        weights_BHNN = softmax(weights_BHNN)
    mixed_BHNd = F.dropout(weights_BHNN.to(value.dtype), dropout, dropout > 0) @ value
    return mixed_BHNd.transpose(1, 2), weights_BHNN
