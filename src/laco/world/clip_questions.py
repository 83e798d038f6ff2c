"""Questions about a clip and their answers, four families, none of which can be answered without the clip."""

from itertools import pairwise

import numpy as np

from laco.world.clips import FRAMES, ClipScene
from laco.world.questions import COLUMNS, ROWS, Question, about_chart, pick, region
from laco.world.scene import Shape

# `static` asks about what stands still: what a method loses of any picture, to compare with.
CLIP_FAMILIES = ("motion", "order", "flash", "static")


def ask_clip(scene: ClipScene, most: int = 2) -> list[Question]:
    """All families' questions, up to `most` of a family, chosen by the scene's seed; order is random."""
    rng = np.random.default_rng([*scene.seed, 13])
    motion = [Question("motion", f"which way does the {m.kind} move?", m.direction) for m in scene.movers]
    order = []
    for first, second in pairwise(shape.kind for shape in scene.sequence):
        order.append(Question("order", f"which shape comes after the {first}?", second))
        order.append(Question("order", f"which shape comes before the {second}?", first))
    asked = [
        *pick(rng, motion, most),
        *pick(rng, order, most),
        Question("flash", "which word is written?", scene.word.string),
        Question("static", "which number is written?", scene.number.string),
        *(Question("static", *q[1:]) for q in pick(rng, about_chart(scene.frame(0)), 1)),
    ]
    return [asked[i] for i in rng.permutation(len(asked))]


def exercises(scene: ClipScene) -> list[Question]:
    """What training asks, in random order: every question about motion and order, and some that only teach.

    These, what is there in the first and in the last frame, help to learn to find a moment. One frame answers each of
    them, so they would judge nothing.
    """
    asked = ask_clip(scene, most=2 * len(scene.sequence))
    asked.append(Question("order", "which shape comes first?", scene.sequence[0].kind))
    asked.append(Question("order", "which shape comes last?", scene.sequence[-1].kind))
    for mover in scene.movers:
        for when, frame in (("start", 0), ("end", FRAMES - 1)):
            if place := _place(mover.at(frame)):
                asked.append(Question("motion", f"where does the {mover.kind} {when}?", place))
    return pick(np.random.default_rng([*scene.seed, 17]), asked, len(asked))


def _place(shape: Shape) -> str | None:
    at = region(shape)
    return f"{ROWS[at[0]]} {COLUMNS[at[1]]}" if at else None
