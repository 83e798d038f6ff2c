"""SigLIP 2 NaFlex: pictures of any shape, each padded at its end to the longest of the batch.

Every picture keeps its own grid and its own odd sides. No prefix token; positions are added before layer 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from laco.families.encoders.base import CompressedVisionConfig, CompressedVisionModel, Encoder, MergingLayer, Size
from laco.families.encoders.halves import Halves
from laco.grid import Grid, merge_map, merged_side


def merged_shapes(shapes_B2: Tensor, factor: int, odd: str) -> Tensor:
    """Height and width of every picture's grid after one merge, as `grid.merged_side` and with its errors."""
    if odd in ("crop", "error"):
        for side in shapes_B2.flatten().tolist():
            merged_side(side, factor, odd)
    return shapes_B2 // factor if odd == "crop" else (shapes_B2 + factor - 1) // factor


def window_indices(shapes_B2: Tensor, factor: int, odd: str) -> Tensor:
    """(B, N', R): where in a picture's sequence the tokens of its n-th window are.

    N' is the largest number of windows of a picture; those past the end of a smaller one repeat its last row.
    A window over the edge repeats the last row and column, so this fits every odd rule but `resize`.
    """
    merged_B2 = merged_shapes(shapes_B2, factor, odd)
    length = merged_B2.prod(dim=-1).max().item()
    if torch.compiler.is_compiling():
        torch._check(length > 1)  # which attention asks
    n_N = torch.arange(length, device=shapes_B2.device)
    r_R = torch.arange(factor * factor, device=shapes_B2.device)
    height_B11, width_B11 = shapes_B2[:, :, None, None].unbind(dim=1)
    windows_B1 = merged_B2[:, 1:]  # in a row
    y_BNR = (n_N // windows_B1)[:, :, None] * factor + r_R // factor
    x_BNR = (n_N % windows_B1)[:, :, None] * factor + r_R % factor
    return torch.minimum(y_BNR, height_B11 - 1) * width_B11 + torch.minimum(x_BNR, width_B11 - 1)


def merge_padded(merger: nn.Module, x_BNC: Tensor, shapes_B2: Tensor, factor: int, odd: str) -> Tensor:
    """Merges the grids of pictures that lie row by row in padded sequences: (B, N, C) -> (B, N', C)."""
    if merger.sees == "windows" and odd != "resize":
        index_BNR = window_indices(shapes_B2, factor, odd)
        return merger(x_BNC[torch.arange(len(x_BNC), device=x_BNC.device)[:, None, None], index_BNR])
    # A map has edges of its own, so it is merged picture by picture.
    maps = [x_NC[: h * w].view(1, h, w, -1) for x_NC, (h, w) in zip(x_BNC, shapes_B2.tolist(), strict=True)]
    return pad_sequence([merge_map(merger, x, factor, odd).flatten(0, 2) for x in maps], batch_first=True)


class LacoSiglip2VisionConfig(CompressedVisionConfig, Siglip2VisionConfig):
    model_type = "laco_siglip2_vision_model"


class LacoSiglip2EncoderLayer(MergingLayer, Siglip2EncoderLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, shapes_B2: Tensor, **kwargs: Any) -> Tensor:
        x_BNC = Siglip2EncoderLayer.forward(self, hidden_states, attention_mask, **kwargs)
        return merge_padded(self.compressor, x_BNC, shapes_B2, self.factor, self.odd)


class LacoSiglip2VisionModel(CompressedVisionModel, Siglip2VisionModel):
    config: LacoSiglip2VisionConfig
    layer_class = LacoSiglip2EncoderLayer
    halves = Halves()
    cannot_reduce = "it pads pictures to one length, and a reducer would take the padding for tokens"
    _no_split_modules = [*Siglip2VisionModel._no_split_modules, "LacoSiglip2EncoderLayer"]  # noqa: RUF012

    # The stock forward, with grids and masks that change from layer to layer.
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None, spatial_shapes: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As the stock one. `merged_shapes` tells the grids of the tokens that it gives."""
        x_BNC = self.embeddings(pixel_values, spatial_shapes)
        shapes_B2, mask_BN = spatial_shapes, pixel_attention_mask
        attended = create_bidirectional_mask(config=self.config, inputs_embeds=x_BNC, attention_mask=mask_BN)
        for layer in self.layers:
            if not isinstance(layer, MergingLayer):
                x_BNC = layer(x_BNC, attended, **kwargs)
                continue
            x_BNC = layer(x_BNC, attended, shapes_B2=shapes_B2, **kwargs)
            shapes_B2 = merged_shapes(shapes_B2, layer.factor, layer.odd)
            mask_BN = torch.arange(x_BNC.shape[1], device=x_BNC.device) < shapes_B2.prod(dim=-1, keepdim=True)
            attended = create_bidirectional_mask(config=self.config, inputs_embeds=x_BNC, attention_mask=mask_BN)
        x_BNC = self.post_layernorm(x_BNC)
        pooled_BC = self.head(x_BNC, mask_BN) if self.use_head else None
        return BaseModelOutputWithPooling(last_hidden_state=x_BNC, pooler_output=pooled_BC)

    def merged_shapes(self, spatial_shapes: Tensor) -> Tensor:
        """Height and width of every picture's tokens in `last_hidden_state`: (B, 2) -> (B, 2)."""
        for step in self.config.steps:
            spatial_shapes = merged_shapes(spatial_shapes, step.merger.factor, step.merger.odd)
        return spatial_shapes


@dataclass(frozen=True)
class NaflexEncoder(Encoder):
    """An encoder whose grids are as large as the processor has made the picture."""

    def own_grid(self, config: Any, size: Size | None = None) -> Grid:
        """`size` is that of the picture as it is cut into patches; without it, the grid of the learned positions."""
        if size is None:
            side = int(config.num_patches**0.5)
            return Grid(1, side, side)
        return Grid(1, size[0] // config.patch_size, size[1] // config.patch_size)

    def geometry(self, config: Any) -> dict[str, Any]:
        return {"patch_size": config.patch_size, "num_patches": config.num_patches}


SIGLIP2 = NaflexEncoder(
    "siglip2", Siglip2VisionModel, Siglip2VisionConfig, LacoSiglip2VisionModel, LacoSiglip2VisionConfig
)
