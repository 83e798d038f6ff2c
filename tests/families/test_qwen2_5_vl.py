"""Qwen2.5-VL: attention in windows, and videos by their seconds. See test_qwen.py for everything else."""

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

import laco
from families.test_qwen2_vl import positions
from laco.errors import LacoError
from laco.families import family_of
from laco.grid import Grid
from tiny.families.qwen2_5_vl import qwen2_5_vl, timed_video
from tiny.families.qwen2_vl import PATCH, patches


@pytest.mark.parametrize(("factors", "works"), [([3], "2 or 4"), ([8], "2 or 4"), ([2, 4], "2 or 4")], ids=str)
def test_blocks_must_divide_windows(factors, works):
    """Windows of 8 x 8 patches as in the released models: blocks of 6 would shrink them, of 16 divide by zero."""
    model, processor = qwen2_5_vl(window=8)
    *before, last = [laco.LaCo(layer=layer, factor=factor) for layer, factor in enumerate(factors, start=1)]
    for method in before:
        laco.compress(model, processor, method)
    classes, config, numbers = type(model), model.config.to_dict(), processor.to_dict()
    sentence = f"windows of 8 x 8 patches, which blocks of .* do not divide; the factors .* must multiply to {works}$"
    with pytest.raises(LacoError, match=f"qwen2_5_vl attends in {sentence}"):
        laco.compress(model, processor, last)
    assert (type(model), model.config.to_dict(), processor.to_dict()) == (classes, config, numbers)


@pytest.mark.parametrize("size", [(12, 20), (16, 16), (4, 4)], ids=str)
def test_windows_of_blocks_are_those_of_the_merged_grid(size):
    """Order of blocks and bounds over r^2: for M = 4 and r = 2 what the stock function gives for half the grid."""
    height, width = size
    for frames in (1, 3):
        full = get_vision_window_index(torch.tensor([[frames, height, width]]), 4, 8 * 14, 14)
        small = get_vision_window_index(torch.tensor([[frames, height // 2, width // 2]]), 2, 4 * 14, 14)
        assert torch.equal(full[0], small[0])
        assert torch.equal(full[1] // 4, small[1])


def test_attended_pairs_are_counted_in_windows():
    """12 x 20 patches: windows of 8 and 4 rows, of 8, 8 and 4 columns; then half of it all."""
    model, processor = qwen2_5_vl(window=8)
    laco.compress(model, processor, laco.LaCo(layer=1))
    kind, vision = family_of(model).encoder_kind(model.config), model.config.vision_config
    whole, merged = (64**2 + 32**2) * 2 + 32**2 + 16**2, (16**2 + 8**2) * 2 + 8**2 + 4**2
    assert kind.attended(vision, Grid(3, 12, 20), 0) == 3 * whole
    assert kind.attended(vision, Grid(3, 6, 10), 2) == 3 * merged
    assert kind.attended(vision, Grid(3, 6, 10), 3) == 3 * 60**2  # full attention, within a frame


def test_positions_of_a_video_follow_its_seconds():
    """Three (double) frames of 2 x 3 tokens, two seconds apart at 2 positions a second."""
    model, processor = qwen2_5_vl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    frame, row, column = positions(model, timed_video(model, processor, 5, seed=0))[:, 0].tolist()
    assert frame[4:22] == [*[4] * 6, *[8] * 6, *[12] * 6]
    assert row[4:22] == [4, 4, 4, 5, 5, 5] * 3
    assert column[4:22] == [4, 5, 6] * 6
    assert row[:4] == [0, 1, 2, 3]
    assert frame[22:] == row[22:] == column[22:]  # behind it, where the text goes on is the stock class's choice


@torch.no_grad()
def test_windows_may_be_worked_out_before():
    """transformers lets callers do so, for compiling; they see the configuration's merge size alone."""
    model, processor = qwen2_5_vl(window=8)
    laco.compress(model, processor, laco.LDPv2(layer=2))
    grid = (2, 12, 20)
    values, grids = patches(model.config.vision_config, grid), torch.tensor([grid])
    order, bounds = get_vision_window_index(grids, 4, 8 * PATCH, PATCH)
    found = model.model.visual(values, grids, window_index=order, cu_window_seqlens=bounds).pooler_output
    assert torch.equal(found, model.model.visual(values, grids).pooler_output)
