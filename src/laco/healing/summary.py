"""Variants over their seeds: means and intervals."""

from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from pydantic import BaseModel

from laco.evaluate import FamilyScore
from laco.evaluate.scores import wilson
from laco.healing.variants import Outcome, Protocol

# Two-sided 95 % quantiles of Student's t by degrees of freedom; above, `student_t` has a series that is near enough.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Summary(BaseModel):
    """A variant over its seeds: mean accuracies in per cent with 95 % intervals.

    `runs` counts those that differ, see `differing`. `low` and `high` bound the average over families: with two runs or
    more by Student's t over them, which holds the chance of initialisation and data order, but not that of the choice
    of questions; with one from the number of questions alone. `families` pool the questions of the runs (Wilson's
    interval).
    """

    name: str
    method: dict[str, Any] | None
    healed: bool
    seeds: list[int]
    runs: int
    average: float
    low: float
    high: float
    families: dict[str, FamilyScore]
    loyalty: float | None
    visual_tokens: float
    seconds: float


class Study(BaseModel):
    """All outcomes, and by label why jobs failed; `refused` are the labels of those that cannot, by what laco says,
    `pending` of those that have not been run.
    """

    protocol: Protocol
    outcomes: list[Outcome]
    failures: dict[str, str]
    refused: list[str] = []
    pending: list[str] = []

    def summaries(self) -> list[Summary]:
        names = dict.fromkeys(outcome.job.variant.name for outcome in self.outcomes)
        return [summarise([o for o in self.outcomes if o.job.variant.name == name]) for name in names]

    def outcome(self, name: str) -> Outcome:
        """The first outcome of a variant."""
        return next(outcome for outcome in self.outcomes if outcome.job.variant.name == name)


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """One variant over its seeds."""
    reports = [outcome.report for outcome in outcomes]
    counted = [outcome.report for outcome in differing(outcomes)]
    averages = [report.average for report in counted]
    families = {name: pooled([report.families[name] for report in counted]) for name in counted[0].families}
    if len(set(averages)) > 1:
        low, high = seed_interval(averages)
    else:  # runs that meet in one average by chance are not certain of it
        low, high = average_interval(list(counted[0].families.values()))
    loyalties = [report.loyalty for report in reports if report.loyalty is not None]
    return Summary(
        name=outcomes[0].job.variant.name,
        method=outcomes[0].job.variant.method,
        healed=outcomes[0].job.variant.heal,
        seeds=[outcome.job.seed for outcome in outcomes],
        runs=len(counted),
        average=fmean(averages),
        low=low,
        high=high,
        families=families,
        loyalty=fmean(loyalties) if loyalties else None,
        visual_tokens=fmean(report.visual_tokens for report in reports),
        seconds=fmean(outcome.seconds for outcome in outcomes),
    )


def differing(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """The runs that count: all that were trained; of others one alone where all answer the same, as a seed that
    changes nothing adds no evidence.
    """
    is_trained = outcomes[0].job.variant.heal
    return outcomes if is_trained or any(o.answers != outcomes[0].answers for o in outcomes) else outcomes[:1]


def pooled(scores: Sequence[FamilyScore]) -> FamilyScore:
    """One family's questions over all seeds, as if they were one large set."""
    n = sum(score.n for score in scores)
    hits = sum(round(score.accuracy * score.n / 100) for score in scores)
    low, high = wilson(hits, n)
    return FamilyScore(accuracy=100 * hits / n, low=low, high=high, n=n)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean over seeds, in per cent, cut to 0 .. 100."""
    half = student_t(len(values) - 1) * stdev(values) / len(values) ** 0.5
    return max(fmean(values) - half, 0.0), min(fmean(values) + half, 100.0)


def student_t(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: above the table by its expansion around the normal distribution's
    (Abramowitz and Stegun 1964, 26.7.5), which is right to three decimals there.
    """
    if freedom in STUDENT_T:
        return STUDENT_T[freedom]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def average_interval(scores: Sequence[FamilyScore]) -> tuple[float, float]:
    """95 % interval of the mean over families from those of the families (MOVER, Zou and Donner 2008)."""
    mean = fmean(score.accuracy for score in scores)
    down = sum((score.accuracy - score.low) ** 2 for score in scores) ** 0.5 / len(scores)
    up = sum((score.high - score.accuracy) ** 2 for score in scores) ** 0.5 / len(scores)
    return mean - down, mean + up
