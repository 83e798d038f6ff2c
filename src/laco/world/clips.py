"""Clips of the embedded world: eight frames in which shapes move, shapes follow one another, and a word flashes up.

A chart and a number stand still all the while. No single frame tells which way something moves or what follows what.
"""

from dataclasses import dataclass

import numpy as np

from laco.world.glyphs import DIGITS, FONT_SIZES, FONTS, LETTERS, SHAPES
from laco.world.scene import (
    Chart,
    Places,
    Scene,
    Shape,
    Text,
    draw_colour,
    draw_string,
    lay_text,
    make_chart,
    text_extent,
)

FRAMES = 8
SPEEDS = (4, 5)  # pixels a frame: 28 to 35 over a clip
FLASH = (2, 3)  # frames in which the word is there
MOVERS, SEQUENCE = 2, 4  # together all kinds of shapes, so that a kind is never there twice
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}


@dataclass(frozen=True)
class Mover:
    """A shape that moves by (dx, dy) pixels a frame; `shape` is where it begins."""

    shape: Shape
    direction: str
    dx: int
    dy: int

    @property
    def kind(self) -> str:
        return self.shape.kind

    def at(self, frame: int) -> Shape:
        s = self.shape
        return Shape(s.kind, s.colour, s.x + frame * self.dx, s.y + frame * self.dy, s.size)


@dataclass(frozen=True)
class ClipScene:
    """What a clip shows.

    Args:
        seed: as that of `Scene`.
        background: grey level.
        chart, number: there in all frames.
        word: there in the frames `flash`.
        movers: of different kinds, on ways that cross nothing.
        sequence: shapes that follow one another in one place.
        turns: which of them each frame shows, ascending.
    """

    seed: tuple[int, ...]
    background: int
    chart: Chart
    number: Text
    word: Text
    flash: range
    movers: tuple[Mover, ...]
    sequence: tuple[Shape, ...]
    turns: tuple[int, ...]

    def frame(self, frame: int) -> Scene:
        """What stands where in one frame."""
        texts = [self.word] if frame in self.flash else []
        shapes = [mover.at(frame) for mover in self.movers] + [self.sequence[self.turns[frame]]]
        return Scene(self.seed, self.background, [self.number, *texts], self.chart, singles=shapes)


def make_clip(seed: tuple[int, ...], held_out: bool) -> ClipScene:
    """The clip of a seed, the same on every machine; `held_out` as for `laco.world.scene.make_scene`."""
    for attempt in range(1000):
        scene = _try_clip(np.random.default_rng([*seed, attempt]), seed, held_out)
        if scene is not None:
            return scene
    raise AssertionError("a thousand layouts failed")


def _try_clip(rng: np.random.Generator, seed: tuple[int, ...], held_out: bool) -> ClipScene | None:
    background = int(rng.integers(205, 251))
    places = Places(rng)
    chart = make_chart(rng, places)
    kinds = [str(kind) for kind in rng.permutation(SHAPES)]
    movers = []
    for kind in kinds[:MOVERS]:
        if (mover := _mover(rng, places, kind, held_out)) is None:
            return None
        movers.append(mover)
    size = int(rng.integers(12, 15))
    if (at := places.take(size, size)) is None:
        return None
    sequence = tuple(Shape(kind, draw_colour(rng, kind, held_out), *at, size) for kind in kinds[MOVERS:])
    word, number = (_text(rng, places, alphabet, held_out) for alphabet in (LETTERS, DIGITS))
    if word is None or number is None:
        return None
    length = int(rng.choice(FLASH))
    begin = int(rng.integers(FRAMES - length + 1))
    flash = range(begin, begin + length)
    return ClipScene(seed, background, chart, number, word, flash, tuple(movers), sequence, _turns(rng))


def _mover(rng: np.random.Generator, places: Places, kind: str, held_out: bool) -> Mover | None:
    """A moving shape; also one that stands still keeps a way free, so that free space tells nothing."""
    size, speed = int(rng.integers(12, 15)), int(rng.choice(SPEEDS))
    direction = str(rng.choice(list(DIRECTIONS)))
    dx, dy = (speed * step for step in DIRECTIONS[direction])
    way = speed * (FRAMES - 1)
    along = dx != 0 or (dy == 0 and bool(rng.integers(2)))
    at = places.take(size + way * along, size + way * (not along))
    if at is None:
        return None
    # Where on its way it begins: at the end that it leaves, or anywhere if it stays.
    offset = int(rng.integers(way + 1)) if direction == "nowhere" else way * (dx + dy < 0)
    x, y = at[0] + offset * along, at[1] + offset * (not along)
    return Mover(Shape(kind, draw_colour(rng, kind, held_out), x, y, size), direction, dx, dy)


def _text(rng: np.random.Generator, places: Places, alphabet: str, held_out: bool) -> Text | None:
    string = draw_string(rng, alphabet, held_out)
    font, size = str(rng.choice(FONTS)), int(rng.choice(FONT_SIZES))
    at = places.take(*text_extent(string, font, size))
    return None if at is None else lay_text(string, font, size, *at, ink=int(rng.integers(0, 70)))


def _turns(rng: np.random.Generator) -> tuple[int, ...]:
    """Which shape of the sequence each frame shows: each in one to three frames."""
    while True:
        cuts = np.sort(rng.choice(np.arange(1, FRAMES), SEQUENCE - 1, replace=False))
        lengths = np.diff([0, *cuts, FRAMES])
        if lengths.max() <= 3:
            return tuple(int(turn) for turn in np.repeat(np.arange(SEQUENCE), lengths))
