"""The window merger of LLaVA-UHD v4 (arXiv 2605.08985), as MiniCPM-V 4.6 ships it.

    y_i = x_i + Attention(LN1(x))_i  within the window
    m   = W2 gelu_tanh(W1 LN2(concat(y_1 .. y_R)) + b1) + b2 + mean(y_1 .. y_R)

LN2 has joint statistics over all r^2 C channels. Without attention it is LaCo with a norm and a wide MLP.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods.base import LayerParts, Merger, MergerModule
from laco.methods.window_attention import WindowAttention, heads_for


@dataclass(frozen=True, kw_only=True)
class WindowMerger(Merger):
    """Window attention, then an MLP on the concatenation, with the mean as shortcut.

    Args:
        attention: with the window attention, or only the MLP and the mean.
        heads: attention heads; None = 16 as in SigLIP-so400m, on other widths gcd(16, width).
        ffn: the hidden width per token, r^2 times as much in all; None = 4 C. SigLIP-so400m has 4304.
        zero_init: the last layers of attention and MLP start at zero, so that an inserted model starts as
            with average pooling and works at once.
        reuse: they start from the encoder layer before instead, as in the paper, and have its `heads` and `ffn`.
            Of encoders whose layers are plain ones, as those of SigLIP and CLIP are.
    """

    name: ClassVar[str] = "window_merger"
    title: ClassVar[str] = "window-attention merger (LLaVA-UHD v4, MiniCPM-V 4.6)"
    paper: ClassVar[str] = "LLaVA-UHD v4, arXiv 2605.08985"
    confirmed: ClassVar[str] = "layers, norms (eps 1e-6), tanh GELU, mean residual after the attention, parameter reuse"
    assumed: ClassVar[str] = (
        "zero init unless `reuse`; depth 1/4 (paper: k = 6 of 27); odd grids padded (reference refuses)"
    )
    trained: ClassVar[bool] = True
    default_depth: ClassVar[float] = 1 / 4

    attention: bool = True
    heads: int | None = None
    ffn: int | None = None
    zero_init: bool = True
    reuse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn is not None and self.ffn < 1:
            raise LacoError(f"window_merger: ffn must be 1 or more; got {self.ffn}")

    @property
    def starts_from_layer(self) -> bool:
        return self.reuse

    def like(self, layer: LayerParts) -> Self:
        sizes = {"heads": layer.heads, "ffn": layer.fc1.out_features}
        for name, size in sizes.items():
            if getattr(self, name) not in (None, size):
                raise LacoError(
                    f"window_merger: reuse starts from an encoder layer with {name}={size}; leave {name} out, or reuse"
                )
        return replace(self, heads=sizes["heads"], ffn=sizes["ffn"])

    def build(self, width: int) -> "WindowAttentionMerger":
        return WindowAttentionMerger(width, self)


class WindowAttentionMerger(MergerModule):
    """(..., R, C) windows -> (..., C). See `WindowMerger`."""

    def __init__(self, width: int, config: WindowMerger):
        super().__init__()
        tokens = config.factor**2
        hidden = tokens * (config.ffn or 4 * width)
        self.zero_init = config.zero_init
        self.attention: WindowAttention | None = None
        if config.attention:
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.attention = WindowAttention(width, heads_for(width, config.heads, usual=16))
        self.norm2 = nn.LayerNorm(tokens * width, eps=1e-6)
        self.fc1 = nn.Linear(tokens * width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_init:
            for linear in [self.fc2] + ([self.attention.out] if self.attention else []):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, x_RC: Tensor) -> Tensor:
        if self.attention:
            normed_RC = self.norm1(x_RC)
            x_RC = x_RC + self.attention(normed_RC, normed_RC, normed_RC)
        return self.fc2(self.act(self.fc1(self.norm2(x_RC.flatten(-2))))) + x_RC.mean(dim=-2)

    @torch.no_grad()
    def start_from(self, layer: LayerParts) -> None:
        """About "that layer on each token, then the mean".

        Attention and its norm are copied; W1 is block-diagonal in the layer's first MLP matrix, W2 the mean
        of its second over the window's tokens; the second norm is repeated. Exact for windows of equal
        tokens, where the layer's activation is the tanh form of GELU.
        """
        norm2, fc1, fc2 = layer.norm2, layer.fc1, layer.fc2
        tokens = self.fc1.in_features // fc1.in_features
        if self.attention:
            copies = zip((self.norm1, *self.attention.children()), layer[1:6], strict=True)
            for mine, theirs in copies:
                mine.load_state_dict(theirs.state_dict())
        self.norm2.weight.copy_(norm2.weight.repeat(tokens))
        self.norm2.bias.copy_(norm2.bias.repeat(tokens))
        self.fc1.weight.copy_(torch.block_diag(*[fc1.weight] * tokens))
        self.fc1.bias.copy_(fc1.bias.repeat(tokens))
        self.fc2.weight.copy_(fc2.weight.repeat(1, tokens) / tokens)
        self.fc2.bias.copy_(fc2.bias)
