"""The training pictures: the embedded world, made on the fly, or files read once and drawn in a seeded order."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from laco.errors import LacoError
from laco.pictures import down_sampled
from laco.train.collate import Item
from laco.train.recipe import Data, Stage
from laco.world import Pages, World
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
    down_sample: int = 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        rng = np.random.default_rng([self.seed, 3, self.start + index])
        is_page = rng.random() < self.stage.pages
        made = (Pages(self.seed) if is_page else World(self.seed, "train"))[self.start + index]
        asked = [] if is_page else [(q.question, q.answer) for q in made.questions[: self.stage.questions]]
        dense = dense_labels(made.scene, self.patch) if self.stage.dense else None
        return Item([down_sampled(made.picture, self.down_sample)], asked, dense)


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
        return Item(pictures, [(group[i].question, group[i].answer) for i in chosen])


def make_source(data: Data, stage: Stage, start: int, seed: int, patch: int) -> Source:
    """The pictures of one stage: steps * batch_size of them, beginning at number `start` of the run."""
    count = stage.steps * stage.batch_size
    if data.source == "world":
        return WorldSource(data.seed, start, count, stage, patch, data.down_sample)
    return FileSource(data, stage, count, seed)
