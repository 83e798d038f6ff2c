"""LDPv2, the projector of MobileVLM V2 (arXiv 2402.03766).

    u = W2 gelu(W1 x + b1) + b2 on every token;   p = average pooling of u;   y = p + depthwise 3 x 3
    convolution of p

The convolution with identity encodes positions (PEG). The MLP runs before pooling, on all tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from laco.methods.base import Merger, MergerModule


@dataclass(frozen=True, kw_only=True)
class LDPv2(Merger):
    """MLP per token, pooling, positional convolution; external a projector, inside it keeps the width.

    The reference always pools to 12 x 12, which is what r = 2 gives on its 24 x 24 grid.
    """

    name: ClassVar[str] = "ldpv2"
    title: ClassVar[str] = "LDPv2 (MobileVLM V2)"
    paper: ClassVar[str] = "MobileVLM V2, arXiv 2402.03766"
    confirmed: ClassVar[str] = "layers, order, biases, erf GELU, zero-padded depthwise 3 x 3 plus identity, init"
    assumed: ClassVar[str] = "pooling by the factor instead of to 12 x 12; inside the encoder the output width is C"
    trained: ClassVar[bool] = True
    is_projector: ClassVar[bool] = True

    def build(self, width: int) -> "LDPv2Projector":
        return self.build_projector(width, width)

    def build_projector(self, width: int, out_width: int) -> "LDPv2Projector":
        return LDPv2Projector(width, out_width, self.factor)


class LDPv2Projector(MergerModule):
    """(B, H, W, C) map -> (B, H/r, W/r, out_width), or (B, *out_grid, out_width). See `LDPv2`.

    Args:
        width: C.
        out_width: channels of the result.
        factor: window side r.
        out_grid: a fixed grid (height, width) that any map is pooled to, as the reference's 12 x 12; for use
            by hand. Its bins overlap where it does not divide the map.
    """

    sees: ClassVar = "map"

    def __init__(self, width: int, out_width: int, factor: int, out_grid: tuple[int, int] | None = None):
        super().__init__()
        self.factor = factor
        self.out_grid = out_grid
        self.mlp = nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.peg = nn.Conv2d(out_width, out_width, kernel_size=3, padding=1, groups=out_width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        u_BDHW = rearrange(self.mlp(x_BHWC), "b h w d -> b d h w")
        p_BDhw = F.adaptive_avg_pool2d(u_BDHW, self.out_grid or (height // self.factor, width // self.factor))
        return rearrange(p_BDhw + self.peg(p_BDhw), "b d h w -> b h w d")
