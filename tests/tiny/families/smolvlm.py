"""Tiny SmolVLM."""

from typing import Any

import torch
from transformers import (
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models import smolvlm as stock
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_utils import VideoMetadata

from tiny.case import Case, Prompt
from tiny.families.idefics3 import tiled_config, words_of_tiles
from tiny.parts import awake, findable

# transformers 5.16.1 offers it to AutoProcessor only beside torchvision, which it does not need.
stock.SmolVLMImageProcessorPil = SmolVLMImageProcessorPil
# The number of frames of a video stands in its prompt in words; without the package that knows them, in digits.
processing_smolvlm.num2words = processing_smolvlm.num2words or str


@findable
class SmolVLMImageOnlyProcessor(SmolVLMProcessor):
    """SmolVLM's processor without video: its video processor would need torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            image_processor, tokenizer, None, image_seq_len=image_seq_len, chat_template=chat_template, **kwargs
        )


class SmolVLMCase(Case):
    """Its processor wants a list of pictures for every prompt, empty for those without."""

    def inputs(self, processor: ProcessorMixin, *prompts: Prompt) -> BatchFeature:
        texts, pictures = [text for text, _ in prompts], [pictures for _, pictures in prompts]
        return processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )


def smolvlm(
    image_size: int = 48,
    patch_size: int = 3,
    layers: int = 4,
    scale_factor: int = 2,
    tiles: int = 2,
    seed: int = 0,
    **config: Any,
) -> tuple[SmolVLMForConditionalGeneration, SmolVLMProcessor]:
    """SmolVLM with tiles of 16 x 16 tokens by default, up to 2 x 2 of them and the whole picture."""
    torch.manual_seed(seed)
    words = words_of_tiles()
    processor = SmolVLMImageOnlyProcessor(
        SmolVLMImageProcessorPil(
            size={"longest_edge": tiles * image_size}, max_image_size={"longest_edge": image_size}
        ),
        words,
        image_seq_len=(image_size // patch_size // scale_factor) ** 2,
    )
    configuration = tiled_config(
        SmolVLMConfig, words, image_size, patch_size, layers, scale_factor=scale_factor, **config
    )
    return awake(SmolVLMForConditionalGeneration(configuration)), processor


def video(model: PreTrainedModel, processor: ProcessorMixin, frames: int, seed: int) -> BatchFeature:
    """A question about a video at one frame a second: its frames are pictures, each announced by its time."""
    size = model.config.vision_config.image_size
    pixels = torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))
    metadata = VideoMetadata(total_num_frames=frames, fps=1, duration=frames, frames_indices=list(range(frames)))
    text = processor.replace_video_token({"pixel_values": pixels, "video_metadata": [metadata]}, 0)
    words = processor.tokenizer([f"{text}what happens?"], return_tensors="pt")
    return BatchFeature(
        {**words, "pixel_values": pixels, "pixel_attention_mask": torch.ones(1, frames, size, size, dtype=torch.long)}
    )


CASES = [SmolVLMCase("smolvlm-smolvlm", smolvlm, videos=video)]
