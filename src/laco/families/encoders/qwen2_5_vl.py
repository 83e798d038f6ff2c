"""Qwen2.5-VL's encoder: most layers attend in windows, for which whole blocks of patches are put in another order."""

from typing import Any

from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionBlock,
)
from transformers.vision_utils import get_vision_window_index

from laco.errors import LacoError
from laco.families.encoders.qwen import (
    Layout,
    PackedLayer,
    PackedMergingLayer,
    PackedVisionConfig,
    PackedVisionModel,
    QwenEncoder,
)
from laco.grid import Grid


class LacoQwen2_5_VLVisionConfig(PackedVisionConfig, Qwen2_5_VLVisionConfig):
    model_type = "laco_qwen2_5_vl_vision"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        window, block, own = window_side(self), self.spatial_merge_size, self.own_merge_size or 1
        if window % block:
            works = [str(factor) for factor in range(2, window // own + 1) if window % (own * factor) == 0]
            raise LacoError(
                f"qwen2_5_vl attends in windows of {window} x {window} patches, which blocks of {block} x {block} do"
                f" not divide; the factors of all mergers must multiply to {' or '.join(works) or '1'}"
            )


class LacoQwen2_5_VLVisionBlock(PackedLayer, Qwen2_5_VLVisionBlock):
    pass


class LacoQwen2_5_VLMergingBlock(PackedMergingLayer, Qwen2_5_VLVisionBlock):
    pass


class LacoQwen2_5_VisionTransformer(PackedVisionModel, Qwen2_5_VisionTransformerPretrainedModel):
    config: LacoQwen2_5_VLVisionConfig
    layer_class = LacoQwen2_5_VLMergingBlock
    plain_class = LacoQwen2_5_VLVisionBlock
    _no_split_modules = ["LacoQwen2_5_VLVisionBlock", "LacoQwen2_5_VLMergingBlock"]  # noqa: RUF012

    def layout(self, grid_thw: Tensor, kwargs: dict[str, Any]) -> Layout:
        config: Any = self.config
        order_B, bounds = get_vision_window_index(
            grid_thw, config.spatial_merge_size, config.window_size, config.patch_size, kwargs=kwargs
        )
        kwargs |= {"window_index": order_B, "cu_window_seqlens": bounds}  # the stock forward works it out no more
        return super().layout(grid_thw, kwargs)._replace(order_B=order_B)


class Qwen2_5_VLEncoder(QwenEncoder):
    def mlp(self, config: Any) -> tuple[int, bool]:
        return config.intermediate_size, True

    def attended(self, config: Any, grid: Grid, layer: int) -> int:
        if layer in config.fullatt_block_indexes:
            return super().attended(config, grid, layer)
        side = window_side(config) // self.merged_before(config, layer)
        rows, columns = ((length // side) * side**2 + (length % side) ** 2 for length in (grid.height, grid.width))
        return grid.frames * rows * columns


def window_side(config: Any) -> int:
    """Side in patches of the windows in which most layers attend."""
    return config.window_size // config.patch_size


QWEN2_5_VL = Qwen2_5_VLEncoder(
    "qwen2_5_vl",
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionConfig,
    LacoQwen2_5_VisionTransformer,
    LacoQwen2_5_VLVisionConfig,
)
