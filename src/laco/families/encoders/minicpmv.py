"""MiniCPM-V 4.6: pictures and slices of any size, packed one behind the other; each attends to itself alone.

It has a merger of its own after layer `insert_layer_id` + 1 (counted from 1), `laco.WindowMerger` by our name. Ours are
further ones; at the same place ours comes first. No prefix token; positions are added before the first layer.

Model and processor count tokens by the grids of patches, `target_sizes`. So a compressed encoder is given its pictures
in *effective* patches, larger by all our factors, which the processor cuts and which are the grids that it is told.
Sides are multiples of these patches, so rules for odd grids never apply.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import MiniCPMV4_6VisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import (
    MiniCPMV4_6VisionEncoderLayer,
    MiniCPMV4_6VisionModel,
)
from transformers.utils.generic import get_max_seqlen
from transformers.utils.output_capturing import capture_outputs

from laco.errors import LacoError
from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer, Size
from laco.families.encoders.halves import Halves
from laco.grid import Grid, merge_map
from laco.methods import Merger, from_dict

# The parts of the stock encoder's own merger, and what they are called in the module of `laco.WindowMerger`.
OWN_MERGER = {
    "layer_norm1": "norm1",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.out_proj": "attention.out",
    "pre_norm": "norm2",
    "linear_1": "fc1",
    "linear_2": "fc2",
}


def own_merger(config: Any) -> Merger:
    """The method that stands in the stock encoder, at its place; the very same for its usual norms (eps 1e-6)."""
    settings = {"heads": config.num_attention_heads, "ffn": config.intermediate_size, "zero_init": False}
    place = {"layer": config.insert_layer_id + 1, "factor": config.window_kernel_size[0], "odd": "error"}
    merger = from_dict({"method": "window_merger", **place, **settings})
    assert isinstance(merger, Merger)
    return merger


def own_merger_weights(encoder: Any) -> dict[str, Tensor]:
    """The weights of the stock encoder's own merger, as a state_dict for the module of `own_merger`."""
    return {
        f"{ours}.{key}": tensor
        for stock, ours in OWN_MERGER.items()
        for key, tensor in encoder.vit_merger.get_submodule(stock).state_dict().items()
    }


class LacoMiniCPMVVisionConfig(FixedGridVisionConfig, MiniCPMV4_6VisionConfig):
    """`image_size` is that of the learned positions. The rule `error` refuses factors that do not divide its grid."""

    model_type = "laco_minicpmv4_6_vision"

    def effective_patch_size(self, own: Any) -> Any:
        grid = Grid(1, self.image_size // own, self.image_size // own)
        for step in self.steps:
            grid = step.merger.num_tokens(grid)
        return own * math.prod(step.merger.factor for step in self.steps)


class LacoMiniCPMVVisionEncoderLayer(MergingLayer, MiniCPMV4_6VisionEncoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, sizes: list[tuple[int, int]], **kwargs: Any) -> Tensor:
        x_1NC = MiniCPMV4_6VisionEncoderLayer.forward(self, hidden_states, *args, **kwargs)
        parts = x_1NC[0].split([height * width for height, width in sizes])
        maps = [part_NC.unflatten(0, (1, *size)) for part_NC, size in zip(parts, sizes, strict=True)]
        merged = [merge_map(self.compressor, x_1HWC, self.factor, self.odd).flatten(1, 2) for x_1HWC in maps]
        return torch.cat(merged, dim=1)


class LacoMiniCPMVVisionModel(FixedGridVisionModel, MiniCPMV4_6VisionModel):
    config: LacoMiniCPMVVisionConfig
    layer_class = LacoMiniCPMVVisionEncoderLayer
    halves = Halves()
    cannot_reduce = (
        "it packs pictures of different sizes into one sequence, whose bounds and positions a reducer does not know"
    )
    _no_split_modules = ["LacoMiniCPMVVisionEncoderLayer"]  # noqa: RUF012

    # The stock forward, with grids and bounds that change at every merger.
    @capture_outputs
    def forward(
        self, pixel_values: Tensor, target_sizes: Tensor, use_vit_merger: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As the stock one, of effective patches, (1, 3, P, N * P); `LacoError` for patches of another size."""
        config: Any = self.config
        factor = config.patch_size // config.embed_patch_size
        pixels = own_patches(pixel_values, target_sizes, config.patch_size, factor)
        sizes_B2 = target_sizes * factor
        x_1NC = self.embeddings(pixels, target_sizes=sizes_B2, **kwargs)
        for index, layer in enumerate(self.layers):
            given = {**kwargs, **each_alone(config, sizes_B2, x_1NC.device)}
            if isinstance(layer, MergingLayer):
                x_1NC = layer(x_1NC, sizes=[tuple(size) for size in sizes_B2.tolist()], **given)
                sizes_B2 = sizes_B2 // layer.factor
            else:
                x_1NC = layer(x_1NC, **given)
            if use_vit_merger and index == config.insert_layer_id:
                x_1NC = self.vit_merger(x_1NC, sizes_B2, **kwargs)
                sizes_B2 = sizes_B2 // 2
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(x_1NC))


def own_patches(pixels_1CPL: Tensor, sizes_B2: Tensor, patch: int, factor: int) -> Tensor:
    """Effective patches -> those of the convolution, row by row in every picture: (1, C, P / factor, L * factor)."""
    if pixels_1CPL.shape[2] != patch:
        raise LacoError(
            f"minicpmv takes patches of {patch} x {patch} pixels with this compression; got {pixels_1CPL.shape[2]} x"
            f" {pixels_1CPL.shape[2]}, so use the processor that was compressed with it"
        )
    parts = pixels_1CPL[0].split((sizes_B2.prod(dim=-1) * patch).tolist(), dim=-1)
    pattern = "c (a p) (i j b q) -> c p (i a j b q)"
    sides = {"a": factor, "b": factor, "q": patch // factor}
    maps = [rearrange(part, pattern, i=i, **sides) for part, (i, _) in zip(parts, sizes_B2.tolist(), strict=True)]
    return torch.cat(maps, dim=-1)[None]


def each_alone(config: Any, sizes_B2: Tensor, device: torch.device) -> dict[str, Any]:
    """The arguments of a layer by which every picture attends to itself alone."""
    ends = sizes_B2.prod(dim=-1).cumsum(0, dtype=torch.int32).to(device)
    bounds = torch.nn.functional.pad(ends, (1, 0))
    return {"attention_mask": None, "cu_seqlens": bounds, "max_seqlen": get_max_seqlen(bounds, config)}


@dataclass(frozen=True)
class MiniCPMVEncoder(Encoder):
    """An encoder whose grids are as large as the processor has made the picture."""

    def own_grid(self, config: Any, size: Size | None = None) -> Grid:
        if size is None:
            raise LacoError(f"the grid of {self.name} depends on the picture; give its size in pixels")
        unit, own = config.patch_size, getattr(config, "embed_patch_size", None) or config.patch_size
        if size[0] % unit or size[1] % unit:
            raise LacoError(
                f"{self.name} takes pictures whose sides are multiples of {unit} pixels, as its processor resizes them;"
                f" got {size[0]} x {size[1]}"
            )
        return Grid(1, size[0] // own, size[1] // own)

    def geometry(self, config: Any) -> dict[str, Any]:
        own = getattr(config, "embed_patch_size", None) or config.patch_size
        return {"patch_size": own, "insert_layer_id": config.insert_layer_id}


MINICPMV = MiniCPMVEncoder(
    "minicpmv", MiniCPMV4_6VisionModel, MiniCPMV4_6VisionConfig, LacoMiniCPMVVisionModel, LacoMiniCPMVVisionConfig
)
