"""The contract of a compression method: a frozen dataclass that is its own configuration.

A method is pure tensor mathematics. It knows nothing of transformers or of any model; `laco.families` knows
models and nothing of methods; `laco.surgery` brings both together.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import nn

from laco.errors import LacoError
from laco.grid import Grid, OddRule, merged_grid

Place = Literal["encoder", "external", "language_model"]


@cache
def _field_types(cls: type["Method"]) -> dict[str, TypeAdapter]:
    hints = get_type_hints(cls)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What every method has: a name, a place, and capabilities that are checked when it is applied.

    Args:
        depth: fraction of the encoder layers that run before compressing, in (0, 1]; 1 = external, after
            the last.
        layer: that count k itself, instead of `depth`.

    Class data: `name` (of the registry and of saved files), `title`, `paper`, `confirmed` and `assumed` (what
    is known from the source, what is our choice), `places`, `needs` (of "attention", "text", "cls"),
    `trained` (has parameters that want training), `static_count` (the number of tokens is known before any
    feature exists).
    """

    depth: float | None = None
    layer: int | None = None

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    confirmed: ClassVar[str]
    assumed: ClassVar[str]
    places: ClassVar[frozenset[Place]] = frozenset({"encoder", "external"})
    needs: ClassVar[frozenset[str]] = frozenset()
    trained: ClassVar[bool]
    static_count: ClassVar[bool] = True
    default_depth: ClassVar[float] = 1.0
    # False: it stands at one place alone.
    has_depth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Settings come from Python, YAML, JSON and the command line: every one is held to its declared type.
        for name, declared in _field_types(type(self)).items():
            value = getattr(self, name)
            try:
                declared.validate_python(value, strict=True)
            except ValidationError as error:
                wanted = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
                raise LacoError(f"{self.name}: {name}={value!r} does not fit: {wanted}") from None
        if not self.has_depth and (self.depth, self.layer) != (None, None):
            raise LacoError(f"{self.name} stands behind the vision encoder, so it takes neither depth nor layer")
        if self.depth is not None and self.layer is not None:
            raise LacoError("give depth or layer, not both")
        if self.depth is not None and not 0 < self.depth <= 1:
            raise LacoError(f"depth must lie in (0, 1], 1 meaning after the last layer; got {self.depth}")
        if self.layer is not None and self.layer < 1:
            raise LacoError(f"layer counts the layers that run before compressing, so 1 or more; got {self.layer}")

    def layer_in(self, num_layers: int, last: int | None = None) -> int:
        """The layer count k in an encoder of `num_layers` layers.

        Args:
            num_layers: layers of the encoder.
            last: the layer whose output the language model reads, if not the last (LLaVA-1.5 reads the last
                but one); depth 1 means after this one.

        Returns:
            k in 1..last: round(depth * num_layers), the convention of the paper's LaCo@f (rounding assumed).
        """
        last = num_layers if last is None else last
        if self.layer is not None:
            if self.layer > last:
                raise LacoError(f"layer {self.layer} is past the end: the model uses {last} encoder layers")
            return self.layer
        depth = self.default_depth if self.depth is None else self.depth
        return last if depth == 1 else min(max(round(depth * num_layers), 1), last)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file: the method's name and every field."""
        return {"method": self.name, **asdict(self)}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> Self:
        """Builds the method from plain data, refusing unknown fields."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            told = known if cls.has_depth else known - {"depth", "layer"}
            raise LacoError(f"{cls.name} has no setting {unknown[0]!r}; it has {', '.join(sorted(told))}")
        return cls(**values)


class LayerParts(NamedTuple):
    """The modules of an encoder layer: x + out(attention(q, k, v of norm1(x))), then x + fc2(gelu(fc1(norm2(x))))."""

    heads: int
    norm1: nn.LayerNorm
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear


class MergerModule(nn.Module):
    """What a merger builds: says what it `sees`, and initialises itself and everything below it.

    A subclass that wants more than torch's own initialisation extends `reset_parameters` and calls it at the
    end of its constructor.
    """

    sees: ClassVar[Literal["windows", "map"]] = "windows"

    def reset_parameters(self) -> None:
        """Initialises every parameter below, in place; also after `to_empty`, whose memory holds anything."""
        for part in self.modules():
            if part is not self and callable(reset := getattr(part, "reset_parameters", None)):
                reset()

    def start_from(self, layer: LayerParts) -> None:
        """Initialises every parameter from the encoder layer before it, where the merger `starts_from_layer`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Merger(Method):
    """Merges every r x r window of neighbouring tokens into one, so a grid stays a grid.

    `build` gives the width-preserving module that can stand after any layer. Its module declares `sees`:
    "windows" (forward takes (..., r * r, C) and gives (..., C), tokens of a window in row-major order) or
    "map" (forward takes (B, H, W, C), sides divisible by r, and gives (B, H/r, W/r, C)), and has
    `reset_parameters()`, which initialises every parameter below it so that the model works at once where
    it can.

    A method whose paper has it as the connector between encoder and language model also gives
    `build_projector`: used when the method is external, in the place of the model's own projector.

    Args:
        factor: window side r >= 1; 1/r^2 of the tokens remain.
        odd: what to do with a grid that r does not divide: `pad`, `resize`, `crop` or `error` (see
            `grid.fit_map`).
    """

    factor: int = 2
    odd: OddRule = "pad"

    is_projector: ClassVar[bool] = False
    # Relative depths of further hidden states that the projector reads before the last, joined on channels.
    projector_levels: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise LacoError(f"factor must be 1 or more; got {self.factor}")

    @property
    def starts_from_layer(self) -> bool:
        """Whether its module starts from the parameters of the encoder layer before it."""
        return False

    def like(self, layer: LayerParts) -> Self:
        """With the sizes of the encoder layer before it, where it `starts_from_layer`; `LacoError` if it has others."""
        return self

    def num_tokens(self, grid: Grid) -> Grid:
        """The grid after merging, before any feature exists."""
        return merged_grid(grid, self.factor, self.odd)

    @abstractmethod
    def build(self, width: int) -> MergerModule:
        """The width-preserving module for tokens of `width` channels."""

    def build_projector(self, width: int, out_width: int) -> MergerModule:
        """The paper's connector: (..., levels * width), the last hidden state last, -> (..., out_width)."""
        raise LacoError(f"{self.name} is no projector; after the last layer it stands before the model's own")
