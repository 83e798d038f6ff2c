"""Pixtral: pictures of any size, packed one behind the other in one sequence; each attends to itself alone.

No prefix token. Positions are rotations by row and column in every layer; a merged token keeps those of its
window's top left corner. Attention sees differences alone, so this equals the window's centre, while numbering
the merged tokens anew would not be what the encoder has learned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PixtralVisionConfig, PixtralVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.pixtral.modeling_pixtral import (
    PixtralAttentionLayer,
    PixtralTransformer,
    generate_block_attention_mask,
)
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from laco.errors import LacoError
from laco.families.encoders.base import Encoder, FixedGridVisionConfig, FixedGridVisionModel, MergingLayer, Size
from laco.families.steps import image_sides
from laco.grid import Grid, merge_map, merged_grid


def unpacked(x_NC: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """The maps (1, H, W, C) of the pictures that lie in a sequence (N, C)."""
    parts = x_NC.split([grid.tokens for grid in grids])
    return [part.reshape(*grid, -1) for part, grid in zip(parts, grids, strict=True)]


def packed(maps_1HWC: Sequence[Tensor]) -> Tensor:
    """The inverse of `unpacked`."""
    return torch.cat([x_1HWC.flatten(0, 2) for x_1HWC in maps_1HWC])


def each_alone(config: Any, x_1NC: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    """The arguments of a layer by which every picture attends to itself alone."""
    tokens = [grid.tokens for grid in grids]
    if not is_flash_attention_requested(config):
        return {"attention_mask": generate_block_attention_mask(tokens, x_1NC)}
    ends = torch.tensor([0, *tokens], device=x_1NC.device).cumsum(0, dtype=torch.int32)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(tokens), "max_length_k": max(tokens)}
    return {"attention_mask": None, **bounds}


class LacoPixtralVisionConfig(FixedGridVisionConfig, PixtralVisionConfig):
    """Here pictures have any size, in whole effective patches, so that every grid divides by the factors.

    A processor that counts in effective patches resizes to them, up, as a merger pads: so no grid is odd. The rule
    `error` refuses factors that would enlarge a picture of `image_size`.
    """

    model_type = "laco_pixtral"

    def effective_patch_size(self, own: Any) -> Any:
        grid = Grid(1, *(side // own for side in image_sides(self.image_size)))
        for step in self.steps:
            grid = step.merger.num_tokens(grid)
        return own * math.prod(step.merger.factor for step in self.steps)


class LacoPixtralAttentionLayer(MergingLayer, PixtralAttentionLayer):
    def forward(self, hidden_states: Tensor, grids: Sequence[Grid], **kwargs: Any) -> Tensor:  # type: ignore[override]
        x_1NC = PixtralAttentionLayer.forward(self, hidden_states, **kwargs)
        maps = unpacked(x_1NC[0], grids)
        return packed([merge_map(self.compressor, x_1HWC, self.factor, self.odd) for x_1HWC in maps])[None]


class LacoPixtralTransformer(PixtralTransformer):
    """The layers, with masks and rotations that change at every merger."""

    def forward(  # type: ignore[override]
        self, x_1NC: Tensor, grids: Sequence[Grid], position_embeddings: tuple[Tensor, ...], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        given = each_alone(self.config, x_1NC, grids)
        for layer in self.layers:
            if not isinstance(layer, LacoPixtralAttentionLayer):
                x_1NC = layer(x_1NC, position_embeddings=position_embeddings, **given, **kwargs)
                continue
            x_1NC = layer(x_1NC, position_embeddings=position_embeddings, grids=grids, **given, **kwargs)
            r = layer.factor
            position_embeddings = tuple(
                packed([x_1HWC[:, ::r, ::r] for x_1HWC in unpacked(part_NC, grids)]) for part_NC in position_embeddings
            )
            grids = [merged_grid(grid, r, layer.odd) for grid in grids]
            given = each_alone(self.config, x_1NC, grids)
        return BaseModelOutputWithPooling(last_hidden_state=x_1NC)


class LacoPixtralVisionModel(FixedGridVisionModel, PixtralVisionModel):
    config: LacoPixtralVisionConfig
    layer_class = LacoPixtralAttentionLayer
    cannot_reduce = (
        "it packs pictures of different sizes into one sequence, whose bounds and positions a reducer does not know"
    )
    layers_at = "transformer.layers"
    _no_split_modules = [*PixtralVisionModel._no_split_modules, "LacoPixtralAttentionLayer"]  # noqa: RUF012

    def __init__(self, config: LacoPixtralVisionConfig):
        super().__init__(config)
        self.transformer.__class__ = LacoPixtralTransformer  # adds nothing that would have to be built
        self.patch_size = config.patch_size  # by which the model around counts the tokens of a picture
        rope: Any = self.patch_positional_embedding
        if rope.inv_freq.ndim == 2:  # in transformers 5.16 a table, which loading fills anew by the patch size
            rope.config = PIXTRAL.with_steps(config, [])

    # The stock forward, with grids from the patch size of the convolution.
    @capture_outputs
    def forward(self, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As the stock one; `LacoError` for a picture that is not whole effective patches."""
        grids = self.grids(pixel_values, image_sizes)
        maps_BHWC = self.patch_conv(pixel_values.to(self.patch_conv.weight.dtype)).movedim(1, -1)
        own = [x_HWC[None, : grid.height, : grid.width] for x_HWC, grid in zip(maps_BHWC, grids, strict=True)]
        x_1NC = self.ln_pre(packed(own)[None])
        return self.transformer(x_1NC, grids, self.rotations(x_1NC, grids), **kwargs)

    def grids(self, pixel_values: Tensor, image_sizes: Any) -> list[Grid]:
        """The grids of the pictures before any merger."""
        if image_sizes is None:
            image_sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        elif isinstance(image_sizes, Tensor):
            image_sizes = image_sizes.tolist()
        effective, own = self.config.patch_size, self.config.embed_patch_size
        for height, width in image_sizes:
            if height % effective or width % effective:
                raise LacoError(
                    f"pixtral compressed like this takes pictures in whole patches of {effective} x {effective} pixels,"
                    f" which one of {height} x {width} is not; let the processor that was compressed with it resize it"
                )
        return [Grid(1, height // own, width // own) for height, width in image_sizes]

    def rotations(self, x_1NC: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles, each (N, width of a head)."""
        rows_and_columns = [[torch.arange(side, device=x_1NC.device) for side in grid[1:]] for grid in grids]
        positions_N2 = torch.cat([torch.cartesian_prod(*both) for both in rows_and_columns])
        frequencies = self.patch_positional_embedding.inv_freq.to(x_1NC.device, torch.float32)
        if frequencies.ndim == 2:  # in transformers 5.16 a table of angles; in row 1, column 1 they are the frequencies
            frequencies, _ = frequencies[math.isqrt(len(frequencies)) + 1].chunk(2)
        angles_Nd = (positions_N2.repeat_interleave(len(frequencies) // 2, dim=-1) * frequencies).repeat(1, 2)
        return angles_Nd.cos().to(x_1NC.dtype), angles_Nd.sin().to(x_1NC.dtype)


@dataclass(frozen=True)
class PixtralEncoder(Encoder):
    """An encoder whose grids are as large as the processor has made the picture."""

    def mlp(self, config: Any) -> tuple[int, bool]:
        return config.intermediate_size, True

    def own_grid(self, config: Any, size: Size | None = None) -> Grid:
        """`size` is rounded up to whole effective patches, as the processor does; without it, `image_size` is."""
        effective = config.patch_size
        factor = effective // (getattr(config, "embed_patch_size", None) or effective)
        return Grid(1, *(-(-side // effective) * factor for side in size or image_sides(config.image_size)))

    def geometry(self, config: Any) -> dict[str, Any]:
        return {"patch_size": getattr(config, "embed_patch_size", None) or config.patch_size}


PIXTRAL = PixtralEncoder(
    "pixtral", PixtralVisionModel, PixtralVisionConfig, LacoPixtralVisionModel, LacoPixtralVisionConfig
)
