"""DC-AE's parameter-free shortcuts (arXiv 2410.10733), from which LaCo's comes.

They work in torch's channel-major order, channel c * f^2 + dr * f + dc, on channel-first maps. Confirmed:
order and formulas of both directions.
"""

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from laco.errors import LacoError


def averaging_shortcut(x_BCHW: Tensor, out_channels: int, factor: int) -> Tensor:
    """Space-to-channel, then the mean of contiguous channels: (B, C, f h, f w) -> (B, out_channels, h, w).

    With out_channels = C every group is one channel's f x f neighbours: average pooling.

    Raises:
        LacoError: f^2 C is not a multiple of out_channels, or a side is not a multiple of f.
    """
    channels, height, width = x_BCHW.shape[1:]
    if channels * factor**2 % out_channels or height % factor or width % factor:
        raise LacoError(
            f"{channels} channels on {height} x {width} do not fit into {out_channels} at factor {factor}:"
            f" it must divide both sides, and {out_channels} must divide {channels * factor**2}"
        )
    wide = F.pixel_unshuffle(x_BCHW, factor)
    return rearrange(wide, "b (c group) h w -> b c group h w", c=out_channels).mean(dim=2)


def duplicating_shortcut(x_BCHW: Tensor, out_channels: int, factor: int) -> Tensor:
    """The way back, channels repeated, then channel-to-space: (B, C, h, w) -> (B, out_channels, f h, f w).

    Raises:
        LacoError: f^2 out_channels is not a multiple of C.
    """
    channels = x_BCHW.shape[1]
    if out_channels * factor**2 % channels:
        raise LacoError(f"{channels} channels cannot be duplicated into {out_channels} at factor {factor}")
    wide = repeat(x_BCHW, "b c h w -> b (c group) h w", group=out_channels * factor**2 // channels)
    return F.pixel_shuffle(wide, factor)


def down_block(x_BCHW: Tensor, conv: nn.Conv2d, out_channels: int, factor: int = 2) -> Tensor:
    """DC-AE's residual down-sampling: a convolution, space-to-channel, and the averaging shortcut past both.

    Args:
        x_BCHW: (B, C, f h, f w).
        conv: C -> out_channels / f^2 channels, sides kept.

    Returns:
        (B, out_channels, h, w).
    """
    return F.pixel_unshuffle(conv(x_BCHW), factor) + averaging_shortcut(x_BCHW, out_channels, factor)
