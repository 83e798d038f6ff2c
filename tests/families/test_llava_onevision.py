"""Counts of placeholder tokens and features for tiles of any resolution, several pictures and videos."""

import random

import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

import laco
import tiny
from laco.families import family_of

SIZES = random.Random(0)


@pytest.fixture(
    params=[("siglip", 48, 1), ("siglip", 40, 2), ("siglip", 56, 3), ("clip", 40, 2), ("siglip", 40, "two mergers")],
    ids=str,
)
def compressed(request):
    vision, image_size, factor = request.param
    model, processor = tiny.llava_onevision(vision, image_size)
    if factor == "two mergers":
        laco.compress(model, processor, laco.AveragePool(layer=1, factor=2))
        factor = 3
    laco.compress(model, processor, laco.LaCo(layer=3, factor=factor))
    return model, processor


def test_placeholders_equal_packed_features_for_many_sizes(compressed):
    model, processor = compressed
    config, grid = model.config, family_of(model).grid(model.config)
    size = config.vision_config.image_size
    for _ in range(200):
        height, width = SIZES.randint(1, 5 * size), SIZES.randint(1, 5 * size)
        placeholders = processor._get_num_multimodal_tokens([[height, width]]).num_image_tokens[0]
        best_height, best_width = select_best_resolution([height, width], config.image_grid_pinpoints)
        tiles = 1 + (best_height // size) * (best_width // size)
        packed, _ = model.model.pack_image_features(
            [torch.zeros(tiles, grid.tokens, 4)],
            torch.tensor([[height, width]]),
            image_newline=torch.zeros(4),
            vision_aspect_ratio=config.vision_aspect_ratio,
        )
        assert len(packed[0]) == placeholders, (height, width)


def test_videos(compressed):
    """Frames are pooled after the projector: ceil(side / 2) squared tokens a frame, and one newline a video."""
    model, processor = compressed
    size, side = model.config.vision_config.image_size, family_of(model).grid(model.config).height
    videos = torch.randn(2, 3, 3, size, size)
    count = 3 * (-(-side // 2)) ** 2 + 1
    tokens = processor.replace_video_token({"pixel_values_videos": videos}, 0)
    assert tokens == "<video>" * count
    words = processor.tokenizer([f"see {tokens} well"] * 2, return_tensors="pt")
    with torch.no_grad():
        both = model(**words, pixel_values_videos=videos).logits
        one = model(
            **processor.tokenizer([f"see {tokens} well"], return_tensors="pt"), pixel_values_videos=videos[1:]
        ).logits
        torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-5)
        assert (both[0, -1] - both[1, -1]).abs().max() > 1e-3
    generated = model.generate(**words, pixel_values_videos=videos, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == words["input_ids"].shape[1] + 3


def test_pictures_and_a_video_together():
    model, processor = tiny.llava_onevision()
    laco.compress(model, processor, laco.LaCo(layer=2))
    videos = torch.randn(1, 2, 3, 48, 48)
    video = processor.replace_video_token({"pixel_values_videos": videos}, 0)
    batch = tiny.inputs(processor, ("<image> then", [tiny.picture(1, 50, 99)]))
    for key, ids in processor.tokenizer([video], return_tensors="pt").items():
        batch[key] = torch.cat([batch[key], ids], dim=1)
    with torch.no_grad():
        logits = model(**batch, pixel_values_videos=videos).logits[0, -1]
        other = model(**batch, pixel_values_videos=torch.randn_like(videos)).logits[0, -1]
    assert (logits - other).abs().max() > 1e-3


def test_newline_and_unpadding_follow_the_merged_grid():
    """A 1 x 2 picture in 48-pixel tiles: a 3 x 3 base and 1 x 2 tiles of 3 x 3, with a newline after each row."""
    model, processor = tiny.llava_onevision()
    laco.compress(model, processor, laco.AveragePool(layer=2))
    batch = tiny.inputs(processor, ("<image>", [tiny.picture(1, 48, 96)]))
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 9 + 3 * (6 + 1)
    with torch.no_grad():
        model.model.image_newline.fill_(7.0)
        outputs = model.model.get_image_features(
            batch["pixel_values"], batch["image_sizes"], batch_num_images=batch["batch_num_images"]
        )
    newlines = (outputs.pooler_output[0] == 7.0).all(-1).nonzero().flatten()
    assert newlines.tolist() == [9 + 6, 9 + 13, 9 + 20]
