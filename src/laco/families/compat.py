"""What differs between the versions of transformers that laco works with, 5.16.1 to the newest."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

TAKES_FEATURES = Version(transformers.__version__) >= Version("5.18")  # models have `mm_encoder_outputs`


def checkpoint_activations(model: PreTrainedModel, **settings: Any) -> None:
    """Turns gradient checkpointing on, which transformers 5.23 renamed. `settings` go to torch.utils.checkpoint."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings or None)


@contextmanager
def given_features(
    model: Any, seen: Mapping[str, Any], others: Mapping[str, Any], features: Any
) -> Iterator[dict[str, Any]]:
    """Arguments with which a model, or `generate`, does not run its vision encoder again.

    Args:
        seen: the encoder's inputs.
        others: all other inputs.
        features: what `get_image_features` made of `seen`.
    """
    if TAKES_FEATURES:
        yield {**others, "mm_encoder_outputs": {"image": features}}
        return
    # Such a model only takes pictures, but it asks its innermost part with this method for their features.
    *_, body = (part for part in model.modules() if hasattr(type(part), "get_image_features"))
    body.get_image_features = lambda *args, **kwargs: features
    try:
        yield {**others, **seen}
    finally:
        del body.get_image_features
