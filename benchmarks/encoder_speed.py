"""Speed of a SigLIP-so400m vision encoder with LaCo inside, on the CPU, against what its FLOPs predict.

27 layers, width 1152, 384 pixels in patches of 14, random weights; LaCo after a quarter of the layers, r = 2. Three
encoders in one interleaved run: uncompressed, compressed by `laco.compress`, and the very same layers of the compressed
one written out by hand in a loop, which shows what the machinery around them costs.

    python benchmarks/encoder_speed.py

Takes about 20 minutes on two cores. Writes benchmarks/results/encoder_speed.json; `--layers 4 --rounds 2` is a trial.
Goals at batch 8: measured / predicted speed-up >= 0.93, LaCo's own layer <= 2 % of the uncompressed encoder's time,
overhead over the hand-written loop <= 1 %.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

import laco
from laco.cost import StageFlops, interleave, machine, stage_flops
from laco.evaluate.report import command
from laco.families.encoders import merge_tokens
from laco.files import write_file

RESULT = Path(__file__).parent / "results" / "encoder_speed.json"
SIDE, PATCH = 384, 14


def build(layers: int, method: laco.Method | None, dtype: torch.dtype) -> Any:
    """The vision encoder of a LLaVA with a SigLIP-so400m encoder; its language model is as small as can be."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
    if method is not None:
        laco.compress(model, None, method)
    return model


def by_hand(tower: Any, pixels: Tensor) -> Tensor:
    """The compressed encoder as one would write it without laco: layers, one merge, layers."""
    x_BNC = tower.embeddings(pixels)
    for layer in tower.encoder.layers:
        y_BNC, _ = layer.self_attn(layer.layer_norm1(x_BNC))
        x_BNC = x_BNC + y_BNC
        x_BNC = x_BNC + layer.mlp(layer.layer_norm2(x_BNC))
        if hasattr(layer, "compressor"):
            x_BNC = merge_tokens(layer.compressor, x_BNC, layer.factor, layer.odd)
    return tower.post_layernorm(x_BNC)


def inference(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        return call(*arguments)

    return run


def measure(stock: Any, merged: Any, batch: int, rounds: int) -> dict[str, Any]:
    """Times of one batch size."""
    tower, compressed = stock.model.vision_tower, merged.model.vision_tower
    like = next(tower.parameters())
    pixels = torch.randn(batch, 3, SIDE, SIDE, dtype=like.dtype)
    with torch.inference_mode():
        torch.testing.assert_close(by_hand(compressed, pixels), compressed(pixels).last_hidden_state)

    layer = next(layer for layer in compressed.encoder.layers if hasattr(layer, "compressor"))
    tokens = torch.randn(batch, (SIDE // PATCH) ** 2, 1152, dtype=like.dtype)
    timings = interleave(
        {
            "uncompressed": inference(tower, pixels),
            "compressed": inference(compressed, pixels),
            "by hand": inference(by_hand, compressed, pixels),
            "LaCo's layer": inference(merge_tokens, layer.compressor, tokens, layer.factor, layer.odd),
        },
        rounds=rounds,
        warmup=2,
    )
    predicted = encoder_flops(stock) / encoder_flops(merged)
    speedup, overhead = timings.speedup("compressed"), timings.speedup("by hand", over="compressed")
    share = 100 / timings.speedup("LaCo's layer").value
    return {
        "batch": batch,
        "milliseconds": {name: timings.median(name) for name in timings.milliseconds},
        "speedup": speedup.model_dump(),
        "speedup_by_flops": predicted,
        "measured_over_predicted": speedup.value / predicted,
        "laco_layer_percent_of_uncompressed": share,
        "overhead_over_by_hand_percent": {name: 100 * (value - 1) for name, value in overhead.model_dump().items()},
        "all_milliseconds": timings.milliseconds,
    }


def encoder_flops(model: Any) -> float:
    flops: StageFlops = stage_flops(model)
    return flops.encoder


def hottest(call: Callable[[], Any], count: int = 8) -> list[dict[str, Any]]:
    """The operations that take most of a call's time, in per cent of it."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    events = sorted(events, key=lambda event: -event.self_cpu_time_total)[:count]
    return [
        {
            "operation": e.key,
            "calls": e.count,
            "percent": 100 * e.self_cpu_time_total / total,
            "ms": e.self_cpu_time_total / 1e3,
        }
        for e in events
    ]


def as_table(rows: list[dict[str, Any]]) -> Table:
    """A column for each batch size, with the goals at batch 8 beside."""
    table = Table("", *(f"batch {row['batch']}" for row in rows), "goal", box=None, header_style="dim")

    def line(name: str, text: Callable[[dict[str, Any]], str], goal: str = "") -> None:
        table.add_row(name, *(text(row) for row in rows), goal)

    def with_range(found: dict[str, float], unit: str = "") -> str:
        return f"{found['value']:.2f}{unit} ({found['low']:.2f} to {found['high']:.2f})"

    line("uncompressed, ms", lambda row: f"{row['milliseconds']['uncompressed']:.0f}")
    line("compressed, ms", lambda row: f"{row['milliseconds']['compressed']:.0f}")
    line("speed-up", lambda row: with_range(row["speedup"]))
    line("speed-up by FLOPs", lambda row: f"{row['speedup_by_flops']:.2f}")
    line("measured / by FLOPs", lambda row: f"{row['measured_over_predicted']:.3f}", ">= 0.93")
    line("LaCo's layer / uncompressed", lambda row: f"{row['laco_layer_percent_of_uncompressed']:.2f} %", "<= 2 %")
    line("over the loop by hand", lambda row: with_range(row["overhead_over_by_hand_percent"], " %"), "<= 1 %")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None, help="all cores when left out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)

    dtype = getattr(torch, given.dtype)
    method = laco.LaCo(depth=1 / 4, factor=2)
    stock, merged = build(given.layers, None, dtype), build(given.layers, method, dtype)
    out = Console()
    rows = [measure(stock, merged, batch, given.rounds) for batch in given.batches]
    result = {
        "command": command(),
        "encoder": {
            "layers": given.layers,
            "width": 1152,
            "hidden": 4304,
            "heads": 16,
            "image_size": SIDE,
            "dtype": given.dtype,
        },
        "method": method.to_dict(),
        "machine": machine(),
        "batches": rows,
        "profile": {},
    }

    out.print(as_table(rows))
    pixels = torch.randn(1, 3, SIDE, SIDE, dtype=dtype)
    for name, model in (("uncompressed", stock), ("compressed", merged)):
        result["profile"][name] = hottest(inference(model.model.vision_tower, pixels))
        out.print(f"\n{name}, batch 1, by operation:")
        for event in result["profile"][name]:
            out.print(
                f"  {event['percent']:5.1f} %  {event['ms']:8.1f} ms  {event['calls']:4d} x  {event['operation']}"
            )
    write_file(given.output, json.dumps(result, indent=1) + "\n")
    out.print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
