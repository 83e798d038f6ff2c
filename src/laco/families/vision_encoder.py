"""A vision encoder alone: the model is the encoder, as the Auto classes load it, without projector and language model.

Every encoder that transformers has as a model of its own is one. A compressed one is of another class, so the object
takes over class and state of the encoder that was built around its parameters.
"""

from collections.abc import Sequence
from typing import Any

from transformers import (
    MODEL_MAPPING,
    AutoImageProcessor,
    AutoModel,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco.errors import LacoError
from laco.families.base import Family, picture_size
from laco.families.encoders import ENCODERS, Encoder
from laco.families.steps import Step, image_sides
from laco.methods import Method, Reducer


def stands_alone(encoder: Encoder) -> bool:
    """Whether the Auto classes load it by itself."""
    return MODEL_MAPPING.get(encoder.stock_config, None) is encoder.stock


class VisionEncoder(Family):
    """See the module. An encoder that is a part of a model is to be compressed with the model, not by itself."""

    name = "vision_encoder"
    holds = "the encoder by itself, with an image processor or none"
    encoders = tuple(encoder for encoder in ENCODERS if stands_alone(encoder))
    encoder_at = ""
    auto_model = AutoModel
    auto_processor = AutoImageProcessor

    @property
    def stock_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return tuple(encoder.stock for encoder in self.encoders)

    @property
    def compressed_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return tuple(encoder.compressed for encoder in self.encoders)

    def owns_config(self, config: PreTrainedConfig) -> bool:
        return any(encoder.owns(config) for encoder in self.encoders)

    def body(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        # Outputs are captured by what is registered for a class when one is built, as `encoder` was.
        model.__class__ = type(encoder)
        model.__dict__.update(encoder.__dict__)

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        raise LacoError("a vision encoder alone has no language model")

    # The geometry. The encoder's configuration is the model's.

    def vision_config(self, config: Any) -> Any:
        return config

    def text_config(self, config: Any) -> None:
        return None

    def widths(self, config: PreTrainedConfig) -> tuple[int, Any]:
        return self.encoder_kind(config).width(config), None

    def with_steps(self, config: PreTrainedConfig, steps: Sequence[Step]) -> PreTrainedConfig:
        return self.encoder_kind(config).with_steps(config, steps)

    def why_not(self, config: Any, method: Method) -> str | None:
        if isinstance(method, Reducer):
            return self.encoder_kind(config).why_not(config, method)
        return "a vision encoder alone has no language model for it"

    def projections(self, config: Any) -> list[tuple[int, int]]:
        return []

    # The image processor.

    def processor_numbers(self, config: Any) -> dict[str, Any]:
        """Those of image processors that cut pictures into patches themselves; others have no such attributes."""
        names = {
            "patch_size": "patch_size",
            "temporal_patch_size": "temporal_patch_size",
            "merge_size": "spatial_merge_size",
        }
        return {name: getattr(config, ours) for name, ours in names.items() if hasattr(config, ours)}

    def check_processor(self, processor: Any, config: Any) -> None:
        if not isinstance(processor, ImageProcessingMixin):
            raise LacoError(f"a vision encoder alone takes an image processor; a {type(processor).__name__} is none")
        kind, tile = self.encoder_kind(config), getattr(processor, "max_image_size", None)
        size = (tile["longest_edge"],) * 2 if tile else picture_size(processor)
        if not kind.takes(config, size):
            wanted = "squares" if kind.interpolates(config) else "{} x {}".format(*image_sides(config.image_size))
            raise LacoError(
                f"the image processor does not match the encoder: it makes pictures of {size[0]} x {size[1]} pixels,"
                f" {kind.name} takes {wanted}"
            )
        for name, wanted in self.processor_numbers(config).items():
            found = getattr(processor, name, None)
            if found is not None and found != like(found, wanted):
                raise LacoError(
                    f"the image processor does not match the encoder: its {name} is {found}, the encoder needs {wanted}"
                )

    def set_processor(self, processor: Any, config: Any) -> None:
        for name, value in self.processor_numbers(config).items():
            if (found := getattr(processor, name, None)) is not None:
                setattr(processor, name, like(found, value))


def like(found: Any, value: Any) -> Any:
    """A size as this attribute of an image processor has it: a number, or height and width by name."""
    return {"height": value, "width": value} if isinstance(found, dict) else value
