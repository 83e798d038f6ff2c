"""Tiny Llama 4."""

from typing import Any

import numpy as np
import torch
from transformers import (
    BatchFeature,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    Llama4TextConfig,
    Llama4VisionConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from laco.families.llama4 import LacoLlama4Config
from tiny.case import Case
from tiny.parts import awake, tokenizer

PARTS = {
    "fake_image_token": "<|image|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "patch_token": "<|patch|>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}


class TinyLlama4ImageProcessor(BaseImageProcessor):
    """In the place of Llama4ImageProcessor, which needs torchvision: as many tiles as fit, then a thumbnail."""

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, size: dict[str, int] | None = None, most: int = 3, **kwargs: Any):
        super().__init__(**kwargs)
        self.size, self.most = size or {"height": 336, "width": 336}, most

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Pictures -> `pixel_values` (tiles of all, 3, size, size) and `aspect_ratios`, their rows and columns."""
        size, tiles, ratios = self.size["height"], [], []
        for image in make_flat_list_of_images(images):
            rows, columns = (min(max(1, round(side / size)), self.most) for side in (image.height, image.width))
            shapes = [(rows, columns)] if rows * columns == 1 else [(rows, columns), (1, 1)]
            for down, across in shapes:
                whole = np.asarray(image.resize((across * size, down * size)), dtype=np.float32) / 127.5 - 1
                for row in np.split(whole, down, axis=0):
                    tiles += [tile.transpose(2, 0, 1) for tile in np.split(row, across, axis=1)]
            ratios.append([rows, columns])
        return BatchFeature({"pixel_values": torch.tensor(np.stack(tiles)), "aspect_ratios": torch.tensor(ratios)})


# The name is enough to find it again, and transformers before 5.19 keeps no class for a configuration of its own.
AutoImageProcessor.register(LacoLlama4Config, image_processor_classes={"pil": TinyLlama4ImageProcessor}, exist_ok=True)


def llama4(
    image_size: int = 64, patch_size: int = 4, layers: int = 4, seed: int = 0
) -> tuple[Llama4ForConditionalGeneration, Llama4Processor]:
    """Llama 4 with tiles of 16 x 16 tokens by default, up to 3 x 3 of them and a thumbnail, joined to 8 x 8."""
    torch.manual_seed(seed)
    words = tokenizer(**PARTS)
    vision = Llama4VisionConfig(
        hidden_size=16,
        intermediate_size=64,  # four times as wide: the adapter reads four tokens with it
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projector_input_dim=20,
        projector_output_dim=20,
        vision_output_dim=20,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    text = Llama4TextConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=32,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    configuration = Llama4Config(
        vision_config=vision,
        text_config=text,
        boi_token_index=words.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=words.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=words.convert_tokens_to_ids("<|patch|>"),
    )
    size = {"height": image_size, "width": image_size}
    processor = Llama4Processor(
        image_processor=TinyLlama4ImageProcessor(size=size), tokenizer=words, patch_size=patch_size
    )
    model = awake(Llama4ForConditionalGeneration(configuration))
    with torch.no_grad():  # it must not say the placeholder, which would want features
        model.get_output_embeddings().weight[configuration.image_token_id] = 0
    return model, processor


CASES = [Case("llama4", llama4, image="<|image|>")]
