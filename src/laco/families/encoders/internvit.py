"""InternViT, the encoder of InternVL: a CLS token in front, positions before the first layer, square pictures.

It makes positions for square pictures of any size. Sizes in its configuration are two numbers, height and width.
"""

from typing import Any

from transformers import InternVLVisionConfig, InternVLVisionModel, PreTrainedConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer

from laco.errors import LacoError
from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer
from laco.families.encoders.halves import Halves
from laco.families.encoders.reducing import ReducingLayer
from laco.families.steps import image_sides


class LacoInternVLVisionConfig(FixedGridVisionConfig, InternVLVisionConfig):
    model_type = "laco_internvl_vision"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embed_patch_size is not None:
            self.embed_patch_size = image_sides(self.embed_patch_size)
        super().__post_init__(**kwargs)
        grid = INTERNVIT.own_grid(self)
        if grid.height != grid.width:
            raise LacoError(
                f"a compressed internvit has square grids alone; image_size {self.image_size} and patches of"
                f" {self.embed_patch_size} pixels give {grid.height} x {grid.width} tokens"
            )


class LacoInternVLVisionLayer(MergingLayer, InternVLVisionLayer):
    @staticmethod
    def prefix_of(config: PreTrainedConfig) -> int:
        return 1


class LacoInternVLReducingLayer(ReducingLayer, InternVLVisionLayer):
    pass


class LacoInternVLVisionModel(FixedGridVisionModel, InternVLVisionModel):
    config: LacoInternVLVisionConfig
    layer_class = LacoInternVLVisionLayer
    reducing_class = LacoInternVLReducingLayer
    layers_at = "encoder.layer"
    halves = Halves(
        attention="attention",
        norm=("layernorm_before",),
        queries=("attention.q_proj", "attention.q_norm"),
        keys=("attention.k_proj", "attention.k_norm"),
        values=("attention.v_proj",),
        out=("attention.projection_layer", "attention.projection_dropout", "lambda_1"),
        feed_forward=("layernorm_after", "mlp", "dropout", "lambda_2"),
    )
    _no_split_modules = [  # noqa: RUF012
        *InternVLVisionModel._no_split_modules,
        "LacoInternVLVisionLayer",
        "LacoInternVLReducingLayer",
    ]


class InternViT(Encoder):
    def interpolates(self, config: Any) -> bool:
        return True


INTERNVIT = InternViT(
    "internvit", InternVLVisionModel, InternVLVisionConfig, LacoInternVLVisionModel, LacoInternVLVisionConfig
)
