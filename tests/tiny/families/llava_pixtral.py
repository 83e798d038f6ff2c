"""Tiny LLaVA with Pixtral as its vision encoder, and what Mistral 3 shares with it."""

import sys
from typing import Any

import pytest
import torch
from transformers import (
    BatchFeature,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.utils import is_torchvision_available

from tiny.case import Case
from tiny.parts import awake, findable, text_config, tokenizer

# The module of the processor takes its rule of sizes from an image processor that needs torchvision.
with pytest.MonkeyPatch.context() as patch:
    if not is_torchvision_available():
        patch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor


@findable
class PixtralPilProcessor(PixtralProcessor):
    """Pixtral's processor under a name that the Auto classes find without torchvision too."""


def pixtral(image_size: int, patch_size: int, layers: int) -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )


def attentive(model: PreTrainedModel) -> PreTrainedModel:
    """Awake, and its encoder attends to some patches more than to others; else positions would hardly matter."""
    awake(model)
    with torch.no_grad():
        for layer in model.model.vision_tower.transformer.layers:
            layer.attention.q_proj.weight.mul_(6)
            layer.attention.k_proj.weight.mul_(6)
    return model


def words_with_rows() -> PreTrainedTokenizerFast:
    return tokenizer(image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")


def pixtral_processor(words: Any, vision: PixtralVisionConfig, spatial_merge_size: int = 1) -> PixtralPilProcessor:
    """Pictures have up to `image_size` pixels a side."""
    size, patch = {"longest_edge": vision.image_size}, {"height": vision.patch_size, "width": vision.patch_size}
    return PixtralPilProcessor(
        image_processor=PixtralImageProcessorPil(size=size, patch_size=patch),
        tokenizer=words,
        patch_size=vision.patch_size,
        spatial_merge_size=spatial_merge_size,
        image_token="<image>",
    )


def llava_pixtral(
    image_size: int = 48,
    patch_size: int = 4,
    layers: int = 4,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[LlavaForConditionalGeneration, PixtralPilProcessor]:
    """LLaVA with grids of up to 12 x 12 tokens by default."""
    torch.manual_seed(seed)
    words, vision = words_with_rows(), pixtral(image_size, patch_size, layers)
    configuration = LlavaConfig(
        vision_config=vision,
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full",
        **config,
    )
    return attentive(LlavaForConditionalGeneration(configuration)), pixtral_processor(words, vision)


def sizes_as_numbers(model: PreTrainedModel, batch: BatchFeature) -> dict[str, Any]:
    """The encoder's inputs; with sizes in a tensor, neither the stock encoder nor a compressed one can be traced."""
    return {
        "pixel_values": batch["pixel_values"],
        "image_sizes": [tuple(size) for size in batch["image_sizes"].tolist()],
    }


CASES = [Case("llava-pixtral", llava_pixtral, tower_inputs=sizes_as_numbers)]
