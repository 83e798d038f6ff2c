"""Clips: deterministic, answerable, disjoint between splits, and not answerable by text or by a single frame."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from laco.errors import LacoError
from laco.world import CLIP_FAMILIES, FRAMES, SIDE, Clips
from laco.world.clips import DIRECTIONS, SEQUENCE, ClipScene
from laco.world.glyphs import SHAPES
from laco.world.labels import dense_labels
from laco.world.questions import COLUMNS, ROWS
from laco.world.scene import HELD_OUT_PAIRS, is_held_out

COUNT = 500


@pytest.fixture(scope="module")
def clips():
    return [Clips(0, "test")[index] for index in range(COUNT)]


@pytest.fixture(scope="module")
def others():
    return [Clips(1, "test")[index] for index in range(2 * COUNT)]


def share(tally: Counter) -> float:
    return tally.most_common(1)[0][1] / tally.total()


def test_same_seed_gives_same_clip_and_questions() -> None:
    first, again = Clips(3)[17], Clips(3)[17]
    assert np.array_equal(first.pixels, again.pixels)
    assert first.questions == again.questions
    assert first.exercises == again.exercises
    assert first.pixels.shape == (FRAMES, SIDE, SIDE, 3)
    assert first.pixels.dtype == np.uint8
    assert [np.asarray(picture).tolist() for picture in first.pictures] == first.pixels.tolist()


@pytest.mark.parametrize("other", [Clips(4)[17], Clips(3, "test")[17], Clips(3)[18]])
def test_another_seed_split_or_index_gives_another_clip(other) -> None:
    assert not np.array_equal(Clips(3)[17].pixels, other.pixels)


def test_clips_are_the_same_on_every_machine(clips) -> None:
    """The scene (not the rasteriser) of one clip, written down."""
    scene = clips[0].scene
    assert (scene.word.string, scene.number.string) == ("RYR", "226")
    assert [(mover.kind, mover.direction) for mover in scene.movers] == [("ring", "nowhere"), ("circle", "down")]
    assert [shape.kind for shape in scene.sequence] == ["square", "diamond", "triangle", "cross"]
    assert scene.turns == (0, 1, 1, 2, 2, 2, 3, 3)


def test_what_stands_still_differs_by_noise_alone() -> None:
    for index in range(10):
        clip = Clips(1)[index]
        still = np.ones((SIDE, SIDE), dtype=bool)
        for frame in range(FRAMES):
            scene = clip.scene.frame(frame)
            for shape in scene.shapes:
                still[shape.y : shape.y + shape.size, shape.x : shape.x + shape.size] = False
        for x, y, width, height in clip.scene.word.boxes:
            still[y : y + height, x : x + width] = False
        change = np.diff(clip.pixels.astype(float), axis=0)
        assert np.abs(change[:, still].mean(axis=0)).max() < 20
        assert 5 < change[:, still].std() < 9  # 5 * sqrt(2), less where pixels are clipped
        assert np.abs(change[:, ~still]).max() > 60


def test_the_word_is_there_in_two_or_three_frames(clips) -> None:
    for clip in clips[:20]:
        x, y, width, height = clip.scene.word.boxes[0]
        darkness = 255 - clip.pixels[:, y : y + height, x : x + width].min(axis=(1, 2, 3)).astype(int)
        there = darkness > 120
        assert there.sum() in (2, 3)
        assert np.flatnonzero(there).tolist() == list(clip.scene.flash)


def test_nothing_overlaps_and_all_is_inside(clips) -> None:
    for clip in clips[:60]:
        for frame in range(FRAMES):
            scene = clip.scene.frame(frame)
            boxes = [(scene.chart.x, scene.chart.y, scene.chart.width, scene.chart.height)]
            boxes += [(s.x, s.y, s.size, s.size) for s in scene.shapes]
            for text in (clip.scene.number, clip.scene.word):
                last = text.boxes[-1]
                boxes.append((text.x, text.y, last[0] + last[2] - text.x, last[3]))
            taken = np.zeros((SIDE, SIDE), dtype=int)
            for x, y, width, height in boxes:
                assert min(x, y) >= 0
                assert max(x + width, y + height) <= SIDE
                taken[y : y + height, x : x + width] += 1
            assert taken.max() == 1


def test_answers_follow_from_the_frames(clips) -> None:
    """An independent reading of the single frames answers every question as the clip does."""
    for clip in clips[:60]:
        frames = [clip.scene.frame(frame) for frame in range(FRAMES)]
        where = [{s.kind: s for s in scene.shapes} for scene in frames]
        order = list(dict.fromkeys(scene.shapes[-1].kind for scene in frames))
        for family, question, answer in clip.questions + clip.exercises:
            words = question.rstrip("?").split()
            if family == "motion" and words[0] == "which":
                (x, y), (to_x, to_y) = (where[t][words[4]].centre for t in (0, -1))
                far = 20 < abs(to_x - x) + abs(to_y - y) < 40
                assert tuple(np.sign((to_x - x, to_y - y))) == DIRECTIONS[answer]
                assert far == (answer != "nowhere")
            elif family == "motion":
                x, y = where[0 if words[-1] == "start" else -1][words[3]].centre
                assert answer == f"{ROWS[int(3 * y / SIDE)]} {COLUMNS[int(3 * x / SIDE)]}"
            elif family == "order" and words[-1] in ("first", "last"):
                assert order[0 if words[-1] == "first" else -1] == answer
            elif family == "order":
                assert order.index(answer) - order.index(words[-1]) == (1 if words[3] == "after" else -1)
            elif family == "flash":
                assert answer in {text.string for scene in frames for text in scene.texts[1:]}
            elif "number" in words:
                assert all(scene.texts[0].string == answer for scene in frames)
            else:
                bars = dict(zip(frames[0].chart.colours, frames[0].chart.values, strict=True))
                assert answer in {str(bars.get(words[-2])), min(bars, key=bars.get), max(bars, key=bars.get)}


def test_splits_share_no_string_and_held_out_pairs_are_only_tested(clips) -> None:
    strings, pairs = {}, {}
    for split, made in (("train", [Clips(0)[i] for i in range(COUNT)]), ("test", clips)):
        scenes = [clip.scene for clip in made]
        strings[split] = {text.string for scene in scenes for text in (scene.word, scene.number)}
        shown = [(s.kind, s.colour) for scene in scenes for t in range(FRAMES) for s in scene.frame(t).shapes]
        pairs[split] = set(shown)
    assert not strings["train"] & strings["test"]
    assert all(is_held_out(string) for string in strings["test"])
    assert not pairs["train"] & HELD_OUT_PAIRS
    assert pairs["test"] >= HELD_OUT_PAIRS


def test_who_reads_the_question_alone_guesses(clips) -> None:
    """The best answer to every single question, found with the answers at hand, is hardly better than chance."""
    tallies: dict[str, dict[str, Counter]] = {family: defaultdict(Counter) for family in CLIP_FAMILIES}
    for clip in clips:
        assert {q.family for q in clip.questions} == set(CLIP_FAMILIES)
        for family, question, answer in clip.questions:
            tallies[family][question][answer] += 1
    assert set(tallies["motion"]) == {f"which way does the {kind} move?" for kind in SHAPES}
    for family, chance in (("motion", 1 / len(DIRECTIONS)), ("order", 1 / (len(SHAPES) - 1))):
        right = sum(tally.most_common(1)[0][1] for tally in tallies[family].values())
        assert right / sum(tally.total() for tally in tallies[family].values()) < chance + 0.1
    assert share(tallies["flash"]["which word is written?"]) < 0.05
    assert share(sum(tallies["static"].values(), Counter())) < 0.2


@pytest.mark.parametrize("frame", [0, 3, 4, 7])
def test_who_sees_one_frame_hardly_knows_a_motion(clips, others, frame: int) -> None:
    """The most common direction at a place, learned from other clips, is right little more often than chance, 1 / 5."""

    def seen(scene: ClipScene):
        for mover in scene.movers:
            x, y = mover.at(frame).centre
            yield (int(x // 16), int(y // 16)), mover.direction

    learned: dict[tuple[int, int], Counter] = defaultdict(Counter)
    for clip in others:
        for place, direction in seen(clip.scene):
            learned[place][direction] += 1
    guesses = [
        learned[place].most_common(1)[0][0] == direction
        for clip in clips
        for place, direction in seen(clip.scene)
        if place in learned
    ]
    assert np.mean(guesses) < 0.4


@pytest.mark.parametrize("frame", range(FRAMES))
def test_who_sees_one_frame_hardly_knows_an_order(clips, frame: int) -> None:
    """The best such answer names what the frame shows, unless that is asked about, and is else right by chance."""
    right = []
    for clip in clips:
        shown = clip.scene.frame(frame).shapes[-1].kind
        movers = {mover.kind for mover in clip.scene.movers}
        for family, question, answer in clip.questions:
            if family == "order":
                unseen = set(SHAPES) - movers - {shown}
                right.append(1 / len(unseen) if question.endswith(f"{shown}?") else shown == answer)
    assert np.mean(right) < 0.5


def test_every_shape_of_a_sequence_has_its_turn(clips) -> None:
    lengths = Counter(clip.scene.turns.count(turn) for clip in clips for turn in range(SEQUENCE))
    assert set(lengths) == {1, 2, 3}


def test_frames_have_dense_labels(clips) -> None:
    maps = [dense_labels(clips[0].scene.frame(frame))["what"] for frame in range(FRAMES)]
    assert not np.array_equal(maps[0], maps[-1])


def test_bad_split_and_seed() -> None:
    with pytest.raises(LacoError, match="train or test"):
        Clips(0, "validation")
    with pytest.raises(LacoError, match="seed is 0 or more"):
        Clips(-1)
