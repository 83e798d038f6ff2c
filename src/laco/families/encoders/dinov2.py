"""DINOv2, without and with registers: CLS and registers in front, positions before the first layer.

Square pictures of any size: positions are interpolated for others than `image_size`, and the grid is the root of
the number of tokens. The prefix tokens pass by every merger.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2.modeling_dinov2 import Dinov2Encoder, Dinov2Layer
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEncoder,
    Dinov2WithRegistersLayer,
)

from laco.errors import LacoError
from laco.families.encoders.base import (
    Encoder,
    FixedGridVisionConfig,
    FixedGridVisionModel,
    MergingLayer,
    reset_compressor,
)
from laco.families.encoders.halves import Halves
from laco.families.encoders.reducing import ReducingLayer


class MasklessEncoder(PreTrainedModel):
    """Mixin of the list of layers, in these models a `PreTrainedModel` of its own, which initialises its parts."""

    def __init__(self, config: PreTrainedConfig, layer: nn.ModuleList):
        PreTrainedModel.__init__(self, config)  # not the stock constructor, which would build the layers again
        self.layer = layer
        self.post_init()

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        # The stock model makes a mask where it is exported or runs by flex_attention, for the tokens before any
        # merging. It hides none of them, so it can go.
        return super().forward(hidden_states, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        present = [getattr(part, "compressor", None) for part in self.layer]
        if not reset_compressor(module, [compressor for compressor in present if compressor is not None]):
            super()._init_weights(module)


class MasklessModel(PreTrainedModel):
    """Mixin of both models, behind those that merge. Class data: `encoder_class`, the list of layers."""

    encoder_class: ClassVar[type[MasklessEncoder]]
    encoder: Any

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.encoder = self.encoder_class(config, self.encoder.layer)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None:
            raise LacoError("a compressed dinov2 takes no attention_mask; no token of its pictures can be hidden")
        return super().forward(pixel_values, bool_masked_pos, **kwargs)


HALVES = Halves(
    attention="attention",
    dropout="attention_probs_dropout_prob",
    norm=("norm1",),
    queries=("attention.q_proj",),
    keys=("attention.k_proj",),
    values=("attention.v_proj",),
    out=("attention.o_proj", "layer_scale1", "drop_path"),
    feed_forward=("norm2", "mlp", "layer_scale2", "drop_path"),
)
if hasattr(modeling_dinov2, "Dinov2SelfAttention"):  # in transformers 5.16
    HALVES = replace(
        HALVES,
        attention="attention.attention",
        queries=("attention.attention.query",),
        keys=("attention.attention.key",),
        values=("attention.attention.value",),
        out=("attention.output.dense", "attention.output.dropout", "layer_scale1", "drop_path"),
    )


class LacoDinov2Config(FixedGridVisionConfig, Dinov2Config):
    model_type = "laco_dinov2"


class LacoDinov2Layer(MergingLayer, Dinov2Layer):
    @staticmethod
    def prefix_of(config: PreTrainedConfig) -> int:
        return 1


class LacoDinov2ReducingLayer(ReducingLayer, Dinov2Layer):
    pass


class LacoDinov2Encoder(MasklessEncoder, Dinov2Encoder):
    pass


class LacoDinov2Model(FixedGridVisionModel, MasklessModel, Dinov2Model):
    config: LacoDinov2Config
    layers_at = "encoder.layer"
    encoder_class = LacoDinov2Encoder
    layer_class = LacoDinov2Layer
    reducing_class = LacoDinov2ReducingLayer
    halves = HALVES
    _no_split_modules = [  # noqa: RUF012
        *Dinov2Model._no_split_modules,
        "LacoDinov2Layer",
        "LacoDinov2ReducingLayer",
    ]


class LacoDinov2WithRegistersConfig(FixedGridVisionConfig, Dinov2WithRegistersConfig):
    model_type = "laco_dinov2_with_registers"


class LacoDinov2WithRegistersLayer(MergingLayer, Dinov2WithRegistersLayer):
    @staticmethod
    def prefix_of(config: Any) -> int:
        return 1 + config.num_register_tokens


class LacoDinov2WithRegistersReducingLayer(ReducingLayer, Dinov2WithRegistersLayer):
    pass


class LacoDinov2WithRegistersEncoder(MasklessEncoder, Dinov2WithRegistersEncoder):
    pass


class LacoDinov2WithRegistersModel(FixedGridVisionModel, MasklessModel, Dinov2WithRegistersModel):
    config: LacoDinov2WithRegistersConfig
    layers_at = "encoder.layer"
    encoder_class = LacoDinov2WithRegistersEncoder
    layer_class = LacoDinov2WithRegistersLayer
    reducing_class = LacoDinov2WithRegistersReducingLayer
    halves = HALVES
    _no_split_modules = [  # noqa: RUF012
        *Dinov2WithRegistersModel._no_split_modules,
        "LacoDinov2WithRegistersLayer",
        "LacoDinov2WithRegistersReducingLayer",
    ]

    def __init__(self, config: Any):
        super().__init__(config)
        # Positions for other sizes than `image_size` are made for patches of this size before transformers 5.19.
        self.embeddings.config = deepcopy(config)
        self.embeddings.config.patch_size = config.embed_patch_size


class Dinov2(Encoder):
    def interpolates(self, config: Any) -> bool:
        return True

    def mlp(self, config: Any) -> tuple[int, bool]:
        hidden = int(config.hidden_size * config.mlp_ratio)
        # SwiGLU has two thirds of it, rounded up to a multiple of 8.
        return ((int(hidden * 2 / 3) + 7) // 8 * 8, True) if config.use_swiglu_ffn else (hidden, False)


DINOV2 = Dinov2("dinov2", Dinov2Model, Dinov2Config, LacoDinov2Model, LacoDinov2Config)
DINOV2_WITH_REGISTERS = Dinov2(
    "dinov2_with_registers",
    Dinov2WithRegistersModel,
    Dinov2WithRegistersConfig,
    LacoDinov2WithRegistersModel,
    LacoDinov2WithRegistersConfig,
)
