"""Tiny LLaVA-OneVision."""

from functools import partial
from typing import Any

import torch
from transformers import (
    BatchFeature,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)

from laco.frames import LlavaOnevisionFramesProcessor
from tiny.case import Case
from tiny.parts import awake, text_config, tokenizer, vision_config


def llava_onevision(
    vision: str = "siglip",
    image_size: int = 48,
    patch_size: int = 8,
    layers: int = 4,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """LLaVA-OneVision with tiles of 6 x 6 tokens by default, up to 3 x 3 of them."""
    torch.manual_seed(seed)
    words = tokenizer()
    strategy = "default" if vision == "clip" else "full"
    pinpoints = [[image_size * h, image_size * w] for h in (1, 2, 3) for w in (1, 2, 3)]
    aspect = config.pop("vision_aspect_ratio", "anyres_max_4")
    configuration = LlavaOnevisionConfig(
        vision_config=vision_config(vision, image_size, patch_size, layers),
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=aspect,
        **config,
    )
    size = {"height": image_size, "width": image_size}
    processor = LlavaOnevisionFramesProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=words,
        num_image_tokens=(image_size // patch_size) ** 2 + int(vision == "clip"),
        vision_feature_select_strategy=strategy,
        vision_aspect_ratio=aspect,
    )
    return awake(LlavaOnevisionForConditionalGeneration(configuration)), processor


def video(
    model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor, frames: int, seed: int
) -> BatchFeature:
    """A question about a video."""
    size = model.config.vision_config.image_size
    pixels = {
        "pixel_values_videos": torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))
    }
    text = f"see {processor.replace_video_token(pixels, 0)} well"
    return BatchFeature({**processor.tokenizer([text], return_tensors="pt"), **pixels})


CASES = [
    Case("llava_onevision-siglip", llava_onevision, nested=True, videos=video),
    Case(
        "llava_onevision-clip",
        partial(llava_onevision, "clip", vision_feature_layer=-2),
        nested=True,
        videos=video,
    ),
]
