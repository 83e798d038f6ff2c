"""Speed of ToMe inside encoders of the shapes ViT-B/16 (as CLIP has it, with a CLS token) and SigLIP-B/16, on the CPU.

    python benchmarks/tome_speed.py

Ours with eager attention and with SDPA, and the uncompressed encoders, beside the published algorithm written out
plainly in the layers of the same encoder, with the whole attention map. Random weights, the same tokens merged by all:
outputs are compared before anything is timed. At 224 pixels, and at 384 and 512 (one picture; SigLIP-B has weights for
all three), where attention is more of the work. Takes about 20 minutes on two cores. Writes
benchmarks/results/tome_speed.json and .md; `--layers 2 --rounds 2` is a trial, and `--pixels 224 --batch 8 --rounds 20
--results out/tome` looks closer at some cases. Goals: eager no slower than the plain one, SDPA faster.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import laco
from laco.cost import interleave, machine
from laco.evaluate.report import command
from laco.files import write_file

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, Any] = {
    "ViT-B/16": (CLIPVisionModel, CLIPVisionConfig),
    "SigLIP-B/16": (SiglipVisionModel, SiglipVisionConfig),
}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
# (pixels, r, batch): r takes the same parts of the tokens at all sizes.
CASES = [(224, 8, 1), (224, 8, 8), (224, 16, 1), (224, 16, 8), (384, 24, 1), (384, 48, 1), (512, 42, 1)]


def build(name: str, pixels: int, layers: int, attention: str, r: int = 0) -> Any:
    kind, config = SHAPES[name]
    torch.manual_seed(0)
    extra = {} if kind is CLIPVisionModel else {"vision_use_head": False}
    model = kind(config(**BASE, **extra, image_size=pixels, num_hidden_layers=layers)).eval().requires_grad_(False)
    if r:
        # The authors' order of tokens, which without a CLS token is another than ours.
        laco.compress(model, None, laco.ToMe(r=r, strict_reference=True))
    model.set_attn_implementation(attention)
    return model


def plain(name: str, pixels: int, layers: int, r: int) -> Any:
    """The stock encoder whose layers do as the paper has it, sections 3 and appendix D of arXiv 2210.09461.

    As in the published code, a layer's forward is replaced, and the layers share what they know of the tokens.
    """
    model = build(name, pixels, layers, "eager")
    prefix = int(isinstance(model, CLIPVisionModel))
    shared: dict[str, Tensor] = {}

    def forward(layer: Any, x_BNC: Tensor, *_: Any, **__: Any) -> Tensor:
        attention, size_BN1 = layer.self_attn, shared["size"]
        y_BNC = layer.layer_norm1(x_BNC)
        q, k, v = (
            rearrange(project(y_BNC), "b n (h d) -> b h n d", h=attention.num_heads)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights_BHNN = q @ k.mT * attention.scale + size_BN1.log()[:, None, None, :, 0]
        mixed_BNC = rearrange(weights_BHNN.softmax(dim=-1) @ v, "b h n d -> b n (h d)")
        x_BNC = x_BNC + attention.out_proj(mixed_BNC)
        x_BNC, shared["size"] = merge(x_BNC, size_BN1, k.mean(dim=1), r, prefix)
        return x_BNC + layer.mlp(layer.layer_norm2(x_BNC))

    def begin(_: Any, args: tuple[Tensor, ...]) -> None:
        shared["size"] = torch.ones(len(args[0]), prefix + (pixels // 16) ** 2, 1, dtype=args[0].dtype)

    body = getattr(model, "vision_model", model)
    for layer in body.encoder.layers:
        layer.forward = partial(forward, layer)
    model.register_forward_pre_hook(begin)
    return model


def merge(x_BNC: Tensor, size_BN1: Tensor, key_BNd: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One matching: the r tokens at even places that are most like one at an odd place are added to it."""
    r = min(r, (x_BNC.shape[1] - prefix) // 2)
    key_BNd = normalize(key_BNd, dim=-1)
    score_BAB = key_BNd[:, ::2] @ key_BNd[:, 1::2].mT
    if prefix:
        score_BAB[:, 0] = -torch.inf
    best_BA, partner_BA = score_BAB.max(dim=-1)
    order_BA = best_BA.argsort(dim=-1, descending=True)
    joins_Br, stays_BA = order_BA[:, :r], order_BA[:, r:]
    if prefix:
        stays_BA = stays_BA.sort(dim=-1).values

    def merged(y_BNC: Tensor) -> Tensor:
        a_BAC, b_BBC = y_BNC[:, ::2], y_BNC[:, 1::2]

        def picked(index: Tensor) -> Tensor:
            return a_BAC.gather(1, index[..., None].expand(-1, -1, y_BNC.shape[-1]))

        target = partner_BA.gather(1, joins_Br)[..., None].expand(-1, -1, y_BNC.shape[-1])
        return torch.cat([picked(stays_BA), b_BBC.scatter_add(1, target, picked(joins_Br))], dim=1)

    sizes = merged(size_BN1)
    return merged(x_BNC * size_BN1) / sizes, sizes


def assign(weights: dict[str, Tensor], *models: Any) -> None:
    """Gives models these very parameters."""
    for model in models:
        model.load_state_dict(weights, assign=True)


def what_is_left(model: Any, pixels: Tensor) -> Tensor:
    """(B, N, C) of an encoder's last layer; of ours, before rows of NaN stand for the tokens that were merged."""
    seen: list[Tensor] = []
    body = getattr(model, "vision_model", model)
    hook = body.encoder.layers[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(pixels)
    hook.remove()
    return seen[0]


def difference(x_BNC: Tensor, y_BNC: Tensor) -> float:
    """The largest, whatever the order of the tokens."""
    rows = torch.arange(len(x_BNC))[:, None]
    x_BNC, y_BNC = (z_BNC[rows, z_BNC[..., 0].argsort(dim=1)] for z_BNC in (x_BNC, y_BNC))
    return (x_BNC - y_BNC).abs().max().item()


def keep_memory() -> None:
    """Lets glibc's malloc keep what is freed: pages that are given back and taken again cost a tenth of the time, and
    which of the ways pays for them is chance.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((-1, 2**31 - 1), (-2, 2**28), (-3, 2**30)):  # trim, top pad, mmap thresholds
            libc.mallopt(parameter, value)


def inference(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        return call(*arguments)

    return run


def measure(name: str, pixels: int, layers: int, r: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times of one shape and batch size, milliseconds a batch; ratios are over the plain implementation."""
    stock = {attention: build(name, pixels, layers, attention) for attention in ("eager", "sdpa")}
    ours = {attention: build(name, pixels, layers, attention, r) for attention in ("eager", "sdpa")}
    written_out = plain(name, pixels, layers, r)
    weights = stock["eager"].state_dict()
    picture = torch.randn(batch, 3, pixels, pixels)
    # In double precision, where no two tokens are as much alike as two others.
    assign({key: value.double() for key, value in weights.items()}, written_out, *ours.values())
    with torch.inference_mode():
        wanted = what_is_left(written_out, picture.double())
        differences = [difference(what_is_left(model, picture.double()), wanted) for model in ours.values()]
    if max(differences) > 1e-6:
        raise SystemExit(f"{name}: ours differs from the plain implementation by {max(differences):.1e}")
    # One copy: how pages of memory lie makes a difference, too.
    assign(weights, *stock.values(), written_out, *ours.values())
    timings = interleave(
        {
            "plain, eager": inference(written_out, picture),
            "laco, eager": inference(ours["eager"], picture),
            "laco, SDPA": inference(ours["sdpa"], picture),
            "uncompressed, eager": inference(stock["eager"], picture),
            "uncompressed, SDPA": inference(stock["sdpa"], picture),
        },
        rounds=rounds,
        warmup=1,
    )
    return {
        "shape": name,
        "pixels": pixels,
        "r": r,
        "batch": batch,
        "tokens_left": wanted.shape[1],
        "difference": max(differences),
        "milliseconds": {name: timings.median(name) for name in timings.milliseconds},
        "speedup_over_plain": {
            way: timings.speedup(way).model_dump() for way in timings.milliseconds if way != "plain, eager"
        },
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    ways = list(rows[0]["milliseconds"])
    lines = [
        "# ToMe inside an encoder",
        "",
        f"`{command()}`: milliseconds a batch, medians, fp32; in brackets the speed-up over the plain implementation,"
        " with its 95 % interval.",
        "",
        f"| shape | pixels | r | batch | tokens left | {' | '.join(ways)} |",
        f"|{'---|' * (5 + len(ways))}",
    ]
    for row in rows:
        cells = [f"{row['milliseconds'][ways[0]]:.0f}"]
        for way in ways[1:]:
            ratio = row["speedup_over_plain"][way]
            between = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
            cells.append(f"{row['milliseconds'][way]:.0f} ({ratio['value']:.2f}, {between})")
        numbers = [row["shape"], row["pixels"], row["r"], row["batch"], row["tokens_left"]]
        lines.append(f"| {' | '.join(map(str, numbers + cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9, help="three times as many at batch 1, which is noisy")
    parser.add_argument("--pixels", type=int, nargs="+", help="only pictures of these sizes")
    parser.add_argument("--batch", type=int, nargs="+", help="only batches of these sizes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    keep_memory()
    rows = []
    cases = [
        (pixels, r, batch)
        for pixels, r, batch in CASES
        if pixels in (given.pixels or [pixels]) and batch in (given.batch or [batch])
    ]
    if not cases:
        parser.error("there is no such case")
    for name in SHAPES:
        for pixels, r, batch in cases:
            rounds = given.rounds * (3 if batch == 1 else 1)
            rows.append(measure(name, pixels, given.layers, r, batch, rounds))
            print(rows[-1]["milliseconds"], rows[-1]["speedup_over_plain"]["laco, SDPA"], flush=True)
    given.results.mkdir(parents=True, exist_ok=True)
    write_file(given.results / "tome_speed.md", as_markdown(rows))
    write_file(
        given.results / "tome_speed.json",
        json.dumps({"command": command(), "rows": rows, "machine": machine()}, indent=1) + "\n",
    )
    print(f"wrote {given.results / 'tome_speed.md'}")


if __name__ == "__main__":
    main()
