"""What differs between the versions of transformers that laco works with, 5.16.1 to the newest."""

from typing import Any

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel, **settings: Any) -> None:
    """Turns gradient checkpointing on, which transformers 5.23 renamed. `settings` go to torch.utils.checkpoint."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings or None)
