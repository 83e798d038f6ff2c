"""Videos without torchvision: frames become what the image processor makes of an overview."""

import pytest
import torch
from transformers import AutoProcessor

import tiny
from laco.errors import LacoError
from laco.frames import LlavaOnevisionFramesProcessor


@pytest.fixture
def processor():
    """Of a tiny LLaVA-OneVision: 48 pixels, 6 x 6 patches, mean and deviation of its own."""
    _, stock = tiny.llava_onevision()
    stock.image_processor.image_mean = [0.1, 0.2, 0.3]
    return LlavaOnevisionFramesProcessor(
        stock.image_processor,
        stock.tokenizer,
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )


@pytest.mark.parametrize("side", [48, 60])
def test_frames_are_treated_as_overviews_of_pictures(processor, side: int) -> None:
    frames = [tiny.picture(seed, side, side) for seed in range(6)]
    inputs = processor(text=["<video>what?", "<video>when?"], videos=[frames[:3], frames[3:]], return_tensors="pt")
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (2, 3, 3, 48, 48)
    overviews = processor(text=["<image>"] * 6, images=[[frame] for frame in frames], return_tensors="pt")
    assert torch.equal(pixels.flatten(0, 1), overviews["pixel_values"][:, 0])
    assert pixels.std() > 0.1
    assert (inputs["input_ids"] == processor.video_token_id).sum(dim=1).tolist() == [3 * 9 + 1] * 2


def test_pictures_and_videos_in_one_batch(processor) -> None:
    frames = [tiny.picture(seed) for seed in range(3)]
    inputs = processor(text=["<image>a", "<video>a"], images=[[frames[0]]], videos=[frames], padding=True)
    assert {"pixel_values", "image_sizes", "pixel_values_videos"} <= set(inputs)


def test_a_saved_processor_comes_back(processor, tmp_path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is LlavaOnevisionFramesProcessor
    given = {"text": ["<video>what?"], "videos": [[tiny.picture(0), tiny.picture(1)]], "return_tensors": "pt"}
    one, other = processor(**given), again(**given)
    assert set(one) == set(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("lengths", [(2, 3), (0,)])
def test_videos_of_a_batch_are_equally_long(processor, lengths) -> None:
    videos = [[tiny.picture(0)] * length for length in lengths]
    with pytest.raises(LacoError, match="same number of frames"):
        processor.video_processor(videos)
