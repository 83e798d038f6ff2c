"""LaCo's Patch Merge Layer (arXiv 2507.02279): space-to-channel, MLP, and a shortcut past it.

    y = MLP(concat(x_1 .. x_R)) + shortcut(x_1 .. x_R),    R = r * r tokens of a window

The concatenation is in connector order: channel (dr * r + dc) * C + c, position-major. The paper's shortcut
is "space-to-channel, then channel averaging", which DC-AE does on r^2 *contiguous* channels in torch's
channel-major order. In the position-major order contiguous channels are neighbouring channels of one token,
so averaging must run over the position axis; then both are the same thing, the mean of the r x r tokens (see
`laco.methods.dcae`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods.base import Merger, MergerModule

Norm = Literal["none", "layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Shortcut = Literal["mean", "none", "saliency"]

NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "none": nn.Identity,
    "layernorm": partial(nn.LayerNorm, eps=1e-6),
    "rmsnorm": partial(nn.RMSNorm, eps=1e-6),
}
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


@dataclass(frozen=True, kw_only=True)
class LaCo(Merger):
    """Patch Merge Layer: MLP over the concatenated window plus the window's mean.

    At r = 2 and by default it has 5 C^2 + 2 C parameters.

    Args:
        shortcut: `mean` (the paper), `none` (pixel-shuffle with an MLP, the paper's baseline), or `saliency`
            (ours): a weighted mean, the weights a softmax over the window for every channel, their logits a
            linear map of LayerNorm(concatenation) that starts at zero, so it starts as the mean.
        norm: of the concatenation, before the MLP: `none`, `layernorm`, `rmsnorm`.
        hidden: width of the MLP's hidden layer; None = C.
        activation: `gelu` (erf), `gelu_tanh`, `silu`, `relu`.
        zero_init: the MLP's last layer starts at zero, so that an inserted model starts as with average
            pooling and works at once. None = wherever there is a shortcut; without one it would silence the
            encoder, and raises.
    """

    name: ClassVar[str] = "laco"
    title: ClassVar[str] = "LaCo patch merge layer"
    paper: ClassVar[str] = "LaCo: Efficient Layer-wise Compression of Visual Tokens for MLLMs, arXiv 2507.02279"
    confirmed: ClassVar[str] = (
        "after layer k of L (LaCo@k/L, default 1/4); pixel shuffle, MLP r^2 C -> C, plus the parameter-free"
        " space-to-channel and channel-averaging shortcut"
    )
    assumed: ClassVar[str] = (
        "r = 2; hidden width C; GELU; biases; no norm; zero last layer; prefix tokens kept out;"
        " odd grids padded; the saliency shortcut is ours"
    )
    trained: ClassVar[bool] = True
    default_depth: ClassVar[float] = 1 / 4

    shortcut: Shortcut = "mean"
    norm: Norm = "none"
    hidden: int | None = None
    activation: Activation = "gelu"
    zero_init: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and self.hidden < 1:
            raise LacoError(f"laco: hidden must be 1 or more; got {self.hidden}")
        if self.zero_init and self.shortcut == "none":
            raise LacoError('laco: zero_init with shortcut="none" would make every merged token zero; set it to False')

    def build(self, width: int) -> "PatchMergeLayer":
        return PatchMergeLayer(width, self)


class PatchMergeLayer(MergerModule):
    """(..., R, C) windows -> (..., C). See `LaCo`."""

    def __init__(self, width: int, config: LaCo):
        super().__init__()
        wide = width * config.factor**2
        hidden = config.hidden or width
        self.shortcut = config.shortcut
        self.zero_init = config.shortcut != "none" if config.zero_init is None else config.zero_init
        self.norm = NORMS[config.norm](wide)
        self.fc1 = nn.Linear(wide, hidden)
        self.act = ACTIVATIONS[config.activation]()
        self.fc2 = nn.Linear(hidden, width)
        if config.shortcut == "saliency":
            self.saliency_norm = nn.LayerNorm(wide, eps=1e-6)
            self.saliency = nn.Linear(wide, wide)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        zeroed = [self.fc2] if self.zero_init else []
        for linear in zeroed + ([self.saliency] if self.shortcut == "saliency" else []):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_RC: Tensor) -> Tensor:
        concat = x_RC.flatten(-2)
        y_C = self.fc2(self.act(self.fc1(self.norm(concat))))
        if self.shortcut == "mean":
            return y_C + x_RC.mean(dim=-2)
        if self.shortcut == "saliency":
            logits_RC = self.saliency(self.saliency_norm(concat)).unflatten(-1, x_RC.shape[-2:])
            return y_C + torch.sum(logits_RC.softmax(dim=-2) * x_RC, dim=-2)
        return y_C
