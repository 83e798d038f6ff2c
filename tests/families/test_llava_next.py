"""LLaVA-NeXT: an independent reference through tiles, unpadding and line breaks, and counts for many sizes."""

import random
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.image_processing_utils import select_best_resolution

import laco
import tiny
from families.test_guards import features_by_hand
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of
from tiny.families.llava_next import CASES, llava_next

METHODS = {
    "layer 1": laco.LaCo(layer=1, shortcut="saliency"),
    "layer 2, factor 3": laco.LaCo(layer=2, factor=3, shortcut="saliency"),
    "layer 3, map": laco.LDPv2(layer=3),
    "after the last": laco.LaCo(depth=1, shortcut="saliency"),
    "projector": laco.LDPv2(depth=1),
    "projector of four levels": laco.TokenPacker(factor=3),
}
visions = pytest.mark.parametrize("vision", ["clip", "siglip"])


def packed_by_hand(features_TNC: Tensor, size: tuple[int, int], tiles_in_row: int, newline_C: Tensor) -> Tensor:
    """The whole picture, then what its tiles show of it row by row, every row with a line break."""
    side = int(features_TNC.shape[1] ** 0.5)
    rows, columns = (len(features_TNC) - 1) // tiles_in_row * side, tiles_in_row * side
    top = left = 0
    if size[1] / size[0] > columns / rows:  # there is padding above and below
        top = (rows - int(round(size[0] * columns / size[1], 7))) // 2
    else:
        left = (columns - int(round(size[1] * rows / size[0], 7))) // 2
    tokens = list(features_TNC[0])
    for y in range(top, rows - top):
        for x in range(left, columns - left):
            tile = 1 + y // side * tiles_in_row + x // side
            tokens.append(features_TNC[tile, y % side * side + x % side])
        tokens.append(newline_C)
    return torch.stack(tokens)


@visions
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("image_size", [48, 40], ids=["even grid", "odd grid"])
def test_features_equal_a_loop_over_stock_layers_and_tiles(vision, method, image_size):
    model, processor = llava_next(vision, image_size, vision_feature_layer=-2 if vision == "clip" else -1)
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, method)
    tiny.scramble(model)
    sizes = [(50, 120), (90, 40)]
    pictures = [tiny.picture(seed, *size) for seed, size in enumerate(sizes)]
    batch = processor(text="<image><image>", images=pictures, return_tensors="pt")
    pixels = batch["pixel_values"].double()
    with torch.no_grad():
        found = model.get_image_features(pixels, batch["image_sizes"]).pooler_output
        for picture, tiles, size in zip(found, pixels, sizes, strict=True):
            height, width = select_best_resolution(size, model.config.image_grid_pinpoints)
            count = 1 + height // image_size * (width // image_size)
            features = torch.stack([features_by_hand(stock, model, tile[None]) for tile in tiles[:count]])
            wanted = packed_by_hand(features, size, width // image_size, model.model.image_newline)
            torch.testing.assert_close(picture, wanted, rtol=0, atol=1e-9)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == sum(map(len, found))


@visions
@pytest.mark.parametrize(("image_size", "factors"), [(48, [1]), (40, [2]), (56, [3]), (40, [2, 3])], ids=str)
def test_placeholders_equal_packed_features_for_many_sizes(vision, image_size, factors):
    model, processor = llava_next(vision, image_size)
    for layer, factor in enumerate(factors, start=1):
        laco.compress(model, processor, laco.AveragePool(layer=layer, factor=factor))
    config, tokens = model.config, family_of(model).grid(model.config).tokens
    sizes = random.Random(0)
    for _ in range(200):
        size = sizes.randint(1, 5 * image_size), sizes.randint(1, 5 * image_size)
        placeholders = processor._get_num_multimodal_tokens([size]).num_image_tokens[0]
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        tiles = 1 + height // image_size * (width // image_size)
        packed, _ = model.model.pack_image_features(
            [torch.zeros(tiles, tokens, 4)], torch.tensor([size]), "full", image_newline=torch.zeros(4)
        )
        assert len(packed[0]) == placeholders, size


def test_newline_and_unpadding_follow_the_merged_grid():
    """A 48 x 96 picture in 48-pixel tiles: a 3 x 3 base and 1 x 2 tiles of 3 x 3, a newline after each row."""
    model, processor = llava_next()
    laco.compress(model, processor, laco.AveragePool(layer=2))
    batch = CASES[0].inputs(processor, ("<image>", [tiny.picture(1, 48, 96)]))
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 9 + 3 * (6 + 1)
    with torch.no_grad():
        model.model.image_newline.fill_(7.0)
        (packed,) = model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
    assert (packed == 7.0).all(-1).nonzero().flatten().tolist() == [9 + 6, 9 + 13, 9 + 20]


def test_flops_of_tiles_are_what_torch_counts():
    model, processor = llava_next(vision_feature_layer=-2)
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    batch = CASES[0].inputs(processor, ("<image>?", [tiny.picture(1, 90, 140)]))
    length, tiles = batch["input_ids"].shape[1], batch["pixel_values"].shape[1]
    assert tiles > 1
    flops = stage_flops(model, pictures=tiles, text_tokens=0, visual_tokens=length, logits=length)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_other_tiles_than_the_models_are_refused():
    model, processor = llava_next()
    processor.image_processor.image_grid_pinpoints = [[96, 96]]
    for other in (processor, tiny.llava("clip")[1]):
        with pytest.raises(LacoError, match="image_grid_pinpoints is"):
            laco.compress(model, other, laco.LaCo())
    assert family_of(model).steps(model.config) == []
    assert processor.patch_size == 8
