"""LLaVA-OneVision: tiles of any resolution with `image_newline` and unpadding, several pictures, videos.

The model packs tiles and pools frames by `image_size // patch_size`, the processor counts by `num_image_tokens`. Where
single tokens leave, it gets a class of its own, which writes fewer placeholders for pictures without tiles, and for
videos; line breaks between tiles leave with their rows, and how many do is not known beforehand.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
    PreTrainedConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from laco.errors import LacoError
from laco.families.base import Family
from laco.families.compat import TAKES_FEATURES
from laco.families.connector import ConnectorForConditionalGeneration, ConnectorModel
from laco.families.counts import count, counting
from laco.families.encoders import CLIP, SIGLIP
from laco.families.reduction import ReducedConfig, ReducedForConditionalGeneration, ReducedModel
from laco.families.reduction.pictures import Pictures, View, square_view
from laco.grid import Grid


class LacoLlavaOnevisionConfig(ReducedConfig, LlavaOnevisionConfig):
    model_type = "laco_llava_onevision"


class TiledPictures(Pictures):
    """A picture is its overview, then the tiles put together to one grid, with a line break behind every row; a video
    its frames, each at half the resolution, and one line break.
    """

    def frames(self, inputs: Mapping[str, Any]) -> int:
        """Of each video; its argument has another name before transformers 5.18."""
        return inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"].shape[1]

    def tiles(self, body: Any, pictures: int, inputs: Mapping[str, Any], video: bool) -> list[int]:
        if video:
            return [self.frames(inputs)] * pictures
        counts = inputs.get("batch_num_images")
        alone = [True] * pictures if counts is None else [n == 1 for n in counts for _ in range(n)]
        side = body.config.vision_config.image_size
        patches = [
            image_size_to_num_patches(size, body.config.image_grid_pinpoints, side) for size in inputs["image_sizes"]
        ]
        return [patch if single else 1 for patch, single in zip(patches, alone, strict=True)]

    def views(self, body: Any, lengths: Sequence[int], inputs: Mapping[str, Any], video: bool) -> list[list[View]]:
        side = FAMILY.grid(body.config).height
        if video:
            grid = Grid(self.frames(inputs), -(-side // 2), -(-side // 2))
            return [[View(torch.arange(grid.tokens), grid)] for _ in lengths]
        out = []
        ones = torch.ones(sum(self.tiles(body, len(lengths), inputs, video)), side * side, 1)
        packed = self.packed(body, ones, inputs, image_newline=torch.zeros(1))
        for length, marks in zip(lengths, packed, strict=True):
            assert len(marks) == length
            views, extra = [square_view(side * side)], marks[side * side :, 0]
            if len(extra) > 1:
                width = int((extra == 0).nonzero()[0])
                rows = torch.arange(len(extra)).view(-1, width + 1)[:, :width]
                views.append(View(rows.flatten() + side * side, Grid(1, len(rows), width)))
            out.append(views)
        return out

    def placeholders(self, lengths: Sequence[int], video: bool) -> list[int]:
        # The model adds the line break of a video later before transformers 5.18.
        return [length + (video and not TAKES_FEATURES) for length in lengths]

    def frames_of(self, body: Any, tokens: int, grids: Mapping[str, Any]) -> int:
        return tokens // (-(-FAMILY.grid(body.config).height // 2)) ** 2

    def gathered(self, body: Any, x_TNC: Tensor, inputs: Mapping[str, Any], video: bool) -> list[Tensor]:
        if video:
            return [part.flatten(0, 1) for part in body.apply_pooling(x_TNC).split(self.frames(inputs))]
        return self.packed(body, x_TNC, inputs, image_newline=None)

    def packed(self, body: Any, x_TNC: Tensor, inputs: Mapping[str, Any], image_newline: Tensor | None) -> list[Tensor]:
        sizes = inputs["image_sizes"]
        ratio = inputs.get("vision_aspect_ratio") or body.config.vision_aspect_ratio
        tiles = self.tiles(body, len(sizes), inputs, video=False)
        return body.pack_image_features(x_TNC.split(tiles), sizes, image_newline, ratio)[0]


class LacoLlavaOnevisionModel(ReducedModel, ConnectorModel, LlavaOnevisionModel):
    config: LacoLlavaOnevisionConfig
    pictures = TiledPictures()


class LacoLlavaOnevisionForConditionalGeneration(
    ReducedForConditionalGeneration, ConnectorForConditionalGeneration, LlavaOnevisionForConditionalGeneration
):
    config: LacoLlavaOnevisionConfig
    model_class = LacoLlavaOnevisionModel


class LlavaOnevision(Family):
    name = "llava_onevision"
    holds = "tiles of any resolution, several pictures, batches, videos"
    stock = LlavaOnevisionForConditionalGeneration
    stock_model = LlavaOnevisionModel
    stock_config = LlavaOnevisionConfig
    compressed = LacoLlavaOnevisionForConditionalGeneration
    compressed_model = LacoLlavaOnevisionModel
    compressed_config = LacoLlavaOnevisionConfig
    encoders = (SIGLIP, CLIP)
    connects = True
    one_grid = True
    behind_video = 1

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            # With a prefix token: the processor takes it off again, and the root of g * g + 1 still rounds to
            # g.
            "num_image_tokens": self.grid(config).tokens + self.prefix(config),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }

    def check_processor(self, processor: Any, config: PreTrainedConfig) -> None:
        super().check_processor(processor, config)
        ours = [tuple(size) for size in processor.image_processor.image_grid_pinpoints]
        if ours != [tuple(size) for size in config.image_grid_pinpoints]:
            raise LacoError("the processor does not match the model: their image_grid_pinpoints differ")

    def set_processor(self, processor: Any, config: PreTrainedConfig) -> None:
        super().set_processor(processor, config)
        count(processor, self.counts(config))


FAMILY = LlavaOnevision()
counting(LlavaOnevisionProcessor)
