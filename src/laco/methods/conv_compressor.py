"""The convolutional compressor of DeepSeek-OCR (arXiv 2510.18234), which stands between its two encoders.

neck: 1x1 conv, LN, 3x3 conv, LN;    then 3x3 convs of stride 2, one for every halving; no bias, no activation
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods.base import Merger, MergerModule


@dataclass(frozen=True, kw_only=True)
class ConvCompressor(Merger):
    """A SAM neck, then strided convolutions back to the encoder's width.

    Args:
        factor: the paper's is 4 (16 times fewer tokens), two convolutions of stride 2. Prime factors other than 2
            get one of their own stride, factor 1 one of stride 1.
        hidden: channels of the neck; None = a third of the width, as 256 of 768 in the paper. Every convolution but the
            last doubles them.
    """

    name: ClassVar[str] = "conv_compressor"
    title: ClassVar[str] = "convolutional compressor (DeepSeek-OCR)"
    paper: ClassVar[str] = "DeepSeek-OCR: Contexts Optical Compression, arXiv 2510.18234"
    confirmed: ClassVar[str] = "layers, norms (eps 1e-6), strides, no bias and no activation; 768 -> 256 -> 512 -> 1024"
    assumed: ClassVar[str] = (
        "the last convolution gives the encoder's width; depth 1/2, as between the two encoders; odd grids by `odd`,"
        " where the reference's convolutions see zeros beside them"
    )
    trained: ClassVar[bool] = True
    default_depth: ClassVar[float] = 1 / 2

    hidden: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and self.hidden < 1:
            raise LacoError(f"conv_compressor: hidden must be 1 or more; got {self.hidden}")

    def build(self, width: int) -> "ConvCompressorModule":
        hidden, strides = self.hidden or max(1, width // 3), prime_factors(self.factor) or [1]
        return ConvCompressorModule(width, [*(hidden * 2**step for step in range(len(strides))), width], strides)


def prime_factors(number: int) -> list[int]:
    """In ascending order; none of 1."""
    smallest = next((divisor for divisor in range(2, number + 1) if number % divisor == 0), None)
    return [smallest, *prime_factors(number // smallest)] if smallest else []


class ConvCompressorModule(MergerModule):
    """(B, H, W, C) -> (B, H', W', C_n), sides divided and rounded up stride by stride. See `ConvCompressor`.

    Args:
        width: C.
        channels: of the neck, then of every strided convolution.
        strides: of these; kernels are 3 wide, or as wide as the stride.
    """

    sees: ClassVar = "map"

    def __init__(self, width: int, channels: list[int], strides: list[int]):
        super().__init__()
        neck = channels[0]
        self.neck1 = nn.Conv2d(width, neck, 1, bias=False)
        self.norm1 = nn.LayerNorm(neck, eps=1e-6)
        self.neck2 = nn.Conv2d(neck, neck, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(neck, eps=1e-6)
        self.down = nn.ModuleList(
            nn.Conv2d(inside, outside, max(3, stride), stride, padding=max(3, stride) // 2, bias=False)
            for (inside, outside), stride in zip(pairwise(channels), strides, strict=True)
        )
        self.reset_parameters()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for conv, norm in ((self.neck1, self.norm1), (self.neck2, self.norm2)):
            x_BHWC = norm(rearrange(conv(rearrange(x_BHWC, "b h w c -> b c h w")), "b c h w -> b h w c"))
        x_BCHW = rearrange(x_BHWC, "b h w c -> b c h w")
        for halving in self.down:
            x_BCHW = halving(x_BCHW)
        return rearrange(x_BCHW, "b c h w -> b h w c")
