"""Mistral 3: Pixtral, with a projector that merges `spatial_merge_size` neighbours in both directions.

That projector stays, and finds the grids of its pictures by the effective patch size; mergers stand before it.
"""

from typing import Any

from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Mistral3Model, PreTrainedModel

from laco.families.llava_pixtral import PixtralFamily
from laco.grid import Grid, merged_grid


class Mistral3(PixtralFamily):
    name = "mistral3"
    stock = Mistral3ForConditionalGeneration
    stock_model = Mistral3Model
    stock_config = Mistral3Config

    def merged_side(self, config: Any) -> int:
        return config.spatial_merge_size

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        super().set_encoder(model, encoder)
        projector: Any = self.projector(model)
        projector.patch_merger.patch_size = encoder.config.patch_size

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        return merged_grid(grid, self.merged_side(config), "pad").tokens  # the processor rounds up to whole windows

    def projections(self, config: Any) -> list[tuple[int, int]]:
        width, _ = self.widths(config)
        return [(width * self.merged_side(config) ** 2, width), *super().projections(config)]
