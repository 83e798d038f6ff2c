"""Answers of a model, many questions at a time: prompts, batches with left padding, pictures and videos encoded once.

Everything here goes through the public interface of transformers (processor, `get_image_features`,
`get_video_features`, `generate`), so it knows neither families nor methods, and treats stock and compressed
models alike. Models and processors are `Any`: the annotations of transformers do not know what its
subclasses add.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import BatchFeature, Cache

import laco.frames  # noqa: F401  from here on AutoProcessor knows its processor
from laco.data import Sample
from laco.errors import LacoError
from laco.families import FAMILIES, family_of
from laco.families.compat import TAKES_FEATURES, encode_pictures
from laco.families.reduction import computed_columns


class Answers(NamedTuple):
    """What a model said to each sample, and how many visual tokens its language model read for it."""

    texts: list[str]
    visual_tokens: list[float]


def prompt(processor: Any, question: str, pictures: int = 1, video: bool = False) -> str:
    """The text that asks, pictures first: by chat template, or `<image>\\nquestion` without one.

    `video`: the pictures are the frames of one video, for which one placeholder stands.

    Raises:
        LacoError: a processor without videos is to ask about one; the question is blank, or has a placeholder in it.
    """
    if not question.strip():
        raise LacoError("the question is empty; ask something about the picture")
    for name in ("image_token", "video_token"):
        if (placeholder := getattr(processor, name, None)) and placeholder in question:
            raise LacoError(
                f"the question {question!r} has {placeholder} in it, which stands for pictures; leave it out"
            )
    if video and getattr(processor, "video_token", None) is None:
        raise LacoError(f"{type(processor).__name__} takes no videos; ask a model of a family that does")
    kind, token, count = ("video", "video_token", 1) if video else ("image", "image_token", pictures)
    if getattr(processor, "chat_template", None) is None:
        return f"{getattr(processor, token)}\n" * count + question
    content = [{"type": kind}] * count + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def check_answers(processor: Any) -> None:
    """Raises `LacoError` for a processor that takes no text, as a vision encoder alone has it, or none at all."""
    if not hasattr(processor, "tokenizer"):
        raise LacoError("a vision encoder alone answers no questions; this needs a vision-language model")


def check_videos(model: Any, method: Any) -> None:
    """Raises `LacoError` for a method that is made for videos in a model that takes none as a whole."""
    if getattr(method, "video_only", False) and not _parameters(model, "video"):
        raise LacoError(f"{method.name} compares frames of videos, which this model does not take; take another method")


def visual_tokens(model: Any, processor: Any) -> float | None:
    """Visual tokens for one picture or tile; None where they depend on it, or it is refused, or the budget counts more,
    as tiles of a picture or frames of a video may have them.

    Raises:
        LacoError: a budget counts more than the model can ever see at once.
    """
    family, config = family_of(model), model.config
    if any(getattr(method, "video_only", False) for method in family.methods(config)):
        return None
    try:
        grid = family.grid(config)
    except LacoError:
        return None
    try:
        return family.tokens_read(config, grid)
    except LacoError:
        splits = getattr(getattr(processor, "image_processor", None), "do_image_splitting", False)
        if splits or getattr(processor, "video_token", None):
            return None
        raise


def encode(
    processor: Any,
    questions: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    videos: Sequence[bool] | None = None,
) -> BatchFeature:
    """Tensors for a batch of questions, padded on the left, each with its own list of RGB pictures.

    `videos` says of each list whether it is the frames of one video; by default none is.

    Raises:
        LacoError: as `prompt`; frames of a video have different sizes.
    """
    check_answers(processor)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so its value does not matter
    videos = [False] * len(pictures) if videos is None else videos
    rows = list(zip(questions, pictures, videos, strict=True))
    clips = [list(frames) for _, frames, video in rows if video]
    for frames in clips:
        if len(sizes := dict.fromkeys(frame.size for frame in frames)) > 1:
            told = " and ".join(f"{width}x{height}" for width, height in list(sizes)[:2])
            raise LacoError(f"the frames of a video have one size; got {told} pixels")
    return processor(
        text=[prompt(processor, asked, len(shown), video) for asked, shown, video in rows],
        # nested: some treat several pictures unlike one
        images=[list(shown) for _, shown, video in rows if shown and not video] or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **({"videos": clips} if clips else {}),
    )


def split_inputs(model: Any, inputs: BatchFeature) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of the vision encoder (what `get_image_features` and `get_video_features` take), and the others.

    Grids of pictures are among both: the language model's positions follow from them (M-RoPE of Qwen).
    """
    takes = {name for kind in ("image", "video") for name in _parameters(model, kind)}
    takes |= {"pixel_values_videos"}  # which models before transformers 5.18 call otherwise
    seen = {name: value for name, value in inputs.items() if name in takes}
    grids = ("image_grid_thw", "video_grid_thw")
    others = {name: value for name, value in inputs.items() if name not in takes or name in grids}
    return seen, others


def _parameters(model: Any, kind: str) -> set[str]:
    """Names of what a model takes to encode pictures of a kind, "image" or "video"; empty where it does not."""
    encoding = getattr(model.base_model, f"get_{kind}_features", None)
    return set() if encoding is None else set(inspect.signature(encoding).parameters)


def encode_once(
    model: Any,
    inputs: BatchFeature,
    pictures: Sequence[Sequence[Image.Image]],
    videos: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Replaces pixels by features, running the vision encoder once for each different picture object, or video.

    Args:
        inputs: a batch of questions, as `encode` makes it.
        pictures: the pictures of each question.
        videos: as for `encode`.

    Returns:
        Arguments for `generate`: the inputs as they are where a question has not exactly one picture, or one video, or
        where the pixels of pictures cannot be told apart, or where transformers is too old, or where what is left of a
        picture depends on the question.
    """
    seen, others = split_inputs(model, inputs)
    kind = "video" if videos and all(videos) else "image"
    one_each = kind == "video" or (not any(videos or ()) and all(len(shown) == 1 for shown in pictures))
    family = next((family for family in FAMILIES if family.owns(model)), None)
    by_question = family is not None and family.reads_question(model.config)
    parts = {name: of_each(value, name, seen) for name, value in seen.items()}
    if by_question or not TAKES_FEATURES or not one_each or any(len(part) != len(pictures) for part in parts.values()):
        return dict(inputs)
    names = [tuple(map(id, shown)) for shown in pictures]
    different = list(dict.fromkeys(names))
    rows = [names.index(name) for name in different]
    picked = {name: torch.cat([part[row] for row in rows]) for name, part in parts.items()}
    outputs = encode_pictures(model, picked)[kind]
    if len(outputs.pooler_output) != len(different):  # of tiles, as some families of older transformers give them
        return dict(inputs)
    numbers = [different.index(name) for name in names]

    def again(features: Any) -> Any:
        found = [features[number] for number in numbers]
        return torch.stack(found) if isinstance(features, Tensor) else found

    outputs.pooler_output = again(outputs.pooler_output)
    if (levels := getattr(outputs, "deepstack_features", None)) is not None:
        outputs.deepstack_features = [again(level) for level in levels]
    return {**others, "mm_encoder_outputs": {kind: outputs}}


def of_each(value: Tensor, name: str, seen: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """An input of the vision encoder, picture by picture: a row of each; or, where patches of all pictures follow each
    other, as many as its grid has.
    """
    grids = seen.get("video_grid_thw" if "video" in name else "image_grid_thw")
    if grids is None or not name.startswith("pixel_values"):
        return value.split(1)
    return value.split(grids.prod(dim=-1).tolist())


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
    """Visual tokens of each sequence of the batch that a layer of the language model computes, mean over its layers.

    `past` is its cache after the prompt. Without one: placeholder tokens, which is the same unless tokens are dropped
    behind the encoder or inside the language model.
    """
    placeholders = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    known = torch.tensor([token for token in placeholders if token is not None], device=inputs["input_ids"].device)
    visual_BL = torch.isin(inputs["input_ids"], known)
    if (layers := computed_columns(past)) is None:
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
            videos = [samples[index].video for index in batch]
            inputs = encode(processor, questions, pictures, videos).to(model.device)
            arguments = encode_once(model, inputs, pictures, videos)
            settings = greedy(processor, model, max_new_tokens)
            output = model.generate(**arguments, **settings, return_dict_in_generate=True)
            new = output.sequences[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(new, skip_special_tokens=True)
            counts = count_visual_tokens(model, inputs, output.past_key_values)
            for index, text, count in zip(batch, said, counts, strict=True):
                texts[index], visual_tokens[index] = text.strip(), count
    return Answers(texts, visual_tokens)
