"""Recipes: YAML files read into strict models. What is wrong is said in one sentence, with what would be right."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from laco.errors import LacoError


class Strict(BaseModel):
    """What a recipe consists of: an unknown key is an error naming the nearest known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = TypeVar("Kind", bound=Strict)


def load(kind: type[Kind], path: str | Path, **overrides: Any) -> Kind:
    """Reads and checks a recipe; `overrides` replace top-level keys (values of None are ignored).

    Raises:
        LacoError: the file is missing, is no YAML mapping, or a key or value is wrong; the message names the key.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise LacoError(f"there is no recipe {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise LacoError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise LacoError(f"{path} must hold keys and values, {example(kind)}")
    given = {key: str(v) if isinstance(v, Path) else v for key, v in overrides.items() if v is not None}
    return parse(kind, {**raw, **given}, str(path))


def parse(kind: type[Kind], raw: Mapping[str, Any], where: str) -> Kind:
    """Checks the content of a recipe; `where` opens the message of the `LacoError`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise LacoError(f"{where}: {sentence(error, kind, raw)}") from None


def sentence(error: ValidationError, kind: type[BaseModel], raw: Mapping[str, Any]) -> str:
    """The first mistake; an unknown key before all others, as it is often the one that is missed elsewhere."""
    found = error.errors()
    first = next((problem for problem in found if problem["type"] == "extra_forbidden"), found[0])
    place, key = place_in(raw, first["loc"]), str(first["loc"][-1]) if first["loc"] else ""
    match first["type"]:
        case "extra_forbidden":
            entry, comma, inner = place.rpartition(", ")
            near = nearest(key, list(model_at(kind, first["loc"][:-1]).model_fields))
            return f"{entry}{':' if comma else ''} unknown key {inner}; {near}".lstrip()
        case "missing":
            return f"{place}: {key} is missing" if place else f"the key {key} is missing"
        case "value_error":
            message = first["msg"].removeprefix("Value error, ")
            return f"{place}: {message}" if place else message
        case "model_type":
            return f"{place} must hold keys and values, {example(model_at(kind, first['loc']))}; got {got(first)}"
        case "too_short":
            return f"{place} has no entry; give one or more"
    same = [problem for problem in found if place_in(raw, problem["loc"]) == place]
    return f"{place} {wanted(same)}; got {got(first)}"


def wanted(problems: Sequence[ErrorDetails]) -> str:
    """What a value should be, in all the types that it may have: "should be a valid integer or a valid number"."""
    texts = [problem["msg"].partition(", unable")[0].removeprefix("Input should be ") for problem in problems]
    return f"should be {' or '.join(dict.fromkeys(texts))}"


def got(problem: ErrorDetails) -> str:
    return "nothing" if problem["input"] is None else short(problem["input"])


def nearest(key: str, known: Sequence[str]) -> str:
    """What is nearest to a key that is not known."""
    return f"the nearest known key is {get_close_matches(key, known, n=1, cutoff=0.0)[0]}"


def place_in(raw: Any, loc: Sequence[int | str]) -> str:
    """Where a mistake is, as far as the recipe goes: `heal.steps`; entries of lists by their method or name, or number:
    `rows, div_prune, budgets`.
    """
    text = ""
    for part in loc:
        if isinstance(raw, list) and isinstance(part, int):
            raw = raw[part]
            name = (raw.get("name") or raw.get("method")) if isinstance(raw, dict) else None
            text += f", {name or f'number {part + 1}'}, "
        elif isinstance(raw, Mapping) and part in raw:
            raw = raw[part]
            text += f"{part}" if not text or text.endswith(", ") else f".{part}"
        else:  # a key that is not there, or the type of which pydantic says that a value is none
            break
    return text.removesuffix(", ")


def model_at(kind: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The model that stands at a place in another."""
    for part in loc:
        if part in kind.model_fields:
            kind = next(models_in(kind.model_fields[str(part)].annotation), kind)
    return kind


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def example(kind: type[BaseModel]) -> str:
    """Two keys of a model, if it can be those that it has to have: "such as output: and stages:"."""
    keys = [name for name, field in kind.model_fields.items() if field.is_required()] or list(kind.model_fields)
    return f"such as {' and '.join(f'{key}:' for key in keys[:2])}"
