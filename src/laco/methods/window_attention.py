"""Multi-head attention within windows, the part that TokenPacker and the window merger share."""

from math import gcd

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from laco.errors import LacoError


def heads_for(width: int, heads: int | None, usual: int) -> int:
    """The number of heads: as asked for, else the greatest divisor that `usual` and the width share."""
    heads = gcd(usual, width) if heads is None else heads
    if heads < 1 or width % heads:
        raise LacoError(f"heads must be a divisor of the width {width}; got {heads}")
    return heads


class WindowAttention(nn.Module):
    """(..., Q, C) queries attend to (..., R, C) keys and values of their own window -> (..., Q, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query_QC: Tensor, key_RC: Tensor, value_RC: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(x), "... n (heads c) -> ... heads n c", heads=self.heads)
            for linear, x in ((self.q, query_QC), (self.k, key_RC), (self.v, value_RC))
        )
        # Windows stay separate leading dimensions: folded into one batch dimension they would exceed what the
        # fused CUDA kernels accept (65,535), and at this size plain matrix products are as good.
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "... heads n c -> ... n (heads c)"))
