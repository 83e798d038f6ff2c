"""Grids of visual tokens and the windows that mergers see.

Shape letters: B pictures, H x W grid (row-major), C channels, r factor, h = H/r, w = W/r, R = r * r tokens of
a window.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from laco.errors import LacoError

OddRule = Literal["pad", "resize", "crop", "error"]
ODD_RULES: tuple[str, ...] = get_args(OddRule)


class Grid(NamedTuple):
    """How visual tokens lie: frames x height x width."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


def merged_side(side: int, factor: int, odd: str) -> int:
    """Length of a grid side after merging `factor` neighbours by the rule `odd`.

    `pad` and `resize` round up, `crop` rounds down, `error` raises `LacoError` unless the factor divides the
    side. A side that cropping would leave empty raises too.
    """
    if side % factor == 0:
        return side // factor
    if odd == "error":
        raise LacoError(
            f"factor {factor} does not divide a grid side of {side} tokens; choose a divisor of {side}"
            ' or odd="pad", "resize" or "crop"'
        )
    if odd == "crop":
        if side < factor:
            raise LacoError(f'odd="crop" would leave nothing of a grid side of {side} tokens at factor {factor}')
        return side // factor
    return -(-side // factor)


def merged_grid(grid: Grid, factor: int, odd: str) -> Grid:
    """The grid after one merge: every frame keeps its own windows, time is never merged."""
    return Grid(grid.frames, merged_side(grid.height, factor, odd), merged_side(grid.width, factor, odd))


def fit_map(x_BHWC: Tensor, factor: int, odd: str) -> Tensor:
    """Makes both sides of a token map divisible by `factor`.

    Args:
        x_BHWC: tokens as a map, (B, H, W, C).
        factor: window side r.
        odd: `pad` repeats the last row and column, `resize` interpolates bilinearly to the next multiple,
            `crop` drops the last rows and columns, `error` refuses.

    Returns:
        (B, r * h, r * w, C) with h, w of `merged_side`. The input itself when nothing has to be done.

    Source: our documented choice; the LaCo paper does not say what it does with odd grids (assumed).
    """
    height, width = x_BHWC.shape[1:3]
    fit_h, fit_w = (merged_side(side, factor, odd) * factor for side in (height, width))
    if (fit_h, fit_w) == (height, width):
        return x_BHWC
    if odd == "crop":
        return x_BHWC[:, :fit_h, :fit_w]
    if odd == "pad":
        # Not F.pad(mode="replicate"): channels would have to go first, and its CUDA gradient is not
        # deterministic.
        x_BHWC = torch.cat([x_BHWC, x_BHWC[:, -1:].expand(-1, fit_h - height, -1, -1)], dim=1)
        return torch.cat([x_BHWC, x_BHWC[:, :, -1:].expand(-1, -1, fit_w - width, -1)], dim=2)
    x_BCHW = rearrange(x_BHWC, "b h w c -> b c h w")
    x_BCHW = F.interpolate(x_BCHW, size=(fit_h, fit_w), mode="bilinear", align_corners=False)
    return rearrange(x_BCHW, "b c h w -> b h w c")


def to_windows(x_BHWC: Tensor, factor: int) -> Tensor:
    """Groups the r x r neighbours of a map: (B, H, W, C) -> (B, h, w, R, C), R in row-major order."""
    return rearrange(x_BHWC, "b (h r1) (w r2) c -> b h w (r1 r2) c", r1=factor, r2=factor)


def from_windows(x_BhwRC: Tensor, factor: int) -> Tensor:
    """The inverse of `to_windows`: (B, h, w, R, C) -> (B, H, W, C)."""
    return rearrange(x_BhwRC, "b h w (r1 r2) c -> b (h r1) (w r2) c", r1=factor, r2=factor)


def merge_map(merger: nn.Module, x_BHWC: Tensor, factor: int, odd: str) -> Tensor:
    """Runs a merger's module over a map: (B, H, W, C) -> (B, h, w, C_out).

    The module says by its attribute `sees` whether it wants `windows` (..., R, C) or the whole `map` (B, H,
    W, C).
    """
    x_BHWC = fit_map(x_BHWC, factor, odd)
    return merger(x_BHWC) if merger.sees == "map" else merger(to_windows(x_BHWC, factor))


def pool_map(x_BHWC: Tensor, factor: int, odd: str = "pad") -> Tensor:
    """Mean of every window: (B, H, W, C) -> (B, h, w, C); the yardstick of how far features move."""
    return to_windows(fit_map(x_BHWC, factor, odd), factor).mean(dim=-2)


def split_prefix(x_BNC: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Splits prefix tokens (CLS, registers), which are never merged, from patch tokens."""
    return x_BNC[:, :prefix], x_BNC[:, prefix:]
