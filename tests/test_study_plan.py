"""What a study would run: budgets on the model's own grid, what cannot run with its reason, and what a part leaves."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import laco
import tiny
from laco import cli
from laco.cost import Ratio
from laco.errors import LacoError
from laco.healing import Job, Protocol, Variant
from laco.healing.run import finished, prepare
from laco.study import measure
from laco.study.measure import Cost, Costs, measure_costs, read_costs
from laco.study.plan import listing, make_plan
from laco.study.recipe import Timing, area, down_sampling, factors, load_study, parse_study
from laco.study.results import StudyResults
from laco.study.run import run

BUDGETS = [0.5, 0.25, 0.11, 0.06]
MODELS = Path(__file__).parents[1] / "models"


def recipe(model: Path | str, **keys: Any) -> dict[str, Any]:
    return {"output": "out", "model": str(model), "budgets": BUDGETS, **keys}


# The down-sampled input.


def test_the_down_sampled_input_stands_at_every_budget(talker_directory: Path) -> None:
    plan = make_plan(parse_study(recipe(talker_directory)))
    found = {case.budget: case.variant.down_sample for case in plan.cases if case.row == "down-sampled input"}
    assert found == {0.5: 1.414, 0.25: 2, 0.11: 3, 0.06: 4}
    alone = make_plan(parse_study(recipe(talker_directory, budgets=[0.5])))
    sides = [case.variant.down_sample for case in alone.cases if case.row == "down-sampled input"]
    assert sides == [1.414, 2]  # the second for the hard questions


@pytest.mark.parametrize(("budget", "side"), [(0.9, 1.054), (0.98, 1.01), (0.3, 1.826), (1 / 9, 3), (0.01, 10)])
def test_its_side_is_whole_where_that_is_near(budget: float, side: float) -> None:
    assert down_sampling(budget) == side


def test_jobs_from_before_factors_were_fractions_are_the_same(tmp_path: Path) -> None:
    job = Job(variant=Variant(name="half", heal=False, down_sample=2.0), seed=0, protocol=Protocol(model="m"))
    data = json.loads(job.model_dump_json())
    data["variant"]["down_sample"] = 2
    (tmp_path / "job.json").write_text(json.dumps(data))
    (tmp_path / "log.txt").write_text("half of it")
    assert Job.model_validate(data) == job
    prepare(tmp_path, job)
    assert (tmp_path / "log.txt").exists()  # goes on where it was
    report = {
        "average": 1, "families": {}, "loyalty": 1, "visual_tokens": 1, "versions": {}, "seed": 0, "command": "",
        "data": "", "split": None, "samples": 1, "case_sensitive": {}, "character_error_rate": {},
    }  # fmt: skip
    outcome = {"job": data, "report": report, "answers": ["a"], "seconds": 1}
    (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    assert finished(tmp_path, job) is not None
    prepare(tmp_path, job.model_copy(update={"seed": 1}))
    assert not (tmp_path / "log.txt").exists()


# Windows on the model's own grid.


def windows(raw: dict[str, Any], **row: Any) -> dict[float | None, int]:
    """Factors by budget of average pooling in the encoder, and outside."""
    rows = [{"method": "average_pool", "depth": 0.5, "budgets": "factor", **row}]
    plan = make_plan(parse_study({**raw, "rows": rows}))
    return {
        c.budget: c.variant.method["factor"] for c in plan.cases if c.row == "average_pool@1/2" and c.variant.method
    }


def test_windows_are_chosen_by_the_tokens_that_they_leave(tmp_path: Path) -> None:
    """Of 12 x 12 tokens r = 2, 3 and 4 leave 25, 11 and 6 %; of 6 x 6 in a frame, r = 3, 4 and 5 leave the same."""
    assert windows(recipe(MODELS / "laco-tiny")) == {0.25: 2, 0.11: 3, 0.06: 4}
    assert windows(recipe(MODELS / "laco-tiny-video", judge={"data": "world-video"})) == {0.25: 2, 0.11: 3}


def test_average_pool_stands_at_every_budget(tmp_path: Path) -> None:
    """Where no window comes near, as many regions; `grid_pool` refuses nothing that windows took."""
    plan = make_plan(parse_study(recipe(MODELS / "laco-tiny", heal={})))
    pools = [(c.budget, c.variant.heal, c.variant.method) for c in plan.cases if c.row == "average pool"]
    by_method = {
        name: [(budget, heal) for budget, heal, method in pools if method and method["method"] == name]
        for name in ("average_pool", "grid_pool")
    }
    assert by_method["average_pool"] == [(b, heal) for b in (0.25, 0.11, 0.06) for heal in (False, True)]
    assert by_method["grid_pool"] == [(0.5, False), (0.5, True)]
    assert "average pool" not in plan.refused


def test_a_model_that_takes_mergers_alone_has_average_pool_where_windows_come_near(tmp_path: Path) -> None:
    laco.save_pretrained(*tiny.CASES["mistral3-pixtral"].build(), tmp_path)
    plan = make_plan(parse_study(recipe(tmp_path, budgets=[0.5, 0.25])))
    assert [case.budget for case in plan.cases if case.row == "average pool"] == [0.25]
    assert "takes mergers alone" in plan.refused["average pool 50 %"]
    assert "average pool" not in plan.refused


def test_windows_that_come_near_no_budget_stand_nowhere(talker_directory: Path) -> None:
    """At 50 % alone, 2 x 2 leave half of what is wanted: the row says so, average pool is one of regions."""
    rows = [{"method": "laco", "depth": 0.5, "budgets": "factor"}]
    plan = make_plan(parse_study(recipe(talker_directory, budgets=[0.5], rows=rows, heal={})))
    assert plan.refused == {"laco@1/2": "no window of r x r tokens leaves a share that is near a budget of this study"}
    pools = [c.variant.method["method"] for c in plan.cases if c.row == "average pool" and c.variant.method]
    assert pools == ["grid_pool", "grid_pool"]


def test_padding_counts(talker_directory: Path) -> None:
    """Of 6 x 6 tokens r = 4 leaves 2 x 2 by padding, as r = 3 does, and 1 x 1 by cropping."""
    raw = recipe(talker_directory, budgets=[0.25, 0.11, 0.03])
    assert windows(raw) == {0.25: 2, 0.11: 3, 0.03: 6}
    assert windows(raw, odd="crop") == {0.25: 2, 0.11: 3, 0.03: 4}


def test_what_is_left_twice_stands_once() -> None:
    left = {2: 0.25, 3: 4 / 36, 4: 4 / 36, 5: 4 / 36, 6: 1 / 36}
    assert factors(BUDGETS, left.__getitem__) == {0.25: 2, 0.11: 3}
    assert factors([0.11, 0.03], left.__getitem__) == {0.11: 3, 0.03: 6}
    assert factors([0.02], area) == {0.02: 7}


# What cannot run.


@pytest.mark.parametrize("as_it_is", [False, True])
def test_rows_that_have_to_be_trained_say_so(talker_directory: Path, as_it_is: bool) -> None:
    rows = [
        {"method": "laco", "budgets": "factor"},
        {"method": "explainability", "budgets": "keep"},
        {"method": "div_prune", "budgets": "keep"},
        {"method": "scope", "budgets": "keep", "as_it_is": False},
    ]
    study = parse_study(recipe(talker_directory, rows=rows, heal={} if as_it_is else None))
    cannot = {entry["row"]: entry["cannot"] for entry in listing(study, as_it_is=as_it_is) if entry["cannot"]}
    assert cannot["laco"] == cannot["explainability"] == "has to be trained, and this study heals nothing"
    assert cannot["scope"] == "is not to be judged as it is, and this study heals nothing"
    assert "div_prune" not in cannot
    only = listing(study, ["explainability"], as_it_is)
    assert [entry["row"] for entry in only if entry["cannot"]] == ["explainability"]


def test_a_row_that_is_healed_nowhere_says_so(talker_directory: Path) -> None:
    rows = [{"method": "laco", "budgets": "factor", "heal": False}]
    plan = make_plan(parse_study(recipe(talker_directory, rows=rows, heal={})))
    assert plan.refused["laco"] == "has to be trained, and this study heals it at none of its budgets"


@pytest.mark.parametrize("method", ["div_prune", "fastv"])
def test_more_tokens_than_there_are_show_in_the_plan(talker_directory: Path, method: str) -> None:
    place = {"layer": 1} if method == "fastv" else {}
    rows = [{"method": method, **place, "budgets": {0.5: {"keep": 37}, 0.25: {"keep": 9}}}]
    plan = make_plan(parse_study(recipe(talker_directory, rows=rows)))
    assert f"{method} cannot keep 37 of 36 visual tokens" in plan.refused[method]
    assert [case.budget for case in plan.cases if case.row == method] == [0.25]


def test_a_folder_without_a_model_is_refused_as_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LacoError) as said:
        make_plan(parse_study(recipe(tmp_path)))
    with pytest.raises(LacoError) as elsewhere:
        laco.from_pretrained(tmp_path)
    assert str(said.value) == str(elsewhere.value)


# What is wrong in a recipe.


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows": ["div_prune"]}, "rows, number 1 must hold keys and values, such as method: and budgets:; got 'div"),
        ({"rows": [{"method": "tome", "budgets": {"half": {"r": 3}}}]}, "tome, budgets: .* such as 0.25; got half"),
        ({"rows": [{"method": "tome", "budgets": {0.5: 3}}]}, "rows, tome, budgets: the budget 0.5 needs settings"),
        ({"rows": [{"method": "tome", "budgets": [0.5]}]}, "rows, tome, budgets: give the name of the setting"),
        ({"rows": [{"method": "tome", "name": "x"}]}, "rows, x: budgets is missing"),
        ({"rows": [{"method": "laco", "budgets": "factor", "heal": "no way"}]}, "rows, laco, heal should be a valid b"),
        ({"rows": None}, "rows should be a valid list; got nothing"),
        ({"budgets": None, "budget": [0.5]}, "unknown key budget; the nearest known key is budgets"),
        ({"seeds": []}, "seeds has no entry; give one or more"),
        ({"heal": {"heal_steps": 0}}, "heal.heal_steps should be greater than 0; got 0"),
        ({"heal": 3}, "heal must hold keys and values, such as budgets: and data:; got 3"),
    ],
)
def test_mistakes_name_the_place_and_what_is_right(keys: dict[str, Any], message: str) -> None:
    given = {key: value for key, value in recipe("m", **keys).items() if value is not None or key == "rows"}
    with pytest.raises(LacoError, match=message):
        parse_study(given)


# What was found before.


def cost() -> Cost:
    return Cost(encoder_ms=1, prefill_ms=1, scoring_ms=0, speedup=Ratio(value=1, low=1, high=1), memory_mb=1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Blocks of methods that are measured from now on; div_prune fails."""
    blocks: list[list[str]] = []

    class Call:
        def __init__(self, model: str, method: Any, *_: Any) -> None:
            self.name = method["method"] if method else "none"

        def run(self) -> None:
            if self.name == "div_prune":
                raise RuntimeError("out of memory")

    def measure_block(calls: dict[str, Any], rounds: int) -> dict[str, Cost]:
        blocks.append([call.name for call in calls.values()])
        return dict.fromkeys(calls, cost())

    monkeypatch.setattr(measure, "Call", Call)
    monkeypatch.setattr(measure, "measure_block", measure_block)
    return blocks


SCOPE, DIV_PRUNE = laco.methods.Scope().to_dict(), laco.methods.DivPrune().to_dict()


def times(file: Path, *methods: dict[str, Any], model: str = "m") -> Costs:
    return measure_costs(methods, model, Timing(), file, progress=False)


def test_what_could_not_be_timed_is_tried_again(tmp_path: Path, measured: list[list[str]]) -> None:
    file = tmp_path / "times.json"
    for _ in range(2):
        found = times(file, SCOPE, DIV_PRUNE).found
        assert "RuntimeError('out of memory')" in found.values()
    assert measured == [["none", "scope"], ["none"]]
    assert "memory'" not in file.read_text()


def test_times_of_another_machine_are_not_mixed(
    tmp_path: Path, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, here = tmp_path / "times.json", measure.machine()
    times(file, SCOPE)
    monkeypatch.setattr(measure, "machine", lambda: {**here, "laco": "later"})
    times(file, SCOPE)
    assert len(measured) == 1
    monkeypatch.setattr(measure, "machine", lambda: {**here, "torch": "later"})
    assert times(file, SCOPE).machine["torch"] == "later"
    assert len(measured) == 2


def test_times_are_those_of_what_is_asked_for(tmp_path: Path, measured: list[list[str]]) -> None:
    times(file := tmp_path / "times.json", SCOPE)
    assert read_costs(file, "m", Timing())
    assert not read_costs(file, "other", Timing())
    assert not read_costs(file, "m", Timing(rounds=1))
    assert not read_costs(file, "m", Timing(), "world-video")


def test_a_part_loses_nothing_of_the_whole(
    talker_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file, output = tmp_path / "study.yaml", tmp_path / "out"
    rows = [{"method": "div_prune", "budgets": "keep"}, {"method": "scope", "budgets": "keep", "heal": False}]
    short = {"adapt_steps": 1, "heal_steps": 1, "batch_size": 2}
    whole = recipe(talker_directory, rows=rows, heal=short, judge={"samples": 7}, seeds=[0], timing=None)
    file.write_text(yaml.safe_dump({**whole, "output": str(output), "budgets": [0.25]}))

    def command(*options: str) -> StudyResults:
        monkeypatch.setattr(sys, "argv", ["laco", "study", str(file), "--json", *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (None, 0)
        capsys.readouterr()
        return StudyResults.model_validate_json((output / "results.json").read_text())

    first = command("--as-it-is", "--only", "scope")
    assert {line.row for line in first.lines} >= {"none", "scope"}
    assert "div_prune" not in {line.row for line in first.lines}
    assert not any(line.healed for line in first.lines)
    run(load_study(file), only=["div_prune"], progress=False)
    found = command("--as-it-is", "--only", "scope")
    assert {(line.row, line.healed) for line in found.lines} >= {("div_prune", True), ("scope", False)}
    assert found.pending == 0
    assert first.pending == len(found.lines) - len(first.lines)
