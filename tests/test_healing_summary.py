"""Variants over their seeds: what is averaged, and how many runs count."""

from collections.abc import Mapping, Sequence

from laco.evaluate import FamilyScore, Report
from laco.evaluate.scores import wilson
from laco.healing import Job, Outcome, Protocol, Variant, average_interval
from laco.healing.summary import differing, seed_interval, summarise


def outcome(
    seed: int, hits: Mapping[str, int], tokens: float = 36, *, heal: bool = False, answers: Sequence[str] = ()
) -> Outcome:
    """A run with so many right answers of 20 in each family; what it answers is told by the hits unless given."""
    families = {}
    for name, right in hits.items():
        low, high = wilson(right, 20)
        families[name] = FamilyScore(accuracy=100 * right / 20, low=low, high=high, n=20)
    report = Report(
        average=sum(family.accuracy for family in families.values()) / len(families), families=families, loyalty=50.0,
        visual_tokens=tokens, versions={}, seed=0, command="", data="", split=None, samples=40, case_sensitive={},
        character_error_rate={}, answers=[],
    )  # fmt: skip
    job = Job(variant=Variant(name="v", heal=heal), seed=seed, protocol=Protocol(model="m"))
    return Outcome(job=job, report=report, answers=list(answers) or [str(hits)], seconds=1.0)


def test_tokens_are_the_mean_over_seeds() -> None:
    runs = [outcome(seed, {"word": 5 + seed}, tokens=30 + 3 * seed) for seed in range(3)]
    assert summarise(runs).visual_tokens == 33


def test_runs_that_answer_the_same_count_once() -> None:
    alike = [outcome(seed, {"word": 5, "count": 10}) for seed in range(3)]
    alone, together = summarise(alike[:1]), summarise(alike)
    assert differing(alike) == alike[:1]
    assert (together.seeds, together.runs) == ([0, 1, 2], 1)
    assert together.families == alone.families
    assert together.families["word"].n == 20
    assert (together.low, together.high) == (alone.low, alone.high)


def test_runs_that_score_the_same_by_other_answers_count_each() -> None:
    hits = {"word": 5, "count": 10}
    runs = [outcome(0, hits, answers=["3", "4"]), outcome(1, hits, answers=["4", "3"])]
    assert differing(runs) == runs
    assert summarise(runs).runs == 2
    assert summarise(runs).families["word"].n == 40


def test_runs_of_a_trained_row_count_each() -> None:
    runs = [outcome(seed, {"word": 5, "count": 10}, heal=True) for seed in range(2)]
    found = summarise(runs)
    assert (found.runs, found.families["word"].n) == (2, 40)
    assert (found.low, found.high) == average_interval(list(runs[0].report.families.values()))


def test_runs_that_differ_count_each() -> None:
    runs = [outcome(seed, {"word": 5 + seed, "count": 10}) for seed in range(3)]
    found = summarise(runs)
    assert found.runs == 3
    assert found.families["word"].n == 60
    assert (found.low, found.high) == seed_interval([run.report.average for run in runs])


def test_runs_that_meet_in_one_average_are_not_certain_of_it() -> None:
    runs = [outcome(0, {"word": 4, "count": 6}), outcome(1, {"word": 6, "count": 4})]
    found = summarise(runs)
    assert found.runs == 2
    assert (found.low, found.high) == average_interval(list(runs[0].report.families.values()))
