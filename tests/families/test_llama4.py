"""Llama 4: an independent reference, rotary angles, the CLS token at the end, tiles, saving."""

import random
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    Llama4ForConditionalGeneration,
    Llama4VisionModel,
)

import laco
import tiny
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of
from laco.families.encoders.llama4 import LacoLlama4VisionModel, merged_angles
from laco.families.llama4 import LacoLlama4Config, LacoLlama4ForConditionalGeneration
from laco.families.steps import Step
from laco.methods import Merger
from tiny.families.llama4 import CASES, llama4

CASE = CASES[0]
Token = tuple[int, int] | None  # row and column of a patch; None is the CLS token


def angles_by_hand(config: Any, tokens: list[Token]) -> Tensor:
    """(N, 1, D) rotations: column first, then row, both from 1; none for the CLS token."""
    half = config.hidden_size // config.num_attention_heads // 2
    theta = config.rope_parameters["rope_theta"]
    frequencies = [theta ** (-2 * j / half) for j in range(half // 2)]
    rows = [
        [(place + 1) * frequency for place in (token[1], token[0]) for frequency in frequencies]
        if token is not None
        else [0.0] * half
        for token in tokens
    ]
    angles_ND = torch.tensor(rows)
    return torch.polar(torch.ones_like(angles_ND), angles_ND)[:, None]


def merged_by_hand(
    compressor: Any, merger: Merger, patches_NC: Tensor, tokens: list[Token]
) -> tuple[Tensor, list[Token]]:
    """Window by window; beyond the edge the last row or column is taken again, and `resize` stretches the map."""
    side, factor = int(len(patches_NC) ** 0.5), merger.factor
    fit = side // factor if merger.odd == "crop" else -(-side // factor)
    map_HWC = patches_NC.unflatten(0, (side, side))
    if merger.odd == "resize" and side % factor:
        map_HWC = F.interpolate(map_HWC.permute(2, 0, 1)[None], (fit * factor, fit * factor), mode="bilinear")[0]
        map_HWC = map_HWC.permute(1, 2, 0)
    last = len(map_HWC) - 1
    windows, corners = [], []
    for top in range(0, fit * factor, factor):
        for left in range(0, fit * factor, factor):
            cells = [(top + dy, left + dx) for dy in range(factor) for dx in range(factor)]
            windows.append(torch.stack([map_HWC[min(y, last), min(x, last)] for y, x in cells]))
            corners.append(tokens[top * side + left])
    if compressor.sees == "windows":
        return torch.stack([compressor(window_RC) for window_RC in windows]), corners
    cells_of_side = [min(cell, last) for cell in range(fit * factor)]
    return compressor(map_HWC[cells_of_side][:, cells_of_side][None]).flatten(0, 2), corners


def features_by_hand(stock: nn.Module, compressed: nn.Module, pixels_CHW: Tensor) -> Tensor:
    """What the encoder puts out for one tile, by a loop over the stock layers, the CLS token apart."""
    family, tower = family_of(compressed), stock.vision_model
    compressors = family.compressors(compressed)
    mergers = {step.layer: step.merger for step in family.steps(compressed.config)}
    side = stock.config.vision_config.image_size // stock.config.vision_config.patch_size
    tokens: list[Token] = [(y, x) for y in range(side) for x in range(side)]
    x_NC = torch.cat([tower.patch_embedding(pixels_CHW[None])[0], tower.class_embedding[None]])
    x_NC = tower.layernorm_pre(x_NC + tower.positional_embedding_vlm)
    for count, layer in enumerate(tower.model.layers, start=1):
        (x_1NC,) = layer(x_NC[None], freqs_ci=angles_by_hand(stock.config.vision_config, [*tokens, None]))
        x_NC = x_1NC[0]
        if count in mergers:
            merged_NC, tokens = merged_by_hand(compressors[f"layers.{count}"], mergers[count], x_NC[:-1], tokens)
            x_NC = torch.cat([merged_NC, x_NC[-1:]])
    return tower.vision_adapter(tower.layernorm_post(x_NC)[None, :-1])[0]


MERGERS = {
    "laco": (partial(laco.LaCo, shortcut="saliency", factor=2), 64),  # 16 -> 8
    "map": (partial(laco.LDPv2, factor=2), 64),
    "laco, 3": (partial(laco.LaCo, factor=3), 72),  # 18 -> 6
    "map, 3": (partial(laco.LDPv2, factor=3), 72),
    "odd, padded": (partial(laco.LaCo, factor=2), 44),  # 11 -> 6
    "odd, padded map": (partial(laco.LDPv2, factor=3), 44),  # 11 -> 4
    "odd, cropped": (partial(laco.LaCo, factor=2, odd="crop"), 52),  # 13 -> 6
    "odd, resized": (partial(laco.LaCo, factor=3, odd="resize"), 44),
}


@torch.no_grad()
def check_against_the_loop(image_size: int, *methods: laco.Method) -> None:
    """The rotation is single precision in the stock layers too, hence the tolerance."""
    model, processor = llama4(image_size=image_size)
    model.double()
    # The stock adapter cannot read an odd grid, but the layers can.
    stock = deepcopy(model)
    for method in methods:
        laco.compress(model, processor, method)
    family = tiny.scramble(model)
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    features = model.vision_model(pixels).last_hidden_state
    wanted = torch.stack([features_by_hand(stock, model, picture) for picture in pixels])
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert features.shape[1] == family.visual_tokens(model.config, family.grid(model.config))


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize(("merger", "image_size"), MERGERS.values(), ids=MERGERS)
def test_features_equal_a_loop_over_stock_layers(merger, image_size, layer):
    check_against_the_loop(image_size, merger(layer=layer))


def test_features_of_two_mergers():
    check_against_the_loop(96, laco.LDPv2(layer=3, factor=3), laco.LaCo(layer=1, factor=2))


def test_angles_are_those_of_the_top_left_tokens():
    """5 x 5 patches in windows of 2 x 2: rows and columns 0, 2 and 4, then in pairs of those: 0 and 4."""
    model, _ = llama4(image_size=20)
    table = model.vision_model.rotary_embedding.freqs_ci
    twice = [laco.LaCo(layer=1), laco.LaCo(layer=2)]
    once = merged_angles(table, 5, twice[:1])
    assert torch.equal(once, table[[0, 2, 4, 10, 12, 14, 20, 22, 24, 25]])
    assert torch.equal(merged_angles(table, 5, twice), table[[0, 4, 20, 24, 25]])
    assert torch.equal(merged_angles(table, 5, [laco.LaCo(layer=1, odd="crop")]), table[[0, 2, 10, 12, 25]])
    tokens: list[Token] = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]
    by_hand = angles_by_hand(model.config.vision_config, [*tokens, None])
    torch.testing.assert_close(once, by_hand, rtol=0, atol=1e-6)


def test_hidden_states_are_merged_from_layer_k_on():
    model, processor = llama4()
    laco.compress(model, processor, laco.LaCo(layer=3, factor=4))
    laco.compress(model, processor, laco.LaCo(layer=1))
    model.set_attn_implementation("eager")
    outputs = model.vision_model(torch.randn(1, 3, 64, 64), output_hidden_states=True, output_attentions=True)
    assert [state.shape[1] for state in outputs.hidden_states] == [257, 65, 65, 5, 5]
    assert [weights.shape[-1] for weights in outputs.attentions] == [257, 65, 65, 5]


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_placeholders_equal_features_for_many_sizes(factor):
    model, processor = llama4()
    laco.compress(model, processor, laco.LaCo(layer=2, factor=factor))
    family, sizes = family_of(model), random.Random(0)
    each = family.visual_tokens(model.config, family.grid(model.config))
    assert model.vision_model(torch.randn(1, 3, 64, 64)).last_hidden_state.shape[1] == each == (8 // factor) ** 2
    for _ in range(100):
        shapes = [(sizes.randint(1, 250), sizes.randint(1, 250)) for _ in range(sizes.randint(1, 2))]
        pictures = [tiny.picture(0, height, width) for height, width in shapes]
        batch = CASE.inputs(processor, ("<image>" * len(pictures), pictures))
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        assert placeholders == len(batch["pixel_values"]) * each, shapes
    model(**batch)  # raises unless they are as many as the features


def test_tiles_and_thumbnail_are_told_apart():
    """One row of two tiles: `start t t x-separator t t y-separator image t t end` with 4 tokens of a tile each."""
    model, processor = llama4()
    laco.compress(model, processor, laco.LaCo(layer=2, factor=4))
    batch = CASE.inputs(processor, ("<image>", [tiny.picture(1, 64, 128)]))
    words = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    tile = ["<|patch|>"] * 4
    assert words == [
        *("<|image_start|>", *tile, "<|tile_x_separator|>", *tile, "<|tile_y_separator|>"),
        *("<|image|>", *tile, "<|image_end|>"),
    ]


def test_what_is_saved_loads_as_it_was(tmp_path):
    model, processor = llama4()
    laco.compress(model, processor, laco.LaCo(layer=2, factor=4))
    tiny.scramble(model)
    laco.save_pretrained(model, processor, tmp_path / "compressed")
    again, other = laco.from_pretrained(tmp_path / "compressed")
    assert type(again) is LacoLlama4ForConditionalGeneration
    assert type(again.config) is LacoLlama4Config
    assert type(again.vision_model) is LacoLlama4VisionModel
    assert again.config.vision_config.patch_size == other.patch_size == 16
    assert again.config.vision_config.embed_patch_size == 4
    # Not saved: the rotary table, computed from the patches of the convolution.
    table = again.vision_model.rotary_embedding.freqs_ci
    assert torch.equal(table, model.vision_model.rotary_embedding.freqs_ci)
    batch = CASE.inputs(other, ("a <image> b", [tiny.picture(1)]))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    laco.decompress(again, other)
    assert type(again) is Llama4ForConditionalGeneration
    assert type(again.vision_model) is Llama4VisionModel
    assert other.patch_size == again.config.vision_config.patch_size == 4


def test_a_stock_checkpoint_loads_into_the_compressed_configuration(tmp_path):
    model, processor = llama4()
    model.save_pretrained(tmp_path)
    laco.compress(model, processor, laco.LaCo(layer=2))
    mine = {key for key in model.state_dict() if ".compressor." in key}
    again, info = LacoLlama4ForConditionalGeneration.from_pretrained(
        tmp_path, config=model.config, output_loading_info=True
    )
    assert info["missing_keys"] == mine == {f"vision_model.model.layers.1.compressor.{key}" for key in LACO_KEYS}
    assert not info["unexpected_keys"]
    batch = CASE.inputs(processor, ("a <image> b", [tiny.picture(1)]))
    with torch.no_grad():  # a fresh compressor is the mean of its windows, here as there
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is Llama4ForConditionalGeneration


LACO_KEYS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def test_the_rotary_table_survives_the_meta_device():
    model, processor = llama4()
    table = model.vision_model.rotary_embedding.freqs_ci
    for _ in range(2):
        laco.compress(model, processor, laco.LaCo(layer=2))
        assert model.vision_model.rotary_embedding.freqs_ci is table
        laco.decompress(model, processor)
        assert model.vision_model.rotary_embedding.freqs_ci is table
    built = Llama4ForConditionalGeneration(model.config)
    assert torch.equal(built.vision_model.rotary_embedding.freqs_ci, table)


@pytest.mark.parametrize("layer", [1, 4])
def test_flops_of_encoder_and_adapter(layer):
    model, processor = llama4()
    laco.compress(model, processor, laco.LaCo(layer=layer, factor=2))
    family, config = family_of(model), model.config
    flops = stage_flops(model)
    tokens = family.visual_tokens(config, family.grid(config))
    *adapter, (width, text_width) = family.projections(config)
    assert flops.projector == 2 * tokens * (sum(i * o for i, o in adapter) + width * text_width)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.vision_model(torch.randn(1, 3, 64, 64))
    in_encoder = flops.encoder + 2 * tokens * sum(i * o for i, o in adapter)
    assert in_encoder == pytest.approx(counter.get_total_flops(), rel=1e-3)


def refused(message: str, method: laco.Method, **settings: Any) -> None:
    model, processor = llama4(**settings)
    with pytest.raises(LacoError, match=message):
        laco.compress(model, processor, method)
    assert type(model) is Llama4ForConditionalGeneration
    assert not family_of(model).steps(model.config)


def test_what_cannot_be_is_refused():
    refused("llama4's adapter joins 2 x 2 tokens, which do not divide the 1 x 1", laco.LaCo(layer=2, factor=16))
    refused("which do not divide the 5 x 5", laco.LaCo(layer=1, factor=3, odd="crop"))
    refused("layer 5 is past the end", laco.LaCo(layer=5))


@pytest.mark.parametrize(
    ("name", "value"), [("patch_size", 8), ("downsample_ratio", 16), ("img_patch_token", "<|image|>")]
)
def test_other_processors_are_refused(name, value):
    model, processor = llama4()
    setattr(processor, name, value)
    with pytest.raises(LacoError, match="processor does not match the model"):
        laco.compress(model, processor, laco.LaCo(layer=2))


def test_pictures_of_another_size_are_refused():
    model, processor = llama4()
    processor.image_processor.size = {"height": 48, "width": 48}
    with pytest.raises(LacoError, match="the picture size is"):
        laco.compress(model, processor, laco.LaCo(layer=2))


def test_the_record_of_the_steps():
    model, processor = llama4()
    laco.compress(model, processor, laco.LaCo(depth=1 / 2))
    assert family_of(model).steps(model.config) == [Step.at(laco.LaCo(), 2)]
    assert model.config.vision_config.compression[0]["layer"] == 2
