"""Tiny Qwen3-VL."""

from functools import partial
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from tiny.case import Case
from tiny.families.qwen2_vl import CANNOT, image_processor, special_tokens, text_settings, video, vision_settings
from tiny.parts import awake, findable, tokenizer


@findable
class Qwen3VLImageOnlyProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without video: its video processor would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


def qwen3_vl(
    layers: int = 4, taps: tuple[int, ...] = (0, 2), seed: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Qwen3-VL; the language model also reads the layers `taps` (0-based)."""
    torch.manual_seed(seed)
    words = tokenizer()
    vision = {
        **vision_settings(layers),
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 24,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": list(taps),
    }
    text = {**text_settings(words), "num_hidden_layers": 3, "head_dim": 12}  # one more than taps
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **special_tokens(words))
    processor = Qwen3VLImageOnlyProcessor(image_processor=image_processor(), tokenizer=words)
    return awake(Qwen3VLForConditionalGeneration(config)), processor


CASES = [Case("qwen3_vl-qwen3_vl", qwen3_vl, any_factor=True, videos=partial(video, stamped=True), cannot=CANNOT)]
