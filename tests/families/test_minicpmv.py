"""MiniCPM-V 4.6: its own merger from ours, an independent reference, counts of slices, patches, the two modes."""

import inspect
import random
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6ImageProcessorPil

import laco
import tiny
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of
from laco.families.encoders.minicpmv import (
    MINICPMV,
    LacoMiniCPMVVisionModel,
    own_merger,
    own_merger_weights,
    own_patches,
)
from laco.families.minicpmv import LacoMiniCPMVConfig, LacoMiniCPMVForConditionalGeneration, LacoMiniCPMVModel
from tiny.case import Case
from tiny.families.minicpmv import RUNS, minicpmv, video

pytestmark = pytest.mark.skipif(not RUNS, reason="the stock encoder merges pictures of one size alone")

CASE = Case("minicpmv", minicpmv)
SLICED = ("<image> or <image>", [tiny.picture(1, 50, 150), tiny.picture(2, 64, 64)])


def cut(picture_CHW: Tensor, patch: int) -> Tensor:
    """A picture as its patches side by side, row by row: (C, patch, patches * patch)."""
    return torch.cat([part for row in picture_CHW.split(patch, dim=1) for part in row.split(patch, dim=2)], dim=2)


def packed(pictures: list[Tensor], patch: int) -> dict[str, Tensor]:
    """What a processor would make of pictures that need no resizing."""
    sizes = [[picture.shape[1] // patch, picture.shape[2] // patch] for picture in pictures]
    pixels = torch.cat([cut(picture, patch) for picture in pictures], dim=2)
    return {"pixel_values": pixels[None], "target_sizes": torch.tensor(sizes)}


def merged_by_hand(compressor: Any, x_HWC: Tensor, factor: int) -> Tensor:
    """(H, W, C) -> (h, w, C), window by window."""
    if compressor.sees == "map":
        return compressor(x_HWC[None])[0]
    rows = []
    for top in range(0, x_HWC.shape[0], factor):
        row = []
        for left in range(0, x_HWC.shape[1], factor):
            window = [x_HWC[top + dy, left + dx] for dy in range(factor) for dx in range(factor)]
            row.append(compressor(torch.stack(window)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def features_by_hand(stock: Any, compressed: Any, picture_CHW: Tensor) -> Tensor:
    """What the language model reads of one picture, by a loop over the stock layers."""
    family, tower, config = family_of(compressed), stock.model.vision_tower, stock.config
    compressors = family.compressors(compressed)
    factors = {step.layer: step.merger.factor for step in family.steps(compressed.config)}
    own = config.vision_config.patch_size
    h, w = picture_CHW.shape[1] // own, picture_CHW.shape[2] // own
    x_1NC = tower.embeddings(cut(picture_CHW, own)[None], target_sizes=torch.tensor([[h, w]]))
    for count, layer in enumerate(tower.encoder.layers, start=1):
        bounds = torch.tensor([0, h * w], dtype=torch.int32)
        x_1NC = layer(x_1NC, attention_mask=None, cu_seqlens=bounds, max_seqlen=None)
        if count in factors:
            x_hwC = merged_by_hand(compressors[f"layers.{count}"], x_1NC[0].unflatten(0, (h, w)), factors[count])
            h, w = x_hwC.shape[:2]
            x_1NC = x_hwC.flatten(0, 1)[None]
        if config.downsample_mode == "16x" and count == config.insert_layer_id + 1:
            x_1NC = tower.vit_merger(x_1NC, torch.tensor([[h, w]]))
            h, w = h // 2, w // 2
    return stock.model.merger(tower.post_layernorm(x_1NC), torch.tensor([[h, w]]))[0]


@torch.no_grad()
def check_against_the_loop(mode: str, *methods: laco.Method) -> None:
    model, processor = minicpmv(downsample_mode=mode)
    model.double()
    stock = deepcopy(model)
    for method in methods:
        laco.compress(model, processor, method)
    tiny.scramble(model)
    patch = processor.image_processor.patch_size
    sides = [(8, 4), (4, 12), (4, 4)] if mode == "16x" else [(2, 6), (4, 2)]
    pictures = [torch.randn(3, h * patch, w * patch, dtype=torch.float64) for h, w in sides]
    features = model.model.get_image_features(**packed(pictures, patch)).pooler_output
    assert [len(found) for found in features] == [h * w // (16 if mode == "16x" else 4) for h, w in sides]
    for found, picture in zip(features, pictures, strict=True):
        torch.testing.assert_close(found, features_by_hand(stock, model, picture), rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])  # the stock merger stands after layer 2
@pytest.mark.parametrize(
    "merger",
    [partial(laco.LaCo, shortcut="saliency"), partial(laco.LDPv2), partial(laco.LaCo, factor=3)],
    ids=["laco", "map", "laco, 3"],
)
def test_features_equal_a_loop_over_stock_layers(merger, layer):
    check_against_the_loop("16x", merger(layer=layer))


@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_features_of_two_mergers(mode):
    check_against_the_loop(mode, laco.LDPv2(layer=3, factor=3), laco.LaCo(layer=1))


# Its own merger from ours.


def without_and_with_ours(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """A stock model, and the same with its own merger switched off and ours in its place, both with processors."""
    stock, stock_processor = minicpmv(seed=seed)
    stock.double()
    model, processor = deepcopy(stock), deepcopy(stock_processor)
    model.config.downsample_mode = processor.image_processor.downsample_mode = "4x"
    laco.compress(model, processor, own_merger(model.config.vision_config))
    (compressor,) = family_of(model).compressors(model).values()
    compressor.load_state_dict(own_merger_weights(stock.model.vision_tower))
    with torch.no_grad():  # to be sure that it is switched off
        for parameter in model.model.vision_tower.vit_merger.parameters():
            parameter.fill_(torch.nan)
    return stock, stock_processor, model, processor


@torch.no_grad()
def test_our_window_merger_with_its_weights_is_its_own_merger():
    stock, stock_processor, model, processor = without_and_with_ours()
    assert own_merger(stock.config.vision_config) == laco.WindowMerger(
        layer=2, factor=2, heads=2, ffn=24, zero_init=False, odd="error"
    )
    pictures = [torch.randn(3, h, w, dtype=torch.float64) for h, w in ((64, 32), (16, 48), (48, 48))]
    given = packed(pictures, stock_processor.image_processor.patch_size)
    ours = packed(pictures, processor.image_processor.patch_size)
    found = model.model.get_image_features(**ours)
    wanted = stock.model.get_image_features(**given)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=0, atol=1e-12)
    assert [len(feature) for feature in found.pooler_output] == [8, 3, 9]
    model.model.vision_tower.layers[1].compressor.fc1.weight.mul_(1.01)
    assert (model.model.get_image_features(**ours).last_hidden_state - wanted.last_hidden_state).abs().max() > 1e-6


@pytest.mark.skipif(
    "downsample_mode" not in inspect.signature(MiniCPMV4_6ImageProcessorPil.find_best_resize).parameters,
    reason="this transformers sizes pictures for 16x in both modes",
)
@torch.no_grad()
def test_answers_and_placeholders_are_those_of_its_own_merger():
    stock, stock_processor, model, processor = without_and_with_ours()
    batches = [CASE.inputs(each, SLICED, ("no picture", [])) for each in (stock_processor, processor)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert len(batches[0]["target_sizes"]) > 3
    assert torch.equal(batches[0]["target_sizes"], batches[1]["target_sizes"] * 2)
    wanted, found = stock(**batches[0]).logits, model(**batches[1]).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


# Counts.


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_placeholders_equal_features_for_many_sizes(factor, mode):
    model, processor = minicpmv(downsample_mode=mode)
    laco.compress(model, processor, laco.AveragePool(layer=3, factor=factor))
    family, sizes = family_of(model), random.Random(0)
    for turn in range(100):
        shapes = [(sizes.randint(8, 300), sizes.randint(8, 300)) for _ in range(sizes.randint(1, 2))]
        pictures = [tiny.picture(0, height, width) for height, width in shapes]
        batch = CASE.inputs(processor, ("<image>" * len(pictures), pictures))
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        grids = [family.grid(model.config, (4 * factor * h, 4 * factor * w)) for h, w in batch["target_sizes"].tolist()]
        assert placeholders == sum(family.visual_tokens(model.config, grid) for grid in grids), shapes
        if turn % 25 == 0:
            with torch.no_grad():
                model(**batch)  # raises unless they are as many as the features


def test_a_mode_for_one_call():
    """The stock model and processor take `downsample_mode` as an argument too."""
    model, processor = minicpmv()
    laco.compress(model, processor, laco.LaCo(layer=1))
    text, pictures = SLICED
    counts = {}
    for mode in ("16x", "4x"):
        batch = processor(text=[text], images=[pictures], downsample_mode=mode, return_tensors="pt")
        counts[mode] = int((batch["input_ids"] == model.config.image_token_id).sum())
        with torch.no_grad():
            assert model(**batch, downsample_mode=mode).logits.isfinite().all()
    assert counts["4x"] > 2 * counts["16x"]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_placeholders_of_videos(frames):
    """Frames are pictures: 8 x 4 effective patches each, 4 x 4 of them a token."""
    model, processor = minicpmv()
    laco.compress(model, processor, laco.LaCo(layer=1))
    batch = video(model, processor, frames, seed=0)
    assert int((batch["input_ids"] == model.config.video_token_id).sum()) == 2 * frames
    assert batch["pixel_values_videos"].shape == (1, 3, 8, frames * 8 * 4 * 8)
    with torch.no_grad():
        model(**batch)


# Patches and positions.


def test_effective_patches_come_apart_row_by_row():
    """Two pictures of 4 x 8 and 8 x 4 pixels, 2 x 2 the small patches and 4 x 4 the large ones."""
    pictures = [torch.arange(32.0).view(1, 4, 8), torch.arange(32.0, 64.0).view(1, 8, 4)]
    large, small = packed(pictures, 4), packed(pictures, 2)
    apart = own_patches(large["pixel_values"], large["target_sizes"], 4, 2)
    assert torch.equal(apart, small["pixel_values"])
    assert apart[0, 0, :, :6].tolist() == [[0, 1, 2, 3, 4, 5], [8, 9, 10, 11, 12, 13]]
    assert torch.equal(own_patches(small["pixel_values"], small["target_sizes"], 2, 1), small["pixel_values"])


def test_hidden_states_are_merged_from_layer_k_on():
    """As in the stock encoder, a state is what its layer puts out: the own merger comes behind layer 2."""
    model, processor = minicpmv()
    laco.compress(model, processor, laco.LaCo(layer=1))
    laco.compress(model, processor, laco.LaCo(layer=3))
    tower, patch = model.model.vision_tower, processor.image_processor.patch_size
    outputs = tower(**packed([torch.randn(3, 4 * patch, 8 * patch)], patch), output_hidden_states=True)
    assert patch == 16
    assert [state.shape[1] for state in outputs.hidden_states] == [512, 128, 128, 8, 8]


# Saving.


def test_what_is_saved_loads_as_it_was(tmp_path):
    model, processor = minicpmv()
    laco.compress(model, processor, laco.LaCo(layer=3))
    tiny.scramble(model)
    laco.save_pretrained(model, processor, tmp_path / "compressed")
    again, other = laco.from_pretrained(tmp_path / "compressed")
    assert type(again) is LacoMiniCPMVForConditionalGeneration
    assert type(again.model) is LacoMiniCPMVModel
    assert type(again.config) is LacoMiniCPMVConfig
    assert type(again.model.vision_tower) is LacoMiniCPMVVisionModel
    assert again.config.patch_size == again.config.vision_config.patch_size == other.image_processor.patch_size == 8
    assert again.config.vision_config.embed_patch_size == 4
    batch = CASE.inputs(other, SLICED)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    laco.decompress(again, other)
    assert type(again) is MiniCPMV4_6ForConditionalGeneration
    assert again.config.patch_size == again.config.vision_config.patch_size == other.image_processor.patch_size == 4


def test_a_stock_checkpoint_loads_into_the_compressed_configuration(tmp_path):
    model, processor = minicpmv()
    model.save_pretrained(tmp_path)
    laco.compress(model, processor, laco.LaCo(layer=2))
    mine = {key for key in model.state_dict() if ".compressor." in key}
    again, info = LacoMiniCPMVForConditionalGeneration.from_pretrained(
        tmp_path, config=model.config, output_loading_info=True
    )
    assert info["missing_keys"] == mine
    assert all(key.startswith("model.vision_tower.encoder.layers.1.compressor.") for key in mine)
    assert not info["unexpected_keys"]
    batch = CASE.inputs(processor, SLICED)
    with torch.no_grad():  # a fresh compressor is the mean of its windows, here as there
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MiniCPMV4_6ForConditionalGeneration


# Cost.


@pytest.mark.parametrize(
    "settings", [{"downsample_mode": "16x"}, {"downsample_mode": "4x"}, {"merger_times": 2}], ids=str
)
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_flops_of_encoder_and_merger(layer, settings):
    model, processor = minicpmv(**settings)
    planned = stage_flops(model, [laco.WindowMerger(layer=layer)], size=(64, 128))
    laco.compress(model, processor, laco.WindowMerger(layer=layer))
    flops = stage_flops(model, size=(64, 128))
    assert flops == planned
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**packed([torch.randn(3, 64, 128)], processor.image_processor.patch_size))
    assert flops.encoder + flops.projector == pytest.approx(counter.get_total_flops(), rel=1e-3)


# What cannot be.


def test_patches_of_another_processor_are_refused():
    model, processor = minicpmv()
    batch = CASE.inputs(deepcopy(processor), SLICED)
    laco.compress(model, processor, laco.LaCo(layer=2))
    with pytest.raises(LacoError, match="minicpmv takes patches of 8 x 8 pixels with this compression; got 4 x 4"):
        model(**batch)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 8), ("downsample_mode", "4x")])
def test_other_processors_are_refused(name, value):
    model, processor = minicpmv()
    setattr(processor.image_processor, name, value)
    with pytest.raises(LacoError, match=f"processor does not match the model: image_processor.{name}"):
        laco.compress(model, processor, laco.LaCo(layer=2))


def test_the_processor_of_videos_follows():
    model, processor = minicpmv()
    processor.video_processor = deepcopy(processor.image_processor)
    laco.compress(model, processor, laco.LaCo(layer=2))
    assert processor.video_processor.patch_size == 8
    processor.video_processor.patch_size = 4
    with pytest.raises(LacoError, match=r"video_processor\.patch_size is 4, the model needs 8"):
        laco.compress(model, processor, laco.LaCo(layer=1))


def test_grids_and_rules_that_cannot_be():
    model, processor = minicpmv()
    with pytest.raises(LacoError, match="depends on the picture; give its size"):
        family_of(model).own_grid(model.config)
    with pytest.raises(LacoError, match="factor 3 does not divide a grid side of 20"):
        laco.compress(model, processor, laco.LaCo(layer=1, factor=3, odd="error"))
    laco.compress(model, processor, laco.LaCo(layer=1, factor=3))
    with pytest.raises(LacoError, match="multiples of 12 pixels, as its processor resizes them; got 64 x 60"):
        MINICPMV.own_grid(model.config.vision_config, (64, 60))
    assert MINICPMV.own_grid(model.config.vision_config, (48, 60)) == (1, 12, 15)
