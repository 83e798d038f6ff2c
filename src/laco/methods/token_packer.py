"""TokenPacker (arXiv 2407.02392, algorithm 2): a query attends to its own window.

    q = LN(Wq x~),  k = LN(MLPk z),  v = LN(MLPv z),   y = MLP(MultiHead(q; k_1 .. k_R; v_1 .. v_R))

x~ is the bilinearly down-sampled last level, z the levels joined on channels. At a whole factor r bilinear
interpolation (align_corners=False, no antialiasing) reads only the middle of each window: its centre token,
or the mean of the central 2 x 2 where r is even. The query is not added to the result.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from laco.methods.base import Merger, MergerModule
from laco.methods.window_attention import WindowAttention, heads_for


def window_centre(x_RC: Tensor, factor: int) -> Tensor:
    """The middle of each window, (..., R, C) -> (..., C): bilinear down-sampling by r."""
    middle = slice((factor - 1) // 2, factor // 2 + 1)
    return x_RC.unflatten(-2, (factor, factor))[..., middle, middle, :].mean(dim=(-3, -2))


@dataclass(frozen=True, kw_only=True)
class TokenPacker(Merger):
    """Point-to-region attention. External it is the projector and reads four levels; inside it has one level.

    Args:
        heads: attention heads; None = 8 as in the paper, on a width that 8 does not divide gcd(8, width).
    """

    name: ClassVar[str] = "token_packer"
    title: ClassVar[str] = "TokenPacker"
    paper: ClassVar[str] = "TokenPacker: Efficient Visual Projector for Multimodal LLM, arXiv 2407.02392"
    confirmed: ClassVar[str] = (
        "layers, 8 heads, LayerNorm eps 1e-6, no residual from the query, init; levels 12, 16, 22, 23 of 24"
    )
    assumed: ClassVar[str] = (
        "the same relative depths in other encoders; inside the encoder one level, the current one, and output width C"
    )
    trained: ClassVar[bool] = True
    is_projector: ClassVar[bool] = True
    projector_levels: ClassVar[tuple[float, ...]] = (12 / 24, 16 / 24, 22 / 24)

    heads: int | None = None

    def build(self, width: int) -> "TokenPackerProjector":
        return TokenPackerProjector(width, width, self.factor, 1, self.heads)

    def build_projector(self, width: int, out_width: int) -> "TokenPackerProjector":
        levels = len(self.projector_levels) + 1
        return TokenPackerProjector(width, out_width, self.factor, levels, self.heads)


class TokenPackerProjector(MergerModule):
    """(..., R, levels * C) windows, the last level last -> (..., out_width). See `TokenPacker`."""

    def __init__(self, width: int, out_width: int, factor: int, levels: int, heads: int | None):
        super().__init__()
        self.width = width
        self.factor = factor
        self.q = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=1e-6))
        self.k = self._levels_to_width(levels * width, width)
        self.v = self._levels_to_width(levels * width, width)
        self.attention = WindowAttention(width, heads_for(width, heads, usual=8))
        self.mlp = nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.reset_parameters()

    @staticmethod
    def _levels_to_width(in_width: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for part in (self.attention.q, self.attention.k, self.attention.v):
            # The reference initialises the three as one (3 C, C) matrix.
            nn.init.xavier_uniform_(part.weight, gain=0.5**0.5)

    def forward(self, x_RK: Tensor) -> Tensor:
        return self.pack(x_RK[..., -self.width :], x_RK)

    def pack(self, x_RC: Tensor, levels_RK: Tensor) -> Tensor:
        """Queries from `x_RC` (..., R, C), keys and values from `levels_RK` (..., R, levels * C)."""
        query_1C = self.q(window_centre(x_RC, self.factor)).unsqueeze(-2)
        return self.mlp(self.attention(query_1C, self.k(levels_RK), self.v(levels_RK)).squeeze(-2))
