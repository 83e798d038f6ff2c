"""Dense labels of a picture: what stands in each patch. Auxiliary targets of pretraining, dropped afterwards.

They are what makes reading emerge in minutes on a CPU: an answer tells three letters a picture, a page of labels sixty.
"""

import numpy as np

from laco.world.glyphs import COLOURS, DIGITS, LETTERS, SHAPES
from laco.world.scene import BAR_PITCH, BAR_WIDTH, BARS, MAX_VALUE, SIDE, STRING_LENGTH, UNIT, Scene, Shape

IGNORE = -100
_COLOUR = {name: i for i, name in enumerate(COLOURS)}
_SHAPE = {name: i for i, name in enumerate(SHAPES)}
_CHAR = {char: 1 + i for i, char in enumerate(LETTERS + DIGITS)}
_FIRST_SHAPE = 1 + len(_CHAR)
_BAR = _FIRST_SHAPE + len(SHAPES)
_NEIGHBOURS = ("left", "right", "above", "below")

# Number of classes of every label.
LABELS = {
    "what": _BAR + 1,  # background, each character, each shape, bar
    "order": STRING_LENGTH,  # of a character in its string
    "colour": len(COLOURS),
    "value": MAX_VALUE,  # of a bar
    "row": 3,  # third of the picture in which a shape lies
    "column": 3,
    **{side: 1 + len(SHAPES) for side in _NEIGHBOURS},  # of a shape in a row; 0 = none
}


def dense_labels(scene: Scene, patch: int = 8) -> dict[str, np.ndarray]:
    """Labels of every patch of a scene.

    Returns:
        For each name of `LABELS` an int64 array (SIDE / patch, SIDE / patch), `IGNORE` where the label has no meaning.
    """
    n = SIDE // patch
    maps = {name: np.full((n, n), IGNORE, dtype=np.int64) for name in LABELS}
    maps["what"][:] = 0

    if chart := scene.chart:
        base = chart.y + chart.height - 2
        for i, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True)):
            x = chart.x + 2 + i * BAR_PITCH + BAR_WIDTH / 2
            # The patch at the foot always; those above it as far as the bar fills most of them.
            top = min(base - 2, base - value * UNIT + patch // 2)
            filled = (slice(int(top // patch), int((base - 2) // patch) + 1), int(x // patch))
            for name, label in (("what", _BAR), ("colour", _COLOUR[colour]), ("value", value - 1)):
                maps[name][filled] = label
        assert len(chart.values) == BARS

    for index, shape in enumerate(scene.shapes):
        cells = _cells(shape, patch)
        maps["what"][cells] = _FIRST_SHAPE + _SHAPE[shape.kind]
        maps["colour"][cells] = _COLOUR[shape.colour]
        column, row = (int(c // (SIDE / 3)) for c in shape.centre)
        maps["row"][cells], maps["column"][cells] = row, column
        for side in _NEIGHBOURS:
            maps[side][cells] = 0
        if index < len(scene.row):
            before, after = _NEIGHBOURS[2:] if scene.row_is_vertical else _NEIGHBOURS[:2]
            if index > 0:
                maps[before][cells] = 1 + _SHAPE[scene.row[index - 1].kind]
            if index + 1 < len(scene.row):
                maps[after][cells] = 1 + _SHAPE[scene.row[index + 1].kind]

    for text in scene.texts:
        last = -1
        for order, (char, (x, y, width, height)) in enumerate(zip(text.string, text.boxes, strict=True)):
            row = int((y + height / 2) // patch)
            # Two narrow characters may have their centres in one patch: the second takes the next one.
            last = min(max(int((x + width / 2) // patch), last + 1), n - 1)
            maps["what"][row, last], maps["order"][row, last] = _CHAR[char], order
    return maps


def _cells(shape: Shape, patch: int) -> tuple[slice, slice]:
    """The patches whose centres a shape's box holds; at least the patch of its own centre."""

    def along(start: int) -> slice:
        first = -(-(start - patch // 2) // patch)
        last = (start + shape.size - patch // 2 - 1) // patch
        middle = int((start + shape.size / 2) // patch)
        return slice(max(min(first, middle), 0), max(last, middle) + 1)

    return along(shape.y), along(shape.x)
