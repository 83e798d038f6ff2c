"""Mergers and connectors."""

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor, nn

from cases.case import Case, Outputs, load
from laco.grid import merge_map, to_windows
from laco.methods import WTC, AveragePool, MergerModule, PixelShuffle, TokenPacker, WindowMerger
from laco.methods.conv_compressor import ConvCompressorModule
from laco.methods.dcae import averaging_shortcut, down_block, duplicating_shortcut
from laco.methods.ldpv2 import LDPv2Projector
from laco.methods.pixel_shuffle import pixel_shuffle


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
    y = merge_map(projector, x, factor, "error")
    transposed = case.hyper.get("ps_version") == "v1" or "shuffle v1" in case.variant
    return {"y": tokens(y.transpose(1, 2) if transposed else y)}


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


def dcae_down_block(case: Case) -> Outputs:
    weight = case["conv_weight"]
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=case.hyper["padding"])
    load(conv, case, {"": "conv"})
    return {"y": down_block(case["x"], conv, weight.shape[0] * case.hyper["factor"] ** 2, case.hyper["factor"])}


def uhd3_wtc(case: Case) -> Outputs:
    factor, grids = case.hyper["window"], case["grids"].tolist()
    # Otherwise the reference's avg_pooling, which leaves out what is odd.
    learned = "fc1_weight" in case.arrays and "avg_pooling" not in case.variant
    method = WTC(factor=factor) if learned else AveragePool(factor=factor)
    merger: MergerModule = method.build(case["x"].shape[-1])
    if learned:
        load(merger, case, {"fc1": "fc1", "fc2": "fc2"})
    pictures = case["x"].split([height * width for height, width in grids])
    merged = [
        merge_map(merger, x.unflatten(0, grid)[None], factor, "error" if learned else "crop").flatten(0, 2)
        for x, grid in zip(pictures, grids, strict=True)
    ]
    lengths = torch.tensor([0, *map(len, merged)])
    return {"y": torch.cat(merged), "cu_seqlens": lengths.cumsum(0)}


def deepseek_ocr_compressor(case: Case) -> Outputs:
    channels = [case.width(name) for name in ("neck_conv1_weight", "down1_weight", "down2_weight")]
    compressor = ConvCompressorModule(case["x"].shape[-1], channels, [2, 2])
    names = {"neck1": "neck_conv1", "neck2": "neck_conv2", "norm1": "neck_ln1", "norm2": "neck_ln2"}
    load(compressor, case, names | {"down.0": "down1", "down.1": "down2"}, eps="ln_eps")
    return {"y": compressor(case["x"]).movedim(-1, 1)}


CASES: dict[str, Callable[[Case], Outputs]] = {
    "pixel_shuffle": shuffle,
    "smolvlm_connector": smolvlm_connector,
    "internvl_mlp1": internvl_mlp1,
    "qwen25_merger": qwen25_merger,
    "dcae_averaging_shortcut": dcae_averaging_shortcut,
    "ldpv2": ldpv2,
    "tokenpacker": tokenpacker,
    "uhd4_window_merger": uhd4_window_merger,
    "dcae_down_block": dcae_down_block,
    "uhd3_wtc": uhd3_wtc,
    "deepseek_ocr_compressor": deepseek_ocr_compressor,
}
