"""What training shows: the embedded world, made on the fly, or files read once and drawn in a seeded order."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from laco.errors import LacoError
from laco.pictures import down_sampled
from laco.train.boxes import boxes_about
from laco.train.collate import Item
from laco.train.recipe import Data, Stage
from laco.world import Clips, Pages, Question, World
from laco.world.labels import dense_labels


class Source(Protocol):
    """A map-style data set: item i is always the same, so a resumed run goes on where it stopped."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class WorldSource:
    """`count` fresh pictures of the embedded world, from `start` on; no picture is seen twice in a run."""

    seed: int
    start: int
    count: int
    stage: Stage
    patch: int = 8
    down_sample: float = 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        rng = np.random.default_rng([self.seed, 3, self.start + index])
        is_page = rng.random() < self.stage.pages
        made = (Pages(self.seed) if is_page else World(self.seed, "train"))[self.start + index]
        questions = [] if is_page else made.questions[: self.stage.questions]
        asked = [(q.question, q.answer) for q in questions]
        dense = dense_labels(made.scene, self.patch) if self.stage.dense else None
        boxes = None
        if self.stage.method_loss:
            boxes = boxes_about(made.scene, questions[0]) if questions else []
        return Item([down_sampled(made.picture, self.down_sample)], asked, dense, boxes)


@dataclass(frozen=True)
class ClipSource:
    """`count` fresh clips of the embedded world, from `start` on, with its pictures among them as the stage says."""

    seed: int
    start: int
    count: int
    stage: Stage
    down_sample: float = 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        number, stage = self.start + index, self.stage
        # Videos of a batch have equally many frames, on all processes.
        still = np.random.default_rng([self.seed, 4, self.start, index // stage.batch_size]).random() < stage.stills
        picture = np.random.default_rng([self.seed, 5, number]).random() < stage.pictures
        questions: list[Question]
        if still or picture:
            shown = World(self.seed, "train")[number]
            pictures, questions = shown.pictures, shown.questions
        else:
            clip = Clips(self.seed, "train")[number]
            pictures, questions = clip.pictures, clip.exercises
        asked = [(q.question, q.answer) for q in questions[: stage.questions]]
        return Item([down_sampled(p, self.down_sample) for p in pictures], asked, video=not picture)


class FileSource:
    """Samples of a file, grouped by picture, in a seeded order that changes with every pass."""

    def __init__(self, data: Data, stage: Stage, count: int, seed: int):
        from laco.data import load_samples

        by_picture = defaultdict(list)
        for sample in load_samples(data.source, split=data.split):
            by_picture[sample.picture_key].append(sample)
        self.groups, self.stage, self.count, self.seed = list(by_picture.values()), stage, count, seed
        self.down_sample = data.down_sample
        if not self.groups:
            raise LacoError(f"{data.source} holds no sample to train on")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        lap, place = divmod(index, len(self.groups))
        group = self.groups[np.random.default_rng([self.seed, lap]).permutation(len(self.groups))[place]]
        chosen = np.random.default_rng([self.seed, lap, place]).permutation(len(group))[: self.stage.questions]
        pictures = [down_sampled(picture, self.down_sample) for picture in group[0].pictures()]
        return Item(pictures, [(group[i].question, group[i].answer) for i in chosen], video=group[0].video)


def make_source(data: Data, stage: Stage, start: int, seed: int, patch: int) -> Source:
    """The pictures of one stage: steps * batch_size of them, beginning at number `start` of the run."""
    count = stage.steps * stage.batch_size
    if data.source == "world":
        return WorldSource(data.seed, start, count, stage, patch, data.down_sample)
    if data.source == "world-video":
        return ClipSource(data.seed, start, count, stage, data.down_sample)
    return FileSource(data, stage, count, seed)
