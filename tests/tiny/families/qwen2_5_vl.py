"""Tiny Qwen2.5-VL."""

from typing import Any

import torch
from transformers import (
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from tiny.case import Case
from tiny.families.qwen2_vl import (
    CANNOT,
    PATCH,
    image_processor,
    special_tokens,
    text_settings,
    video,
    vision_settings,
)
from tiny.parts import awake, findable, tokenizer


@findable
class Qwen2_5_VLImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without video: its video processor would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


def qwen2_5_vl(
    layers: int = 4, window: int = 16, seed: int = 0
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Qwen2.5-VL; all but the second and the last layer attend in windows of `window` patches (8 in the real ones)."""
    torch.manual_seed(seed)
    words = tokenizer()
    vision = {
        **vision_settings(layers),
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 24,
        "window_size": window * PATCH,
        "fullatt_block_indexes": [1, layers - 1],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text_settings(words), **special_tokens(words))
    processor = Qwen2_5_VLImageOnlyProcessor(image_processor=image_processor(), tokenizer=words)
    return awake(Qwen2_5_VLForConditionalGeneration(config)), processor


def timed_video(model: PreTrainedModel, processor: ProcessorMixin, frames: int, seed: int) -> BatchFeature:
    """A video whose (double) frames are two seconds apart."""
    batch = video(model, processor, frames, seed)
    batch["second_per_grid_ts"] = torch.tensor([2.0])
    return batch


CASES = [Case("qwen2_5_vl-qwen2_5_vl", qwen2_5_vl, any_factor=True, videos=timed_video, cannot=CANNOT)]
