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
from laco.study.measure import Cost, Costs, key_of
from laco.study.plan import Case, Place
from laco.study.recipe import DOWN_SAMPLED, RANDOM, percent
from laco.world import FAMILIES

MEASURED = {"healed", "method", "seeds", "visual_tokens", "average", "low", "high", "loyalty"}  # of a summary


class Line(BaseModel):
    """One row at one budget, as it is or healed. Rates in per cent with 95 % intervals, over all seeds.

    Args:
        visual_tokens: that a layer of the language model computes, on average over layers and questions.
        low, high: of `average`, the mean over families; see `laco.healing.Summary`.
        hard, easy: accuracy on the questions that the down-sampled input (factor 2, as it is) gets wrong, and on the
            others: the view of VTC-Bench (arXiv 2510.07143), which tells apart what compression is needed for.
        cost: None where it was not measured.
    """

    row: str
    place: Place
    budget: float | None
    healed: bool
    method: dict[str, Any] | None
    seeds: list[int]
    visual_tokens: float
    average: float
    low: float
    high: float
    families: dict[str, FamilyScore]
    loyalty: float | None
    hard: FamilyScore | None
    easy: FamilyScore | None
    cost: Cost | None

    @property
    def state(self) -> str:
        """Budget and training, e.g. "25 %, healed"."""
        budget = "all tokens" if self.budget is None else percent(self.budget)
        return f"{budget}, {'healed' if self.healed else 'as it is'}"

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
        verdicts: sentences on which methods the baselines beat.
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
        cost = costs.found.get(key_of(method)) if costs else None
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
                cost=cost if isinstance(cost, Cost) else None,
            )
        )
    return sorted(lines, key=lambda line: (-(line.budget or 1), line.healed))


def hard_questions(cases: Sequence[Case], study: Study, samples: Sequence[Sample]) -> set[int] | None:
    """Which questions the input down-sampled by 2 gets wrong, without training; None before it was asked."""
    variant = next(c.variant for c in cases if c.variant.down_sample == 2 and not c.variant.heal)
    outcomes = [outcome for outcome in study.outcomes if outcome.job.variant == variant]
    return {index for hit, index in all_hits(outcomes, samples) if not hit} if outcomes else None


def all_hits(outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> list[tuple[bool, int]]:
    """Of every seed and question, whether the answer was right, and the number of the question."""
    return [
        (same(text, sample.answer), index)
        for outcome in outcomes
        for index, (text, sample) in enumerate(zip(outcome.answers, samples, strict=True))
    ]


def part_score(hits: Sequence[bool]) -> FamilyScore | None:
    return score(hits) if hits else None


def in_order(families: Mapping[str, FamilyScore]) -> dict[str, FamilyScore]:
    """Families as the world lists them, then all others."""
    return {name: families[name] for name in [*FAMILIES, *families] if name in families}


def verdicts(lines: Sequence[Line]) -> list[str]:
    """For every budget, as it is and healed: which methods random choice and the down-sampled input beat."""
    return [
        sentence for group in by_state(lines) for name in (RANDOM, DOWN_SAMPLED) for sentence in beaten(group, name)
    ]


def beaten(lines: Sequence[Line], baseline: str) -> Iterator[str]:
    """The sentence on one baseline; none where there is nothing to compare."""
    base = next((line for line in lines if line.row == baseline), None)
    methods = [line for line in lines if line.place != "baseline"]
    if base is None or not methods:
        return
    worse = sorted((line for line in methods if line.average < base.average), key=lambda line: line.average)
    named = [
        f"{line.row} ({line.average:.1f}{'' if line.high < base.low else ', within the intervals'})" for line in worse
    ]
    if not worse:
        yield f"{base.state}: no method is below {baseline} ({base.average:.1f})."
    else:
        yield f"{base.state}: {baseline} ({base.average:.1f}) beats {len(worse)} of {len(methods)}: {'; '.join(named)}."


def by_state(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines of one budget and state together, in their order."""
    return [list(group) for _, group in groupby(lines, key=lambda line: line.state)]
