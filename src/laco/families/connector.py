"""A merger as the connector: in the place of the projector between vision encoder and language model.

The stock classes build their own projector, so a model with another one is an (otherwise empty) subclass.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from laco.families.encoders.base import merge_tokens, reset_compressor
from laco.families.steps import Step
from laco.methods import Merger


class Connector(nn.Module):
    """(B, N, levels * C) features of the encoder -> (B, N', text width).

    `replaced` holds what stood here before, projector and `vision_feature_layer`, outside of parameters and
    state_dict; it is gone after saving and loading.
    """

    replaced: tuple[nn.Module, int | list[int]] | None = None

    def __init__(self, merger: Merger, width: int, text_width: int):
        super().__init__()
        self.compressor = merger.build_projector(width, text_width)
        self.factor, self.odd = merger.factor, merger.odd

    def forward(self, image_features: Tensor) -> Tensor:
        return merge_tokens(self.compressor, image_features, self.factor, self.odd)


def connector_step(config: PreTrainedConfig) -> Step | None:
    """The step that stands in the place of the projector, if the model's configuration has one."""
    steps = getattr(config.vision_config, "steps", [])
    return next((step for step in steps if step.place == "projector"), None)


class ConnectorModel(PreTrainedModel):
    """Mixin of a model whose projector is the merger of its configuration's compression, if that has one."""

    multi_modal_projector: Any

    def __init__(self, config: Any):
        super().__init__(config)
        if (step := connector_step(config)) is not None:
            self.multi_modal_projector = Connector(
                step.merger, config.vision_config.hidden_size, config.text_config.hidden_size
            )
            self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        projector = self.multi_modal_projector
        if not isinstance(projector, Connector) or not reset_compressor(module, [projector.compressor]):
            super()._init_weights(module)


class ConnectorForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Mixin of such a model with its language-model head."""

    model_class: ClassVar[type[ConnectorModel]]

    def __init__(self, config: Any):
        # Not the stock constructor, which would build the stock model first.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
