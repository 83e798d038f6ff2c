"""One question to one model: the answer, its visual tokens, and the times of encoder, prefill and decode."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor
from transformers.generation import BaseStreamer

from laco.evaluate.generation import count_visual_tokens, encode, evaluating, greedy, split_inputs
from laco.evaluate.report import is_compressed
from laco.families import family_of
from laco.families.compat import encode_pictures, given_features
from laco.families.reduction.prompt import knowing


class Asked(BaseModel):
    """An answer and what it took. Times in milliseconds, measured once after a warm-up.

    `visual_tokens` is what the language model reads (mean over its layers, where tokens leave between them),
    `visual_tokens_before` what it would read without compression. `encoder_ms` is vision encoder and projector,
    `prefill_ms` the language model up to the first new token, `decode_ms` the mean for each further one (None if
    there is none). Opening and resizing pictures and splitting text into tokens is in none of them.
    """

    answer: str
    visual_tokens_before: float
    visual_tokens: float
    prompt_tokens: int
    new_tokens: int
    encoder_ms: float
    prefill_ms: float
    decode_ms: float | None


class Stopwatch(BaseStreamer):
    """Notes when `generate` hands over the prompt and each new token; handing over waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def ask(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    question: str,
    *,
    video: bool = False,
    max_new_tokens: int = 128,
) -> Asked:
    """Asks a model about one or more RGB pictures, or about the video whose frames they are, greedily, and measures.

    The warm-up is one run of the encoder and two tokens, so that neither the first use of a kernel nor lazy
    allocation is counted.
    """
    inputs = encode(processor, [question], [pictures], [video]).to(model.device)
    seen, others = split_inputs(model, inputs)
    with evaluating(model):
        for length in (2, max_new_tokens):
            with knowing(model, inputs):
                features, encoder_ms = timed(lambda: encode_pictures(model, seen))
            watch = Stopwatch()
            with given_features(model, seen, others, features) as given:
                settings = greedy(processor, model, length)
                output = model.generate(**given, streamer=watch, return_dict_in_generate=True, **settings)
    asked, first, *further = watch.times
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    before = inputs
    if is_compressed(model):
        before = encode(uncompressed_processor(model, processor), [question], [pictures], [video])
    return Asked(
        answer=processor.decode(new, skip_special_tokens=True).strip(),
        visual_tokens_before=count_visual_tokens(model, before)[0],
        visual_tokens=count_visual_tokens(model, inputs, output.past_key_values)[0],
        prompt_tokens=inputs["input_ids"].shape[1],
        new_tokens=len(new),
        encoder_ms=encoder_ms,
        prefill_ms=1000 * (first - asked),
        decode_ms=1000 * (further[-1] - first) / len(further) if further else None,
    )


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a run and its milliseconds, the device's work included."""
    synchronize()
    start = perf_counter()
    result = run()
    synchronize()
    return result, 1000 * (perf_counter() - start)


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def uncompressed_processor(model: Any, processor: Any) -> Any:
    """A copy of a compressed model's processor that counts placeholder tokens as for the stock model."""
    family, processor = family_of(model), deepcopy(processor)
    family.set_processor(processor, family.uncompressed(model.config))
    return processor
