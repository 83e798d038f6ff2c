"""Vision encoders with mergers inside: SigLIP and CLIP.

A compressed encoder is the stock class with a few of its layers replaced by subclasses that merge what they
put out. So parameter names stay, the only new keys are `encoder.layers.{k-1}.compressor.*`, and
`hidden_states[i]` is merged iff i >= k. Its configuration gives `patch_size` as the *effective* patch size,
from which models and processors count tokens; the patch convolution keeps `embed_patch_size`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from laco.errors import LacoError
from laco.families.steps import Step, effective_patch_size
from laco.grid import merge_map, split_prefix
from laco.methods import Merger, MergerModule


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
    """Mixin of an encoder layer whose output is merged. Subclasses say how many `prefix` tokens stand in
    front.
    """

    prefix: ClassVar[int]

    def __init__(self, config: PreTrainedConfig, merger: Merger):
        super().__init__(config)
        self.compressor = merger.build(config.hidden_size)
        self.factor, self.odd = merger.factor, merger.odd

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x_BNC = super().forward(hidden_states, *args, **kwargs)
        prefix_BPC, patches_BNC = split_prefix(x_BNC, self.prefix)
        merged_BNC = merge_tokens(self.compressor, patches_BNC, self.factor, self.odd)
        return torch.cat([prefix_BPC, merged_BNC], dim=1) if self.prefix else merged_BNC


class CompressedVisionConfig(PreTrainedConfig):
    """Mixin of a vision configuration that records its compression.

    Args:
        compression: `Step.to_dict` of every merger, in the order of their layers.
        embed_patch_size: patch size of the patch convolution. If absent, `patch_size` is taken for it and
            replaced by the effective one; if present, `patch_size` must be the effective one.
    """

    compression: list[dict[str, Any]] | None = None
    embed_patch_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        stock: Any = self
        own = stock.patch_size if self.embed_patch_size is None else self.embed_patch_size
        effective = effective_patch_size(stock.image_size, own, self.steps)
        if self.embed_patch_size is not None and stock.patch_size != effective:
            raise LacoError(
                f"patch_size {stock.patch_size} contradicts the compression of patches of {own} pixels; it"
                f" must be {effective}"
            )
        self.embed_patch_size, stock.patch_size = own, effective

    @property
    def steps(self) -> list[Step]:
        return [Step.from_dict(data) for data in self.compression or []]


class CompressedVisionModel(PreTrainedModel):
    """Mixin of a vision encoder that builds the layers of its configuration's compression."""

    layer_class: ClassVar[type[MergingLayer]]
    encoder: Any

    def __init__(self, config: Any):
        # The patch convolution needs its own patch size, yet on this very object: layers keep a reference to
        # it, through which transformers later switches their attention.
        effective, config.patch_size = config.patch_size, config.embed_patch_size
        try:
            super().__init__(config)
        finally:
            config.patch_size = effective
        for step in config.steps:
            if step.place == "encoder":
                self.encoder.layers[step.layer - 1] = self.layer_class(config, step.merger)
        self.post_init()

    def compressors(self) -> dict[int, MergerModule]:
        """The mergers by the count k of layers before them."""
        return {
            index + 1: layer.compressor
            for index, layer in enumerate(self.encoder.layers)
            if isinstance(layer, MergingLayer)
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not reset_compressor(module, self.compressors().values()):
            super()._init_weights(module)


class LacoSiglipVisionConfig(CompressedVisionConfig, SiglipVisionConfig):
    model_type = "laco_siglip_vision_model"


class LacoSiglipEncoderLayer(MergingLayer, SiglipEncoderLayer):
    prefix = 0


class LacoSiglipVisionModel(CompressedVisionModel, SiglipVisionModel):
    config: LacoSiglipVisionConfig
    layer_class = LacoSiglipEncoderLayer
    _no_split_modules = [*SiglipVisionModel._no_split_modules, "LacoSiglipEncoderLayer"]  # noqa: RUF012


class LacoCLIPVisionConfig(CompressedVisionConfig, CLIPVisionConfig):
    model_type = "laco_clip_vision_model"


class LacoCLIPEncoderLayer(MergingLayer, CLIPEncoderLayer):
    prefix = 1


class LacoCLIPVisionModel(CompressedVisionModel, CLIPVisionModel):
    config: LacoCLIPVisionConfig
    layer_class = LacoCLIPEncoderLayer
    _no_split_modules = [*CLIPVisionModel._no_split_modules, "LacoCLIPEncoderLayer"]  # noqa: RUF012


def take_over_conversions(ours: str, stock: str) -> None:
    """Hub checkpoints of the stock class load into ours too: renaming of old keys is skipped for unknown
    classes.
    """
    if (mapping := get_checkpoint_conversion_mapping(stock)) is not None:
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


@dataclass(frozen=True)
class Encoder:
    """A vision encoder that mergers can stand in: its stock and its compressed classes."""

    name: str
    stock: type[PreTrainedModel]
    stock_config: type[PreTrainedConfig]
    compressed: type[CompressedVisionModel]
    compressed_config: type[CompressedVisionConfig]

    @property
    def prefix(self) -> int:
        return self.compressed.layer_class.prefix

    def owns(self, config: PreTrainedConfig) -> bool:
        return config.model_type in (self.stock_config.model_type, self.compressed_config.model_type)

    def register(self) -> None:
        AutoConfig.register(self.compressed_config.model_type, self.compressed_config, exist_ok=True)
        AutoModel.register(self.compressed_config, self.compressed, exist_ok=True)
        take_over_conversions(self.compressed.__name__, self.stock.__name__)


ENCODERS = (
    Encoder("siglip", SiglipVisionModel, SiglipVisionConfig, LacoSiglipVisionModel, LacoSiglipVisionConfig),
    Encoder("clip", CLIPVisionModel, CLIPVisionConfig, LacoCLIPVisionModel, LacoCLIPVisionConfig),
)
for encoder in ENCODERS:
    encoder.register()


def encoder_of(config: PreTrainedConfig) -> Encoder:
    """The encoder that a vision configuration, stock or compressed, belongs to; `LacoError` if to none."""
    for encoder in ENCODERS:
        if encoder.owns(config):
            return encoder
    known = ", ".join(encoder.name for encoder in ENCODERS)
    raise LacoError(f"the vision encoder {config.model_type!r} is not supported; there are {known}")
