"""What a study found, as plain data: table, page, plot, JSON and CSV are all made from it, so they cannot disagree."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel

from laco.data import Sample
from laco.evaluate import FamilyScore
from laco.evaluate.report import score
from laco.evaluate.scores import same
from laco.healing import Outcome, Study
from laco.healing.summary import differing
from laco.methods import get
from laco.study.measure import Cost, Costs, key_of
from laco.study.plan import Case, Place
from laco.study.recipe import DOWN_SAMPLED, RANDOM, SLACK, percent
from laco.world import FAMILIES

MEASURED = {"healed", "method", "seeds", "runs", "visual_tokens", "average", "low", "high", "loyalty"}  # of a summary


class Line(BaseModel):
    """One row at one budget, as it is or healed. Rates in per cent with 95 % intervals, over all seeds.

    Args:
        runs: that differ; of `seeds` that change nothing one counts.
        visual_tokens: that a layer of the language model computes, on average over layers, questions and seeds.
        low, high: of `average`, the mean over families; see `laco.healing.Summary`.
        hard, easy: accuracy on the questions that the down-sampled input (factor 2, as it is) gets wrong, and on the
            others: the view of VTC-Bench (arXiv 2510.07143), which tells apart what compression is needed for.
        own_loss: whether it was healed by a loss of its own, too, and so with one question a picture.
        cost: of the method before healing, in milliseconds that compare with those of all lines; None where it was not
            measured.
    """

    row: str
    place: Place
    budget: float | None
    healed: bool
    method: dict[str, Any] | None
    seeds: list[int]
    runs: int
    visual_tokens: float
    average: float
    low: float
    high: float
    families: dict[str, FamilyScore]
    loyalty: float | None
    hard: FamilyScore | None
    easy: FamilyScore | None
    own_loss: bool
    cost: Cost | None

    @property
    def state(self) -> str:
        """Budget and training, e.g. "25 %, healed"."""
        budget = "all tokens" if self.budget is None else percent(self.budget)
        return f"{budget}, {'healed' if self.healed else 'as it is'}"

    @property
    def is_baseline(self) -> bool:
        """Whether it is a baseline, or its method has no other source than being one."""
        return self.method is None or get(self.method["method"]).paper.startswith("baseline")

    def flat(self) -> dict[str, Any]:
        """One line of the CSV file."""
        line: dict[str, Any] = self.model_dump(exclude={"method", "seeds", "families", "hard", "easy", "cost"})
        line["seeds"] = " ".join(map(str, self.seeds))
        for name, found in {**self.families, "hard": self.hard, "easy": self.easy}.items():
            for key, value in (found.model_dump() if found else {}).items():
                line[name if key == "accuracy" else f"{name}_{key}"] = value
        if self.cost:
            line |= self.cost.model_dump(exclude={"speedup"})
            line |= {f"speedup_{key}": value for key, value in self.cost.speedup.model_dump().items()}
        return line


class StudyResults(BaseModel):
    """Everything that `laco study` found.

    Args:
        refused: {row: why the method cannot stand or run in the model}.
        failures: {job: last words}, defects.
        untimed: {row: why its cost could not be measured}.
        pending: runs that have not been made.
        verdicts: sentences on which methods the baselines beat, and which are not compared.
    """

    command: str
    recipe: dict[str, Any]
    lines: list[Line]
    verdicts: list[str]
    refused: dict[str, str]
    failures: dict[str, str]
    untimed: dict[str, str]
    pending: int = 0
    machine: dict[str, Any]
    versions: dict[str, str]


def make_lines(cases: Sequence[Case], study: Study, samples: Sequence[Sample], costs: Costs | None) -> list[Line]:
    """The cases that have an outcome, by budget from large to small, as they are before healed.

    Args:
        samples: that were asked.
    """
    summaries = {summary.name: summary for summary in study.summaries()}
    hard = hard_questions(cases, study, samples)
    lines = []
    for case in cases:
        if (summary := summaries.get(case.variant.name)) is None:
            continue
        method = case.variant.method
        hits = all_hits([o for o in study.outcomes if o.job.variant == case.variant], samples)
        lines.append(
            Line(
                **summary.model_dump(include=MEASURED),
                row=case.row,
                place=case.place,
                budget=case.budget,
                families=in_order(summary.families),
                hard=None if hard is None else part_score([hit for hit, index in hits if index in hard]),
                easy=None if hard is None else part_score([hit for hit, index in hits if index not in hard]),
                own_loss=study.protocol.teaches(case.variant),
                cost=comparable(costs, method) if costs else None,
            )
        )
    return sorted(lines, key=lambda line: (-(line.budget or 1), line.healed))


def hard_questions(cases: Sequence[Case], study: Study, samples: Sequence[Sample]) -> set[int] | None:
    """Which questions the input down-sampled by 2 gets wrong, without training; None before it was asked."""
    variant = next(c.variant for c in cases if c.variant.down_sample == 2 and not c.variant.heal)
    outcomes = [outcome for outcome in study.outcomes if outcome.job.variant == variant]
    return {index for hit, index in all_hits(outcomes, samples) if not hit} if outcomes else None


def comparable(costs: Costs, method: Mapping[str, Any] | None) -> Cost | None:
    """A method's cost with its milliseconds on the scale of the model as it is; None where it was not measured.

    Methods are timed in blocks, and what else the machine does drifts between them. Each block has the model as it is
    in it, whose time there follows from the speed-up.
    """
    cost, none = costs.found.get(key_of(method)), costs.found["none"]
    if not isinstance(cost, Cost) or not isinstance(none, Cost):
        return None
    scale = none.answer_ms / (cost.speedup.value * cost.answer_ms)
    stages = ("encoder_ms", "prefill_ms", "scoring_ms")
    return cost.model_copy(update={stage: scale * getattr(cost, stage) for stage in stages})


def all_hits(outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> list[tuple[bool, int]]:
    """Of every run that counts and question, whether the answer was right, and the number of the question."""
    return [
        (same(text, sample.answer), index)
        for outcome in differing(outcomes)
        for index, (text, sample) in enumerate(zip(outcome.answers, samples, strict=True))
    ]


def part_score(hits: Sequence[bool]) -> FamilyScore | None:
    return score(hits) if hits else None


def in_order(families: Mapping[str, FamilyScore]) -> dict[str, FamilyScore]:
    """Families as the world lists them, then all others."""
    return {name: families[name] for name in [*FAMILIES, *families] if name in families}


def verdicts(lines: Sequence[Line]) -> list[str]:
    """For every budget, as it is and healed: which methods random choice and the down-sampled input beat.

    Methods that read far more than the budget are not compared, which is said; those that score the very same are one.
    """
    none = next(line for line in lines if line.row == "none")
    return [sentence for group in by_state(lines) for sentence in compared(group, none.visual_tokens)]


def compared(lines: Sequence[Line], all_tokens: float) -> Iterator[str]:
    """The sentences on one budget and state."""
    if (budget := lines[0].budget) is None:
        return
    methods = [line for line in lines if not line.is_baseline]
    over = [line for line in methods if line.visual_tokens > SLACK * budget * all_tokens]
    for base in (line for name in (RANDOM, DOWN_SAMPLED) for line in lines if line.row == name):
        yield from beaten(base, [line for line in methods if line not in over])
    if over:
        named = "; ".join(f"{line.row} ({line.visual_tokens:.0f} of {all_tokens:.0f} tokens)" for line in over)
        yield f"{over[0].state}: not compared, as they leave the language model over {SLACK} times the budget: {named}."


def beaten(base: Line, methods: Sequence[Line]) -> Iterator[str]:
    """The sentence on one baseline; none where there is nothing to compare."""
    if not methods:
        return
    found = joined(methods)
    worse = sorted((one for one in found if one[1].average < base.average), key=lambda one: one[1].average)
    named = [
        f"{name} ({line.average:.1f}{'' if line.high < base.low else ', within the intervals'})" for name, line in worse
    ]
    if not worse:
        yield f"{base.state}: no method is below {base.row} ({base.average:.1f})."
    else:
        yield f"{base.state}: {base.row} ({base.average:.1f}) beats {len(worse)} of {len(found)}: {'; '.join(named)}."


def joined(lines: Sequence[Line]) -> list[tuple[str, Line]]:
    """Lines with their names; of those that score the very same in every family the first, with the names of all."""
    alike: dict[tuple[float, ...], list[Line]] = {}
    for line in lines:
        scores = (line.average, *(family.accuracy for family in line.families.values()))
        alike.setdefault(scores, []).append(line)
    return [(" = ".join(line.row for line in group), group[0]) for group in alike.values()]


def by_state(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines of one budget and state together, in their order."""
    return [list(group) for _, group in groupby(lines, key=lambda line: line.state)]
