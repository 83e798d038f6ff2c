"""Qwen2-VL: where pictures and videos stand in the language model. See test_qwen.py for everything else."""

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

import laco
import tiny
from tiny.families.qwen2_vl import qwen2_vl, video


def positions(model: PreTrainedModel, batch: BatchFeature) -> Tensor:
    """What the language model gets: (3, B, N), frame, row and column of every token."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen["position_ids"]


def test_positions_of_a_picture_are_those_of_the_merged_grid():
    """Two letters, a picture of 32 x 48 pixels (8 x 12 patches, 2 x 3 tokens that are read), one letter."""
    model, processor = qwen2_vl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    batch = processor(text="ab<image>c", images=[tiny.picture(1, 32, 48)], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert positions(model, batch)[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_positions_of_a_video():
    """Three (double) frames of 2 x 3 tokens behind "see " and before " well"."""
    model, processor = qwen2_vl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    frame, row, column = positions(model, video(model, processor, 5, seed=0))[:, 0].tolist()
    assert frame == [0, 1, 2, 3, *[4] * 6, *[5] * 6, *[6] * 6, 7, 8, 9, 10, 11]
    assert row == [0, 1, 2, 3, *[4, 4, 4, 5, 5, 5] * 3, 7, 8, 9, 10, 11]
    assert column == [0, 1, 2, 3, *[4, 5, 6] * 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("factor", [3, 5, 7])
def test_any_factor(factor):
    model, processor = qwen2_vl()
    laco.compress(model, processor, laco.LaCo(layer=2, factor=factor, odd="error"))
    batch = processor(text="<image>", images=[tiny.picture(1, 50, 70)], return_tensors="pt")
    assert batch["image_grid_thw"][0, 1] % (2 * factor) == 0
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
