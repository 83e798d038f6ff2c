"""Scenes of the embedded world: a word, a number, a bar chart and coloured shapes at random places, from a seed.

A scene is plain data (what stands where); `draw` turns it into a picture. All coordinates are pixels, origin top left.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np

from laco.world.glyphs import COLOURS, DIGITS, FONT_SIZES, FONTS, LETTERS, SHAPES, glyph, shape_mask

SIDE = 96
UNIT = 4  # pixels of bar height for each unit of value
BAR_WIDTH, BAR_PITCH = 6, 8
MAX_VALUE = 8
BARS = 4
STRING_LENGTH = 3
HELD_OUT_STRINGS = 0.15
# Each shape lacks one colour in training pictures; test pictures use all pairs.
HELD_OUT_PAIRS = frozenset(zip(SHAPES, COLOURS, strict=True))


@dataclass(frozen=True)
class Text:
    """A line of characters; `boxes` holds (x, y, width, height) of each."""

    string: str
    font: str
    size: int
    x: int
    y: int
    ink: int
    boxes: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Chart:
    """`BARS` bars of different colours and different values 1..MAX_VALUE on a base line at the bottom."""

    colours: tuple[str, ...]
    values: tuple[int, ...]
    x: int
    y: int

    width = BARS * BAR_PITCH + 2
    height = MAX_VALUE * UNIT + 2


@dataclass
class Scene:
    """What a picture shows. `row` holds the shapes that stand side by side (or on top of each other)."""

    seed: tuple[int, ...]
    background: int
    texts: list[Text] = field(default_factory=list)
    chart: Chart | None = None
    row: list[Shape] = field(default_factory=list)
    row_is_vertical: bool = False
    singles: list[Shape] = field(default_factory=list)

    @property
    def shapes(self) -> list[Shape]:
        return self.row + self.singles


def is_held_out(string: str) -> bool:
    """Whether a string is kept for test pictures: a fixed 15 % of all strings, by checksum."""
    return zlib.crc32(string.encode()) % 1000 < 1000 * HELD_OUT_STRINGS


def draw_string(rng: np.random.Generator, alphabet: str, held_out: bool) -> str:
    while True:
        string = "".join(alphabet[i] for i in rng.integers(len(alphabet), size=STRING_LENGTH))
        if is_held_out(string) == held_out:
            return string


def lay_text(string: str, font: str, size: int, x: int, y: int, ink: int) -> Text:
    boxes = []
    for char in string:
        mask, advance = glyph(font, size, char)
        boxes.append((x, y, mask.shape[1], mask.shape[0]))
        x += advance
    return Text(string, font, size, boxes[0][0], y, ink, tuple(boxes))


def text_extent(string: str, font: str, size: int) -> tuple[int, int]:
    masks = [glyph(font, size, char) for char in string]
    return sum(advance for _, advance in masks) + 2, masks[0][0].shape[0]


class Places:
    """Random places that do not overlap, found by trial on an occupancy map."""

    def __init__(self, rng: np.random.Generator, margin: int = 2):
        self.rng, self.margin = rng, margin
        self.taken = np.zeros((SIDE, SIDE), dtype=bool)

    def take(self, width: int, height: int, tries: int = 60) -> tuple[int, int] | None:
        m = self.margin
        for _ in range(tries):
            x = int(self.rng.integers(1, SIDE - width))
            y = int(self.rng.integers(1, SIDE - height))
            if not self.taken[max(y - m, 0) : y + height + m, max(x - m, 0) : x + width + m].any():
                self.taken[y : y + height, x : x + width] = True
                return x, y
        return None


def make_scene(seed: tuple[int, ...], held_out: bool) -> Scene:
    """One infographic: word, number, chart, a row of three shapes and up to three single ones, all kinds different.

    Args:
        seed: any non-negative integers; the same seed gives the same scene on every machine.
        held_out: use the strings kept for testing, and all shape-colour pairs instead of the training ones.
    """
    for attempt in range(1000):
        rng = np.random.default_rng([*seed, attempt])
        scene = _try_scene(rng, seed, held_out)
        if scene is not None:
            return scene
    raise AssertionError("a thousand layouts failed")


def _try_scene(rng: np.random.Generator, seed: tuple[int, ...], held_out: bool) -> Scene | None:
    scene = Scene(seed, background=int(rng.integers(205, 251)))
    places = Places(rng)

    scene.chart = make_chart(rng, places)

    kinds = [str(kind) for kind in rng.permutation(SHAPES)]
    row, size = 3, int(rng.integers(12, 15))
    pitch = size + 2
    scene.row_is_vertical = bool(rng.integers(2))
    extent = (size, row * pitch - 2)
    at = places.take(*(extent if scene.row_is_vertical else extent[::-1]))
    if at is None:
        return None
    for i in range(row):
        x, y = (at[0], at[1] + i * pitch) if scene.row_is_vertical else (at[0] + i * pitch, at[1])
        scene.row.append(Shape(kinds[i], draw_colour(rng, kinds[i], held_out), x, y, size))

    for alphabet in (LETTERS, DIGITS):
        string = draw_string(rng, alphabet, held_out)
        font, font_size = FONTS[rng.integers(len(FONTS))], FONT_SIZES[rng.integers(len(FONT_SIZES))]
        at = places.take(*text_extent(string, font, font_size))
        if at is None:
            return None
        scene.texts.append(lay_text(string, font, font_size, *at, ink=int(rng.integers(0, 70))))

    for kind in kinds[row : row + int(rng.integers(0, 4))]:
        size = int(rng.integers(12, 15))
        at = places.take(size, size)
        if at is None:
            return None
        scene.singles.append(Shape(kind, draw_colour(rng, kind, held_out), *at, size))
    return scene


def make_chart(rng: np.random.Generator, places: Places) -> Chart:
    """A chart, the first thing on a canvas."""
    at = places.take(Chart.width, Chart.height)
    assert at is not None
    colours = rng.permutation(list(COLOURS))[:BARS]
    values = rng.permutation(np.arange(1, MAX_VALUE + 1))[:BARS]
    return Chart(tuple(map(str, colours)), tuple(map(int, values)), *at)


def draw_colour(rng: np.random.Generator, kind: str, held_out: bool) -> str:
    colours = [colour for colour in COLOURS if held_out or (kind, colour) not in HELD_OUT_PAIRS]
    return colours[rng.integers(len(colours))]


def make_page(seed: tuple[int, ...]) -> Scene:
    """A page full of short random strings and no questions: many characters a picture, to learn letters quickly."""
    rng = np.random.default_rng([*seed, 7])
    scene = Scene(seed, background=int(rng.integers(205, 251)))
    y = int(rng.integers(1, 8))
    while y < SIDE - 14:
        font, size = FONTS[rng.integers(len(FONTS))], FONT_SIZES[rng.integers(len(FONT_SIZES))]
        x = int(rng.integers(1, 14))
        while True:
            alphabet = LETTERS if rng.integers(2) else DIGITS
            string = draw_string(rng, alphabet, held_out=False)
            width, _height = text_extent(string, font, size)
            if x + width > SIDE - 1:
                break
            scene.texts.append(lay_text(string, font, size, x, y, ink=int(rng.integers(0, 70))))
            x += width + int(rng.integers(3, 16))
        y += 12 + int(rng.integers(2, 8))
    return scene


def draw(scene: Scene, frame: int | None = None) -> np.ndarray:
    """The scene's picture: (SIDE, SIDE, 3) uint8, with pixel noise from the scene's seed.

    Frames of a clip have the same tints, and each its own noise.
    """
    rng = np.random.default_rng([*scene.seed, 11])
    canvas = np.full((SIDE, SIDE, 3), scene.background, dtype=np.float32)
    if scene.chart:
        _draw_chart(canvas, scene.chart, rng)
    for shape in scene.shapes:
        tint = np.asarray(COLOURS[shape.colour], dtype=np.float32) + rng.integers(-14, 15, size=3)
        _blend(canvas, shape.x, shape.y, shape_mask(shape.kind, shape.size), tint)
    for text in scene.texts:
        for char, (x, y, _, _) in zip(text.string, text.boxes, strict=True):
            _blend(canvas, x, y, glyph(text.font, text.size, char)[0], np.float32(text.ink))
    noise = rng if frame is None else np.random.default_rng([*scene.seed, 11, frame])
    canvas += noise.normal(0, 5, size=canvas.shape).astype(np.float32)
    return canvas.clip(0, 255).round().astype(np.uint8)


def _draw_chart(canvas: np.ndarray, chart: Chart, rng: np.random.Generator) -> None:
    base = chart.y + chart.height - 2
    canvas[base : base + 2, chart.x : chart.x + chart.width] = 60
    for i, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True)):
        x = chart.x + 2 + i * BAR_PITCH
        tint = np.asarray(COLOURS[colour], dtype=np.float32) + rng.integers(-14, 15, size=3)
        canvas[base - value * UNIT : base, x : x + BAR_WIDTH] = tint


def _blend(canvas: np.ndarray, x: int, y: int, mask: np.ndarray, tint: np.ndarray | np.float32) -> None:
    height, width = mask.shape
    patch = canvas[y : y + height, x : x + width]
    alpha = mask[: patch.shape[0], : patch.shape[1], None]
    patch += alpha * (tint - patch)
