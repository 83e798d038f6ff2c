"""The world: deterministic, answerable, disjoint between splits, and legible only in full resolution."""

from collections import Counter

import numpy as np
import pytest

from laco.errors import LacoError
from laco.world import FAMILIES, SIDE, Pages, World
from laco.world.glyphs import COLOURS, DIGITS, FONTS, LETTERS, SHAPES, glyph, shape_mask
from laco.world.labels import IGNORE, LABELS, dense_labels
from laco.world.questions import COLUMNS, ROWS
from laco.world.scene import HELD_OUT_PAIRS, is_held_out


def test_same_seed_gives_same_picture_and_questions() -> None:
    first, again = World(3, "train")[17], World(3, "train")[17]
    assert np.array_equal(first.pixels, again.pixels)
    assert first.questions == again.questions
    assert first.pixels.shape == (SIDE, SIDE, 3)
    assert first.pixels.dtype == np.uint8


@pytest.mark.parametrize("other", [World(4, "train")[17], World(3, "test")[17], World(3, "train")[18]])
def test_another_seed_split_or_index_gives_another_picture(other) -> None:
    assert not np.array_equal(World(3, "train")[17].pixels, other.pixels)


def test_pictures_are_the_same_on_every_machine() -> None:
    """The scene (not the rasteriser) of one picture, written down."""
    made = World(0, "test")[0]
    assert (made.scene.texts[0].string, made.scene.texts[1].string) == ("YFS", "578")
    assert [s.kind for s in made.scene.row] == ["diamond", "circle", "cross"]


def test_every_family_is_asked_and_no_answer_dominates() -> None:
    world, answers = World(1, "test"), {family: Counter() for family in FAMILIES}
    for index in range(200):
        for question in world[index].questions:
            answers[question.family][question.answer] += 1
    for family, tally in answers.items():
        assert tally.total() >= 200, family
        assert tally.most_common(1)[0][1] / tally.total() < 0.35, family


def test_splits_share_no_string_and_held_out_pairs_are_only_tested() -> None:
    strings, pairs = {}, {}
    for split in ("train", "test"):
        scenes = [World(0, split)[i].scene for i in range(300)]
        strings[split] = {text.string for scene in scenes for text in scene.texts}
        pairs[split] = {(s.kind, s.colour) for scene in scenes for s in scene.shapes}
    assert not strings["train"] & strings["test"]
    assert all(is_held_out(s) for s in strings["test"])
    assert not pairs["train"] & HELD_OUT_PAIRS
    assert pairs["test"] >= HELD_OUT_PAIRS
    assert not any(is_held_out(text.string) for i in range(50) for text in Pages(0)[i].scene.texts)


def test_answers_follow_from_the_scene() -> None:
    """An independent reading of the scene answers every question as the world does."""
    for index in range(60):
        made = World(5, "test")[index]
        scene = made.scene
        shapes = {s.kind: s for s in scene.shapes}
        bars = dict(zip(scene.chart.colours, scene.chart.values, strict=True))
        for family, question, answer in made.questions:
            words = question.rstrip("?").split()
            if family == "word":
                assert answer == scene.texts[0].string
            elif family == "number":
                assert answer == scene.texts[1].string
            elif family == "chart" and words[0] == "how":
                assert int(answer) == bars[words[4]]
            elif family == "chart":
                assert bars[answer] == (max if words[-1] == "highest" else min)(bars.values())
            elif family == "colour":
                assert answer == (shapes[words[-1]].colour if words[1] == "colour" else
                                  next(k for k, s in shapes.items() if s.colour == words[-1]))  # fmt: skip
            elif family == "count":
                wanted = [s for s in shapes.values() if words[-1] in ("there", s.colour)]
                assert int(answer) == len(wanted)
            elif family == "relation":
                (dx, dy) = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[2]]
                (x, y), (to_x, to_y) = shapes[words[-1]].centre, shapes[answer].centre
                pitch = shapes[answer].size + 2
                assert (to_x - x, to_y - y) == (dx * pitch, dy * pitch)
            else:
                row, column = answer.split()
                x, y = shapes[words[-1]].centre
                assert row == ROWS[int(3 * y / SIDE)]
                assert column == COLUMNS[int(3 * x / SIDE)]


def test_nothing_overlaps_and_all_is_inside() -> None:
    for index in range(60):
        scene = World(6, "train")[index].scene
        taken = np.zeros((SIDE, SIDE), dtype=int)
        chart = scene.chart
        boxes = [(chart.x, chart.y, chart.width, chart.height)]
        boxes += [(s.x, s.y, s.size, s.size) for s in scene.shapes]
        for text in scene.texts:
            last = text.boxes[-1]
            boxes.append((text.x, text.y, last[0] + last[2] - text.x, last[3]))
        for x, y, width, height in boxes:
            assert x >= 0
            assert y >= 0
            assert x + width <= SIDE
            assert y + height <= SIDE
            taken[y : y + height, x : x + width] += 1
        assert taken.max() == 1


def test_characters_and_shapes_differ_from_one_another() -> None:
    for font in FONTS:
        masks = [glyph(font, 13, char)[0] for char in LETTERS + DIGITS]
        for i, a in enumerate(masks):
            assert a.max() > 0.5
            assert not any(a.shape == b.shape and np.abs(a - b).max() < 0.3 for b in masks[:i])
    for size in (12, 14):
        masks = [shape_mask(kind, size) for kind in SHAPES]
        assert all(np.abs(a - b).mean() > 0.05 for i, a in enumerate(masks) for b in masks[:i])


def test_dense_labels_name_what_stands_in_the_patches() -> None:
    classes = ["", *LETTERS, *DIGITS, *SHAPES, "bar"]
    assert LABELS["what"] == len(classes)
    for index in range(40):
        scene = World(7, "train")[index].scene
        maps = dense_labels(scene)
        assert all(m.shape == (12, 12) and m.max() < LABELS[name] for name, m in maps.items())
        for text in scene.texts:
            row = int((text.y + text.boxes[0][3] / 2) // 8)
            read = [classes[c] for c in maps["what"][row] if classes[c] in set(text.string)]
            assert "".join(read).count(text.string) >= 1
        for shape in scene.shapes:
            x, y = (int(c // 8) for c in shape.centre)
            assert classes[maps["what"][y, x]] == shape.kind
            assert list(COLOURS)[maps["colour"][y, x]] == shape.colour
        for colour, value in zip(scene.chart.colours, scene.chart.values, strict=True):
            bars = maps["value"][(maps["what"] == LABELS["what"] - 1) & (maps["colour"] == list(COLOURS).index(colour))]
            assert set(bars[bars != IGNORE]) == {value - 1}


def test_bad_split_and_seed() -> None:
    with pytest.raises(LacoError, match="train or test"):
        World(0, "validation")
    with pytest.raises(LacoError, match="seed is 0 or more"):
        World(-1)
