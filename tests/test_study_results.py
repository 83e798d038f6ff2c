"""What a study says of its answers and times: lines, verdicts, the page, the plot."""

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from laco.cost import Ratio
from laco.data import Sample
from laco.evaluate import Report
from laco.evaluate.report import score
from laco.healing import HALVED, NONE, Job, Outcome, Protocol, Study, Variant
from laco.healing.job import recipe_of
from laco.healing.summary import seed_interval
from laco.methods import get
from laco.study.measure import Cost, Costs, key_of
from laco.study.page import as_csv, as_markdown, groups, remarks, table
from laco.study.plan import Case, place_of
from laco.study.plot import BEST, accuracy_against_time, front
from laco.study.recipe import Timing, parse_study
from laco.study.results import Line, StudyResults, make_lines, verdicts
from laco.study.run import run

SAMPLES = [Sample("", (), "q", str(truth), "count") for truth in range(10)]
BASELINES = {"random": "random_tokens", "uniform stride": "uniform_stride", "average pool": "average_pool"}
NONE_RIGHT, DOWN_SAMPLED_RIGHT = "1111111111", "1111100000"


def outcome(variant: Variant, right: str, seed: int = 0, tokens: float = 36) -> Outcome:
    """An outcome with so many right answers: "1" = right, "0" = wrong, question by question."""
    answers = [sample.answer if hit == "1" else "no" for sample, hit in zip(SAMPLES, right, strict=True)]
    found = score([hit == "1" for hit in right])
    report = Report(
        average=found.accuracy, families={"count": found}, loyalty=50.0, visual_tokens=tokens, versions={}, seed=0,
        command="", data="", split=None, samples=10, case_sensitive={}, character_error_rate={}, answers=answers,
    )  # fmt: skip
    job = Job(variant=variant, seed=seed, protocol=Protocol(model="m"))
    return Outcome(job=job, report=report, answers=answers, seconds=1.0)


def lines_of(
    rights: Mapping[str, str | list[str]], healed: bool = False, costs: Costs | None = None, **tokens: float
) -> list[Line]:
    """Lines at 25 % from {row: right answers (of each seed)}, beside none and the down-sampled input.

    A row is called like its method, with its place after an @; `tokens` other than 36 are by method.
    """
    cases = [Case("none", "baseline", None, NONE), Case("down-sampled input", "baseline", 0.25, HALVED)]
    runs: list[str | list[str]] = [NONE_RIGHT, DOWN_SAMPLED_RIGHT, *rights.values()]
    if healed:
        cases += [Case("none", "baseline", None, Variant(name="none, healed"))]
        runs.insert(2, NONE_RIGHT)
    for row in rights:
        method = get(BASELINES.get(row, row.split("@")[0]))()
        place = "baseline" if row in BASELINES else place_of(method)
        cases.append(Case(row, place, 0.25, Variant(name=row, method=method.to_dict(), heal=healed)))
    outcomes = [
        outcome(case.variant, right, seed, tokens.get(case.row, 144 if case.budget is None else 36))
        for case, found in zip(cases, runs, strict=True)
        for seed, right in enumerate([found] if isinstance(found, str) else found)
    ]
    return make_lines(cases, Study(protocol=Protocol(model="m"), outcomes=outcomes, failures={}), SAMPLES, costs)


def cost(encoder: float, prefill: float, speedup: float, scoring: float = 0.0) -> Cost:
    ratio = Ratio(value=speedup, low=speedup, high=speedup)
    return Cost(encoder_ms=encoder, prefill_ms=prefill, scoring_ms=scoring, speedup=ratio, memory_mb=1)


def results_of(lines: list[Line], **keys: Any) -> StudyResults:
    machine = {"processor": "a", "cores": 2, "threads": 1, "torch": "1", "transformers": "2", "laco": "3"}
    recipe = {"output": "out", "model": "some/model", "budgets": [0.25], **keys.pop("recipe", {})}
    return StudyResults(
        command="laco study x.yaml", recipe=parse_study(recipe).model_dump(), lines=lines, verdicts=verdicts(lines),
        refused={"tome": "no keys"}, failures={}, untimed={}, machine=machine, versions={}, **keys,
    )  # fmt: skip


# Lines.


def test_hard_questions_are_those_that_the_down_sampled_input_gets_wrong() -> None:
    lines = {line.row: line for line in lines_of({"dart": "1100000111"})}
    assert [lines[name].hard.accuracy for name in ("none", "down-sampled input", "dart")] == [100, 0, 60]
    assert [lines[name].easy.accuracy for name in ("none", "down-sampled input", "dart")] == [100, 100, 40]
    assert (lines["dart"].hard.n, lines["dart"].easy.n) == (5, 5)


def test_runs_that_score_the_same_count_once_among_the_hard_questions_too() -> None:
    lines = {line.row: line for line in lines_of({"scissor": ["1100000111"] * 3, "random": ["1100000111", "0" * 10]})}
    assert (lines["scissor"].runs, lines["scissor"].hard.n, lines["scissor"].families["count"].n) == (1, 5, 10)
    assert (lines["random"].runs, lines["random"].hard.n, lines["random"].families["count"].n) == (2, 10, 20)
    assert lines["random"].hard.accuracy == 30


def test_times_of_all_blocks_are_on_the_scale_of_one_model() -> None:
    # The second block ran while the machine was half as fast: there the model as it is took 12 ms instead of 6.
    first, second = get("dart")().to_dict(), get("scope")().to_dict()
    found = {
        "none": cost(4, 2, 1),
        key_of(first): cost(2, 1, 2, scoring=1),
        key_of(second): cost(6, 2, 1.5, scoring=1),
    }
    costs = Costs(model="m", data="world", timing=Timing(), machine={}, found=dict(found))
    rights = dict.fromkeys(("dart", "scope", "tome"), NONE_RIGHT)
    lines = {line.row: line for line in lines_of(rights, costs=costs)}
    assert lines["dart"].cost == found[key_of(first)]
    assert lines["scope"].cost == cost(3, 1, 1.5, scoring=0.5)
    for row in ("none", "down-sampled input", "dart", "scope"):
        assert lines[row].cost.answer_ms == pytest.approx(6 / lines[row].cost.speedup.value)
    assert lines["tome"].cost is None
    assert costs.found == found


@pytest.mark.parametrize(
    ("name", "train_data", "own"),
    [
        ("laco", "world", False),
        ("flexselect", "world", False),  # but for its `lite` form nothing of it is trained
        ("div_prune", "world", False),
        ("spvit", "photos.jsonl", True),
        ("explainability", "photos.jsonl", True),
        ("glimpse_prune", "world", True),
        ("glimpse_prune", "photos.jsonl", False),  # it learns from boxes
    ],
)
def test_healing_teaches_some_methods_by_a_loss_of_their_own(
    talker_directory: Path, name: str, train_data: str, own: bool
) -> None:
    method = get(name)(**({"depth": 0.5} if name == "glimpse_prune" else {})).to_dict()
    protocol = Protocol(model=str(talker_directory), train_data=train_data)
    job = Job(variant=Variant(name=name, method=method), seed=0, protocol=protocol)
    first = recipe_of(job, Path("model")).stages[0]
    assert protocol.teaches(job.variant) == own == (first.method_loss > 0) == (first.questions == 1)


# Verdicts.


def test_what_a_baseline_beats_is_said() -> None:
    lines = lines_of({"random": "1111111110", "dart": "1111111111", "scope": "1111000000", "evs": "0000000000"})
    first, second = verdicts(lines)
    assert first == "25 %, as it is: random (90.0) beats 2 of 3: evs (0.0); scope (40.0, within the intervals)."
    assert second.startswith("25 %, as it is: down-sampled input (50.0) beats 2 of 3: evs (0.0, within the intervals)")
    assert verdicts([line for line in lines if line.row in ("none", "dart", "random")]) == [
        "25 %, as it is: no method is below random (90.0)."
    ]


def test_baselines_at_other_places_are_no_methods() -> None:
    rights = {"random": NONE_RIGHT, "random_keep@1/4": "0" * 10, "average_pool@1/4": "0" * 10}
    assert not verdicts(lines_of(rights))
    (first, _) = verdicts(lines_of(rights | {"dart": "0" * 10}))
    assert first == "25 %, as it is: random (100.0) beats 1 of 1: dart (0.0)."


def test_rows_that_score_the_same_are_named_together() -> None:
    alike = "1100000000"
    rights = {"random": NONE_RIGHT, "laco@1/4": alike, "average_pool@1/4": alike, "window_merger@1/4": alike}
    (first, _) = verdicts(lines_of(rights | {"dart": "1000000000"}))
    assert first.endswith("random (100.0) beats 2 of 2: dart (10.0); laco@1/4 = window_merger@1/4 (20.0).")


def test_methods_that_read_far_more_than_the_budget_are_not_compared() -> None:
    rights = {"random": NONE_RIGHT, "ipcv": "0" * 10, "dart": "0" * 10, "scope": "0" * 10}
    first, _, last = verdicts(lines_of(rights, ipcv=144, dart=54))  # 54 of 144 are 1.5 times a quarter
    assert first.startswith("25 %, as it is: random (100.0) beats 1 of 1: dart = scope (0.0)")
    assert last == (
        "25 %, as it is: not compared, as they leave the language model over 1.5 times the budget:"
        " ipcv (144 of 144 tokens)."
    )


# The page.


def test_page_table_and_csv_show_every_line() -> None:
    results = results_of(lines_of({"random": "1110000000", "dart": "0000000000"}))
    page, rows = as_markdown(results, None), list(csv.DictReader(as_csv(results).splitlines()))
    assert [row["row"] for row in rows] == ["none", "down-sampled input", "random", "dart"]
    assert rows[3]["hard"] == "0.0"
    assert "| random | 36 | 30.0 ±" in page
    assert "## 25 %, as it is" in page
    assert "- tome: no keys" in page
    assert "| dart | 0 (0 – 28) |" in page
    assert "tome cannot: no keys" in list(remarks(results))
    assert "# 1 method beside the baselines on model, one protocol\n" in page
    assert "a, 2 cores, 1 threads; torch 1" in page


def test_the_model_as_it_is_is_in_every_table() -> None:
    lines = lines_of({"random": "1110000000", "dart": ["1111000000", "1110000000"]}, healed=True)
    names = [[line.row for line in group] for group in groups(lines)]
    assert names == [["none", "down-sampled input"], ["none", "none", "random", "dart"]]
    healed = as_markdown(results_of(lines), None).split("## 25 %, healed\n")[1].splitlines()[3:7]
    assert [row.split(" | ")[0] for row in healed] == ["| none, as it is", "| none", "| random", "| dart"]
    assert list(table(results_of(lines)).columns[0].cells) == [
        *("[bold]25 %, as it is[/]", "none", "down-sampled input"),
        *("[bold]25 %, healed[/]", "none, as it is", "none", "random", "dart"),
    ]
    alone = [line for line in lines if line.budget is None]
    assert groups(alone) == [[alone[0]], [alone[1]]]


def test_a_budget_that_the_recipe_does_not_name_has_no_lines(
    talker_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input down-sampled by 2 is there to tell the hard questions, and stands at 25 %."""
    raw = {"model": str(talker_directory), "budgets": [0.5], "seeds": [0], "timing": None}
    recipe = parse_study({**raw, "output": str(tmp_path / "out")})

    def all_finished(variants: list[Variant], protocol: Protocol, *_: Any, **__: Any) -> Study:
        outcomes = [outcome(v, DOWN_SAMPLED_RIGHT if v.down_sample == 2 else NONE_RIGHT) for v in variants]
        return Study(protocol=protocol, outcomes=outcomes, failures={})

    monkeypatch.setattr(sys.modules["laco.study.run"], "finished_study", all_finished)
    monkeypatch.setattr(Protocol, "judged_on", lambda _: SAMPLES)
    results = run(recipe, finished=True)
    assert {line.budget for line in results.lines} == {None, 0.5}
    assert [line.hard.n for line in results.lines if line.hard] == [5] * len(results.lines)
    assert "25 %, as it is" not in as_markdown(results, None)


def test_runs_say_which_interval_a_row_has() -> None:
    lines = lines_of({"dart": ["1111000000", "1110000000"]}, healed=True)
    low, high = seed_interval([40, 30])
    page = as_markdown(results_of(lines), None)
    assert f"| dart | 36 | 35.0 ±{(high - low) / 2:.1f} | 2 |" in page
    assert "| none | 144 | 100.0 ±13.9 | 1 |" in page
    assert "Student's t over the runs" in page


def test_what_was_healed_otherwise_is_marked() -> None:
    rights: dict[str, str | list[str]] = {"glimpse_prune": NONE_RIGHT, "dart": NONE_RIGHT}
    heal = {"recipe": {"heal": {}}}
    page = as_markdown(results_of(lines_of(rights, healed=True), **heal), None)
    assert "with 8 questions each, for all methods alike, but those marked †: glimpse_prune learn by a loss" in page
    assert page.count("| glimpse_prune † |") == 2
    assert "| dart † |" not in page
    page = as_markdown(results_of(lines_of({"dart": NONE_RIGHT}, healed=True), **heal), None)
    assert "for all methods alike. Times" in page
    assert "†" not in page


def test_names_are_explained() -> None:
    rows = [{"method": "prumerge", "name": "prumerge+", "grid": True, "budgets": {0.25: {"keep": 9}}}]
    lines = lines_of({"prumerge": NONE_RIGHT, "laco@1/4": NONE_RIGHT})
    lines[2] = lines[2].model_copy(update={"row": "prumerge+"})
    page = as_markdown(results_of(lines, recipe={"rows": rows}), None)
    assert "`prumerge+` is prumerge with `grid: True`" in page
    assert "`@1/4` stands after a quarter" in page
    assert "@external" not in page


def test_baselines_without_a_line_are_explained() -> None:
    lines = [
        line.model_copy(update={"budget": 0.5}) if line.budget else line for line in lines_of({"random": NONE_RIGHT})
    ]
    recipe = {"recipe": {"budgets": [0.5, 0.25]}}
    page = as_markdown(results_of(lines, **recipe), None)
    assert "- uniform stride is not here: the study has none at this budget.\n" in page
    assert "random is not here" not in page
    assert "down-sampled input is not here" not in page
    results = results_of(lines, pending=2, **recipe)
    results.refused["uniform stride"] = "no grid"
    assert "50 %, as it is: uniform stride is not here: no grid." in remarks(results)
    results.refused.clear()
    assert "50 %, as it is: uniform stride is not here: it has not been run yet." in remarks(results)


def test_rows_that_the_recipe_leaves_out_are_explained() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "laco", "depth": 0.25, "budgets": "factor"},
        {"method": "pixel_shuffle", "depth": 0.25, "budgets": "factor"},
        {"method": "dart", "budgets": {0.5: {"keep": 9}}},
        {"method": "dyntok", "budgets": {0.5: {"threshold": 0.5}}},
        {"method": "scope", "budgets": "keep", "heal": False},
    ]
    lines = [
        line.model_copy(update={"budget": budget, "healed": healed})
        for budget in (0.5, 0.25)
        for healed in (False, True)
        for line in lines_of({"random": NONE_RIGHT})
    ]
    recipe = {"budgets": [0.5, 0.25], "rows": rows, "heal": {"budgets": [0.25]}}
    kept = [line for line in lines if (line.budget, line.healed) != (0.5, True)]
    page = as_markdown(results_of(kept, recipe=recipe), None).split("## Rows that are left out of tables\n\n")[1]
    window = "the window that comes nearest, 2 x 2, leaves 25 %"
    late = "the language model's layers before the first drop read all tokens, so small budgets are out of reach"
    assert page.split("\n\n")[0].splitlines() == [
        f"- 50 %, as it is: laco@1/4, pixel_shuffle@1/4: {window}.",
        "- 25 %, as it is: laco@1/4, pixel_shuffle@1/4: it must be trained first.",
        f"- 25 %, as it is; 25 %, healed: dart: {late}.",
        "- 25 %, as it is; 25 %, healed: dyntok: the recipe has no settings that come to this budget.",
        "- 25 %, healed: scope: the recipe does not heal it there.",
    ]


# The plot.


def timed(lines: list[Line], speedups: list[float]) -> list[Line]:
    return [
        line.model_copy(update={"cost": cost(1, 0, speedup)}) for line, speedup in zip(lines, speedups, strict=True)
    ]


def test_the_plot_names_baselines_the_best_of_each_place_and_what_nothing_beats() -> None:
    rights = {"random": "1100000000", "dart": "1111110000", "average_pool@1/4": "1000000000"}
    rights |= {
        row: "1" * hits + "0" * (10 - hits) for row, hits in (("scope", 8), ("holov", 7), ("mmtok", 6), ("evs", 5))
    }
    lines = timed(lines_of(rights), [1, 1, 1.2, 1.1, 4, *(0.9, 0.8, 0.7, 0.6)])
    assert [line.row for line in front(lines)] == ["none", "random", "dart", "average_pool@1/4"]
    (axes,) = accuracy_against_time(lines).axes
    best = [f"{row} 25 %" for row in ("scope", "holov", "mmtok")]
    assert len(best) == BEST
    assert {text.get_text() for text in axes.texts} == {
        *("none", "down-sampled input", "random"),
        *("dart 25 %", "average_pool@1/4 25 %", *best),
    }
    assert [25, 10] in [dots.get_offsets().tolist()[0] for dots in axes.collections]


def test_names_in_the_plot_cover_neither_points_nor_each_other() -> None:
    rights = dict.fromkeys(
        ("random", "uniform stride", "dart", "scope", "holov", "mmtok", "tome", "evit"), "1111110000"
    )
    lines = timed(lines_of(rights), [1.0, 0.99, *(1 + 0.004 * number for number in range(len(rights)))])
    figure = accuracy_against_time(lines)
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert len(boxes) == len(lines)
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert axes.bbox.containsx(box.x0)
        assert axes.bbox.containsx(box.x1)
    points = axes.transData.transform([dots.get_offsets()[0] for dots in axes.collections])
    assert not any(box.contains(*point) for box in boxes for point in points)
