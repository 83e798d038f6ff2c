"""The embedded world: seeded pictures with questions that stress what compression destroys.

`World(seed, split)[index]` is a picture with its questions, made anew on every machine from three numbers: no file, no
hub. Training and test pictures never share a string, and six of the 36 shape-colour pairs occur in test pictures only.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from laco.errors import LacoError
from laco.world.questions import FAMILIES, READING, Question, ask
from laco.world.scene import SIDE, Scene, draw, make_page, make_scene

SPLITS = ("train", "test")

__all__ = ["FAMILIES", "READING", "SIDE", "SPLITS", "Pages", "Question", "World", "WorldPicture"]


@dataclass(frozen=True)
class WorldPicture:
    """A scene with its picture (`SIDE` x `SIDE` RGB) and its questions."""

    scene: Scene

    @cached_property
    def pixels(self) -> np.ndarray:
        """(SIDE, SIDE, 3) uint8."""
        return draw(self.scene)

    @property
    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @cached_property
    def questions(self) -> list[Question]:
        return ask(self.scene)


@dataclass(frozen=True)
class World:
    """An endless set of pictures. `seed` and `split` choose it, an index one of its pictures.

    Args:
        seed: non-negative; another seed gives fresh pictures of the same kind.
        split: "train", or "test" with held-out strings and all shape-colour pairs.
    """

    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise LacoError(f"the world's split is {' or '.join(SPLITS)}; got {self.split!r}")
        if self.seed < 0:
            raise LacoError(f"a seed is 0 or more; got {self.seed}")

    def __getitem__(self, index: int) -> WorldPicture:
        return WorldPicture(make_scene((self.seed, SPLITS.index(self.split), index), held_out=self.split == "test"))


@dataclass(frozen=True)
class Pages:
    """Pages full of characters, without questions: only for the dense labels of pretraining."""

    seed: int = 0

    def __getitem__(self, index: int) -> WorldPicture:
        return WorldPicture(make_page((self.seed, 2, index)))
