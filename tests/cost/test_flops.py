"""Counts from configurations against torch's counter on real models, and against published numbers."""

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, PreTrainedModel, SiglipVisionConfig

import laco
import tiny
from laco.cost import StageFlops, encoder_layer_flops, merger_flops, stage_flops
from laco.cost.flops import decoder_flops, pooling_head_flops
from laco.errors import LacoError
from laco.families import FAMILIES, family_of
from laco.grid import Grid

METHODS: list[list[laco.Method]] = [
    [],
    [laco.LaCo(depth=1 / 4)],
    [laco.LaCo(depth=1)],
    [laco.PixelShuffle(depth=1)],
    [laco.TokenPacker(depth=1)],
    [laco.AveragePool(depth=1 / 4)],
    [laco.LaCo(depth=1 / 4), laco.TokenPacker(depth=1 / 2, factor=3)],
    [laco.WindowMerger(depth=1 / 2), laco.LDPv2(depth=1, factor=3)],
]


def ids(methods: list[laco.Method]) -> str:
    return "+".join(f"{m.name}@{m.depth}" for m in methods) or "none"


def counted(model: PreTrainedModel, inputs: dict[str, Any], backward: bool = False) -> FlopCounterMode:
    """What torch counts; eager attention, because its counter knows no fused attention on the CPU."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        output = model(**inputs, use_cache=False)
        if backward:
            output.logits.sum().backward()
    return counter


@pytest.mark.parametrize("methods", METHODS, ids=ids)
@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_every_stage_is_what_torch_counts(vision: str, methods: list[laco.Method]) -> None:
    model, processor = tiny.llava(vision)
    for method in methods:
        laco.compress(model, processor, method)
    pictures = [tiny.picture(0), tiny.picture(1)]
    inputs = dict(processor(text="<image><image>what is it?", images=pictures, return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    flops = stage_flops(model, pictures=2, text_tokens=length - visual, logits=length)

    counter = counted(model, inputs)
    found = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert flops.encoder == pytest.approx(found["vision_tower"], rel=0.01)
    assert flops.projector == pytest.approx(found["multi_modal_projector"], rel=0.01)
    head = 2 * length * model.config.text_config.hidden_size * model.config.text_config.vocab_size
    assert flops.language_model - head == pytest.approx(found["language_model"], rel=0.01)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert flops.training_step == pytest.approx(counted(model, inputs, backward=True).get_total_flops(), rel=0.01)


@pytest.mark.parametrize("methods", METHODS, ids=ids)
def test_planned_methods_count_as_inserted_ones(methods: list[laco.Method]) -> None:
    model, processor = tiny.llava()
    planned = stage_flops(model.config, methods)
    for method in methods:
        laco.compress(model, processor, method)
    assert planned == stage_flops(model) == stage_flops(model.config)


@pytest.mark.parametrize("read", [-2, [1, -2]], ids=["last but one", "two levels"])
def test_layers_that_nobody_reads_run_forward_only(read: int | list[int]) -> None:
    model, processor = tiny.llava("clip", vision_feature_layer=read)
    inputs = dict(processor(text="<image>?", images=tiny.picture(), return_tensors="pt"))
    flops = stage_flops(model, text_tokens=1, logits=37)
    assert flops.unread > 0
    assert flops.forward == pytest.approx(counted(model, inputs).get_total_flops(), rel=0.01)
    assert flops.training_step == pytest.approx(counted(model, inputs, backward=True).get_total_flops(), rel=0.01)


def test_tiles_of_llava_onevision() -> None:
    model, processor = tiny.llava_onevision()
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    inputs = dict(processor(text="<image>?", images=tiny.picture(height=90, width=140), return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    tiles = inputs["pixel_values"].shape[1]
    assert tiles > 1
    flops = stage_flops(model, pictures=tiles, text_tokens=0, visual_tokens=length, logits=length)
    assert flops.forward == pytest.approx(counted(model, inputs).get_total_flops(), rel=0.01)


def test_siglip_with_its_pooling_head() -> None:
    config = tiny.vision_config("siglip", 48, 8, 1)
    config.vision_use_head = True
    head = transformers.SiglipVisionModel(config).head
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(1, 36, 16))
    assert pooling_head_flops(36, 16, 32) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_grouped_query_attention_and_head_width() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(9)[None], logits_to_keep=1)
    assert decoder_flops(config, 9) == pytest.approx(counter.get_total_flops(), rel=0.01)


# Relative cost of the layers of an encoder compressed after k of them, r = 2, and the full cost in GFLOP.
PUBLISHED = [
    # name, tokens, layers, width, hidden, gated, full, {k: ratio}
    ("AIMv2-L 256", 256, 24, 1024, 2816, True, 164, {2: 0.306, 4: 0.369, 6: 0.432, 12: 0.621}),
    ("AIMv2-L 576", 576, 24, 1024, 2816, True, 388, {2: 0.298, 4: 0.362, 6: 0.426, 12: 0.617}),
    ("AIMv2-L 1024", 1024, 24, 1024, 2816, True, 734, {2: 0.288, 4: 0.353, 6: 0.418, 12: 0.612}),
    ("SigLIP-so400m 784", 784, 27, 1152, 4304, False, 721, {2: 0.287, 4: 0.344, 7: 0.430, 13: 0.601}),
    ("SigLIP-B/16 1024", 1024, 12, 768, 3072, False, 213, {1: 0.281, 2: 0.347, 3: 0.412, 6: 0.608}),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_ratios_of_known_encoders(row: tuple) -> None:
    _, tokens, layers, width, hidden, gated, full, ratios = row
    before = encoder_layer_flops(tokens, width, hidden, gated=gated)
    after = encoder_layer_flops(tokens // 4, width, hidden, gated=gated)
    assert layers * before / 1e9 == pytest.approx(full, abs=0.7)
    for k, ratio in ratios.items():
        assert (k * before + (layers - k) * after) / (layers * before) == pytest.approx(ratio, abs=6e-4), k


def test_the_patch_merge_layer_has_two_products() -> None:
    assert merger_flops(laco.LaCo(), Grid(1, 32, 32), 768) == 2 * 256 * (4 * 768 * 768 + 768 * 768)
    assert merger_flops(laco.LaCo(hidden=10), Grid(2, 5, 7), 8) == 2 * (2 * 3 * 4) * (4 * 8 * 10 + 10 * 8)
    assert merger_flops(laco.AveragePool(), Grid(1, 32, 32), 768) == 0


def test_the_shape_of_siglip_base_end_to_end() -> None:
    vision = SiglipVisionConfig(image_size=512, patch_size=16, vision_use_head=False)
    config = LlavaConfig(vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full")
    none, merged = stage_flops(config), stage_flops(config, [laco.LaCo(depth=1 / 4)])
    assert none.encoder_before / 1e9 == pytest.approx(213, abs=0.7)
    assert (merged.encoder_before + merged.encoder_after) / none.encoder_before == pytest.approx(0.412, abs=6e-4)
    assert merged.language_model < none.language_model / 3


def test_compressed_families_are_known_and_others_are_not() -> None:
    model, processor = tiny.llava()
    laco.compress(model, processor, laco.PixelShuffle(depth=1))
    assert isinstance(stage_flops(model.config), StageFlops)
    assert family_of(model) in FAMILIES
    with pytest.raises(LacoError, match="LlamaConfig belongs to no family"):
        stage_flops(LlamaConfig())
