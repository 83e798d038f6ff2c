"""Pixel-shuffle connectors: concatenate the r x r tokens of a window on channels, then project.

`internvl` (InternVL 1.5, arXiv 2404.16821): LayerNorm(r^2 C) -> Linear -> GELU (erf) -> Linear, both to the
new width. `smolvlm`  (Idefics3 2408.12637, SmolVLM 2504.05299): one Linear without bias. `qwen`
(Qwen2.5-VL 2502.13923): RMSNorm of every token -> Linear(r^2 C -> r^2 C) -> GELU (erf) -> Linear.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from laco.grid import to_windows
from laco.methods.base import Merger, MergerModule

Form = Literal["internvl", "smolvlm", "qwen"]


def pixel_shuffle(x_BHWC: Tensor, factor: int, version: Literal["v1", "v2"] = "v2") -> Tensor:
    """Space-to-channel: (B, H, W, C) -> (B, H/r, W/r, r^2 C), in connector order (dr * r + dc) * C + c.

    Sides must be multiples of r (see `grid.fit_map`). `v1` is the default of InternVL's code, not of its
    released
    checkpoints: the same vectors on the transposed grid, (B, W/r, H/r, r^2 C). Confirmed: exact in both
    versions.
    """
    y_BhwK = to_windows(x_BHWC, factor).flatten(-2)
    return y_BhwK.transpose(1, 2) if version == "v1" else y_BhwK


@dataclass(frozen=True, kw_only=True)
class PixelShuffle(Merger):
    """Pixel shuffle and a projection, no shortcut; external it is the projector, inside it keeps the width.

    Args:
        form: `internvl`, `smolvlm` or `qwen`, see the module's text.
    """

    name: ClassVar[str] = "pixel_shuffle"
    title: ClassVar[str] = "pixel-shuffle connector"
    paper: ClassVar[str] = (
        "InternVL 1.5, arXiv 2404.16821; Idefics3, 2408.12637; SmolVLM, 2504.05299; Qwen2.5-VL, 2502.13923"
    )
    confirmed: ClassVar[str] = (
        "channel order, layers, biases, LayerNorm eps 1e-5, RMSNorm eps 1e-6, erf GELU as projector"
    )
    assumed: ClassVar[str] = (
        "inside the encoder: the same with the output width C (LaCo's baseline); torch's default init"
    )
    trained: ClassVar[bool] = True
    is_projector: ClassVar[bool] = True

    form: Form = "internvl"

    def build(self, width: int) -> "PixelShuffleProjector":
        return self.build_projector(width, width)

    def build_projector(self, width: int, out_width: int) -> "PixelShuffleProjector":
        return PixelShuffleProjector(width, out_width, self.factor, self.form)


class PixelShuffleProjector(MergerModule):
    """(..., R, C) windows -> (..., out_width). See `PixelShuffle`."""

    def __init__(self, width: int, out_width: int, factor: int, form: Form):
        super().__init__()
        wide = width * factor**2
        self.token_norm: nn.Module = nn.RMSNorm(width, eps=1e-6) if form == "qwen" else nn.Identity()
        self.norm: nn.Module = nn.LayerNorm(wide, eps=1e-5) if form == "internvl" else nn.Identity()
        if form == "smolvlm":
            self.mlp = nn.Sequential(nn.Linear(wide, out_width, bias=False))
        else:
            hidden = wide if form == "qwen" else out_width
            self.mlp = nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, out_width))

    def forward(self, x_RC: Tensor) -> Tensor:
        return self.mlp(self.norm(self.token_norm(x_RC).flatten(-2)))
