"""What Mistral 3 has beside its encoder: a projector that merges patches by itself."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import laco
import tiny
from laco.cost import stage_flops
from laco.families import family_of
from laco.grid import Grid
from tiny.families.mistral3 import mistral3

GRIDS = [(4, 6), (2, 2), (6, 2)]  # of the encoder's output


def projected_by_hand(projector: nn.Module, x_NC: Tensor, height: int, width: int, side: int) -> Tensor:
    """One picture, window by window: norm, the window's tokens channel by channel, three linear maps."""
    x_NC = projector.norm(x_NC)
    merged = []
    for top, left in product(range(0, height - height % side, side), range(0, width - width % side, side)):
        window = [x_NC[(top + dy) * width + left + dx] for dy in range(side) for dx in range(side)]
        merged.append(projector.patch_merger.merging_layer(torch.stack(window, dim=1).flatten()))
    return projector.linear_2(projector.act(projector.linear_1(torch.stack(merged))))


@pytest.mark.parametrize("side", [1, 2], ids="merged by {}".format)
@pytest.mark.parametrize("factor", [2, 3])
def test_the_projector_merges_the_merged_grids(side, factor):
    model, processor = mistral3(spatial_merge_size=side)
    model.double()
    laco.compress(model, processor, laco.LaCo(layer=2, factor=factor))
    tiny.scramble(model)
    pixels = torch.randn(3, 3, 24 * factor, 24 * factor, dtype=torch.float64)
    sizes = torch.tensor(GRIDS) * 4 * factor
    with torch.no_grad():
        found = model.model.get_image_features(pixels, image_sizes=sizes).pooler_output
        tokens = model.model.vision_tower(pixels, image_sizes=sizes).last_hidden_state[0]
        parts = tokens.split([height * width for height, width in GRIDS])
        for features, x_NC, grid in zip(found, parts, GRIDS, strict=True):
            wanted = projected_by_hand(model.model.multi_modal_projector, x_NC, *grid, side)
            torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)


def test_its_patch_size_follows_the_encoder_and_returns():
    model, processor = mistral3()
    merger = model.model.multi_modal_projector.patch_merger
    laco.compress(model, processor, laco.LaCo(layer=2))
    assert (merger.patch_size, merger.spatial_merge_size, model.config.spatial_merge_size) == (8, 2, 2)
    laco.decompress(model, processor)
    assert (merger.patch_size, processor.patch_size, processor.spatial_merge_size) == (4, 4, 2)


def test_no_merger_takes_the_place_of_its_projector():
    model, processor = mistral3()
    laco.compress(model, processor, laco.PixelShuffle(depth=1))
    family = family_of(model)
    assert [(step.layer, step.place) for step in family.steps(model.config)] == [(4, "encoder")]
    assert type(model.model.multi_modal_projector).__name__ == "Mistral3MultiModalProjector"


def test_visual_tokens_by_hand():
    """1540 pixels are 110 patches of 14; by 2 and again by 2 there are 27.5 windows, so pictures grow to 28."""
    config = mistral3()[0].config
    config.vision_config.image_size, config.vision_config.patch_size = 1540, 14
    family = family_of(mistral3()[0])
    assert family.visual_tokens(config, family.grid(config)) == 55 * 55
    assert family.visual_tokens(config, laco.LaCo().num_tokens(family.grid(config))) == 28 * 28
    assert family.visual_tokens(config, Grid(1, 4, 6)) == 6
    plain, merged = stage_flops(config), stage_flops(config, [laco.LaCo(depth=1 / 4)])
    assert merged.language_model < plain.language_model / 3


def test_one_visual_token_in_all_is_too_few_for_the_stock_model_too():
    """It takes a single feature vector for a batch of one and splits its channels; with compression as without."""
    model, processor = mistral3()
    for _ in range(2):
        batch = processor(text="<image>", images=tiny.picture(1, 5, 5))
        assert (batch["input_ids"] == model.config.image_token_id).sum() == 1
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            model(**batch)
        two = processor(text="<image><image>", images=[tiny.picture(seed, 5, 5) for seed in (1, 2)])
        model(**two)
        if not family_of(model).steps(model.config):
            laco.compress(model, processor, laco.LaCo(layer=2))
