"""What SmolVLM has beyond Idefics 3, with which it shares its tests: videos."""

import pytest
import torch

import laco
from tiny.families.smolvlm import smolvlm, video


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_text_of_a_video(frames):
    """Frames of 16 x 16 patches, merged to 8 x 8, joined to 4 x 4."""
    model, processor = smolvlm()
    laco.compress(model, processor, laco.LaCo(layer=2))
    text = processor.tokenizer.decode(video(model, processor, frames, seed=0)["input_ids"][0])
    frame = f"<fake_token_around_image><global-img>{'<image>' * 16}<fake_token_around_image>"
    times = "".join(f"\nFrame from 00:0{second}:{frame}" for second in range(frames))
    intro, _, rest = text.partition(" frames from a ")
    assert intro.startswith("You are provided the following series of ")
    assert rest == f"0:00:0{frames} [H:MM:SS] video.\n{times}\n\nwhat happens?"


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_every_frame_is_a_picture(frames):
    model, processor = smolvlm()
    laco.compress(model, processor, laco.LaCo(layer=2))
    batch = video(model, processor, frames, seed=0)
    with torch.no_grad():
        found = model.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
        alone = [
            model.model.get_image_features(frame[None, None], return_dict=True).pooler_output[0]
            for frame in batch["pixel_values"][0]
        ]
        torch.testing.assert_close(torch.cat([*found]).flatten(0, -2), torch.cat(alone), rtol=0, atol=1e-5)
        before = model(**batch).logits[0, -1]
        for frame in range(frames):
            other = {**batch, "pixel_values": batch["pixel_values"].clone()}
            other["pixel_values"][0, frame] *= -1
            assert (model(**other).logits[0, -1] - before).abs().max() > 1e-3


def test_processors_of_other_frames_are_refused():
    model, processor = smolvlm()
    processor.video_processor = type(processor.image_processor)(max_image_size={"longest_edge": 24})
    with pytest.raises(laco.LacoError, match="max_image_size of the video_processor is 24, the model needs 48"):
        laco.compress(model, processor, laco.LaCo(layer=1))
