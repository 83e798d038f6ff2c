"""What a compressed configuration records: which merger stands after which layer, and the resulting grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods import Merger, Method, Reducer, from_dict


@dataclass(frozen=True)
class Step:
    """One merger at its place.

    Args:
        merger: the method, its `layer` resolved to the count k of encoder layers before it.
        place: `encoder`, behind layer k at the encoder's width, or `projector`, in the place of the model's
            own projector, which reads the output of layer k.
    """

    merger: Merger
    place: Literal["encoder", "projector"] = "encoder"

    @classmethod
    def at(cls, merger: Merger, layer: int, place: Literal["encoder", "projector"] = "encoder") -> Self:
        return cls(replace(merger, depth=None, layer=layer), place)

    @property
    def layer(self) -> int:
        assert self.merger.layer is not None
        return self.merger.layer

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json: the place, and the method with all its settings."""
        settings = self.merger.to_dict()
        del settings["depth"]  # resolved to `layer`
        return {"place": self.place, **settings}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `LacoError` for anything that is not such a record."""
        settings = dict(data)
        place = settings.pop("place", "encoder")
        merger = from_dict(settings)
        if place not in ("encoder", "projector") or not isinstance(merger, Merger) or merger.layer is None:
            raise LacoError(f"not a compression that can stand in a vision encoder: {data}")
        return cls(merger, place)


@dataclass(frozen=True)
class Compression:
    """All that compresses a model.

    Args:
        steps: mergers, first to last.
        reducer: what drops or merges tokens in the vision encoder's layers.
        reductions: methods behind the encoder and inside the language model.
    """

    steps: Sequence[Step] = ()
    reducer: Reducer | None = None
    reductions: Sequence[Method] = ()

    @property
    def methods(self) -> list[Method]:
        """In the order in which tokens meet them."""
        inside: list[Method] = [] if self.reducer is None else [self.reducer]
        return [*(step.merger for step in self.steps), *inside, *self.reductions]

    @property
    def drops(self) -> bool:
        """Whether the language model may read fewer tokens than the grid behind the encoder has."""
        return self.reducer is not None or bool(self.reductions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "compression": [step.to_dict() for step in self.steps],
            "reducer": None if self.reducer is None else self.reducer.to_dict(),
            "reduction": [method.to_dict() for method in self.reductions],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `LacoError` for anything that is not such a record."""
        reducer = from_dict(data["reducer"]) if data.get("reducer") else None
        if reducer is not None and not isinstance(reducer, Reducer):
            raise LacoError(f"not a method that works inside the layers of a vision encoder: {data['reducer']}")
        return cls(
            [Step.from_dict(step) for step in data["compression"]],
            reducer,
            [from_dict(method) for method in data.get("reduction", ())],
        )


def image_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of what a configuration gives as one number or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def effective_patch_size(
    image_size: int | Sequence[int], patch_size: int | Sequence[int], steps: Sequence[Step]
) -> int | list[int]:
    """The patch size p for which image_size // p is the side of the merged grid; two numbers if it was given as two.

    It alone tells the unchanged code of models and processors how many tokens there are. Of all p the largest
    possible is image_size // side, so if that fails no other works: `LacoError`.
    """
    sides, patches = image_sides(image_size), image_sides(patch_size)
    grid = Grid(1, *(side // patch for side, patch in zip(sides, patches, strict=True)))
    for step in steps:
        grid = step.merger.num_tokens(grid)
    effective = []
    for pixels, side in zip(sides, grid[1:], strict=True):
        patch = pixels // side
        if pixels // patch != side:
            raise LacoError(
                f"no patch size divides {pixels} pixels into the {grid.height} x {grid.width} tokens that"
                " remain; choose another factor or odd rule"
            )
        effective.append(patch)
    return effective[0] if isinstance(patch_size, int) else effective
