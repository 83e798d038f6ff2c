"""Which of our functions answers a numeric case: the table `CASES` at the end, from an index's method name.

A function gets a `Case` and gives its outputs by the names of the index. It builds the very module that users
get, loads the case's weights by meaning, and takes every size from the arrays and hyper-parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from laco.grid import merge_map, to_windows
from laco.methods import PixelShuffle, TokenPacker, WindowMerger
from laco.methods.dcae import averaging_shortcut, duplicating_shortcut
from laco.methods.ldpv2 import LDPv2Projector
from laco.methods.pixel_shuffle import pixel_shuffle


@dataclass(frozen=True)
class Case:
    """The arrays (inputs and weights) and hyper-parameters of one case."""

    arrays: dict[str, Tensor]
    hyper: dict[str, Any]
    variant: str

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def width(self, name: str) -> int:
        """Output channels of a weight."""
        return self.arrays[name].shape[0]

    def map(self, name: str) -> Tensor:
        """(B, [prefix +] H W, C) tokens as a map (B, H, W, C), prefix tokens left out."""
        height, width = self.hyper["grid"]
        return self.arrays[name][:, -height * width :].unflatten(1, (height, width))


Outputs = dict[str, Tensor]


def load(module: nn.Module, case: Case, names: dict[str, str], eps: str | None = None) -> None:
    """Fills every parameter from the case's arrays.

    Args:
        module: what to fill, all of it.
        case: holds an array `{stem}_weight` or `{stem}_bias` for every parameter.
        names: the stem that stands for each submodule.
        eps: the hyper-parameter that holds the epsilon of the norms.
    """
    state = {}
    for key in module.state_dict():
        part, _, kind = key.rpartition(".")
        state[key] = case[f"{names[part]}_{kind}"]
    module.load_state_dict(state)
    if eps:
        for part in module.modules():
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                part.eps = case.hyper[eps]


def tokens(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.flatten(1, 2)


def shuffle(case: Case) -> Outputs:
    return {"y": tokens(pixel_shuffle(case.map("x"), case.hyper["r"], case.hyper["ps_version"]))}


def smolvlm_connector(case: Case) -> Outputs:
    x, factor = case.map("x"), case.hyper["r"]
    projector = PixelShuffle(factor=factor, form="smolvlm").build_projector(x.shape[-1], case.width("proj_weight"))
    load(projector, case, {"mlp.0": "proj"})
    return {
        "shuffled": tokens(pixel_shuffle(x, factor)),
        "y": tokens(merge_map(projector, x, factor, "error")),
    }


def internvl_mlp1(case: Case) -> Outputs:
    x, factor = case.map("x"), case.hyper["r"]
    projector = PixelShuffle(factor=factor, form="internvl").build_projector(x.shape[-1], case.width("fc2_weight"))
    load(projector, case, {"norm": "norm", "mlp.0": "fc1", "mlp.2": "fc2"}, eps="ln_eps")
    return {"y": tokens(merge_map(projector, x, factor, "error"))}


def qwen25_merger(case: Case) -> Outputs:
    channels = case["x"].shape[-1]
    factor = isqrt(case["fc1_weight"].shape[1] // channels)
    projector = PixelShuffle(factor=factor, form="qwen").build_projector(channels, case.width("fc2_weight"))
    load(projector, case, {"token_norm": "norm", "mlp.0": "fc1", "mlp.2": "fc2"}, eps="rms_eps")
    return {"y": projector(case["x"].unflatten(0, (-1, factor**2)))}


def dcae_averaging_shortcut(case: Case) -> Outputs:
    x, factor = case["x"], case.hyper["factor"]
    channels = x.shape[1]
    y = averaging_shortcut(x, channels * factor**2 // case.hyper["group"], factor)
    return {"y": y, "up": duplicating_shortcut(y, channels, factor)}


def ldpv2(case: Case) -> Outputs:
    x, out_grid = case.map("x"), tuple(case.hyper["out_grid"])
    factor = x.shape[1] // out_grid[0]
    projector = LDPv2Projector(x.shape[-1], case.width("fc2_weight"), factor, out_grid)
    load(projector, case, {"mlp.0": "fc1", "mlp.2": "fc2", "peg": "peg"})
    return {"y": tokens(projector(x))}


def tokenpacker(case: Case) -> Outputs:
    x, levels, factor = case.map("x_single"), case.map("x_multi"), case.hyper["scale_factor"]
    packer = TokenPacker(factor=factor, heads=case.hyper["heads"])
    projector = packer.build_projector(x.shape[-1], case.width("mlp2_weight"))
    names = {"q.0": "q_proj", "q.1": "ln_q", "mlp.0": "mlp1", "mlp.2": "mlp2"}
    names |= {f"{x}.{i}": name for x in "kv" for i, name in ((0, f"{x}_fc1"), (2, f"{x}_fc2"), (3, f"ln_{x}"))}
    names |= {f"attention.{x}": f"attn_{x}" for x in ("q", "k", "v", "out")}
    load(projector, case, names, eps="ln_eps")
    return {"y": tokens(projector.pack(to_windows(x, factor), to_windows(levels, factor)))}


def uhd4_window_merger(case: Case) -> Outputs:
    width, factor = case["x"].shape[-1], case.hyper["window"]
    merger = WindowMerger(
        factor=factor,
        attention="attn_q_weight" in case.arrays,
        heads=case.hyper["heads"],
        ffn=case.width("mlp1_weight") // factor**2,
    ).build(width)
    names = {"norm1": "ln1", "norm2": "ln2", "fc1": "mlp1", "fc2": "mlp2"}
    names |= {f"attention.{x}": f"attn_{x}" for x in ("q", "k", "v", "out")}
    load(merger, case, names, eps="ln_eps")
    grids = case["grids"].tolist()
    pictures = case["x"].split([height * width for height, width in grids], dim=1)
    merged = [
        tokens(merge_map(merger, x.unflatten(1, grid), factor, "error"))
        for x, grid in zip(pictures, grids, strict=True)
    ]
    return {"y": torch.cat(merged, dim=1)}


CASES: dict[str, Callable[[Case], Outputs]] = {
    "pixel_shuffle": shuffle,
    "smolvlm_connector": smolvlm_connector,
    "internvl_mlp1": internvl_mlp1,
    "qwen25_merger": qwen25_merger,
    "dcae_averaging_shortcut": dcae_averaging_shortcut,
    "ldpv2": ldpv2,
    "tokenpacker": tokenpacker,
    "uhd4_window_merger": uhd4_window_merger,
}
