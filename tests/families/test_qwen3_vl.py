"""Qwen3-VL: layers that are tapped on the way, and videos by timestamps. See test_qwen.py for everything else."""

import pytest
import torch

import laco
import tiny
from families.test_qwen2_vl import positions
from tiny.families.qwen2_vl import patches, video
from tiny.families.qwen3_vl import qwen3_vl


def tapped(model, grid):
    with torch.no_grad():
        output = model.model.visual(patches(model.config.vision_config, grid), torch.tensor([grid]))
    return [output.pooler_output, *output.deepstack_features]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_all_taps_give_as_many_tokens(k):
    model, processor = qwen3_vl(taps=(0, 1, 2, 3))
    laco.compress(model, processor, laco.LaCo(layer=k))
    assert {len(tap) for tap in tapped(model, (2, 8, 12))} == {2 * 2 * 3}


def test_a_merger_changes_the_taps_behind_it_alone():
    model, processor = qwen3_vl(taps=(0, 1, 2, 3))
    laco.compress(model, processor, laco.AveragePool(layer=2))
    compressed = tapped(model, (1, 8, 12))
    laco.decompress(model, processor)
    assert type(model.model.visual.deepstack_merger_list[0]).__name__ == "Qwen3VLVisionPatchMerger"
    laco.compress(model, processor, laco.AveragePool(layer=4))
    last = tapped(model, (1, 8, 12))
    same = [torch.allclose(one, other, atol=1e-6) for one, other in zip(compressed, last, strict=True)]
    # Averages of layer 2 are the same whether the merger or the tap takes them.
    assert same == [False, True, True, False, False]


@pytest.mark.parametrize("tap", [0, 1])
def test_the_language_model_reads_every_tap(tap):
    model, processor = qwen3_vl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    batch = processor(text="ab<image>c", images=[tiny.picture(1, 32, 48)], return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits[:, -1]
        model.model.visual.deepstack_merger_list[tap].linear_fc2.weight.mul_(0.5)
        assert (model(**batch).logits[:, -1] - before).abs().max() > 1e-3


def test_positions_of_a_video_are_pictures_behind_timestamps():
    """Two (double) frames of 2 x 3 tokens; each is a picture in the sequence, after `<0.0 seconds>` in 13 letters."""
    model, processor = qwen3_vl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    frame, row, column = positions(model, video(model, processor, 3, seed=0, stamped=True))[-3:, 0].tolist()
    first, second = 4 + 13, 4 + 13 + 3 + 13  # a picture of 2 x 3 takes 3 positions
    head, middle, tail = [*range(first)], [*range(first + 3, second)], [*range(second + 3, second + 8)]
    assert frame == [*head, *[first] * 6, *middle, *[second] * 6, *tail]
    assert row == [*head, *[first] * 3, *[first + 1] * 3, *middle, *[second] * 3, *[second + 1] * 3, *tail]
    columns = [[start, start + 1, start + 2] * 2 for start in (first, second)]
    assert column == [*head, *columns[0], *middle, *columns[1], *tail]
