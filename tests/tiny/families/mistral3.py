"""Tiny Mistral 3."""

from typing import Any

import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tiny.case import Case
from tiny.families.llava_pixtral import (
    PixtralPilProcessor,
    attentive,
    pixtral,
    pixtral_processor,
    sizes_as_numbers,
    words_with_rows,
)
from tiny.parts import text_config


def mistral3(
    image_size: int = 48,
    patch_size: int = 4,
    layers: int = 4,
    vision_feature_layer: int = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[Mistral3ForConditionalGeneration, PixtralPilProcessor]:
    """Mistral 3 with grids of up to 12 x 12 tokens by default, projected to 6 x 6."""
    torch.manual_seed(seed)
    words, vision = words_with_rows(), pixtral(image_size, patch_size, layers)
    configuration = Mistral3Config(
        vision_config=vision,
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        **config,
    )
    processor = pixtral_processor(words, vision, configuration.spatial_merge_size)
    return attentive(Mistral3ForConditionalGeneration(configuration)), processor


CASES = [Case("mistral3-pixtral", mistral3, tower_inputs=sizes_as_numbers)]
