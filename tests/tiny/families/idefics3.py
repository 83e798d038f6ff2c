"""Tiny Idefics 3."""

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models import idefics3 as stock
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tiny.case import Case
from tiny.parts import awake, text_config, tokenizer

# transformers 5.16.1 offers it to AutoProcessor only beside torchvision, which it does not need.
stock.Idefics3ImageProcessorPil = Idefics3ImageProcessorPil

# Tokens around pictures and their tiles, which the processor only finds if the tokenizer has them.
AROUND = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
ROWS_AND_COLUMNS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))


def words_of_tiles() -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.add_tokens([*AROUND, *ROWS_AND_COLUMNS], special_tokens=True)
    return words


def tiled_config(
    kind: type[PreTrainedConfig],
    words: PreTrainedTokenizerFast,
    image_size: int,
    patch_size: int,
    layers: int,
    **config: Any,
) -> PreTrainedConfig:
    """Configuration of a model with such an encoder, for both families that have it."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    return kind(
        vision_config=vision,
        text_config=text_config(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **config,
    )


def idefics3(
    image_size: int = 48,
    patch_size: int = 3,
    layers: int = 4,
    scale_factor: int = 2,
    tiles: int = 2,
    seed: int = 0,
    **config: Any,
) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Idefics 3 with tiles of 16 x 16 tokens by default, up to 2 x 2 of them and the whole picture."""
    torch.manual_seed(seed)
    words = words_of_tiles()
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": tiles * image_size}, max_image_size={"longest_edge": image_size}
        ),
        words,
        image_seq_len=(image_size // patch_size // scale_factor) ** 2,
    )
    configuration = tiled_config(
        Idefics3Config, words, image_size, patch_size, layers, scale_factor=scale_factor, **config
    )
    return awake(Idefics3ForConditionalGeneration(configuration)), processor


CASES = [Case("idefics3-idefics3", idefics3)]
