"""`laco study`: what a recipe means, what is measured, and a whole study that is stopped and goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import laco
import tiny
from laco import cli
from laco.errors import LacoError
from laco.grid import Grid
from laco.methods import Reducer, Selector, registry
from laco.methods.base import MergerModule
from laco.methods.selector import Signals
from laco.study.measure import peak_bytes, scoring_ms
from laco.study.page import as_markdown, remarks
from laco.study.plan import listing, make_plan
from laco.study.recipe import BASELINES, area, factors, load_study, parse_study
from laco.study.results import StudyResults
from laco.study.run import run

ZOO = Path(__file__).parents[1] / "recipes" / "zoo.yaml"
BUDGETS = [0.5, 0.25, 0.11, 0.06]


def recipe(model: Path | str = "nowhere", **keys: Any) -> dict[str, Any]:
    return {"output": "out", "model": str(model), "budgets": [0.25], **keys}


TWICE = {"method": "div_prune", "budgets": "keep"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budgetts": [0.5]}, "unknown key budgetts; the nearest known key is budgets"),
        ({"heal": {"adapt_stepps": 3}}, "unknown key heal.adapt_stepps; the nearest known key is adapt_steps"),
        ({"rows": [{"method": "tom", "budgets": "keep"}]}, "no method 'tom'; did you mean 'tome'"),
        ({"rows": [{"method": "laco", "budgets": "factor", "dept": 0.25}]}, "laco: unknown key dept; .* is depth"),
        ({"rows": [{"method": "laco", "budgets": "factor", "heel": False}]}, "laco: unknown key heel; .* is heal"),
        ({"rows": [{"method": "tome", "budgets": "keeep"}]}, "tome: unknown key keeep in budgets"),
        ({"rows": [{"method": "tome", "budgets": {0.25: {"rr": 3}}}]}, "tome: unknown key rr in budgets; .* is r"),
        ({"rows": [{"method": "tome", "budgets": {0.2: {"r": 3}}}]}, "tome names the budget 0.2, which is not among"),
        ({"rows": [{"method": "laco", "budgets": "factor", "heal": [0.5]}]}, "laco names the budget 0.5"),
        ({"rows": [{"method": "div_prune", "budgets": {0.25: {"keep": 0}}}]}, "keep is a count of visual tokens, 1 or"),
        ({"heal": {"budgets": [0.1]}}, "heal names the budget 0.1"),
        ({"budgets": [0.0]}, "between 0 and 1; got 0"),
        ({"rows": [{"budgets": "keep"}]}, "rows, number 1: method is missing"),
        ({"seeds": [0, 1, 0]}, "seeds have 0 twice; give each once"),
        ({"budgets": [0.25, 0.5, 0.25001]}, "budgets have 25 % twice; give each once"),
        (
            {"rows": [TWICE, {**TWICE, "positions": "renumber"}]},
            "a row and another row are both called 'div_prune'; give",
        ),
        ({"rows": [TWICE, {**TWICE, "name": "Div prune"}]}, "a row and another row are both called 'Div prune'"),
        ({"rows": [{**TWICE, "name": "random"}]}, "a row and a baseline are both called 'random'; give the row a name"),
        ({"rows": [{**TWICE, "name": "none"}]}, "a row and a baseline are both called 'none'"),
    ],
)
def test_mistakes_in_a_recipe_are_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(LacoError, match=message) as error:
        parse_study({**recipe(), **keys})
    assert "\n" not in str(error.value)


def test_rows_that_a_name_tells_apart_and_the_baselines(talker_directory: Path) -> None:
    rows = [TWICE, {**TWICE, "positions": "renumber", "name": "renumbered"}]
    plan = make_plan(parse_study(recipe(talker_directory, rows=rows)))
    assert {case.row for case in plan.cases} == {*BASELINES, "div_prune", "renumbered"}


def test_each_window_side_stands_at_the_budget_that_it_comes_nearest_to() -> None:
    assert factors(BUDGETS, area) == {0.25: 2, 0.11: 3, 0.06: 4}
    assert factors([0.5], area) == {}  # 1/4 and 1/2 are no neighbours
    assert factors([0.04], lambda side: {2: 0.25}.get(side, 1 / 36)) == {0.04: 3}  # too little by 1.44
    assert factors([0.05], lambda side: {2: 0.25}.get(side, 1 / 36)) == {}  # and by 1.8
    assert factors([0.3, 0.2], area) == {0.3: 2}  # 1/4 is nearer to 0.3, as a ratio


def test_how_rows_come_to_their_budgets() -> None:
    rows = [
        {"method": "laco", "depth": 0.25, "budgets": "factor"},
        {"method": "div_prune", "budgets": "keep"},
        {"method": "evit", "fuse": False, "budgets": {0.5: {"keep": 0.8}}},
    ]
    windows, keep, own = parse_study({**recipe(), "budgets": BUDGETS, "rows": rows}).rows
    assert windows.label == "laco@1/4"
    assert windows.at(BUDGETS)[0.11] == {"depth": 0.25, "factor": 3}
    assert 0.5 not in windows.at(BUDGETS)
    assert keep.at(BUDGETS) == {budget: {"keep": budget} for budget in BUDGETS}
    assert own.at(BUDGETS) == {0.5: {"fuse": False, "keep": 0.8}}


def test_the_zoo_has_every_method_at_its_budgets() -> None:
    zoo = load_study(ZOO)
    always = {"random_tokens", "uniform_stride", "grid_pool"}
    assert {row.method for row in zoo.rows} | always == set(registry())
    for row in zoo.rows:
        for budget, settings in row.at(zoo.budgets).items():
            method, wanted = row.build(settings), budget * 144
            if isinstance(method, Reducer) and method.name not in ("ipcv", "spvit"):
                assert abs(method.num_tokens(144, 12) - wanted) < 1, method
            if isinstance(method, Selector) and method.static_count:
                assert abs(method.budget(144) - wanted) <= 1, method
            if isinstance(method, laco.DecoderMethod) and budget == 0.5 and method.depths_used[0] < 0.5:
                assert not method.static_count or abs(fmean(method.layer_tokens(144, 3)) - wanted) <= 2, method


def test_the_zoo_of_videos_is_a_study_of_clips() -> None:
    study = load_study(ZOO.with_name("zoo-video.yaml"))
    assert (study.judge.data, study.heal) == ("world-video", None)
    made_for_videos = {"scissor", "dyntok", "vidcom2", "flexselect", "evs", "flashvid", "v_cast"}
    assert made_for_videos <= {row.method for row in study.rows}
    for row in study.rows:
        for budget, settings in row.at(study.budgets).items():
            method = row.build(settings)
            if isinstance(method, laco.DecoderMethod) and budget == 0.5:  # less than a third is out of reach
                assert abs(fmean(method.layer_tokens(288, 3)) - budget * 288) <= 2, method


def test_the_plan_has_all_baselines_both_states_and_reasons(talker_directory: Path) -> None:
    rows = [
        {"method": "average_pool", "depth": 0.25, "budgets": "factor"},
        {"method": "laco", "budgets": "factor"},
        {"method": "random_keep", "depth": 1.0, "budgets": "factor", "heal": False},
        {"method": "laco", "name": "too deep", "layer": 99, "budgets": "factor"},
    ]
    plan = make_plan(parse_study(recipe(talker_directory, heal={}, rows=rows)))
    names = [case.variant.name for case in plan.cases]
    assert len(set(names)) == len(names)
    assert {"none", "none, healed", "down-sampled input 25 %", "average pool 25 %, healed"} <= set(names)
    assert {"random 25 %", "uniform stride 25 %"} <= {*names, *(f"{name} 25 %" for name in plan.refused)}
    states = {
        row: [case.variant.heal for case in plan.cases if case.row == row]
        for row in ("average_pool@1/4", "laco", "random_keep@external")
    }
    assert states == {"average_pool@1/4": [False, True], "laco": [True], "random_keep@external": [False]}
    assert [c.variant.down_sample for c in plan.cases if c.row == "down-sampled input"] == [2, 2]
    assert "layer 99 is past the end" in plan.refused["too deep"]
    listed = {entry["row"]: entry for entry in listing(parse_study(recipe(talker_directory, heal={}, rows=rows)))}
    assert (listed["random_keep@external"]["as_it_is"], listed["random_keep@external"]["healed"]) == (3, 0)
    assert (listed["laco"]["as_it_is"], listed["laco"]["healed"]) == (0, 3)
    assert listed["laco"]["settings"] == "method: laco, factor: 2"
    with pytest.raises(LacoError, match="the study has no row 'lace'"):
        listing(parse_study(recipe(talker_directory, rows=rows)), only=["lace"])


# What is measured.


def test_bytes_are_counted_while_they_are_alive() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first.view(10, 100) * 2  # beside it
        del first
        (second + 1).add_(1)  # in place of nothing new

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert peak_bytes(work) == 8000


def test_only_the_methods_own_steps_are_scoring() -> None:
    class Slow(MergerModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return x

    method = laco.DivPrune(keep=2)
    own_before = dict(vars(laco.DivPrune))

    def choose() -> None:
        time.sleep(0.05)
        method(Signals(grid=Grid(1, 2, 2), tokens=torch.randn(4, 8)))

    alone = scoring_ms(nn.Identity(), None, choose)
    chosen = scoring_ms(nn.Identity(), method, choose)
    merged = scoring_ms(model := nn.Sequential(Slow(), nn.Identity()), None, lambda: model(torch.ones(1)))
    assert alone == 0
    assert 0 < chosen < 50
    assert merged >= 50
    assert dict(vars(laco.DivPrune)) == own_before
    assert not model[0]._forward_hooks


# A whole study.


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def studied(talker_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, StudyResults, int]:
    """A study that was interrupted when the model as it is had been judged, and then went on."""
    folder = tmp_path_factory.mktemp("study")
    file, output = folder / "study.yaml", folder / "out"
    rows = [
        {"method": "average_pool", "depth": 0.25, "budgets": "factor"},
        {"method": "laco", "name": "too deep", "layer": 99, "budgets": "factor"},
        {"method": "evs", "budgets": "keep"},
        {"method": "prumerge", "name": "too many", "budgets": {0.25: {"keep": 1000}}},
    ]
    timing = {"rounds": 2, "batch": 2}
    whole = recipe(talker_directory, rows=rows, judge={"samples": 14}, seeds=[0], timing=timing)
    file.write_text(yaml.safe_dump({**whole, "output": str(output)}))
    command = [sys.executable, "-c", "from laco.cli import main; main()", "study", str(file), "--jobs", "1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    wait_for(output / "jobs" / "none" / "outcome.json", process)
    process.terminate()  # the study alone: it ends what it has started
    _, err = process.communicate(timeout=60)
    assert "laco: stopped; the same command goes on from here" in err
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    first = (output / "jobs" / "none" / "outcome.json").stat().st_mtime_ns
    return file, output, run(load_study(file), jobs=2, progress=False), first


def test_a_study_goes_on_where_it_was_stopped(studied: tuple[Path, Path, StudyResults, int]) -> None:
    _, output, results, first = studied
    assert (output / "jobs" / "none" / "outcome.json").stat().st_mtime_ns == first
    lines = {line.row: line for line in results.lines}
    wanted = {"none", "down-sampled input", "average pool", "average_pool@1/4"}
    assert wanted <= set(lines)
    assert not results.failures
    assert (lines["none"].visual_tokens, lines["average_pool@1/4"].visual_tokens) == (36, 9)
    assert lines["none"].loyalty == 100
    assert "layer 99 is past the end" in results.refused["too deep"]
    assert "evs compares frames of videos" in results.refused["evs"]
    assert "cannot keep 1000 of 36" in results.refused["too many"]  # which shows when it runs
    for name in wanted:
        assert lines[name].cost.answer_ms > 0
    assert lines["average_pool@1/4"].cost.memory_mb < lines["none"].cost.memory_mb
    assert lines["none"].cost.scoring_ms == 0 < lines["average_pool@1/4"].cost.scoring_ms


def test_the_command_takes_what_is_there_and_writes_all_files(
    studied: tuple[Path, Path, StudyResults, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file, output, before, _ = studied
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("jobs/*/outcome.json")}
    times = (output / "times.json").read_text()

    def command(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["laco", "study", str(file), "--jobs", "1", *options])
        monkeypatch.setattr(cli, "out", cli.Console(width=200))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (None, 0)
        return capsys.readouterr().out

    page = output.parent / "zoo.md"
    (output / "results.md").write_text("of a part")
    said = json.loads(command("--json", "--page", str(page)))
    assert said["lines"] == before.model_dump(mode="json")["lines"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (output / "times.json").read_text() == times
    assert StudyResults.model_validate_json((output / "results.json").read_text()).lines == before.lines
    assert (output / "results.csv").read_text().count("\n") == len(before.lines) + 1
    assert "![Accuracy against measured time](zoo.png)" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert (output / "results.md").read_text() == page.read_text().replace("(zoo.png)", "(results.png)")

    more = yaml.safe_load(file.read_text())
    more["rows"].append({"method": "average_pool", "name": "later", "layer": 2, "budgets": "factor"})
    file.with_name("more.yaml").write_text(yaml.safe_dump(more))
    found = run(load_study(file.with_name("more.yaml")), finished=True)
    assert found.lines == before.lines
    assert found.pending == 1
    assert found.refused == before.refused
    assert "Runs of this study that have not been made yet: 1." in as_markdown(found, None)
    assert "Runs of this study that have not been made yet: 1." in " ".join(remarks(found))
    assert {path: path.stat().st_mtime_ns for path in output.glob("jobs/*/outcome.json")} == stamps
    with pytest.raises(LacoError, match=r"nothing of this study is finished in .*nothing.jobs; run it without"):
        run(load_study(file, output=str(output / "nothing")), finished=True)

    shown = command("--timing")
    assert "average_pool@1/4" in shown
    assert "too deep cannot: " in shown
    assert f"wrote {output / 'results.json'}" in shown
    assert (output / "times.json").read_text() != times
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    listed = json.loads(command("--list", "--json"))
    assert [entry["row"] for entry in listed if entry["cannot"]][-2:] == ["too deep", "evs"]


@pytest.mark.parametrize("options", [(), ("--as-it-is",)])
def test_healing_can_be_left_out(
    options: tuple[str, ...], talker_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(recipe(talker_directory, heal={"budgets": [0.25]}, output=str(tmp_path / "out"))))
    monkeypatch.setattr(sys, "argv", ["laco", "study", str(file), "--list", "--json", *options])
    with pytest.raises(SystemExit):
        cli.main()
    healed = sum(entry["healed"] for entry in json.loads(capsys.readouterr().out))
    assert healed == 0 if options else healed > 0


@pytest.mark.parametrize(("video", "judged", "runs"), [(0, "world", 0), (1, "world", 0), (1, "world-video", 1)])
def test_methods_for_videos_are_planned_where_there_are_videos(
    talker_directory: Path, tmp_path: Path, video: int, judged: str, runs: int
) -> None:
    model = talker_directory
    if video:
        model = tmp_path / "video"
        laco.save_pretrained(*tiny.llava_onevision(), model)
    rows = [{"method": "evs", "budgets": "keep"}, TWICE]
    listed = listing(parse_study(recipe(model, rows=rows, judge={"data": judged})))
    (evs,) = (entry for entry in listed if entry["row"] == "evs")
    assert evs["as_it_is"] == runs
    assert runs or "evs compares frames of videos" in evs["cannot"]
    assert not next(entry for entry in listed if entry["row"] == "div_prune")["cannot"]


@pytest.mark.parametrize("keys", [{"judge": {"data": "none.jsonl"}}, {"heal": {"data": "none.jsonl"}}])
def test_data_that_is_not_there_is_one_sentence(talker_directory: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    study = parse_study(recipe(talker_directory, output=str(tmp_path / "out"), **keys))
    with pytest.raises(LacoError, match=r"there is no data at none\.jsonl"):
        listing(study)
    with pytest.raises(LacoError, match=r"there is no data at none\.jsonl"):
        run(study, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LacoError, match=r"cannot load .*nothing"):
        make_plan(parse_study(recipe(tmp_path / "nothing")))
