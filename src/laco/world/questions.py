"""Questions about a scene and their answers, seven families, none of which can be answered without the picture."""

from typing import NamedTuple

import numpy as np

from laco.world.glyphs import COLOURS
from laco.world.scene import SIDE, Scene, Shape

FAMILIES = ("word", "number", "chart", "colour", "count", "relation", "locate")
READING = ("word", "number")  # what down-sampling and merging destroy first

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_BORDER = 4  # pixels: shapes nearer to a border between two regions are not asked for


class Question(NamedTuple):
    family: str
    question: str
    answer: str


def region(shape: Shape) -> tuple[int, int] | None:
    """Row and column of the third of the picture in which a shape lies; None where it is not clear."""
    third = SIDE / 3
    if any(abs(c - border) < _BORDER for c in shape.centre for border in (third, 2 * third)):
        return None
    column, row = (int(c // third) for c in shape.centre)
    return row, column


def ask(scene: Scene) -> list[Question]:
    """All families' questions about a scene, up to two of a family, chosen by the scene's seed; order is random."""
    rng = np.random.default_rng([*scene.seed, 13])
    word, number = scene.texts
    asked = [
        Question("word", "which word is written?", word.string),
        Question("number", "which number is written?", number.string),
        *pick(rng, about_chart(scene), 2),
        *pick(rng, _about_colour(scene), 2),
        *pick(rng, _about_count(scene, rng), 2),
        *pick(rng, _about_relation(scene), 2),
        *pick(rng, _about_place(scene), 2),
    ]
    return [asked[i] for i in rng.permutation(len(asked))]


def pick(rng: np.random.Generator, questions: list[Question], most: int) -> list[Question]:
    return [questions[i] for i in rng.permutation(len(questions))[:most]]


def about_chart(scene: Scene) -> list[Question]:
    assert scene.chart is not None
    bars = list(zip(scene.chart.values, scene.chart.colours, strict=True))
    heights = [Question("chart", f"how high is the {colour} bar?", str(value)) for value, colour in bars]
    return [
        *heights,
        Question("chart", "which bar is highest?", max(bars)[1]),
        Question("chart", "which bar is lowest?", min(bars)[1]),
    ]


def _about_colour(scene: Scene) -> list[Question]:
    questions = [Question("colour", f"which colour is the {s.kind}?", s.colour) for s in scene.shapes]
    tally = [s.colour for s in scene.shapes]
    questions += [
        Question("colour", f"which shape is {s.colour}?", s.kind) for s in scene.shapes if tally.count(s.colour) == 1
    ]
    return questions


def _about_count(scene: Scene, rng: np.random.Generator) -> list[Question]:
    tally = [s.colour for s in scene.shapes]
    present, absent = [c for c in COLOURS if c in tally], [c for c in COLOURS if c not in tally]
    among = absent if absent and rng.random() < 0.2 else present  # now and then the answer is 0
    colour = among[rng.integers(len(among))]
    return [
        Question("count", "how many shapes are there?", str(len(tally))),
        Question("count", f"how many shapes are {colour}?", str(tally.count(colour))),
    ]


def _about_relation(scene: Scene) -> list[Question]:
    before, after = ("above", "below") if scene.row_is_vertical else ("left of", "right of")
    questions = []
    for first, second in zip(scene.row, scene.row[1:], strict=False):
        questions.append(Question("relation", f"what is {before} the {second.kind}?", first.kind))
        questions.append(Question("relation", f"what is {after} the {first.kind}?", second.kind))
    return questions


def _about_place(scene: Scene) -> list[Question]:
    placed = [(s, region(s)) for s in scene.shapes]
    return [Question("locate", f"where is the {s.kind}?", f"{ROWS[at[0]]} {COLUMNS[at[1]]}") for s, at in placed if at]
