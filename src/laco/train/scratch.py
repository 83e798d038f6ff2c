"""Small models from scratch, in stock Hugging Face classes: configuration, weights, tokenizer, processor."""

from copy import deepcopy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from laco.checkpoint import from_pretrained
from laco.errors import LacoError
from laco.frames import LlavaOnevisionFramesProcessor
from laco.train.recipe import NewModel
from laco.world import SIDE, Clips, World

IMAGE, VIDEO, END, PAD = "<image>", "<video>", "<eos>", "<pad>"
# One turn: the pictures, the question, a line break, the answer, the end.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<{{ part['type'] }}>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
)
_HALF = [0.5, 0.5, 0.5]  # mean and deviation of the pixels that SigLIP reads


def build_tokenizer(vocabulary: int, video: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the world's questions, where `video` also from those about clips.

    Any text can be written in it. Questions are lower case and become few tokens; words and numbers to be read are
    upper case and digits, which the questions lack, so every character of an answer stays a token of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    world, clips = World(), Clips()
    asked = [q for i in range(200) for q in world[i].questions]
    asked += [q for i in range(200 * video) for q in clips[i].exercises]
    lines = [q.question for q in asked] + [q.answer for q in asked if q.answer.islower()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, IMAGE, VIDEO] if video else [PAD, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    further = {"video_token": VIDEO} if video else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE, **further},
    )


def build_new(new: NewModel) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model for pictures of the world's size, randomly initialised but for what `new.weights` gives, and its
    processor.

    Raises:
        LacoError: `new.weights` is no model of this kind.
    """
    base = None if new.weights is None else from_pretrained(new.weights)
    video = new.architecture == "llava_onevision"
    tokenizer = build_tokenizer(new.vocabulary, video)
    vision, text = _parts(new, tokenizer, None if base is None else base[0].config)
    model, processor = (_onevision if video else _llava)(vision, text, tokenizer)
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    if base is not None:
        _take_weights(model, tokenizer, *base, str(new.weights))
    return model, processor


def _parts(new: NewModel, tokenizer: Any, base: Any) -> tuple[Any, Any]:
    """Configurations of the encoder and the language model, shapes as in `base` where there is one."""
    ids: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": int(tokenizer.vocab[END]),
        "pad_token_id": int(tokenizer.vocab[PAD]),
    }
    if base is None:
        vision = SiglipVisionConfig(image_size=SIDE, patch_size=new.patch_size, vision_use_head=False, **new.vision)
        return vision, Qwen2Config(**ids, **new.text)
    vision, text = deepcopy(base.vision_config), deepcopy(base.text_config)
    if not (isinstance(vision, SiglipVisionConfig) and isinstance(text, Qwen2Config) and vision.image_size == SIDE):
        raise LacoError(
            f"{new.weights} is no model to begin with: that is one of a SigLIP encoder for {SIDE} pixels and a Qwen2"
            " language model"
        )
    vision.update(new.vision)
    text.update({**ids, **new.text})
    return vision, text


def _llava(vision: Any, text: Any, tokenizer: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=int(tokenizer.vocab[IMAGE]),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(SIDE // vision.patch_size) ** 2,
    )
    return LlavaForConditionalGeneration(config), processor


def _onevision(vision: Any, text: Any, tokenizer: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A picture is an overview and one tile of the same size, the least that this architecture knows; a frame of a
    video is seen once and pooled to half the resolution.
    """
    tiles = [[SIDE, SIDE]]
    processor = LlavaOnevisionFramesProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=tiles, image_mean=_HALF, image_std=_HALF
        ),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=int(tokenizer.vocab[IMAGE]),
        video_token_index=int(tokenizer.vocab[VIDEO]),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=tiles,
        vision_aspect_ratio=processor.vision_aspect_ratio,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _take_weights(model: Any, tokenizer: Any, base: Any, processor: Any, source: str) -> None:
    """Gives a model the weights of another one, and to each token that both know its embedding there."""
    own, given = model.state_dict(), base.state_dict()
    known = processor.tokenizer.get_vocab()
    pairs = [(row, known[token]) for token, row in tokenizer.get_vocab().items() if token in known]
    rows, from_rows = torch.tensor(pairs).T
    embeddings = {
        name
        for name, part in model.named_modules()
        if part is model.get_input_embeddings() or part is model.get_output_embeddings()
    }
    with torch.no_grad():
        for name, tensor in given.items():
            if name.rpartition(".")[0] in embeddings:
                own[name][rows] = tensor[from_rows]
            elif name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)
            else:
                raise LacoError(f"{source} is no model to begin with: its {name} has no place in the new one")
