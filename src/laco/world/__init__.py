"""The embedded world: seeded pictures with questions that stress what compression destroys.

`World(seed, split)[index]` is a picture with its questions, made anew on every machine from three numbers: no file, no
hub. Training and test pictures never share a string, and six of the 36 shape-colour pairs occur in test pictures only.
`Clips(seed, split)[index]` is a clip with its questions, by the same rules.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from laco.errors import LacoError
from laco.world.clip_questions import CLIP_FAMILIES, ask_clip, exercises
from laco.world.clips import FRAMES, ClipScene, make_clip
from laco.world.questions import FAMILIES, READING, Question, ask
from laco.world.scene import SIDE, Scene, draw, make_page, make_scene

SPLITS = ("train", "test")

__all__ = [
    "CLIP_FAMILIES",
    "FAMILIES",
    "FRAMES",
    "READING",
    "SIDE",
    "SPLITS",
    "Clips",
    "Pages",
    "Question",
    "World",
    "WorldClip",
    "WorldPicture",
]


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

    @property
    def pictures(self) -> list[Image.Image]:
        return [self.picture]

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
        _check(self.seed, self.split)

    def __getitem__(self, index: int) -> WorldPicture:
        return WorldPicture(make_scene((self.seed, SPLITS.index(self.split), index), held_out=self.split == "test"))


@dataclass(frozen=True)
class Pages:
    """Pages full of characters, without questions: only for the dense labels of pretraining."""

    seed: int = 0

    def __getitem__(self, index: int) -> WorldPicture:
        return WorldPicture(make_page((self.seed, 2, index)))


@dataclass(frozen=True)
class WorldClip:
    """A scene that changes, with its `FRAMES` frames (`SIDE` x `SIDE` RGB) and its questions."""

    scene: ClipScene

    @cached_property
    def pixels(self) -> np.ndarray:
        """(FRAMES, SIDE, SIDE, 3) uint8."""
        return np.stack([draw(self.scene.frame(frame), frame) for frame in range(FRAMES)])

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(frame) for frame in self.pixels]

    @cached_property
    def questions(self) -> list[Question]:
        return ask_clip(self.scene)

    @cached_property
    def exercises(self) -> list[Question]:
        """What training asks: more questions, also some that a single frame answers."""
        return exercises(self.scene)


@dataclass(frozen=True)
class Clips:
    """An endless set of clips; arguments as those of `World`."""

    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        _check(self.seed, self.split)

    def __getitem__(self, index: int) -> WorldClip:
        return WorldClip(make_clip((self.seed, 3 + SPLITS.index(self.split), index), held_out=self.split == "test"))


def _check(seed: int, split: str) -> None:
    if split not in SPLITS:
        raise LacoError(f"the world's split is {' or '.join(SPLITS)}; got {split!r}")
    if seed < 0:
        raise LacoError(f"a seed is 0 or more; got {seed}")
