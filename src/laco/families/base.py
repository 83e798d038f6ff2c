"""What surgery has to know of a family: a group of Hugging Face architectures that work alike."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from operator import attrgetter
from statistics import fmean
from typing import Any, ClassVar

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from laco.errors import LacoError
from laco.families.connector import Connector
from laco.families.counts import Counts
from laco.families.encoders import CompressedVisionModel, Encoder, encoder_of
from laco.families.encoders.base import Size, take_over_conversions
from laco.families.reduction import ReducedModel, restore
from laco.families.reduction.signals import map_counts
from laco.families.steps import Compression, Step, image_sides
from laco.grid import Grid
from laco.methods import DecoderMethod, Merger, Method, Reducer, Selector


class Family(ABC):
    """Where the parts of a model are, and which numbers of its processor follow from the encoder's grid.

    Class data:
        name: of listings and saved compressors. `holds`: what works, for listings.
        stock, stock_model, stock_config: the stock classes with language-model head, without it, and of the
            configuration.
        compressed, compressed_model, compressed_config: their subclasses, for models that the stock classes
            cannot build; None where these build every compressed model. See `wears_our_classes`.
        encoders: those that are tested in it, for listings.
        encoder_at, projector_at: paths of vision encoder and projector in the model.
        connects: a merger may take the place of the projector. Not where that is itself a merger or has
            other duties; there, external methods stand before it.
        packs: several questions about a picture may be trained on in one sequence, kept apart by a mask of pairs of
            tokens and by positions: plain causal attention with positions of one dimension.
        one_grid, behind_video: see `Counts`.
        auto_model, auto_processor: the Auto classes that load them.
    """

    name: ClassVar[str]
    holds: ClassVar[str]
    stock: ClassVar[type[PreTrainedModel]]
    stock_model: ClassVar[type[PreTrainedModel]]
    stock_config: ClassVar[type[PreTrainedConfig]]
    compressed: ClassVar[type[PreTrainedModel] | None] = None
    compressed_model: ClassVar[type[PreTrainedModel] | None] = None
    compressed_config: ClassVar[type[PreTrainedConfig] | None] = None
    encoders: ClassVar[tuple[Encoder, ...]]
    encoder_at: ClassVar[str] = "model.vision_tower"
    projector_at: ClassVar[str] = "model.multi_modal_projector"
    connects: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    one_grid: ClassVar[bool] = False
    behind_video: ClassVar[int | None] = 0
    auto_model: ClassVar[Any] = AutoModelForImageTextToText
    auto_processor: ClassVar[Any] = AutoProcessor

    @property
    def stock_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return (self.stock,)

    @property
    def compressed_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return (self.compressed,) if self.compressed else ()

    def register(self) -> None:
        """Makes the Auto classes know the classes of compressed models."""
        if self.compressed is None or self.compressed_model is None or self.compressed_config is None:
            return
        if issubclass(self.compressed_model, ReducedModel):
            self.compressed_model.family = self
        AutoConfig.register(self.compressed_config.model_type, self.compressed_config, exist_ok=True)
        AutoModel.register(self.compressed_config, self.compressed_model, exist_ok=True)
        AutoModelForImageTextToText.register(self.compressed_config, self.compressed, exist_ok=True)
        take_over_conversions(self.compressed_config.model_type, self.stock_config.model_type)
        take_over_conversions(self.compressed_model.__name__, self.stock_model.__name__)
        take_over_conversions(self.compressed.__name__, self.stock.__name__)

    def owns(self, model: nn.Module) -> bool:
        return type(model) in (*self.stock_classes, *self.compressed_classes)

    def owns_config(self, config: PreTrainedConfig) -> bool:
        return type(config) in (self.stock_config, self.compressed_config)

    # The parts of a model.

    def encoder(self, model: PreTrainedModel) -> Any:
        return model.get_submodule(self.encoder_at)

    def layers(self, model: PreTrainedModel) -> Any:
        return self.encoder_kind(model.config).layers(self.encoder(model))

    def projector(self, model: PreTrainedModel) -> nn.Module:
        return model.get_submodule(self.projector_at)

    def body(self, model: PreTrainedModel) -> Any:
        """The model without its language-model head, of class `stock_model`: what holds the parts."""
        return model.model

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return self.body(model).language_model

    def compressors(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """What compresses and has parameters in a model, by its place: `layers.{k}` of the encoder, `projector`,
        `selector` behind it, or `decoder`, inside the language model.
        """
        encoder = self.encoder(model)
        found: dict[str, nn.Module] = {}
        if isinstance(encoder, CompressedVisionModel):
            found = {f"layers.{k}": compressor for k, compressor in encoder.compressors().items()}
        if self.connects and isinstance(projector := self.projector(model), Connector):
            found["projector"] = projector.compressor
        if self.reductions(model.config):
            found |= dict(getattr(self.language_model(model), "compressor", {}))
        return found

    # Changing a model, in place.

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        """Whether a model with these mergers needs our subclasses of the family's classes; with other methods all do.

        As it is, it fits stock classes that build their vision encoder through the Auto classes; only a
        merger as the projector is beyond them.
        """
        return any(step.place == "projector" for step in steps)

    def set_encoder(self, model: PreTrainedModel, encoder: PreTrainedModel) -> None:
        """Puts an encoder in its place, with its configuration."""
        parent, _, name = self.encoder_at.rpartition(".")
        setattr(model.get_submodule(parent), name, encoder)
        model.config.vision_config = encoder.config
        for part in (model, self.body(model)):  # gathered from the encoder when the model was built
            part._no_split_modules = {*(part._no_split_modules or ()), *(encoder._no_split_modules or ())}

    def set_projector(self, model: PreTrainedModel, projector: nn.Module, read: int | list[int]) -> None:
        """Puts a projector in its place, which reads the encoder's `vision_feature_layer` `read`."""
        parent, _, name = self.projector_at.rpartition(".")
        setattr(model.get_submodule(parent), name, projector)
        model.config.vision_feature_layer = read

    def set_classes(self, model: PreTrainedModel, compression: Compression) -> None:
        """Gives model and configuration the classes that build a model with this compression.

        They differ from the stock ones in construction and in what is around a forward, so an existing object can
        change between them.
        """
        ours = self.wears_our_classes(compression.steps) or compression.drops
        if self.compressed is None or self.compressed_model is None or self.compressed_config is None:
            assert not self.wears_our_classes(compression.steps), f"{self.name} has no classes for {compression}"
            return
        model.__class__ = self.compressed if ours else self.stock
        self.body(model).__class__ = self.compressed_model if ours else self.stock_model
        model.config.__class__ = self.compressed_config if ours else self.stock_config
        if issubclass(self.compressed_model, ReducedModel):
            model.config.reduction = compression.to_dict()["reduction"] or None
            body: Any = self.body(model)
            if ours:
                body.extend_language_model()
            else:
                restore(self.language_model(model))
                del model.config.reduction

    # The geometry, from a configuration alone.

    def vision_config(self, config: Any) -> Any:
        return config.vision_config

    def text_config(self, config: Any) -> Any:
        return config.text_config

    def encoder_kind(self, config: PreTrainedConfig) -> Encoder:
        return encoder_of(self.vision_config(config))

    def widths(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Channels of the encoder's tokens and of the language model's."""
        width = self.encoder_kind(config).width(self.vision_config(config))
        return width, self.text_config(config).hidden_size

    def prefix(self, config: PreTrainedConfig) -> int:
        """Prefix tokens of the encoder: CLS, registers."""
        return self.encoder_kind(config).prefix(self.vision_config(config))

    def steps(self, config: PreTrainedConfig) -> list[Step]:
        """The mergers that a model of this configuration has, first to last."""
        return getattr(self.vision_config(config), "steps", [])

    def reductions(self, config: PreTrainedConfig) -> list[Method]:
        """The methods behind the encoder or inside the language model that a model of this configuration has."""
        return getattr(config, "reductions", [])

    def reducer(self, config: PreTrainedConfig) -> Reducer | None:
        """The method inside the encoder's layers that a model of this configuration has."""
        return getattr(self.vision_config(config), "reducing_method", None)

    def compression(self, config: PreTrainedConfig) -> Compression:
        """All that compresses a model of this configuration."""
        return Compression(self.steps(config), self.reducer(config), self.reductions(config))

    def methods(self, config: PreTrainedConfig) -> list[Method]:
        """As `compression`, in the order in which tokens meet it."""
        return self.compression(config).methods

    def unmerges(self, config: Any) -> bool:
        """Whether tokens that were merged inside the encoder must come out at all their places, for a connector that
        joins neighbours.
        """
        kind = self.compressed_model
        return kind is not None and issubclass(kind, ReducedModel) and not kind.pictures.by_token

    def counts(self, config: Any) -> Counts:
        """What methods inside the encoder and behind it leave of pictures."""
        kind, joins = self.encoder_kind(config), self.unmerges(config)
        # A prefix token that stays passes the projector by itself.
        alone = not joins and all(step.place != "projector" for step in self.steps(config))
        return Counts(
            reducer=None if joins else self.reducer(config),
            selector=next((method for method in self.reductions(config) if isinstance(method, Selector)), None),
            layers=kind.num_layers(self.vision_config(config)),
            last=max(self.read_layers(config)),
            prefix=self.prefix(config) if alone else 0,
            grid=self.grid(config).tokens if self.one_grid else None,
            behind_video=self.behind_video,
        )

    def tokens_read(self, config: Any, grid: Grid) -> float | None:
        """As `visual_tokens`, after methods behind the encoder and, on average over layers, inside the language model;
        None where that depends on what is seen.
        """
        tokens: float | None = self.counts(config).left(self.visual_tokens(config, grid))
        method = next((method for method in self.reductions(config) if isinstance(method, DecoderMethod)), None)
        if tokens is None or method is None:
            return tokens
        if not method.static_count:
            return None
        return fmean(method.layer_tokens(round(tokens), self.text_config(config).num_hidden_layers))

    def reads_question(self, config: PreTrainedConfig) -> bool:
        """Whether what is left of a picture depends on the question in a way that its features alone cannot tell."""
        return any({"text", "text_attention", "maps"} & method.needs for method in self.reductions(config))

    def why_not(self, config: Any, method: Method) -> str | None:
        """Why a method cannot stand in a model, if it is no merger; None if it can."""
        if isinstance(method, Reducer) and (
            reason := self.encoder_kind(config).why_not(self.vision_config(config), method)
        ):
            return reason
        if self.compressed_model is None or not issubclass(self.compressed_model, ReducedModel):
            return f"{self.name} takes mergers alone so far"
        text = self.text_config(config)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            return f"its language model has layers of {' and '.join(sorted(kinds - {'full_attention'}))}"
        if not getattr(text, "layer_types", None) and (window := getattr(text, "sliding_window", None)):
            return (
                f"its language model sees the last {window} tokens alone; where prompts are shorter, load it with"
                " sliding_window=None in its text_config"
            )
        if missing := method.needs & {"clip_tokens", "clip_text"}:
            return f"it needs {' and '.join(sorted(missing))}, which laco does not gather in models so far"
        if isinstance(method, DecoderMethod):
            method.points(self.text_config(config).num_hidden_layers)  # raises where they are past the end
        return self.why_no_maps(config, method)

    def why_no_maps(self, config: Any, method: Method) -> str | None:
        """Why a method cannot stand in a model because it, or one that is there, reads layers of the encoder."""
        present = self.compression(config)
        if "maps" not in method.needs:
            reader = next((other for other in present.reductions if "maps" in other.needs), None)
            if reader is None or isinstance(method, DecoderMethod):
                return None
            return f"{reader.name} reads whole grids of visual tokens, of which {method.name} would take some away"
        for other in (present.reducer, *present.reductions):
            if isinstance(other, Reducer | Selector):
                return f"it reads whole grids of visual tokens, of which {other.name} takes some away"
        first = min(map_counts(method, self.encoder_kind(config).num_layers(self.vision_config(config))))
        for step in present.steps:
            if step.place == "projector" or step.layer > first:
                return (
                    f"it reads what the vision encoder puts out after layer {first}, which {step.merger.name} after"
                    f" layer {step.layer} leaves on another grid; merge after layer {first} or earlier"
                )
        return None

    def with_steps(self, config: Any, steps: Sequence[Step]) -> Any:
        """A copy of a configuration with exactly these mergers in the encoder's."""
        config = deepcopy(config)
        config.vision_config = self.encoder_kind(config).with_steps(self.vision_config(config), steps)
        return config

    def uncompressed(self, config: Any) -> Any:
        """A copy of a configuration that no method compresses."""
        config = self.with_steps(config, [])
        config.__class__ = self.stock_config
        if hasattr(config, "reduction"):
            del config.reduction
        return config

    def own_mergers(self, config: Any) -> list[Merger]:
        """The mergers that the stock encoder has inside by itself, `layer` being their place."""
        return []

    def read_layers(self, config: Any, read: int | list[int] | None = None) -> list[int]:
        """The counts of encoder layers whose outputs the language model reads, or would by
        `vision_feature_layer`; the last where a family has no such setting.
        """
        layers = self.encoder_kind(config).num_layers(self.vision_config(config))
        read = getattr(config, "vision_feature_layer", -1) if read is None else read
        return [index % (layers + 1) for index in ([read] if isinstance(read, int) else read)]

    def check_steps(self, config: Any, steps: Sequence[Step], read: int | list[int] | None = None) -> None:
        """Raises `LacoError` where mergers inside the encoder, sorted by layer, are beyond the family.

        As it is: all that the language model reads must lie on one grid.
        """
        first = min(self.read_layers(config, read))
        last = max((step.layer for step in steps if step.place == "encoder"), default=0)
        if last > first:
            raise LacoError(
                f"the language model also reads the output of encoder layer {first}, which merging after layer"
                f" {last} would leave on another grid; compress after layer {first} or earlier"
            )

    def own_grid(self, config: PreTrainedConfig, size: Size | None = None) -> Grid:
        """The grid of one picture (or tile, or frame) before any merger.

        `size`, height and width in pixels, is needed where the grid depends on the picture.
        """
        return self.encoder_kind(config).own_grid(self.vision_config(config), size)

    def grid(self, config: PreTrainedConfig, size: Size | None = None) -> Grid:
        """The grid of one picture (or tile, or frame) behind all mergers."""
        return self.encoder_kind(config).grid(self.vision_config(config), size)

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        """Tokens that the language model reads of one picture (or tile, or frame), line breaks left out.

        `grid` is what the encoder puts out; the family's own projector may merge it further.
        """
        return grid.tokens

    def projections(self, config: Any) -> list[tuple[int, int]]:
        """Widths in and out of the linear maps that the family's own projector applies to each such token."""
        width, text_width = self.widths(config)
        return [(len(self.read_layers(config)) * width, text_width), (text_width, text_width)]

    # The processor.

    @abstractmethod
    def processor_numbers(self, config: Any) -> dict[str, Any]:
        """The attributes that a processor must have to count placeholder tokens as this model needs them.

        A name with dots, such as `image_processor.patch_size`, is an attribute of a part.
        """

    def check_processor(self, processor: Any, config: Any) -> None:
        """Raises `LacoError` unless a processor counts and sizes pictures as the model does."""
        if not hasattr(processor, "image_processor"):
            raise LacoError(f"a {type(processor).__name__} is no processor of pictures and text")
        pairs = {name: (_get(processor, name), wanted) for name, wanted in self.processor_numbers(config).items()}
        pairs["image_token_id"] = (getattr(processor, "image_token_id", None), config.image_token_id)
        pairs |= self.picture_numbers(processor, config)
        for name, (found, wanted) in pairs.items():
            if found != wanted:
                raise LacoError(f"the processor does not match the model: {name} is {found}, the model needs {wanted}")

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        """What the processor makes of a picture and what the encoder takes, by name.

        As it is, it fits encoders of one square picture size.
        """
        wanted = image_sides(self.vision_config(config).image_size)
        return {"the picture size": (picture_size(processor.image_processor), wanted)}

    def set_processor(self, processor: ProcessorMixin, config: PreTrainedConfig) -> None:
        """Lets a processor count placeholder tokens as a model of this configuration needs them."""
        for name, value in self.processor_numbers(config).items():
            parent, _, attribute = name.rpartition(".")
            setattr(attrgetter(parent)(processor) if parent else processor, attribute, value)


def _get(part: Any, name: str) -> Any:
    try:
        return attrgetter(name)(part)
    except AttributeError:
        return None


def picture_size(image_processor: Any) -> tuple[int | None, int | None]:
    """Height and width in pixels of what an image processor gives to the encoder."""
    cropped = getattr(image_processor, "do_center_crop", False) and image_processor.crop_size
    size = (image_processor.crop_size if cropped else getattr(image_processor, "size", None)) or {}
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size.get("height"), size.get("width"))
