"""What differs between the versions of transformers that laco works with, 5.16.1 to the newest."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

TAKES_FEATURES = Version(transformers.__version__) >= Version("5.18")  # models have `mm_encoder_outputs`
# Before that, in this thread: by the id of the part of a model that is asked for them.
GIVEN: ContextVar[Mapping[int, Mapping[str, Any]]] = ContextVar("laco_given", default=MappingProxyType({}))


def checkpoint_activations(model: PreTrainedModel, **settings: Any) -> None:
    """Turns gradient checkpointing on, which transformers 5.23 renamed. `settings` go to torch.utils.checkpoint."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings or None)


def encode_pictures(model: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """{"image" or "video": features} of the encoder's inputs `seen`, pixels and what is said of them."""
    features = {}
    for kind in ("image", "video"):
        own = {name: value for name, value in seen.items() if ("video" in name) == (kind == "video")}
        if own:
            # Before 5.18 the pixels of videos are an argument of another name in some models; they always come first.
            pixels = own.pop("pixel_values_videos" if kind == "video" else "pixel_values")
            features[kind] = getattr(model, f"get_{kind}_features")(pixels, **own, return_dict=True)
    return features


@contextmanager
def given_features(
    model: Any, seen: Mapping[str, Any], others: Mapping[str, Any], features: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Arguments with which a model, or `generate`, does not run its vision encoder again.

    Args:
        seen: the encoder's inputs.
        others: all other inputs.
        features: what `encode_pictures` made of `seen`.
    """
    if TAKES_FEATURES:
        yield {**others, "mm_encoder_outputs": dict(features)}
        return
    # Such a model only takes pixels, but it asks its innermost part with these methods for their features.
    *_, body = (part for part in model.modules() if hasattr(type(part), "get_image_features"))
    token = GIVEN.set({**GIVEN.get(), id(body): features})

    def asked(kind: str, *args: Any, **kwargs: Any) -> Any:
        handed = handed_features(body)  # another thread may ask the same model about other pictures
        return handed[kind] if kind in handed else getattr(type(body), f"get_{kind}_features")(body, *args, **kwargs)

    for kind in features:
        setattr(body, f"get_{kind}_features", partial(asked, kind))
    try:
        yield {**others, **seen}
    finally:
        GIVEN.reset(token)
        for kind in features:
            vars(body).pop(f"get_{kind}_features", None)


def handed_features(body: Any) -> Mapping[str, Any]:
    """What `given_features` has for this part of a model, where models do not take it."""
    return GIVEN.get().get(id(body), {})
