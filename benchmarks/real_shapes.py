"""What compressing published architectures changes: `python benchmarks/real_shapes.py` (`--json` for the numbers).

The models have the published shapes and live on the meta device: nothing is downloaded, weights cost nothing, and
nothing is said about quality. Each gets `laco.LaCo(depth=1/4, factor=2)`. Shapes are those of config.json of the
models' pages, written down by hand; what is not given here is the default of the configuration's class. Writes
benchmarks/results/real_shapes.json and real_shapes.md.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from transformers import (
    Aimv2VisionConfig,
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3VisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
)

import laco
from laco.cost import stage_flops
from laco.families import family_of_config

RESULTS = Path(__file__).parent / "results"
METHOD = laco.LaCo(depth=1 / 4, factor=2)
REPEATS = 3

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size
QWEN2_5 = {
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936),
    "7B": (3584, 18944, 28, 28, 4, 152064),
}


TIED = ("0.5B", "1.5B", "3B")  # whose embeddings are also the language-model head


def qwen2_5(size: str) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip((*names, "vocab_size"), QWEN2_5[size], strict=True))


def llava_onevision(size: str) -> LlavaOnevisionConfig:
    """SigLIP-so400m/14 at 384 pixels without its last layer, the default of the class, as in the published models."""
    return LlavaOnevisionConfig(text_config=Qwen2Config(**qwen2_5(size)), tie_word_embeddings=size in TIED)


def llava_aimv2() -> LlavaConfig:
    """The paper's main encoder in LLaVA's architecture; the language model is our choice."""
    vision = Aimv2VisionConfig(image_size=448, use_head=False)  # the rest of AIMv2-L is the default of the class
    return LlavaConfig(
        vision_config=vision,
        text_config=Qwen2Config(**qwen2_5("1.5B")),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def internvl() -> InternVLConfig:
    """InternVL3-1B: InternViT-300M/14 at 448 pixels, the default of the class but for its biases."""
    text = Qwen2Config(**qwen2_5("0.5B") | {"vocab_size": 151674})
    return InternVLConfig(vision_config={"attention_bias": True}, text_config=text, tie_word_embeddings=False)


def qwen2_5_vl(size: str) -> Qwen2_5_VLConfig:
    text = qwen2_5(size)
    vision = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=size in TIED)


def qwen3_vl_4b() -> Qwen3VLConfig:
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    return Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)


def smolvlm_256m() -> Idefics3Config:
    """SigLIP-B/16 at 512 pixels and SmolLM2-135M, in the architecture of Idefics 3."""
    vision = Idefics3VisionConfig(hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16)
    text = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49280,
    )
    return Idefics3Config(vision_config=vision, text_config=text, scale_factor=4)


# Configuration, and side of a square picture (tile) in pixels.
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], int]] = {
    "LLaVA-OneVision 0.5B (SigLIP-so400m-384)": (lambda: llava_onevision("0.5B"), 384),
    "LLaVA-OneVision 1.5B (SigLIP-so400m-384)": (lambda: llava_onevision("1.5B"), 384),
    "LLaVA-OneVision 7B (SigLIP-so400m-384)": (lambda: llava_onevision("7B"), 384),
    "LLaVA 1.5B (AIMv2-L-448)": (llava_aimv2, 448),
    "InternVL3 1B (InternViT-300M-448)": (internvl, 448),
    "Qwen2.5-VL 3B": (lambda: qwen2_5_vl("3B"), 896),
    "Qwen2.5-VL 7B": (lambda: qwen2_5_vl("7B"), 896),
    "Qwen3-VL 4B": (qwen3_vl_4b, 1024),
    "SmolVLM 256M": (smolvlm_256m, 512),
}


@dataclass(frozen=True)
class Row:
    """Sizes and FLOPs of one model for one picture (tile), and the median time of `compress`."""

    model: str
    parameters: int
    picture: tuple[int, int]
    visual_tokens_before: int
    visual_tokens_after: int
    parameters_added: int
    encoder_flops_before: float
    encoder_flops_after: float
    seconds: float


def measured(name: str, build: Callable[[], PreTrainedConfig], side: int) -> Row:
    size = (side, side)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(build())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = counts(model.config, size)
    seconds = []
    for _ in range(REPEATS):
        if seconds:
            laco.decompress(model, None)
        start = perf_counter()
        laco.compress(model, None, METHOD)
        seconds.append(perf_counter() - start)
    after = counts(model.config, size)
    added = sum(parameter.numel() for parameter in model.parameters()) - parameters
    return Row(name, parameters, size, before[0], after[0], added, before[1], after[1], median(seconds))


def counts(config: PreTrainedConfig, size: tuple[int, int]) -> tuple[int, float]:
    """Visual tokens that the language model reads of a picture, and FLOPs of the encoder with the compressor."""
    family = family_of_config(config)
    return family.visual_tokens(config, family.grid(config, size)), stage_flops(config, size=size).encoder


def table(rows: list[Row]) -> str:
    head = ["model", "parameters", "picture", "visual tokens", "compressor", "encoder GFLOPs", "", "compress"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        fraction = row.encoder_flops_after / row.encoder_flops_before
        lines.append(
            [
                row.model,
                f"{row.parameters / 1e9:.2f} B",
                "{} x {}".format(*row.picture),
                f"{row.visual_tokens_before} -> {row.visual_tokens_after}",
                f"{row.parameters_added / 1e6:.1f} M",
                f"{row.encoder_flops_before / 1e9:.0f} -> {row.encoder_flops_after / 1e9:.0f}",
                f"{fraction:.0%}",
                f"{row.seconds:.2f} s",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False) -> None:
    rows = [measured(name, build, side) for name, (build, side) in MODELS.items()]
    numbers = json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    text = (
        "# LaCo(depth=1/4, factor=2) in published architectures\n\n"
        "Made by `python benchmarks/real_shapes.py`, on the meta device: shapes and counts, no weights, no quality.\n"
        "One square picture, or tile where the family cuts pictures into tiles. Encoder GFLOPs include the\n"
        "compressor. `compress` is the median time of three runs of `laco.compress`.\n\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_shapes.json").write_text(numbers)
    (RESULTS / "real_shapes.md").write_text(text + table(rows))
    typer.echo(numbers if as_json else table(rows), nl=False)


if __name__ == "__main__":
    typer.run(main)
