"""Answers of a model, many questions at a time: prompts, batches with left padding, pictures encoded once.

Everything here goes through the public interface of transformers (processor, `get_image_features`,
`generate`), so it knows neither families nor methods, and treats stock and compressed models alike. Models
and processors are `Any`: the annotations of transformers do not know what its subclasses add.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import BatchFeature, Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from laco.data import Sample
from laco.errors import LacoError
from laco.families import FAMILIES
from laco.families.compat import TAKES_FEATURES
from laco.families.reduction import kept_columns


class Answers(NamedTuple):
    """What a model said to each sample, and how many visual tokens its language model read for it."""

    texts: list[str]
    visual_tokens: list[float]


def prompt(processor: Any, question: str, pictures: int = 1) -> str:
    """The text that asks, pictures first: by chat template, or `<image>\\nquestion` without one."""
    if getattr(processor, "chat_template", None) is None:
        return f"{processor.image_token}\n" * pictures + question
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def check_answers(processor: Any) -> None:
    """Raises `LacoError` for a processor that takes no text, as a vision encoder alone has it, or none at all."""
    if not hasattr(processor, "tokenizer"):
        raise LacoError("a vision encoder alone answers no questions; this needs a vision-language model")


def encode(processor: Any, questions: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> BatchFeature:
    """Tensors for a batch of questions, padded on the left, each with its own list of RGB pictures."""
    check_answers(processor)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so its value does not matter
    texts = [prompt(processor, asked, len(shown)) for asked, shown in zip(questions, pictures, strict=True)]
    return processor(
        text=texts,
        images=[list(shown) for shown in pictures if shown] or None,  # nested: some treat several unlike one
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def split_inputs(model: Any, inputs: BatchFeature) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of the vision encoder (what `get_image_features` takes), and the others.

    Grids of pictures are among both: the language model's positions follow from them (M-RoPE of Qwen).
    """
    takes = inspect.signature(model.base_model.get_image_features).parameters
    seen = {name: value for name, value in inputs.items() if name in takes}
    others = {name: value for name, value in inputs.items() if name not in takes or name == "image_grid_thw"}
    return seen, others


def encode_once(model: Any, inputs: BatchFeature, pictures: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """Replaces pixels by features, running the vision encoder once for each different picture object.

    Args:
        inputs: a batch of questions, as `encode` makes it.
        pictures: the pictures of each question.

    Returns:
        Arguments for `generate`: the inputs as they are where a question has not exactly one picture, or
        where rows of the pixels are not pictures (families that pack patches), or where transformers is too old, or
        where what is left of a picture depends on the question.
    """
    seen, others = split_inputs(model, inputs)
    one_each = all(len(shown) == 1 for shown in pictures)
    family = next((family for family in FAMILIES if family.owns(model)), None)
    by_question = family is not None and family.reads_question(model.config)
    if by_question or not TAKES_FEATURES or not one_each or any(len(value) != len(pictures) for value in seen.values()):
        return dict(inputs)
    names = [id(picture) for (picture,) in pictures]
    different = list(dict.fromkeys(names))
    rows = [names.index(name) for name in different]
    picked = {name: value[rows] for name, value in seen.items()}
    features = model.get_image_features(**picked, return_dict=True).pooler_output
    again = [features[different.index(name)] for name in names]
    return {**others, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=again)}}  # type: ignore[arg-type]


def greedy(processor: Any, model: Any, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`: greedy decoding with a cache, whatever the generation config says."""
    eos = model.generation_config.eos_token_id
    return {
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id if eos is None else eos,
    }


def count_visual_tokens(model: Any, inputs: BatchFeature, past: Cache | None = None) -> list[float]:
    """Visual tokens that the language model reads of each sequence of the batch, mean over its layers.

    `past` is its cache after the prompt. Without one: placeholder tokens, which is the same unless tokens are dropped
    behind the encoder or inside the language model.
    """
    visual_BL = inputs["input_ids"] == model.config.image_token_id
    if (layers := kept_columns(past)) is None:
        return visual_BL.sum(dim=1).tolist()
    length = visual_BL.shape[1]
    counts = [
        (visual_BL.gather(1, columns.clamp(0, length - 1)) & (columns >= 0) & (columns < length)).sum(dim=1)
        for columns in layers
    ]
    return torch.stack(counts).float().mean(dim=0).tolist()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inference mode and `eval()`, with the model's training flag put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def answer(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> Answers:
    """Greedy answers to all samples, in their order.

    Questions about the same picture are put into the same batch, where the picture is opened and encoded
    once. The batch size changes nothing but speed and memory (in float32; in bfloat16 near-ties may fall
    either way).
    """
    names = [sample.picture_key for sample in samples]
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    order = sorted(range(len(samples)), key=lambda index: first[names[index]])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts, visual_tokens = [""] * len(samples), [0.0] * len(samples)
    with evaluating(model):
        for batch in track(batches, "answering", console=Console(stderr=True), disable=not progress):
            shown = {names[index]: samples[index].pictures() for index in batch}
            pictures = [shown[names[index]] for index in batch]
            questions = [samples[index].question for index in batch]
            inputs = encode(processor, questions, pictures).to(model.device)
            arguments = encode_once(model, inputs, pictures)
            settings = greedy(processor, model, max_new_tokens)
            output = model.generate(**arguments, **settings, return_dict_in_generate=True)
            new = output.sequences[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(new, skip_special_tokens=True)
            counts = count_visual_tokens(model, inputs, output.past_key_values)
            for index, text, count in zip(batch, said, counts, strict=True):
                texts[index], visual_tokens[index] = text.strip(), count
    return Answers(texts, visual_tokens)
