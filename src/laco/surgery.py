"""Puts a method at a place in a model and takes it out again, in place.

A model is compressed by building its encoder anew from a configuration that records the compression, on the
meta device, and moving the very same parameters and buffers over. Only the compressor itself is allocated.
Everything that can fail is done before the first change, so after an error model and processor are as they
were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from laco.errors import LacoError
from laco.families import Family, Step, family_of
from laco.families.connector import Connector
from laco.families.encoders import CompressedVisionModel
from laco.families.encoders.base import NOT_BOTH
from laco.families.steps import Compression
from laco.methods import DecoderMethod, Merger, Method, Reducer, Selector


def compress(
    model: PreTrainedModel, processor: ProcessorMixin | None, method: Method
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """Puts a compressor into a model, in place.

    Args:
        model: of a family that laco knows (`laco.families()`), stock or already compressed at other places.
            Any device, the meta device too; dtype, training mode, `requires_grad`, hooks, attention and gradient
            checkpointing stay as they are. The compressor gets dtype and device of the encoder. It may be a
            vision encoder alone.
        processor: that of the model; from then on it counts the placeholder tokens that remain. The image
            processor of a vision encoder alone. None if there is none.
        method: what `laco methods` lists. A merger, after the last layer that the language model reads, stands in the
            place of the projector if it `is_projector`. One of each other kind may stand in a model: inside the layers
            of the encoder, behind it, inside the language model.

    Returns:
        The same two objects.

    Raises:
        LacoError: unknown family or encoder, a processor that does not match, a layer past the end, a place
            that is taken or behind a layer that the language model reads, a factor that does not fit the
            grid, a method that cannot run in this family, an encoder that was quantised, wrapped by adapters or
            spread over devices. Nothing has changed then.
    """
    family = family_of(model)
    with naming(family):
        steps = family.steps(model.config)
        if isinstance(method, Reducer | Selector | DecoderMethod):
            set_compression(model, processor, with_method(method, family, model.config))
            return model, processor
        step = place(method, family, model.config)
        if step.merger.starts_from_layer:
            kind = family.encoder_kind(model.config)
            before = kind.layers(family.encoder(model))[step.layer - 1]
            step = replace(step, merger=step.merger.like(kind.layer_parts(before)))
        if taken := [other for other in steps if other.layer == step.layer]:
            raise LacoError(f"the model is already compressed after layer {step.layer}, by {taken[0].merger.name}")
        steps = [*steps, step]
        for reader in family.reductions(model.config):
            if reason := family.why_no_maps(family.with_steps(model.config, steps), reader):
                raise LacoError(f"{step.merger.name} cannot run beside {reader.name}: {reason}")
        set_compression(model, processor, replace(family.compression(model.config), steps=steps))
    return model, processor


def decompress(
    model: PreTrainedModel, processor: ProcessorMixin | None
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """Takes all compressors out of a model, in place: exactly the model from before.

    A projector that a merger has replaced comes back bit-equal in the same session. It is not saved with the
    compressed model, so after loading such a model from disk this raises `LacoError`; so does a model that is
    not compressed or is spread over devices. Nothing has changed then.
    """
    family = family_of(model)
    with naming(family):
        if not family.methods(model.config):
            raise LacoError("the model is not compressed")
        set_compression(model, processor, Compression())
    return model, processor


@contextmanager
def naming(family: Family) -> Iterator[None]:
    """Lets every `LacoError` name the family whose limit it is about."""
    try:
        yield
    except LacoError as error:
        if family.name in str(error):
            raise
        raise LacoError(f"{family.name}: {error}") from error


def place(method: Method, family: Family, config: PreTrainedConfig) -> Step:
    """Where a method stands in a model of this configuration; `LacoError` if it cannot."""
    if not isinstance(method, Merger):
        raise LacoError(f"a model is compressed by a method such as laco.LaCo(), see laco.methods(); got {method!r}")
    layers = family.encoder_kind(config).num_layers(family.vision_config(config))
    last = max(family.read_layers(config))
    layer = method.layer_in(layers, last)
    kind = "external" if layer == last else "encoder"
    if kind not in method.places:
        raise LacoError(f"{method.name} does not work at the place {kind}, only {', '.join(sorted(method.places))}")
    as_projector = method.is_projector and family.connects and layer == last
    return Step.at(method, layer, "projector" if as_projector else "encoder")


def with_method(method: Reducer | Selector | DecoderMethod, family: Family, config: PreTrainedConfig) -> Compression:
    """The compression of a configuration with one more method that is no merger."""
    present = family.compression(config)
    kind: type[Method] = next(kind for kind in (Reducer, Selector, DecoderMethod) if isinstance(method, kind))
    if taken := [other for other in present.methods if isinstance(other, kind)]:
        raise LacoError(f"the model already has {taken[0].name} at that place")
    if reason := family.why_not(config, method):
        raise LacoError(f"{method.name} cannot run here: {reason}")
    if isinstance(method, Reducer):
        if any(isinstance(other, Selector) for other in present.reductions):
            raise LacoError(f"{method.name} inside the encoder and a selector behind it do not work together yet")
        return replace(present, reducer=method)
    if isinstance(method, Selector) and present.reducer is not None:
        raise LacoError(f"{present.reducer.name} inside the encoder and a selector behind it do not work together yet")
    return replace(present, reductions=[*present.reductions, method])


def set_compression(model: PreTrainedModel, processor: ProcessorMixin | None, compression: Compression) -> None:
    """Makes a model have exactly this compression, in place; what it has of it already keeps its parameters."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise LacoError("the model is spread over devices; compress or decompress it before dispatching it")
    own_configuration(model)
    family, config = family_of(model), model.config
    steps = sorted(compression.steps, key=lambda step: step.layer)
    compression = replace(compression, steps=steps)
    if steps and compression.reducer is not None:
        raise LacoError(NOT_BOTH)
    if processor is not None:
        family.check_processor(processor, config)
    replaced = new_projector(model, family, steps) if family.connects else None
    family.check_steps(config, steps, replaced[1] if replaced else None)
    encoder = family.encoder(model)
    present = family.compression(config)
    if (steps, compression.reducer) != (present.steps, present.reducer):
        encoder = new_encoder(encoder, family, config, compression)

    family.set_encoder(model, encoder)
    if replaced:
        family.set_projector(model, *replaced)
    family.set_classes(model, compression)
    if processor is not None:
        family.set_processor(processor, model.config)


def own_configuration(model: PreTrainedModel) -> None:
    """A copy of its configuration for a model, in place: others may share it, which stay as they are."""
    copies: dict[int, Any] = {}
    deepcopy(model.config, copies)
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            module.config = copies.get(id(config), config)


def new_encoder(old: Any, family: Family, config: PreTrainedConfig, compression: Compression) -> Any:
    """An encoder with these mergers, or this reducer, around the parameters and buffers of the old one."""
    kind, steps, reducer = family.encoder_kind(config), compression.steps, compression.reducer
    settings = kind.with_steps(old.config, steps) if reducer is None else old.config
    if reducer is not None:
        last = max(family.read_layers(config))
        settings = kind.with_reducer(old.config, reducer, last, family.unmerges(config))
    with torch.device("meta"):
        new: Any = (kind.compressed if steps or reducer else kind.stock)(settings)

    move_tensors(old, new)
    present = old.compressors() if isinstance(old, CompressedVisionModel) else {}
    for step in steps:
        if step.place == "encoder" and step.layer not in present:
            merging = kind.layers(new)[step.layer - 1]
            merging.compressor = fresh(partial(step.merger.build, kind.width(settings)), like=old)
            if step.merger.starts_from_layer:
                merging.compressor.start_from(kind.layer_parts(merging))
    if reducer is not None:
        for index in new.compressors().keys() - present.keys():
            kind.layers(new)[index].compressor = fresh(partial(reducer.build, kind.width(settings)), like=old)
    return new


def new_projector(model: PreTrainedModel, family: Family, steps: Sequence[Step]) -> tuple[nn.Module, int | list[int]]:
    """The projector of a model with these mergers, and the `vision_feature_layer` that it reads."""
    config, old, read = model.config, family.projector(model), model.config.vision_feature_layer
    kind, vision = family.encoder_kind(config), family.vision_config(config)
    step = next((step for step in steps if step.place == "projector"), None)
    if step is None:
        return original_projector(old) if isinstance(old, Connector) else (old, read)
    if isinstance(old, Connector):
        return old, read

    if (config.vision_feature_select_strategy == "default") != (kind.prefix(vision) == 1):
        raise LacoError(
            f"{step.merger.name} as the projector needs all patch tokens of the encoder and no others; the"
            f" vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not give them"
        )
    widths = kind.width(vision), family.text_config(config).hidden_size
    connector = fresh(partial(Connector, step.merger, *widths), like=old)
    connector.replaced = old, read
    if step.merger.projector_levels:
        layers = kind.num_layers(vision)
        levels = [round(level * layers) for level in step.merger.projector_levels]
        return connector, [*(min(max(level, 1), step.layer) for level in levels), step.layer]
    return connector, read if isinstance(read, int) else step.layer


def original_projector(connector: Connector) -> tuple[nn.Module, int | list[int]]:
    """What a merger has replaced as the projector, on the device and in the dtype of the merger."""
    if connector.replaced is None:
        raise LacoError(
            "the projector that the compressor replaced is not saved with a compressed model; load the"
            " original model instead"
        )
    projector, read = connector.replaced
    like = next(connector.parameters())
    return projector.to(like.device, like.dtype).train(connector.training), read


def fresh(build: Callable[[], Any], like: nn.Module) -> Any:
    """A new module with device, dtype and training mode of another."""
    reference = next(like.parameters())
    with torch.device(reference.device):
        return build().to(reference.dtype).train(like.training)


def same_kind(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one class, or one merges what the other's class puts out."""
    return isinstance(one, type(other)) or isinstance(other, type(one))


# What modules keep besides tensors. transformers captures outputs by hooks on layers, and notes that they are there.
KEPT = {
    "training",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_output_capturing_hooks_installed",
    *(key for key in vars(nn.Module()) if "hook" in key),
}


def move_tensors(old: nn.Module, new: nn.Module) -> None:
    """Gives a newly built encoder the very parameters and buffers of the old one, and its modules' state and hooks."""
    parts = dict(new.named_modules())
    for name, module in old.named_modules():
        if ".compressor" in name and name not in parts:
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        part = parts.get(name)
        if part is None or (tensors and not same_kind(part, module)):
            raise LacoError(
                f"the vision encoder is not as it was loaded: {name} is a {type(module).__name__}; compress"
                " before quantising it or adding adapters to it"
            )
        for key, tensor in tensors:
            setattr(part, key, tensor)
        part.__dict__.update({key: value for key, value in module.__dict__.items() if key in KEPT})
