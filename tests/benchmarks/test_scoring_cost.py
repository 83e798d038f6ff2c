"""The benchmark of choosing: every method that scores is in it and does its work, and what its file claims is so."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from laco.errors import LacoError
from laco.methods import Merger, Plan, Reducer, Selector, registry

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "scoring_cost.py"
SCORING = {name for name, cls in registry().items() if not issubclass(cls, Merger)} | {"sparsevlm_plus"}


@pytest.fixture
def program() -> Any:
    spec = importlib.util.spec_from_file_location("scoring_cost", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(program, monkeypatch, tmp_path):
    """Runs it and gives the settings and the rows that it writes."""

    def run(*arguments: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
        path = tmp_path / "found.csv"
        small = ["--width", "64", "--tokens", "64", "--keep", "8", "--output", str(path)]
        monkeypatch.setattr(sys, "argv", ["scoring_cost.py", *small, *arguments])
        program.main()
        _, settings, *rows = path.read_text().splitlines()
        return json.loads(settings.removeprefix("#")), list(csv.DictReader(rows))

    return run


@pytest.mark.parametrize("name", sorted(SCORING - {"evs"}))
def test_what_is_timed_drops_or_merges(program, name):
    found = program.prepared(name, program.Inputs(64, 2, 64), 8)()
    cls, settings = program.METHODS[name]
    if issubclass(cls, Reducer):
        x_BNC, state = found
        assert len(x_BNC) == 2
        assert x_BNC.shape[1] == state.place_BN.shape[1] < 1 + 64
        return
    assert len(found) == 2
    for plan in found:
        assert isinstance(plan, Plan)
        if not cls.static_count:
            assert 0 < len(plan.kept) <= 64
        elif issubclass(cls, Selector):
            assert len(plan.kept) == cls(keep=8, **settings).left(64, prefix=1)
        else:
            assert len(plan.kept) == cls(keep=8, depth=0.5, **settings).left(64, 64)


def test_evs_needs_more_than_one_frame(program):
    assert len(program.prepared("evs", program.Inputs(2 * 576, 1, 64), 600)()[0].kept) == 600
    with pytest.raises(LacoError, match="still picture"):
        program.prepared("evs", program.Inputs(576, 1, 64), 160)


def test_rows_are_there_for_every_method_that_scores(run, program):
    settings, rows = run("--batches", "1", "2", "--rounds", "1")
    assert settings["rounds"] == 1
    assert {row["method"] for row in rows} == SCORING | program.CHOICES.keys()
    assert len(rows) == 2 * len({row["method"] for row in rows})
    assert {row["method"] for row in rows if row["note"]} == {"evs"}
    assert all(float(row["ms"]) > 0 for row in rows if not row["note"])
    assert {row["place"] for row in rows} == {"external", "language_model", "encoder", ""}


@pytest.mark.parametrize(("rounds", "given"), [("6", False), ("7", True)])
def test_intervals_of_few_rounds_are_left_out(run, rounds, given):
    _, rows = run("--batches", "1", "--only", "tome", "fastv", "--rounds", rounds)
    assert [row["method"] for row in rows] == ["tome", "fastv"]
    for row in rows:
        low, high = row["low"], row["high"]
        assert float(low) <= float(row["ms"]) <= float(high) if given else not low and not high


def test_what_cannot_run_says_so_and_does_not_end_the_run(run, program, monkeypatch, capsys):
    class Broken(program.METHODS["fastv"][0]):
        def score(self, signals) -> Tensor:
            raise MemoryError("you tried to allocate 99 GB\nin vain")

    monkeypatch.setitem(program.METHODS, "fastv", (Broken, {}))
    _, rows = run("--batches", "1", "--only", "fastv", "evit", "--rounds", "1")
    assert rows[0]["note"] == "MemoryError: you tried to allocate 99 GB"
    assert not rows[0]["ms"]
    assert float(rows[1]["ms"]) > 0
    assert "cannot run" in capsys.readouterr().out
