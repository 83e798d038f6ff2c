"""Idefics 3 and SmolVLM: SigLIP over tiles of one square size, each of which may be padded right and below.

No prefix token, positions by fractional coordinates, all before the first layer. A mask of the patches that are
real keeps the padding from being attended to, and here it follows the grid. What a picture's real tokens become
does not depend on its padding: they are merged as if the picture stood alone, odd sides and map mergers included.
The processors never pad a tile; masks come from pixels made by hand.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Idefics3VisionConfig, Idefics3VisionTransformer
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.idefics3.modeling_idefics3 import Idefics3Encoder, Idefics3EncoderLayer
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMEncoder, SmolVLMEncoderLayer, SmolVLMVisionTransformer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from laco.errors import LacoError
from laco.families.encoders.base import CompressedVisionConfig, CompressedVisionModel, Encoder, MergingLayer
from laco.families.encoders.halves import Halves
from laco.families.encoders.reducing import ReducingLayer
from laco.grid import merge_map


def merge_mask(real_BHW: Tensor, factor: int, odd: str) -> Tensor:
    """Which windows are real: (B, H, W) -> (B, h, w).

    Those with any real token, which then is the first; by the rule `crop` those with real tokens alone, which
    holds if the last is.
    """
    first = factor - 1 if odd == "crop" else 0
    return real_BHW[:, first::factor, first::factor]


def edge_repeated(lengths_B: Tensor, side: int, factor: int) -> Tensor:
    """(B, S): indices of a side of S tokens, a multiple of the factor, on which the last real token is repeated to
    the end of its window. Windows of padding alone stay as they are.
    """
    index_S = torch.arange(-(-side // factor) * factor, device=lengths_B.device)
    last_BS = torch.where(index_S // factor * factor < lengths_B[:, None], lengths_B[:, None], side) - 1
    return torch.minimum(index_S, last_BS)


def merge_padded(merger: nn.Module, x_BHWC: Tensor, real_BHW: Tensor, factor: int, odd: str) -> Tensor:
    """Merges pictures that are padded right and below: (B, H, W, C) -> (B, h, w, C).

    Windows of padding alone hold merged padding, which the stock model carries along as well.
    """
    tracing = torch.compiler.is_compiling()
    if not tracing and real_BHW.all():
        return merge_map(merger, x_BHWC, factor, odd)
    heights_B, widths_B = real_BHW[:, :, 0].sum(dim=1), real_BHW[:, 0].sum(dim=1)
    if not tracing and (real_BHW.sum(dim=(1, 2)) != heights_B * widths_B).any():
        raise LacoError("a picture may be padded only right and below, its real part being a rectangle")
    if merger.sees == "windows" and odd == "pad":
        rows_BS, columns_BS = (
            edge_repeated(lengths_B, side, factor)
            for lengths_B, side in zip((heights_B, widths_B), x_BHWC.shape[1:3], strict=True)
        )
        pictures_B = torch.arange(len(x_BHWC), device=x_BHWC.device)
        return merge_map(
            merger, x_BHWC[pictures_B[:, None, None], rows_BS[:, :, None], columns_BS[:, None]], factor, odd
        )
    merged_BhwC = merge_map(merger, x_BHWC, factor, odd)
    if tracing:  # no sizes to go by, so better no result than a wrong one
        return torch.where(real_BHW.all(), merged_BhwC, torch.nan)
    merged_BhwC = merged_BhwC.clone()
    for picture, (height, width) in enumerate(zip(heights_B.tolist(), widths_B.tolist(), strict=True)):
        (alone_hwC,) = merge_map(merger, x_BHWC[picture, None, :height, :width], factor, odd)
        merged_BhwC[picture, : alone_hwC.shape[0], : alone_hwC.shape[1]] = alone_hwC
    return merged_BhwC


class PaddedMergingLayer(MergingLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, real_BHW: Tensor) -> Tensor:
        x_BNC = super(MergingLayer, self).forward(hidden_states, attention_mask)  # the stock layer
        x_BHWC = x_BNC.unflatten(1, real_BHW.shape[1:])
        return merge_padded(self.compressor, x_BHWC, real_BHW, self.factor, self.odd).flatten(1, 2)


class PaddedEncoder(nn.Module):
    """Mixin of the stack of layers: the stock loop, in which the mask follows the grid."""

    config: Any
    layers: nn.ModuleList

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """`attention_mask` is that of the patches, (B, H, W)."""
        x_BNC, real_BHW = inputs_embeds, attention_mask
        if self.config.reducer is not None and not real_BHW.all():
            raise LacoError(
                "a tile is padded, which a compression that drops or merges tokens by their features forbids"
            )
        attended = create_bidirectional_mask(self.config, x_BNC, real_BHW.flatten(1))
        for layer in self.layers:
            if isinstance(layer, ReducingLayer):
                x_BNC = layer(x_BNC)
                continue
            if not isinstance(layer, PaddedMergingLayer):
                x_BNC = layer(x_BNC, attended)
                continue
            x_BNC = layer(x_BNC, attended, real_BHW)
            real_BHW = merge_mask(real_BHW, layer.factor, layer.odd)
            attended = create_bidirectional_mask(self.config, x_BNC, real_BHW.flatten(1))
        return BaseModelOutput(last_hidden_state=x_BNC)


class PaddedVisionModel(CompressedVisionModel):
    """Mixin of the vision encoder."""

    encoder_class: ClassVar[type[PaddedEncoder]]
    halves = Halves()
    embeddings: Any
    encoder: Any
    post_layernorm: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.encoder.__class__ = self.encoder_class  # which differs from the stock one in its forward alone

    def forward(
        self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return self.on_full_grids(self.encode, pixel_values, patch_attention_mask, **kwargs)

    # The stock forward; there the encoder gets a mask of pairs of tokens, which no longer tells the grid.
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def encode(
        self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        if patch_attention_mask is None:
            height, width = (pixels // self.config.patch_size for pixels in pixel_values.shape[2:])
            patch_attention_mask = pixel_values.new_ones(len(pixel_values), height, width, dtype=torch.bool)
        x_BNC = self.embeddings(pixel_values=pixel_values, patch_attention_mask=patch_attention_mask)
        x_BNC = self.encoder(x_BNC, patch_attention_mask).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(x_BNC))


class LacoIdefics3VisionConfig(CompressedVisionConfig, Idefics3VisionConfig):
    model_type = "laco_idefics3_vision"


class LacoIdefics3EncoderLayer(PaddedMergingLayer, Idefics3EncoderLayer):
    pass


class LacoIdefics3ReducingLayer(ReducingLayer, Idefics3EncoderLayer):
    pass


class LacoIdefics3Encoder(PaddedEncoder, Idefics3Encoder):
    pass


class LacoIdefics3VisionTransformer(PaddedVisionModel, Idefics3VisionTransformer):
    config: LacoIdefics3VisionConfig
    layer_class = LacoIdefics3EncoderLayer
    reducing_class = LacoIdefics3ReducingLayer
    encoder_class = LacoIdefics3Encoder
    _no_split_modules = [  # noqa: RUF012
        *Idefics3VisionTransformer._no_split_modules,
        "LacoIdefics3EncoderLayer",
        "LacoIdefics3ReducingLayer",
    ]


class LacoSmolVLMVisionConfig(CompressedVisionConfig, SmolVLMVisionConfig):
    model_type = "laco_smolvlm_vision"


class LacoSmolVLMEncoderLayer(PaddedMergingLayer, SmolVLMEncoderLayer):
    pass


class LacoSmolVLMReducingLayer(ReducingLayer, SmolVLMEncoderLayer):
    pass


class LacoSmolVLMEncoder(PaddedEncoder, SmolVLMEncoder):
    pass


class LacoSmolVLMVisionTransformer(PaddedVisionModel, SmolVLMVisionTransformer):
    config: LacoSmolVLMVisionConfig
    layer_class = LacoSmolVLMEncoderLayer
    reducing_class = LacoSmolVLMReducingLayer
    encoder_class = LacoSmolVLMEncoder
    _no_split_modules = [  # noqa: RUF012
        *SmolVLMVisionTransformer._no_split_modules,
        "LacoSmolVLMEncoderLayer",
        "LacoSmolVLMReducingLayer",
    ]


IDEFICS3 = Encoder(
    "idefics3",
    Idefics3VisionTransformer,
    Idefics3VisionConfig,
    LacoIdefics3VisionTransformer,
    LacoIdefics3VisionConfig,
)
SMOLVLM = Encoder(
    "smolvlm", SmolVLMVisionTransformer, SmolVLMVisionConfig, LacoSmolVLMVisionTransformer, LacoSmolVLMVisionConfig
)
