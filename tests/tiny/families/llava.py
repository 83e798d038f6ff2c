"""Tiny LLaVA 1.5."""

from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from tiny.case import Case
from tiny.parts import awake, text_config, tokenizer, vision_config


def llava(
    vision: str = "siglip",
    image_size: int = 48,
    patch_size: int = 8,
    layers: int = 4,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA with a 6 x 6 grid by default; like LLaVA 1.5 it drops the CLS token of CLIP."""
    torch.manual_seed(seed)
    words = tokenizer()
    strategy = "default" if vision == "clip" else "full"
    configuration = LlavaConfig(
        vision_config=vision_config(vision, image_size, patch_size, layers),
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        **config,
    )
    size = {"height": image_size, "width": image_size}
    pictures = (
        CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size)
        if vision == "clip"
        else SiglipImageProcessorPil(size=size)
    )
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision == "clip"),
    )
    return awake(LlavaForConditionalGeneration(configuration)), processor


CASES = [Case("llava-siglip", llava), Case("llava-clip", partial(llava, "clip", vision_feature_layer=-2))]
