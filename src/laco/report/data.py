"""What a report shows, as plain data: the page, the JSON and the CSV are all made from it, so they cannot disagree."""

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Any

from pydantic import BaseModel

from laco.cost import Ratio
from laco.evaluate import FamilyScore


class Shown(BaseModel):
    """A question about a picture and the model's answer."""

    question: str
    truth: str
    answer: str
    right: bool


class Example(BaseModel):
    """A picture (`png`: base64) with what one or several models said: {variant: answers to the same questions}."""

    png: str
    answers: dict[str, list[Shown]]


class Insertion(BaseModel):
    """A compressor put in without training: how far the encoder's output moves, and what is still known.

    `cosine` is the mean over tokens of the cosine to the uncompressed encoder's output, averaged over each window.
    """

    name: str
    cosine: float | None
    average: float
    low: float
    high: float
    families: dict[str, FamilyScore]


class StageTimes(BaseModel):
    """One stage of one variant: milliseconds for a picture, speed-up over the uncompressed model, and by FLOPs."""

    milliseconds: float
    speedup: Ratio
    predicted: float


class Row(BaseModel):
    """A variant after healing. `place`: none, inside or external; `times` by stage: encoder, prefill, training."""

    name: str
    place: str
    healed: bool
    seeds: list[int]
    visual_tokens: float
    average: float
    low: float
    high: float
    families: dict[str, FamilyScore]
    loyalty: float | None
    times: dict[str, StageTimes]

    @property
    def answer_ms(self) -> float | None:
        """Milliseconds from a picture to the first word: encoder and prefill."""
        return self.times["encoder"].milliseconds + self.times["prefill"].milliseconds if self.times else None

    def flat(self) -> dict[str, Any]:
        """One line of the CSV file."""
        line: dict[str, Any] = self.model_dump(exclude={"families", "times", "seeds"})
        line["seeds"] = " ".join(map(str, self.seeds))
        line |= {name: score.accuracy for name, score in self.families.items()}
        for stage, times in self.times.items():
            line |= {
                f"{stage}_ms": times.milliseconds,
                f"{stage}_speedup": times.speedup.value,
                f"{stage}_speedup_low": times.speedup.low,
                f"{stage}_speedup_high": times.speedup.high,
                f"{stage}_speedup_by_flops": times.predicted,
            }
        return line


class Results(BaseModel):
    """Everything that `laco demo` found."""

    command: str
    model: dict[str, Any]
    protocol: dict[str, Any]
    timing: dict[str, Any]
    shown: list[Example]
    insertions: list[Insertion]
    rows: list[Row]
    examples: list[Example]
    failures: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, Any]
    minutes: float

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def as_csv(lines: Sequence[dict[str, Any]]) -> str:
    """A CSV file with a column for every key of any line, in the order in which they come up."""
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
