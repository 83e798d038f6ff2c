"""MiniCPM-V 4.6: pictures of any size with slices, several pictures, videos.

It compresses by itself: a merger inside its encoder and one behind it, 4 x 4 patches to a token (2 x 2 where
`downsample_mode` is 4x, which leaves out the one inside). Both stay, and our mergers come before or between them, so
that a token stands for 4 x 4 effective patches. The processor cuts these, and sizes every picture to whole tokens.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Model,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco.families.base import Family
from laco.families.encoders.base import Size
from laco.families.encoders.minicpmv import MINICPMV, LacoMiniCPMVVisionConfig, LacoMiniCPMVVisionModel, own_merger
from laco.families.steps import Step
from laco.grid import Grid
from laco.methods import Merger


class LacoMiniCPMVConfig(MiniCPMV4_6Config):
    model_type = "laco_minicpmv4_6"

    def __post_init__(self, **kwargs: Any) -> None:
        # The stock class makes its own encoder of a dictionary, whatever `model_type` that has.
        if isinstance(self.vision_config, dict):
            self.vision_config = LacoMiniCPMVVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class LacoMiniCPMVModel(MiniCPMV4_6Model):
    config: LacoMiniCPMVConfig

    def __init__(self, config: Any):
        super().__init__(config)  # which names the class of its encoder
        self.vision_tower = LacoMiniCPMVVisionModel._from_config(config.vision_config)
        self.post_init()


class LacoMiniCPMVForConditionalGeneration(MiniCPMV4_6ForConditionalGeneration):
    config: LacoMiniCPMVConfig

    def __init__(self, config: Any):
        # Not the stock constructor, which would build the stock model first.
        PreTrainedModel.__init__(self, config)
        self.model = LacoMiniCPMVModel(config)
        self.vocab_size = config.text_config.vocab_size
        self.lm_head = nn.Linear(config.text_config.hidden_size, self.vocab_size, bias=False)
        self.post_init()


class MiniCPMV(Family):
    name = "minicpmv"
    holds = "pictures of any size with slices, several pictures, batches, videos"
    packs = False  # linear attention knows no mask of pairs
    stock = MiniCPMV4_6ForConditionalGeneration
    stock_model = MiniCPMV4_6Model
    stock_config = MiniCPMV4_6Config
    compressed = LacoMiniCPMVForConditionalGeneration
    compressed_model = LacoMiniCPMVModel
    compressed_config = LacoMiniCPMVConfig
    encoders = (MINICPMV,)
    projector_at = "model.merger"

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        return bool(steps)

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        super().set_encoder(model, encoder)
        model.config.patch_size = encoder.config.patch_size  # repeated there by the stock class

    def own_mergers(self, config: Any) -> list[Merger]:
        return [] if config.downsample_mode == "4x" else [own_merger(config.vision_config)]

    def grid(self, config: Any, size: Size | None = None) -> Grid:
        grid = super().grid(config, size)
        for merger in self.own_mergers(config):
            grid = merger.num_tokens(grid)
        return grid

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        return int(grid.tokens // 4**config.merger_times)

    def projections(self, config: Any) -> list[tuple[int, int]]:
        width, text_width = self.widths(config)
        joined = (4 * width, 4 * width)
        pairs = [joined, (4 * width, text_width)]
        for later in range(1, config.merger_times):  # each round runs for four times as many tokens as the next
            pairs += [joined, (4 * width, width)] * 4**later
        return pairs

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "image_processor.patch_size": config.vision_config.patch_size,
            "image_processor.downsample_mode": config.downsample_mode,
        }

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        # Pictures have any size. Videos must be cut as they are.
        videos = getattr(processor, "video_processor", None)
        return {
            name.replace("image", "video"): (getattr(videos, name.partition(".")[2], None), wanted)
            for name, wanted in self.processor_numbers(config).items()
            if videos is not None
        }

    def set_processor(self, processor: Any, config: Any) -> None:
        super().set_processor(processor, config)
        if (videos := getattr(processor, "video_processor", None)) is not None:
            videos.patch_size = config.vision_config.patch_size
