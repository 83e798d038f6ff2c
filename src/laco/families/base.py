"""What surgery has to know of a family: a group of Hugging Face architectures that work alike."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from laco.errors import LacoError
from laco.families.connector import Connector, ConnectorForConditionalGeneration, ConnectorModel
from laco.families.encoders import CompressedVisionModel, encoder_of, take_over_conversions
from laco.families.steps import Step, square_grid
from laco.grid import Grid


class Family(ABC):
    """Where the parts of a model are, and which numbers of its processor follow from the encoder's grid.

    Class data: `name` (of listings and saved compressors), `holds` (what works, for listings), the stock
    classes with language-model head, without, and of the configuration, and their subclasses `connected` for
    models with a merger as their projector.
    """

    name: ClassVar[str]
    holds: ClassVar[str]
    stock: ClassVar[type[PreTrainedModel]]
    stock_model: ClassVar[type[PreTrainedModel]]
    stock_config: ClassVar[type[PreTrainedConfig]]
    connected: ClassVar[type[ConnectorForConditionalGeneration]]
    connected_config: ClassVar[type[PreTrainedConfig]]

    @property
    def connected_model(self) -> type[ConnectorModel]:
        return self.connected.model_class

    def register(self) -> None:
        """Makes the Auto classes know the models with a merger as their projector."""
        config = self.connected_config
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, self.connected_model, exist_ok=True)
        AutoModelForImageTextToText.register(config, self.connected, exist_ok=True)
        take_over_conversions(config.model_type, self.stock_config.model_type)
        take_over_conversions(self.connected_model.__name__, self.stock_model.__name__)

    def owns(self, model: nn.Module) -> bool:
        return type(model) in (self.stock, self.connected)

    # The parts of a model.

    def encoder(self, model: PreTrainedModel) -> Any:
        return model.model.vision_tower

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        model.model.vision_tower = encoder
        model.config.vision_config = encoder.config
        for part in (model, model.model):  # gathered from the encoder when the model was built
            part._no_split_modules = {*(part._no_split_modules or ()), *(encoder._no_split_modules or ())}

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return self.encoder(model).encoder.layers

    def projector(self, model: PreTrainedModel) -> nn.Module:
        return model.model.multi_modal_projector

    def set_projector(self, model: PreTrainedModel, projector: nn.Module, read: int | list[int]) -> None:
        """Puts a projector in its place; whether it is a merger decides the (otherwise equal) classes."""
        connected = isinstance(projector, Connector)
        model.model.multi_modal_projector = projector
        model.config.vision_feature_layer = read
        model.__class__ = self.connected if connected else self.stock
        model.model.__class__ = self.connected_model if connected else self.stock_model
        model.config.__class__ = self.connected_config if connected else self.stock_config

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.model.language_model

    def compressors(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The mergers in a model by their places, `layers.{k}` or `projector`."""
        encoder, projector = self.encoder(model), self.projector(model)
        found: dict[str, nn.Module] = {}
        if isinstance(encoder, CompressedVisionModel):
            found = {f"layers.{k}": compressor for k, compressor in encoder.compressors().items()}
        if isinstance(projector, Connector):
            found["projector"] = projector.compressor
        return found

    # The geometry, from a configuration alone.

    def steps(self, config: PreTrainedConfig) -> list[Step]:
        """The mergers that a model of this configuration has, first to last."""
        return getattr(config.vision_config, "steps", [])

    def read_layers(self, config: PreTrainedConfig, read: int | list[int] | None = None) -> list[int]:
        """The counts of encoder layers whose outputs the language model reads, or would by
        `vision_feature_layer`.
        """
        read = config.vision_feature_layer if read is None else read
        layers = config.vision_config.num_hidden_layers
        return [index % (layers + 1) for index in ([read] if isinstance(read, int) else read)]

    def own_grid(self, config: PreTrainedConfig) -> Grid:
        """The grid of one picture (or tile, or frame) before any merger."""
        vision = config.vision_config
        return square_grid(vision.image_size, getattr(vision, "embed_patch_size", vision.patch_size))

    def grid(self, config: PreTrainedConfig) -> Grid:
        """The grid of one picture (or tile, or frame) as the language model sees it."""
        return square_grid(config.vision_config.image_size, config.vision_config.patch_size)

    # The processor.

    @abstractmethod
    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The attributes that a processor must have to count placeholder tokens as this model needs them."""

    def check_processor(self, processor: Any, config: PreTrainedConfig) -> None:
        """Raises `LacoError` unless a processor counts and sizes pictures as the model does."""
        if not hasattr(processor, "image_processor"):
            raise LacoError(f"a {type(processor).__name__} is no processor of pictures and text")
        picture = picture_size(processor.image_processor)
        size = config.vision_config.image_size
        pairs = {name: (getattr(processor, name, None), v) for name, v in self.processor_numbers(config).items()}
        pairs["image_token_id"] = (getattr(processor, "image_token_id", None), config.image_token_id)
        pairs["the picture size"] = (picture, (size, size))
        for name, (found, wanted) in pairs.items():
            if found != wanted:
                raise LacoError(f"the processor does not match the model: {name} is {found}, the model needs {wanted}")

    def set_processor(self, processor: ProcessorMixin, config: PreTrainedConfig) -> None:
        """Lets a processor count placeholder tokens as a model of this configuration needs them."""
        for name, value in self.processor_numbers(config).items():
            setattr(processor, name, value)

    def prefix(self, config: PreTrainedConfig) -> int:
        """Prefix tokens of the encoder."""
        return encoder_of(config.vision_config).prefix


def picture_size(image_processor: Any) -> tuple[int | None, int | None]:
    """Height and width in pixels of what an image processor gives to the encoder."""
    cropped = getattr(image_processor, "do_center_crop", False) and image_processor.crop_size
    size = image_processor.crop_size if cropped else image_processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size.get("height"), size.get("width"))
