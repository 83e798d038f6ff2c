"""Tiny InternVL."""

from functools import partial
from typing import Any

import torch
from transformers import (
    BatchFeature,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from tiny.case import Case
from tiny.parts import awake, findable, text_config, tokenizer

IMAGE = "<IMG_CONTEXT>"
# The 6B encoder differs from the others in its norms, and keeps the last one.
SIX_BILLION = {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False}


@findable
class InternVLImageOnlyProcessor(InternVLProcessor):
    """InternVL's processor without video: its video processor would need torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            image_processor, tokenizer, image_seq_length=image_seq_length, chat_template=chat_template, **kwargs
        )


def internvl(
    image_size: int = 64,
    patch_size: int = 8,
    layers: int = 4,
    vision_feature_layer: int = -1,
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[InternVLForConditionalGeneration, InternVLProcessor]:
    """InternVL with tiles of 8 x 8 tokens by default, up to 4 of them and a thumbnail, projected to 4 x 4."""
    torch.manual_seed(seed)
    words = tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token=IMAGE)
    configuration = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            **(vision or {}),
        ),
        text_config=text_config(words),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=vision_feature_layer,
        **config,
    )
    count = (image_size // patch_size) ** 2 // int(1 / configuration.downsample_ratio) ** 2
    configuration.image_seq_length = count
    size = {"height": image_size, "width": image_size}
    processor = InternVLImageOnlyProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4),
        tokenizer=words,
        image_seq_length=count,
    )
    model = awake(InternVLForConditionalGeneration(configuration))
    with torch.no_grad():  # zero in a new model, which would hide mistakes
        for parameter in model.model.vision_tower.embeddings.parameters(recurse=False):
            parameter.normal_()
    return model, processor


def video(model: PreTrainedModel, processor: ProcessorMixin, frames: int, seed: int) -> BatchFeature:
    """A question about a video: its frames are pictures, each announced by its number."""
    size = model.config.vision_config.image_size
    pixels = torch.randn(frames, 3, *size, generator=torch.Generator().manual_seed(seed))
    placeholders = processor.replace_video_token({"pixel_values_videos": [pixels]}, 0)
    return BatchFeature(
        {**processor.tokenizer([f"what happens in {placeholders}?"], return_tensors="pt"), "pixel_values": pixels}
    )


CASES = [
    Case("internvl-internvit", partial(internvl, patch_size=4), image=IMAGE, videos=video),
    Case("internvl-internvit_6b", partial(internvl, patch_size=4, vision=SIX_BILLION), image=IMAGE, videos=video),
]
