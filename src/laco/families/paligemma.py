"""PaliGemma: one square picture size, a linear projector, attention both ways over pictures and prompt.

Model and processor count placeholder tokens by `patch_size` and by plain numbers, so nothing but the encoder
changes. Its projector reads the encoder's normed output, so external methods stand before it.
"""

from collections.abc import Sequence
from typing import Any

from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco.families.base import Family
from laco.families.encoders import SIGLIP
from laco.families.steps import Step


class PaliGemma(Family):
    name = "paligemma"
    holds = "several pictures, batches, prefix and suffix"
    packs = False  # the whole prompt sees itself
    stock = PaliGemmaForConditionalGeneration
    stock_model = PaliGemmaModel
    stock_config = PaliGemmaConfig
    encoders = (SIGLIP,)

    # The configuration counts the tokens of a picture when it is made; so do these.

    def with_steps(self, config: Any, steps: Sequence[Step]) -> Any:
        new = super().with_steps(config, steps)
        new.text_config.num_image_tokens = self.grid(new).tokens
        return new

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        super().set_encoder(model, encoder)
        model.config.text_config.num_image_tokens = self.grid(model.config).tokens

    def projections(self, config: Any) -> list[tuple[int, int]]:
        return [(self.widths(config)[0], config.projection_dim)]

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        tokens = self.grid(config).tokens
        # The processor is built from the number that its image processor has.
        return {"image_seq_length": tokens, "image_processor.image_seq_length": tokens}
