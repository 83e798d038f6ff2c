"""`laco.ask`: the answer is that of a plain generate, the counts are right, the times are of what they say."""

import pytest
import torch

import laco
import tiny
from conftest import TEMPLATE
from laco.ask import ask, uncompressed_processor
from laco.errors import LacoError
from laco.evaluate.generation import encode, greedy


def plain(model, processor, pictures, question, tokens):
    inputs = encode(processor, [question], [pictures])
    with torch.inference_mode():
        output = model.generate(**inputs, **greedy(processor, model, tokens))
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("make", [tiny.llava, tiny.llava_onevision])
def test_answer_and_counts(make, pictures):
    model, processor = make()
    shown = [tiny.picture(seed, 100, 60) for seed in range(pictures)]
    stock = ask(model, processor, shown, "what?", max_new_tokens=4)
    assert stock.answer == plain(model, processor, shown, "what?", 4)
    assert stock.visual_tokens == stock.visual_tokens_before
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    asked = ask(model, processor, shown, "what?", max_new_tokens=4)
    assert asked.answer == plain(model, processor, shown, "what?", 4)
    assert asked.visual_tokens_before == stock.visual_tokens
    assert asked.visual_tokens < stock.visual_tokens
    assert asked.prompt_tokens == stock.prompt_tokens - stock.visual_tokens + asked.visual_tokens
    assert asked.new_tokens == 4


@pytest.mark.parametrize("method", [laco.LaCo(layer=1), laco.VidCom2(keep=0.5), laco.FastV(keep=0.5, layer=1)])
def test_a_video(method):
    frames = [tiny.picture(seed, 48, 48) for seed in range(3)]
    model, processor = tiny.llava_onevision()
    inputs = encode(processor, ["what?"], [frames], [True])
    stock = ask(model, processor, frames, "what?", video=True, max_new_tokens=4)
    assert (stock.visual_tokens, stock.visual_tokens_before) == (
        28,
        28,
    )  # 3 frames of 3 x 3 tokens, a line break
    with torch.inference_mode():
        output = model.generate(**inputs, **greedy(processor, model, 4))[:, inputs["input_ids"].shape[1] :]
    assert stock.answer == processor.decode(output[0], skip_special_tokens=True).strip()
    laco.compress(model, processor, method)
    asked = ask(model, processor, frames, "what?", video=True, max_new_tokens=4)
    assert asked.visual_tokens < 24
    assert asked.visual_tokens_before == 28


@pytest.mark.parametrize("placeholder", ["<image>", "<video>"])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_question_with_a_placeholder_is_refused(placeholder, template):
    model, processor = tiny.llava_onevision()
    processor.chat_template = template
    with pytest.raises(LacoError, match=f"the question 'what {placeholder}\\?' has {placeholder} in it"):
        ask(model, processor, [tiny.picture()], f"what {placeholder}?")


def test_frames_of_several_sizes_are_refused():
    frames = [tiny.picture(0, 48, 48), tiny.picture(1, 60, 48)]
    with pytest.raises(LacoError, match="the frames of a video have one size; got 48x48 and 48x60 pixels"):
        ask(*tiny.llava_onevision(), frames, "what?", video=True)


def test_uncompressed_processor_leaves_the_other_alone(talker):
    model, processor = talker
    laco.compress(model, processor, laco.AveragePool(depth=1 / 2, factor=3))
    numbers = processor.patch_size, model.config.vision_config.patch_size
    assert uncompressed_processor(model, processor).patch_size == 8
    assert (processor.patch_size, model.config.vision_config.patch_size) == numbers == (24, 24)


def test_times_are_of_what_they_say(talker, monkeypatch):
    """On a clock that only the encoder, the prefill and the decoding of a token move on, every time is exact."""
    model, processor = talker
    clock = [0.0]
    monkeypatch.setattr("laco.ask.perf_counter", lambda: clock[0])

    def takes(module, seconds):
        run = module.forward

        def forward(*args, **kwargs):
            clock[0] += seconds(kwargs)
            return run(*args, **kwargs)

        monkeypatch.setattr(module, "forward", forward)

    takes(model.model.vision_tower, lambda _: 0.3)
    takes(model.model.language_model, lambda given: 0.02 if given["inputs_embeds"].shape[1] > 1 else 0.004)
    asked = ask(model, processor, [tiny.picture()], "what?", max_new_tokens=4)
    times = asked.encoder_ms, asked.prefill_ms, asked.decode_ms
    assert times == pytest.approx((300, 20, 4))


def test_one_token_has_no_decode_time(talker):
    assert ask(*talker, [tiny.picture()], "what?", max_new_tokens=1).decode_ms is None
