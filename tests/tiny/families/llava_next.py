"""Tiny LLaVA-NeXT."""

from functools import partial
from typing import Any

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from tiny.case import Case
from tiny.parts import awake, text_config, tokenizer, vision_config


def llava_next(
    vision: str = "clip",
    image_size: int = 48,
    patch_size: int = 8,
    layers: int = 4,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """LLaVA-NeXT with tiles of 6 x 6 tokens by default, up to four of them."""
    torch.manual_seed(seed)
    words = tokenizer()
    strategy = "default" if vision == "clip" else "full"
    pinpoints = [[image_size * h, image_size * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    configuration = LlavaNextConfig(
        vision_config=vision_config(vision, image_size, patch_size, layers),
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=pinpoints,
        **config,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=words,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision == "clip"),
    )
    return awake(LlavaNextForConditionalGeneration(configuration)), processor


CASES = [
    Case("llava_next-clip", partial(llava_next, vision_feature_layer=-2), nested=True),
    Case("llava_next-siglip", partial(llava_next, "siglip"), nested=True),
]
