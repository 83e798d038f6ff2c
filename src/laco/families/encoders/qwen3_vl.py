"""Qwen3-VL's encoder: learned positions resampled to each picture, and further mergers that tap layers on the way.

A tap ("deepstack") before a merger finds more tokens in a block than the stock merger joins. It takes the mean of
every window that will later be merged, so its weights fit and all taps give the tokens that the language model adds up.
"""

from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionBlock,
    Qwen3VLVisionModel,
    Qwen3VLVisionPatchMerger,
)

from laco.families.encoders.qwen import (
    PackedLayer,
    PackedMergingLayer,
    PackedVisionConfig,
    PackedVisionModel,
    QwenEncoder,
    own_merge_size,
    to_blocks,
)
from laco.grid import pool_map


class LacoQwen3VLVisionConfig(PackedVisionConfig, Qwen3VLVisionConfig):
    model_type = "laco_qwen3_vl_vision"


class LacoQwen3VLVisionBlock(PackedLayer, Qwen3VLVisionBlock):
    pass


class LacoQwen3VLMergingBlock(PackedMergingLayer, Qwen3VLVisionBlock):
    pass


class LacoQwen3VLTap(Qwen3VLVisionPatchMerger):
    """The stock merger of a tap, behind the mean of windows: blocks of `side` tokens become the stock encoder's."""

    def __init__(self, config: LacoQwen3VLVisionConfig, side: int):
        super().__init__(config, use_postshuffle_norm=True)
        self.side, self.factor = side, side // config.spatial_merge_size

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pool_map(to_blocks(x, self.side), self.factor).flatten(0, 2))


class LacoQwen3VLVisionModel(PackedVisionModel, Qwen3VLVisionModel):
    config: LacoQwen3VLVisionConfig
    layer_class = LacoQwen3VLMergingBlock
    plain_class = LacoQwen3VLVisionBlock
    _no_split_modules = ["LacoQwen3VLVisionBlock", "LacoQwen3VLMergingBlock"]  # noqa: RUF012

    def __init__(self, config: LacoQwen3VLVisionConfig):
        super().__init__(config)
        sides = [layer.side // getattr(layer, "factor", 1) for layer in self.layers]  # that layers put out
        with own_merge_size(config):
            self.deepstack_merger_list = nn.ModuleList(
                LacoQwen3VLTap(config, sides[index]) for index in config.deepstack_visual_indexes
            )
        self.post_init()


QWEN3_VL = QwenEncoder(
    "qwen3_vl", Qwen3VLVisionModel, Qwen3VLVisionConfig, LacoQwen3VLVisionModel, LacoQwen3VLVisionConfig
)
