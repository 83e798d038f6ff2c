"""Saving and loading: whole models in the plain Hugging Face layout, and compressors alone.

Only safetensors are read and nothing in a checkpoint is ever executed. Everything is written as a whole or
not at all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from laco._version import __version__
from laco.errors import LacoError
from laco.families import FAMILIES, Family, family_of
from laco.families.reduction.trained import trained_modules
from laco.families.steps import Compression
from laco.files import atomic_directory
from laco.methods import Merger, Method
from laco.surgery import compress, set_compression

CONFIG = "compressor_config.json"
WEIGHTS = "compressor.safetensors"
HUB_SETTINGS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(
    source: str | Path, compressor: Method | str | Path | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a model, stock or compressed, and its processor.

    A vision encoder alone comes with its image processor, or with None from a directory without one.

    Args:
        source: a directory, or a name on the hub.
        compressor: a method to compress the model with, or a directory of `save_compressor`.
        kwargs: of the model's `from_pretrained`, e.g. `dtype`, `device_map`, `attn_implementation`.

    Raises:
        LacoError: there is no such model, a file is damaged, weights are no safetensors, or a key is missing,
            extra or has another shape than the configuration says.
    """
    hub = {name: kwargs[name] for name in HUB_SETTINGS if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
        # Any model with pictures and text may be loaded, also of a family that is not known.
        family = next((family for family in FAMILIES if family.owns_config(config)), Family)
        loaded: Any = family.auto_model.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below instead of by transformers
            use_safetensors=True,
            trust_remote_code=False,
            **kwargs,
        )
        processor: Any = None
        if family.auto_processor is AutoProcessor or has_processor(source, hub.get("subfolder", "")):
            processor = family.auto_processor.from_pretrained(source, trust_remote_code=False, **hub)
    except LacoError:
        raise
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise LacoError(f"cannot load {source}: {' '.join(str(error).split())}") from error
    model, info = loaded
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
    refuse_difference(str(source), info["missing_keys"], info["unexpected_keys"], shapes)
    if isinstance(compressor, Method):
        compress(model, processor, compressor)
    elif compressor is not None:
        load_compressor(model, processor, compressor)
    return model, processor


def has_processor(source: str | Path, subfolder: str) -> bool:
    """Whether an image processor can be expected: not in a directory without its file."""
    directory = Path(source)
    files = (directory / subfolder / name for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))
    return not directory.is_dir() or any(file.exists() for file in files)


def save_pretrained(
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    directory: str | Path,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Saves a whole model with its processor, if it has one, in the plain Hugging Face layout, all of it or nothing.

    `extra_files` are texts to save beside, by their names: a recipe, a log.


    A directory that is there already is replaced, unless it holds other things: `LacoError`, as for a full
    disk.
    """
    with atomic_directory(directory) as beside:
        model.save_pretrained(beside)
        if processor is not None:
            processor.save_pretrained(beside)
        for name, text in (extra_files or {}).items():
            (beside / name).write_text(text)


def save_compressor(model: PreTrainedModel, directory: str | Path) -> None:
    """Saves the compressors of a model alone: compressor_config.json, compressor.safetensors, README.md.

    The rest of the model is not saved, trained or not; it is to come from the base model when loading.
    """
    family = family_of(model)
    compression = family.compression(model.config)
    if not compression.methods:
        raise LacoError("the model is not compressed, so there is no compressor to save")
    tensors = {
        f"{place}.{key}": tensor.detach().contiguous()
        for place, compressor in family.compressors(model).items()
        for key, tensor in compressor.state_dict().items()
    }
    if any(tensor.is_meta for tensor in tensors.values()):
        raise LacoError("the model is on the meta device, so its compressor has no weights to save")
    config = {
        "laco_version": __version__,
        "base_model": model.name_or_path or None,
        "base": base_of(family, model),
        **compression.to_dict(),
    }
    with atomic_directory(directory) as beside:
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt", "laco_version": __version__})
        (beside / "README.md").write_text(model_card(config, compression))


def load_compressor(
    model: PreTrainedModel, processor: ProcessorMixin | None, directory: str | Path
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """Puts saved compressors into the model that they were made for, in place.

    Args:
        model: uncompressed, or compressed by the very same settings, then only the weights are replaced.
        processor: as for `compress`.
        directory: of `save_compressor`.

    Raises:
        LacoError: a file is missing or damaged, the model has another family, encoder or geometry than the
            base, or weights are missing, extra or of another shape. Nothing has changed then.
    """
    family, directory = family_of(model), Path(directory)
    try:
        config = dict(json.loads((directory / CONFIG).read_text()))
        tensors = load_file(directory / WEIGHTS)
        compression = Compression.from_dict(config)
        base = dict(config["base"])
    except LacoError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise LacoError(f"{directory} holds no compressor that can be read: {error}") from error
    for name, found in base_of(family, model).items():
        if base.get(name) != found:
            raise LacoError(
                f"the compressor was made for another model: its {name} is {base.get(name)}, here it is {found}"
            )
    present = family.compression(model.config)
    if present.methods and present != compression:
        raise LacoError("the model is already compressed in another way; load the compressor into the base model")

    with torch.device("meta"):
        wanted = {
            f"{place}.{key}": tuple(tensor.shape)
            for place, compressor in built(compression, family, model.config).items()
            for key, tensor in compressor.state_dict().items()
        }
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    shapes = {key: (found[key], wanted[key]) for key in found.keys() & wanted if found[key] != wanted[key]}
    refuse_difference(str(directory), wanted.keys() - found, found.keys() - wanted, shapes)

    if not present.methods:
        set_compression(model, processor, compression)
    elif processor is not None:
        family.check_processor(processor, model.config)
    for place, compressor in family.compressors(model).items():
        prefix = f"{place}."
        compressor.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    return model, processor


def built(compression: Compression, family: Family, config: Any) -> dict[str, nn.Module]:
    """New modules of a compression, by the names of `Family.compressors`."""
    width, text_width = family.widths(config)
    found: dict[str, nn.Module] = {
        "projector" if step.place == "projector" else f"layers.{step.layer}": (
            step.merger.build_projector(width, text_width) if step.place == "projector" else step.merger.build(width)
        )
        for step in compression.steps
    }
    if (reducer := compression.reducer) is not None:
        layers = family.encoder_kind(config).num_layers(family.vision_config(config))
        modules = {index: reducer.build(width) for index in reducer.layers(layers, max(family.read_layers(config)))}
        found |= {f"layers.{index}": module for index, module in modules.items() if module is not None}
    if compression.reductions:
        found |= trained_modules(compression.reductions, family.text_config(config), width)
    return found


def base_of(family: Family, model: PreTrainedModel) -> dict[str, Any]:
    """What a model must have in common with the one that a compressor was made for."""
    config = model.config
    kind, vision = family.encoder_kind(config), family.vision_config(config)
    width, text_width = family.widths(config)
    return {
        "family": family.name,
        "encoder": kind.name,
        "layers": kind.num_layers(vision),
        "width": width,
        "text_width": text_width,
        **kind.geometry(vision),
    }


def refuse_difference(
    source: str, missing: Any, extra: Any, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Raises `LacoError` that names what is missing, extra or misshaped (found, wanted), if anything is."""
    problems = [f"{listed(missing)} missing"] if missing else []
    problems += [f"{listed(extra)} not expected"] if extra else []
    problems += [f"{key} has shape {found} instead of {wanted}" for key, (found, wanted) in sorted(shapes.items())[:3]]
    if problems:
        raise LacoError(f"the weights in {source} do not fit their configuration: {'; '.join(problems)}")


def listed(keys: Any, most: int = 3) -> str:
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def model_card(config: dict[str, Any], compression: Compression) -> str:
    """README.md of a saved compressor."""
    base, layers = config["base_model"] or "BASE_MODEL", config["base"]["layers"]
    pixels = config["base"].get("image_size", "any number of")
    rows = [
        f"| {step.merger.title} | {step.place} | {step.layer} of {layers} | {step.merger.factor} |"
        for step in compression.steps
    ]
    others = [method for method in compression.methods if not isinstance(method, Merger)]
    rows += [f"| {method.title} | {' or '.join(sorted(method.places))} | | |" for method in others]
    sources = "\n".join(f"- {method.title}: {method.paper}" for method in compression.methods)
    return f"""---
library_name: laco
base_model: {base}
tags: [visual-token-compression]
---

# Visual-token compressor for {base}

| method | place | after layer | factor |
|---|---|---|---|
{chr(10).join(rows)}

Only the compressor is here; everything else comes from the base model. Made with laco
{config["laco_version"]} for family {config["base"]["family"]}, encoder {config["base"]["encoder"]},
{pixels} pixels.

```python
import laco

model, processor = laco.from_pretrained({base!r}, compressor="this directory")
```

All settings are in `{CONFIG}`. Sources:

{sources}
"""
