"""Tiny MiniCPM-V 4.6."""

from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import (
    BatchFeature,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessorPil,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VisionConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen3_5TextConfig,
)

from tiny.case import Case
from tiny.parts import awake, findable, tokenizer

PARTS = {
    "image_start_token": "<image_start>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


@findable
class MiniCPMVImageOnlyProcessor(MiniCPMV4_6Processor):
    """MiniCPM-V's processor without video: its video processor would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.slice_mode, self.video_slice_mode = image_processor.slice_mode, False
        self.default_use_image_id = image_processor.use_image_id
        for name in ("image_token", "video_token", *PARTS):
            setattr(self, name, getattr(tokenizer, name))
        self.image_token_id, self.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id


def minicpmv(
    patch_size: int = 4,
    layers: int = 4,
    insert_layer_id: int = 1,
    downsample_mode: str = "16x",
    seed: int = 0,
    **config: Any,
) -> tuple[MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Processor]:
    """MiniCPM-V with pictures of about 16 x 16 patches, else up to 4 slices; its own merger is after layer 2."""
    torch.manual_seed(seed)
    words = tokenizer(**PARTS)
    vision = MiniCPMV4_6VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=20 * patch_size,
        patch_size=patch_size,
    )
    text = Qwen3_5TextConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 1],
        },
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    configuration = MiniCPMV4_6Config(
        vision_config=vision,
        text_config=text,
        insert_layer_id=insert_layer_id,
        downsample_mode=downsample_mode,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        **config,
    )
    processor = MiniCPMVImageOnlyProcessor(
        image_processor=MiniCPMV4_6ImageProcessorPil(
            patch_size=patch_size, scale_resolution=16 * patch_size, max_slice_nums=4, downsample_mode=downsample_mode
        ),
        tokenizer=words,
    )
    model = awake(MiniCPMV4_6ForConditionalGeneration(configuration))
    with torch.no_grad():
        for parameter in model.model.vision_tower.vit_merger.parameters():
            parameter.normal_(std=0.2)  # stock ones start with 1
        # It must not say the placeholders, which would want features.
        model.lm_head.weight[[words.image_token_id, words.video_token_id]] = 0
    return model, processor


def video(model: PreTrainedModel, processor: ProcessorMixin, frames: int, seed: int) -> BatchFeature:
    """A question about a video: every frame a picture of 8 x 4 effective patches, packed as pictures are."""
    patch, divisor = model.config.vision_config.patch_size, 4 if model.config.downsample_mode == "4x" else 16
    sizes = np.array([[8, 4]] * frames)
    pixels = torch.randn(1, 3, patch, frames * 32 * patch, generator=torch.Generator().manual_seed(seed))
    counted = {
        "target_sizes_videos": sizes,
        "num_frames_per_video": [frames],
        "grids_videos": np.zeros((frames, 2), dtype=int),
    }
    placeholders = processor.replace_video_token(counted, video_idx=0, video_token_divisor=divisor)
    words = processor.tokenizer([f"what happens in {placeholders}?"], return_tensors="pt")
    return BatchFeature({**words, "pixel_values_videos": pixels, "target_sizes_videos": torch.tensor(sizes)})


# Before 5.19 the stock encoder merges pictures of one size alone, so not even a picture with its slices.
RUNS = Version(transformers.__version__) >= Version("5.19")
WHY = "the stock encoder makes Python numbers of the pictures' sizes"
CASES = [Case("minicpmv", minicpmv, videos=video, cannot=dict.fromkeys(("compile", "export", "onnx"), WHY))] * RUNS
