"""What a compressed configuration records: which merger stands after which layer, and the resulting grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods import Merger, from_dict


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


def square_grid(image_size: int, patch_size: int) -> Grid:
    """The grid that a square encoder makes of one picture of image_size x image_size pixels."""
    side = image_size // patch_size
    return Grid(1, side, side)


def effective_patch_size(image_size: int, patch_size: int, steps: Sequence[Step]) -> int:
    """The patch size p for which image_size // p is the side of the merged grid.

    It alone tells the unchanged code of models and processors how many tokens there are. Of all p the largest
    possible is image_size // side, so if that fails no other works: `LacoError`.
    """
    grid = square_grid(image_size, patch_size)
    for step in steps:
        grid = step.merger.num_tokens(grid)
    effective = image_size // grid.height
    if image_size // effective != grid.height:
        raise LacoError(
            f"no patch size divides {image_size} pixels into the {grid.height} x {grid.width} tokens that"
            " remain; choose another factor or odd rule"
        )
    return effective
