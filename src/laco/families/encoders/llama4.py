"""Llama 4: the CLS token stands last, rotary angles come from one table, and the adapter is part of the encoder.

Tiles of one square size. A merged token keeps the angles of the top-left token of its window, the CLS token its own.
Layers put out tuples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Llama4VisionConfig, Llama4VisionModel, PreTrainedConfig
from transformers.models.llama4.modeling_llama4 import Llama4VisionEncoderLayer

from laco.families.encoders.base import (
    Encoder,
    FixedGridVisionConfig,
    FixedGridVisionModel,
    MergingLayer,
    merge_tokens,
)
from laco.grid import Grid
from laco.methods import Merger


class LacoLlama4VisionConfig(FixedGridVisionConfig, Llama4VisionConfig):
    model_type = "laco_llama4_vision_model"


class LaterLlama4VisionLayer(Llama4VisionEncoderLayer):
    """The stock layer on a grid that the mergers `before` have made smaller."""

    before: Sequence[Merger] = ()

    def __init__(self, config: Any):
        super().__init__(config)
        self.side = config.image_size // config.embed_patch_size

    def forward(self, hidden_state: Tensor, freqs_ci: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_state, merged_angles(freqs_ci, self.side, self.before), *args, **kwargs)


def merged_angles(freqs_ci: Tensor, side: int, mergers: Sequence[Merger]) -> Tensor:
    """Rows of the rotary table, (side * side + 1, 1, D), that the tokens keep behind these mergers."""
    # As real numbers, for the ONNX exporter cannot slice complex ones; in half precision the table is real anyway.
    table = torch.view_as_real(freqs_ci) if freqs_ci.is_complex() else freqs_ci
    angles_HW1D = table[:-1].unflatten(0, (side, side))
    for merger in mergers:
        _, height, width = merger.num_tokens(Grid(1, *angles_HW1D.shape[:2]))
        angles_HW1D = angles_HW1D[:: merger.factor, :: merger.factor][:height, :width]
    merged = torch.cat([angles_HW1D.flatten(0, 1), table[-1:]])
    return torch.view_as_complex(merged) if freqs_ci.is_complex() else merged


class LacoLlama4VisionEncoderLayer(MergingLayer, LaterLlama4VisionLayer):
    @staticmethod
    def prefix_of(config: PreTrainedConfig) -> int:
        return 1  # the CLS token, though it stands last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BNC, *attention = LaterLlama4VisionLayer.forward(self, *args, **kwargs)
        merged_BNC = merge_tokens(self.compressor, x_BNC[:, :-1], self.factor, self.odd)
        return (torch.cat([merged_BNC, x_BNC[:, -1:]], dim=1), *attention)


class LacoLlama4VisionModel(FixedGridVisionModel, Llama4VisionModel):
    config: LacoLlama4VisionConfig
    layer_class = LacoLlama4VisionEncoderLayer
    cannot_reduce = "its CLS token stands last, and its rotary table and adapter want the tokens of a whole grid"
    layers_at = "model.layers"
    _no_split_modules = [  # noqa: RUF012
        *Llama4VisionModel._no_split_modules,
        "LaterLlama4VisionLayer",
        "LacoLlama4VisionEncoderLayer",
    ]

    def __init__(self, config: LacoLlama4VisionConfig):
        super().__init__(config)
        for index in range(len(self.layers)):
            if before := [step.merger for step in config.steps if step.layer <= index]:
                if not isinstance(self.layers[index], MergingLayer):
                    self.layers[index] = LaterLlama4VisionLayer(config)
                self.layers[index].before = before
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Computes the rotary table again, from the patch size of the convolution.
        config: Any = self.config
        effective, config.patch_size = config.patch_size, config.embed_patch_size
        try:
            super()._init_weights(module)
        finally:
            config.patch_size = effective


LLAMA4 = Encoder("llama4", Llama4VisionModel, Llama4VisionConfig, LacoLlama4VisionModel, LacoLlama4VisionConfig)
