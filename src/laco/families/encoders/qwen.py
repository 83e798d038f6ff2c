"""What the encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: pictures of any size, packed into one sequence.

Patches come as blocks of M x M, each row by row, block after block along the rows of a frame, frame after frame,
picture after picture. M is what the last step, the stock merger, would join into one token, and the only number by
which model and processor count tokens, size pictures and place them in the language model. So a compressed encoder
has a larger M: `spatial_merge_size` = own M * every factor, while the stock merger stays as it was and joins what
mergers left of a block. Every side is a multiple of M, so rules for odd grids never apply.

A merger leaves the order of blocks as it is. So windows of attention and the bounds of frames stay, with fewer tokens
between them, and a merged token keeps the rotary position of its window's first patch.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from laco.errors import LacoError
from laco.families.encoders.base import (
    CompressedVisionConfig,
    CompressedVisionModel,
    Encoder,
    MergingLayer,
    Size,
)
from laco.grid import Grid, merge_map


class Layout(NamedTuple):
    """How pictures lie in the sequence: their grids, in blocks, and the order of blocks if they are not in a row."""

    grids: list[Grid]
    order_B: Tensor | None = None  # the block that stands at each place, for attention in windows

    def to_maps(self, x_BSSC: Tensor) -> list[Tensor]:
        """Blocks of S x S tokens, as they lie -> a map (frames, H, W, C) of every picture."""
        if self.order_B is not None:
            x_BSSC = x_BSSC[self.order_B.argsort()]
        parts = x_BSSC.split([grid.tokens for grid in self.grids])
        return [
            rearrange(part, "(t h w) a b c -> t (h a) (w b) c", t=grid.frames, h=grid.height)
            for part, grid in zip(parts, self.grids, strict=True)
        ]

    def to_blocks(self, maps: list[Tensor], side: int) -> Tensor:
        """The inverse of `to_maps` -> (B, side, side, C)."""
        x_BSSC = torch.cat([rearrange(x, "t (h a) (w b) c -> (t h w) a b c", a=side, b=side) for x in maps])
        return x_BSSC if self.order_B is None else x_BSSC[self.order_B]


def to_blocks(x_NC: Tensor, side: int) -> Tensor:
    """(N, C) packed tokens -> (B, side, side, C)."""
    return x_NC.unflatten(0, (-1, side, side))


class PackedLayer(nn.Module):
    """Mixin of a layer in a compressed encoder, which is called with positions and bounds of all patches.

    `block` and `side`, which the encoder sets, are the sides of a block in patches and in the tokens that come in.
    """

    block: int = 1
    side: int = 1

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if (factor := self.block // self.side) > 1:
            cu_seqlens = self.bounds(cu_seqlens)
            if kwargs.get("max_seqlen") is not None:
                kwargs["max_seqlen"] = kwargs["max_seqlen"] // factor**2
            assert position_embeddings is not None
            position_embeddings = self.angles(position_embeddings)
        return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)

    def bounds(self, cu_seqlens: Tensor) -> Tensor:
        """Where parts that attend to themselves begin and end, counted in patches -> in tokens that come in."""
        return cu_seqlens // (self.block // self.side) ** 2

    def angles(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all patches, each (N, d) -> of the tokens that come in."""
        factor = self.block // self.side
        cos_ND, sin_ND = (
            to_blocks(x_ND, self.block)[:, ::factor, ::factor].flatten(0, 2) for x_ND in position_embeddings
        )
        return cos_ND, sin_ND


class PackedMergingLayer(MergingLayer, PackedLayer):
    """Mixin of such a layer whose output is merged."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x_NC = PackedLayer.forward(self, hidden_states, *args, **kwargs)
        x_BSSC, layout = to_blocks(x_NC, self.side), kwargs["layout"]
        if self.compressor.sees == "windows":  # which never reach over the bounds of blocks
            return merge_map(self.compressor, x_BSSC, self.factor, "error").flatten(0, 2)
        maps = [merge_map(self.compressor, x_THWC, self.factor, "error") for x_THWC in layout.to_maps(x_BSSC)]
        return layout.to_blocks(maps, self.side // self.factor).flatten(0, 2)


class PackedVisionConfig(CompressedVisionConfig):
    """Mixin of the configuration.

    Args:
        own_merge_size: `spatial_merge_size` of the uncompressed encoder. If absent, `spatial_merge_size` is taken
            for it and multiplied by the factors; if present, `spatial_merge_size` must be that product.
    """

    own_merge_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        stock: Any = self
        own = stock.spatial_merge_size if self.own_merge_size is None else self.own_merge_size
        total = own * math.prod(step.merger.factor for step in self.steps)
        if self.own_merge_size is not None and stock.spatial_merge_size != total:
            raise LacoError(
                f"spatial_merge_size {stock.spatial_merge_size} contradicts the compression, with which the merge size"
                f" of {own} becomes {total}"
            )
        self.own_merge_size, stock.spatial_merge_size = own, total


@contextmanager
def own_merge_size(config: Any) -> Iterator[None]:
    """Lets parts be built for the merge size of the stock encoder, with this very configuration object."""
    total, config.spatial_merge_size = config.spatial_merge_size, config.own_merge_size
    try:
        yield
    finally:
        config.spatial_merge_size = total


class PackedVisionModel(CompressedVisionModel):
    """Mixin of the encoder. Class data: `plain_class`, the layer that merges nothing."""

    layer_class: ClassVar[type[PackedMergingLayer]]
    plain_class: ClassVar[type[PackedLayer]]
    layers_at = "blocks"
    cannot_reduce = (
        "it packs pictures of different sizes into one sequence, whose bounds and positions a reducer does not know"
    )

    def __init__(self, config: Any):
        with own_merge_size(config):
            super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.spatial_merge_unit = config.spatial_merge_size**2
        side = config.spatial_merge_size
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, PackedLayer):
                layer = self.layers[index] = self.plain_class(config)
            layer.block, layer.side = config.spatial_merge_size, side
            if isinstance(layer, PackedMergingLayer):
                side //= layer.factor
        self.post_init()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        layout = self.layout(grid_thw, kwargs)
        return super().forward(hidden_states, grid_thw, layout=layout, **kwargs)

    def layout(self, grid_thw: Tensor, kwargs: dict[str, Any]) -> Layout:
        """The layout of pictures with these grids of patches; `kwargs` are those of `forward`, to be added to."""
        size = self.spatial_merge_size
        return Layout([Grid(frames, height // size, width // size) for frames, height, width in grid_thw.tolist()])


class QwenEncoder(Encoder):
    """A vision encoder of this kind."""

    def num_layers(self, config: Any) -> int:
        return config.depth

    def merge_size(self, config: Any) -> int:
        """Side of the windows that the stock merger at its end joins."""
        return getattr(config, "own_merge_size", None) or config.spatial_merge_size

    def merged_before(self, config: Any, layer: int) -> int:
        """Product of the factors of all mergers before the layer with this index (0-based)."""
        return math.prod(step.merger.factor for step in getattr(config, "steps", []) if step.layer <= layer)

    def queries_keys(self, layer: Any, x_BNC: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        cos_ND, sin_ND = kwargs["position_embeddings"]
        if isinstance(layer, PackedLayer):
            cos_ND, sin_ND = layer.angles((cos_ND, sin_ND))
        heads = layer.attn.num_heads
        q, k, _ = rearrange(layer.attn.qkv(layer.norm1(x_BNC)), "n (three h d) -> three n h d", three=3, h=heads)
        q, k = apply_rotary_pos_emb_vision(q, k, cos_ND, sin_ND)
        return rearrange(q, "n h d -> 1 h n d"), rearrange(k, "n h d -> 1 h n d")

    def patch_values(self, config: Any) -> int:
        return config.in_channels * config.temporal_patch_size * config.patch_size**2

    def attended(self, config: Any, grid: Grid, layer: int) -> int:
        return grid.frames * (grid.height * grid.width) ** 2

    def own_grid(self, config: Any, size: Size | None = None) -> Grid:
        if size is None:
            raise LacoError(f"the grid of {self.name} depends on the picture; give its size in pixels")
        patch, unit = config.patch_size, config.patch_size * config.spatial_merge_size
        if size[0] % unit or size[1] % unit:
            raise LacoError(
                f"{self.name} takes pictures whose sides are multiples of {unit} pixels, as its processor resizes them;"
                f" got {size[0]} x {size[1]}"
            )
        return Grid(1, size[0] // patch, size[1] // patch)

    def geometry(self, config: Any) -> dict[str, Any]:
        return {"patch_size": config.patch_size, "merge_size": self.merge_size(config)}

    def stock_settings(self, config: Any) -> dict[str, Any]:
        settings = super().stock_settings(config)
        settings.pop("own_merge_size", None)
        return settings | {"spatial_merge_size": self.merge_size(config)}
