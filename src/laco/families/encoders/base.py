"""What surgery has to know of a vision encoder, and the parts that compressed encoders are made of.

A compressed encoder is the stock class with a few of its layers replaced by subclasses that merge what they
put out. So parameter names stay, the only new keys are those of the `compressor` in a layer, and
`hidden_states[i]` is merged iff i >= k.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from laco.errors import LacoError
from laco.families.encoders.reducing import JOINED, ReducingVisionModel
from laco.families.steps import Step, effective_patch_size, image_sides
from laco.grid import Grid, merge_map, split_prefix
from laco.methods import Merger, MergerModule, Reducer, from_dict
from laco.methods.base import LayerParts

Size = tuple[int, int]  # height and width of a picture in pixels


def merge_tokens(merger: nn.Module, x_BNC: Tensor, factor: int, odd: str) -> Tensor:
    """Merges a square grid that lies row by row in a sequence: (B, N, C) -> (B, N', C_out)."""
    side = math.isqrt(x_BNC.shape[1])
    if side * side != x_BNC.shape[1]:
        raise LacoError(f"{x_BNC.shape[1]} visual tokens are no square grid; pictures must be square")
    x_BHWC = rearrange(x_BNC, "b (h w) c -> b h w c", h=side)
    return merge_map(merger, x_BHWC, factor, odd).flatten(1, 2)


def reset_compressor(module: nn.Module, compressors: Iterable[MergerModule]) -> bool:
    """Lets a compressor that owns `module` initialise itself; False where none does.

    For `_init_weights` of a model, which transformers calls part by part. It would overwrite what
    `reset_parameters` chose (a zero last layer, say), and never comes by parts without tensors of their own,
    so any part of a compressor stands for the whole. Parameters that a checkpoint has filled are kept:
    transformers marks them and guards torch.nn.init while it runs.
    """
    for compressor in compressors:
        if any(part is module for part in compressor.modules()):
            tensors = [*compressor.parameters(), *compressor.buffers()]
            if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                compressor.reset_parameters()
            return True
    return False


class MergingLayer(nn.Module):
    """Mixin of an encoder layer whose output is merged.

    As it is, it fits a layer that is built from a configuration alone and gives (B, prefix + N, C) with N
    tokens of a square grid, row by row. Others override `merge`, or more.
    """

    def __init__(self, config: PreTrainedConfig, merger: Merger):
        super().__init__(config)
        self.compressor = merger.build(self.width_of(config))
        self.factor, self.odd = merger.factor, merger.odd
        self.prefix = self.prefix_of(config)

    @staticmethod
    def width_of(config: Any) -> int:
        """Channels of the layer's tokens."""
        return config.hidden_size

    @staticmethod
    def prefix_of(config: PreTrainedConfig) -> int:
        """Tokens in front of the patches that are never merged: CLS, registers."""
        return 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.merge(super().forward(hidden_states, *args, **kwargs))

    def merge(self, x_BNC: Tensor) -> Tensor:
        prefix_BPC, patches_BNC = split_prefix(x_BNC, self.prefix)
        merged_BNC = merge_tokens(self.compressor, patches_BNC, self.factor, self.odd)
        return torch.cat([prefix_BPC, merged_BNC], dim=1) if self.prefix else merged_BNC


NOT_BOTH = "mergers and a reducer do not stand in one vision encoder yet; decompress the model first"


class CompressedVisionConfig(PreTrainedConfig):
    """Mixin of a vision configuration that records its compression: mergers, or a reducer.

    Args:
        compression: `Step.to_dict` of every merger, in the order of their layers.
        reducer: `Reducer.to_dict`.
        reducer_last: how many layers the language model uses; all, if None.
        reducer_unmerge: tokens that were merged are put out at all their places, for a connector that joins neighbours.
    """

    compression: list[dict[str, Any]] | None = None
    reducer: dict[str, Any] | None = None
    reducer_last: int | None = None
    reducer_unmerge: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.reducing_method is not None and self.compression:
            raise LacoError(NOT_BOTH)

    @property
    def reducing_method(self) -> Reducer | None:
        if self.reducer is None:
            return None
        reducer = from_dict(self.reducer)
        if not isinstance(reducer, Reducer):
            raise LacoError(f"not a method that drops or merges tokens inside a vision encoder: {self.reducer}")
        return reducer

    @property
    def steps(self) -> list[Step]:
        return [Step.from_dict(data) for data in self.compression or []]


class CompressedVisionModel(ReducingVisionModel):
    """Mixin of a vision encoder that builds the layers of its configuration's compression.

    Class data: `layer_class`, and `layers_at`, the path of the list of layers in the encoder.
    """

    layer_class: ClassVar[type[MergingLayer]]
    layers_at: ClassVar[str] = "encoder.layers"

    def __init__(self, config: Any):
        super().__init__(config)
        for step in config.steps:
            if step.place == "encoder":
                self.layers[step.layer - 1] = self.merging_layer(step)
        if (reducer := config.reducing_method) is not None:
            self.put_reducer(reducer, self.layer_class.prefix_of(config), self.layer_class.width_of(config))
        self.post_init()

    @property
    def layers(self) -> Any:
        return self.get_submodule(self.layers_at)

    def merging_layer(self, step: Step) -> MergingLayer:
        return self.layer_class(self.config, step.merger)

    def compressors(self) -> dict[int, MergerModule]:
        """What is in the layers of mergers and reducers, by the count k of layers before it."""
        mergers = {
            index + 1: layer.compressor for index, layer in enumerate(self.layers) if isinstance(layer, MergingLayer)
        }
        return mergers | super().compressors()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not reset_compressor(module, self.compressors().values()):
            super()._init_weights(module)


class FixedGridVisionConfig(CompressedVisionConfig):
    """Of an encoder whose pictures all have `image_size` pixels, and so one grid.

    Its `patch_size` is the *effective* one, from which models and processors count tokens; the patch
    convolution keeps its own.

    Args:
        embed_patch_size: patch size of the patch convolution. If absent, `patch_size` is taken for it and
            replaced by the effective one; if present, `patch_size` must be the effective one.
    """

    embed_patch_size: int | list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        stock: Any = self
        own = stock.patch_size if self.embed_patch_size is None else self.embed_patch_size
        effective = self.effective_patch_size(own)
        if self.embed_patch_size is not None and image_sides(stock.patch_size) != image_sides(effective):
            raise LacoError(
                f"patch_size {stock.patch_size} contradicts the compression of patches of {own} pixels; it"
                f" must be {effective}"
            )
        self.embed_patch_size, stock.patch_size = own, effective

    def effective_patch_size(self, own: Any) -> Any:
        stock: Any = self
        return effective_patch_size(stock.image_size, own, self.steps) if self.steps else own


class FixedGridVisionModel(CompressedVisionModel):
    """Mixin of such an encoder."""

    def __init__(self, config: Any):
        # The patch convolution needs its own patch size, yet on this very object: layers keep a reference to
        # it, through which transformers later switches their attention.
        effective, config.patch_size = config.patch_size, config.embed_patch_size
        try:
            super().__init__(config)
        finally:
            config.patch_size = effective

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A layer sees the number of tokens alone, and would take 4 x 9 of them for 6 x 6.
        (height, width), patch = pixel_values.shape[-2:], image_sides(self.config.embed_patch_size)
        if self.config.compression and height // patch[0] != width // patch[1]:
            raise LacoError(
                f"a compressed {self.config.model_type.removeprefix('laco_')} takes square pictures alone; got"
                f" {height} x {width} pixels"
            )
        return self.on_full_grids(super().forward, pixel_values, *args, **kwargs)


def take_over_conversions(ours: str, stock: str) -> None:
    """Hub checkpoints of the stock class load into ours too: renaming of old keys is skipped for unknown
    classes.
    """
    if (mapping := get_checkpoint_conversion_mapping(stock)) is not None:
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


@dataclass(frozen=True)
class Encoder:
    """A vision encoder that mergers can stand in: its stock and its compressed classes, and its geometry.

    As it is, it fits encoders whose pictures all have one square grid. Grids are those of one picture (or
    tile, or frame).
    """

    name: str
    stock: type[PreTrainedModel]
    stock_config: type[PreTrainedConfig]
    compressed: type[CompressedVisionModel]
    compressed_config: type[CompressedVisionConfig]

    def owns(self, config: PreTrainedConfig) -> bool:
        # Not by `model_type`, which in configurations on the hub may be that of the whole model.
        return type(config) in (self.stock_config, self.compressed_config)

    def register(self) -> None:
        AutoConfig.register(self.compressed_config.model_type, self.compressed_config, exist_ok=True)
        AutoModel.register(self.compressed_config, self.compressed, exist_ok=True)
        take_over_conversions(self.compressed.__name__, self.stock.__name__)

    # The parts and sizes of an encoder.

    def layers(self, tower: PreTrainedModel) -> Any:
        return tower.get_submodule(self.compressed.layers_at)

    def num_layers(self, config: Any) -> int:
        return config.num_hidden_layers

    def width(self, config: Any) -> int:
        return self.compressed.layer_class.width_of(config)

    def prefix(self, config: Any) -> int:
        """Tokens before the patches that are never merged: CLS, registers."""
        return self.compressed.layer_class.prefix_of(config)

    def mlp(self, config: Any) -> tuple[int, bool]:
        """Hidden width of a layer's MLP, and whether it is gated (three maps instead of two)."""
        return config.intermediate_size, False

    def patch_values(self, config: Any) -> int:
        """Values that the patch embedding maps to one token: channels x pixels (x frames)."""
        height, width = image_sides(getattr(config, "embed_patch_size", None) or config.patch_size)
        return config.num_channels * height * width

    def attended(self, config: Any, grid: Grid, layer: int) -> int:
        """Pairs of tokens that attend to one another in the layer with this index (0-based) on this grid."""
        return (grid.tokens + self.prefix(config)) ** 2

    # Its geometry.

    def interpolates(self, config: Any) -> bool:
        """Whether it makes positions for square pictures of any size, not of `image_size` alone."""
        return False

    def takes(self, config: Any, size: tuple[int | None, int | None]) -> bool:
        """Whether it takes pictures of this size; always, where it has not one size for all."""
        wanted = self.geometry(config).get("image_size")
        return wanted is None or size == image_sides(wanted) or (self.interpolates(config) and size[0] == size[1])

    def own_grid(self, config: Any, size: Size | None = None) -> Grid:
        """The grid before any merger. `size` is that of the picture, where grids depend on it."""
        patch = image_sides(getattr(config, "embed_patch_size", None) or config.patch_size)
        height, width = size if size and self.interpolates(config) else image_sides(config.image_size)
        return Grid(1, height // patch[0], width // patch[1])

    def grid(self, config: Any, size: Size | None = None) -> Grid:
        """The grid behind all mergers inside the encoder or in the place of the projector."""
        grid = self.own_grid(config, size)
        for step in getattr(config, "steps", []):
            grid = step.merger.num_tokens(grid)
        return grid

    def geometry(self, config: Any) -> dict[str, Any]:
        """What a compressor needs to find again: plain data, compared when a saved one is put into a model."""
        size = config.image_size
        return {"image_size": size if isinstance(size, int) else list(size), "grid": list(self.own_grid(config))}

    # What passes through a layer.

    def queries_keys(self, layer: nn.Module, x_BNC: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What attention in a layer compares, (B, H, N, d) each, by its own norm and projections.

        Args:
            layer: of a stock or a compressed encoder.
            x_BNC: tokens that enter it; (N, C), and B = 1 in the result, where pictures are packed.
            kwargs: the other arguments that it is called with; they have the rotary angles, where there are any.
        """
        if self.compressed.halves is None:
            raise LacoError(f"{self.name} does not show queries and keys of its layers")
        return self.compressed.halves.queries_keys(layer, x_BNC)

    def layer_parts(self, layer: nn.Module) -> LayerParts:
        """The modules of a layer; `LacoError` where it is no plain one."""
        halves = self.compressed.halves
        if halves is None or (parts := halves.parts(layer)) is None:
            raise LacoError(
                f"no merger can start from a layer of {self.name}, which is more than norm, attention and an MLP of two"
                " maps; leave reuse out"
            )
        return parts

    # Its configuration with other mergers, or with a reducer.

    def stock_settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The settings of the uncompressed configuration."""
        settings = config.to_dict()
        for key in ("model_type", "compression", "reducer", "reducer_last", "reducer_unmerge"):
            settings.pop(key, None)
        settings["patch_size"] = settings.pop("embed_patch_size", None) or settings["patch_size"]
        return settings

    def with_steps(self, config: PreTrainedConfig, steps: Sequence[Step]) -> PreTrainedConfig:
        """A new configuration with exactly these mergers; `LacoError` where they do not fit the grid."""
        if steps and getattr(config, "reducer", None):
            raise LacoError(NOT_BOTH)
        return self.configuration(config, {"compression": [step.to_dict() for step in steps]} if steps else {})

    def why_not(self, config: Any, reducer: Reducer) -> str | None:
        """Why a reducer cannot run inside this encoder; None if it can."""
        if self.compressed.reducing_class is None:
            return self.compressed.cannot_reduce
        return NOT_BOTH if getattr(config, "steps", None) else None

    def with_reducer(
        self, config: PreTrainedConfig, reducer: Reducer | None, last: int | None = None, unmerge: bool = False
    ) -> PreTrainedConfig:
        """A new configuration with this reducer inside the encoder, or the stock one; `LacoError` where it cannot run.

        Args:
            last: how many layers the language model uses, if not all.
            unmerge: for a connector that joins neighbouring tokens. A token that was merged into another is put out
                with its values, so that there are as many as ever.
        """
        if reducer is None:
            return self.configuration(config, {})
        if reason := self.why_not(config, reducer):
            raise LacoError(f"{reducer.name} cannot run inside {self.name}: {reason}")
        if unmerge and reducer.drops:
            raise LacoError(JOINED.format(reducer.name))
        reducer.layers(self.num_layers(config), last)  # refuses layers past the end
        record = json.loads(json.dumps(reducer.to_dict()))  # with lists for tuples, as it will be read
        return self.configuration(config, {"reducer": record, "reducer_last": last, "reducer_unmerge": unmerge})

    def configuration(self, config: PreTrainedConfig, compression: dict[str, Any]) -> PreTrainedConfig:
        """A new configuration, compressed like this or, with nothing given, the stock one."""
        kind = self.compressed_config if compression else self.stock_config
        new = kind(**self.stock_settings(config), **compression)
        new._attn_implementation = config._attn_implementation
        return new
