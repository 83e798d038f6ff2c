"""Tiny Qwen2-VL, and what the three Qwen families share: image processor, hand-made videos."""

from typing import Any

import torch
from transformers import (
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from tiny.case import Case
from tiny.parts import awake, findable, tokenizer

PATCH = 4  # pixels
CANNOT = dict.fromkeys(
    ("compile", "export", "onnx"),
    "The encoder splits its sequence at bounds that depend on the pictures' sizes, which cannot be traced.",
)


@findable
class Qwen2VLImageOnlyProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without video: its video processor would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


def vision_settings(layers: int, heads: int = 2) -> dict[str, Any]:
    return {"depth": layers, "num_heads": heads, "patch_size": PATCH, "spatial_merge_size": 2}


def text_settings(words: PreTrainedTokenizerFast, width: int = 24) -> dict[str, Any]:
    """Of a language model with positions in three dimensions: two channels of each head's six for each."""
    return {
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }


def special_tokens(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": words.convert_tokens_to_ids("<image>"),
        "video_token_id": words.convert_tokens_to_ids("<video>"),
        "tie_word_embeddings": True,
    }


def image_processor() -> Qwen2VLImageProcessorPil:
    size = {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, size=size)


def patches(vision: PreTrainedConfig, *grids: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Random patches of pictures or videos with these grids of frames x height x width, packed."""
    count = sum(frames * height * width for frames, height, width in grids)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(count, values, generator=torch.Generator().manual_seed(seed))


def video(
    model: PreTrainedModel, processor: ProcessorMixin, frames: int, seed: int, stamped: bool = False
) -> BatchFeature:
    """A prompt about a video of so many frames; the processor would repeat the last of an odd number.

    `stamped`: every (double) frame on its own, behind the time at which it was seen.
    """
    vision = model.config.vision_config
    double, merge = -(-frames // vision.temporal_patch_size), processor.image_processor.merge_size
    grid = (double, 2 * merge, 3 * merge)
    shown = (
        "".join(f"<{time:.1f} seconds>" + "<video>" * 6 for time in range(double))
        if stamped
        else "<video>" * 6 * double
    )
    words = processor.tokenizer([f"see {shown} well"], return_tensors="pt")
    return BatchFeature(
        {
            **words,
            "mm_token_type_ids": 2 * (words["input_ids"] == model.config.video_token_id).int(),
            "pixel_values_videos": patches(vision, grid, seed=seed),
            "video_grid_thw": torch.tensor([grid]),
        }
    )


def qwen2_vl(layers: int = 4, seed: int = 0) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """Qwen2-VL whose language model reads one token for 8 x 8 pixels."""
    torch.manual_seed(seed)
    words = tokenizer()
    config = Qwen2VLConfig(
        vision_config={**vision_settings(layers), "embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2},
        text_config=text_settings(words),
        **special_tokens(words),
    )
    processor = Qwen2VLImageOnlyProcessor(image_processor=image_processor(), tokenizer=words)
    return awake(Qwen2VLForConditionalGeneration(config)), processor


CASES = [Case("qwen2_vl-qwen2_vl", qwen2_vl, any_factor=True, videos=video, cannot=CANNOT)]
