"""The report: one file that needs nothing else, whose numbers are those of the CSV and the JSON."""

import csv
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from laco.cost import Ratio
from laco.evaluate import FamilyScore
from laco.report import Example, Insertion, Results, Row, Shown, StageTimes, write_report
from laco.report.page import render
from laco.report.plots import spread


def row(name: str, place: str, average: float, half: float = 3.0, speedup: float = 1.0) -> Row:
    times = StageTimes(
        milliseconds=5 / speedup,
        speedup=Ratio(value=speedup, low=speedup - 0.125, high=speedup + 0.125),
        predicted=speedup + 0.25,
    )
    return Row(
        name=name,
        place=place,
        healed=place != "none",
        seeds=[0],
        visual_tokens=144 if place == "none" else 36,
        average=average,
        low=average - half,
        high=average + half,
        families={"word": FamilyScore(accuracy=average, low=average - half, high=average + half, n=100)},
        loyalty=None,
        times=dict.fromkeys(("encoder", "prefill", "training"), times),
    )


@pytest.fixture
def results() -> Results:
    said = Shown(question="which <b>word</b>?", truth="ABC", answer="XYZ", right=False)
    example = Example(png="iVBORw0KGgo=", answers={"none": [said]})
    families = {"word": FamilyScore(accuracy=12, low=10, high=15, n=9)}
    return Results(
        command="laco demo --seed 3",
        model={
            "name": "laco-tiny", "architecture": "Llava", "parameters": 12345, "layers": 12, "width": 64,
            "image_size": 96, "visual_tokens": 144,
        },
        protocol={
            "adapt_steps": 6, "heal_steps": 12, "steps": 18, "batch_size": 4, "samples": 70, "seeds": [3],
            "eval_seed": 3,
        },
        timing={"rounds": 5, "batch": 2},
        shown=[example],
        insertions=[Insertion(name="LaCo@1/4", cosine=0.837, average=12, low=10, high=15, families=families)],
        rows=[
            row("none", "none", 90.5),
            row("LaCo@1/4", "inside", 71.25, speedup=2.0),
            row("PixelShuffle@1/4", "inside", 33.25, speedup=2.0),
        ],
        examples=[example],
        failures={"TokenPacker, seed 0": "out of <memory>"},
        versions={"laco": "0.1", "torch": "2"},
        machine={"processor": "a CPU", "cores": 2, "threads": 2},
        minutes=7.5,
    )  # fmt: skip


def test_files_hold_the_same_numbers(results: Results, tmp_path: Path) -> None:
    written = write_report(results, tmp_path)
    assert sorted(path.name for path in written) == ["accuracy-time.png", "report.html", "results.csv", "results.json"]
    assert (tmp_path / "accuracy-time.png").read_bytes().startswith(b"\x89PNG")
    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(line["name"], float(line["average"]), float(line["word"])) for line in lines] == [
        (r.name, r.average, r.families["word"].accuracy) for r in results.rows
    ]
    assert float(lines[1]["encoder_speedup"]) == json.loads(results.rows[1].model_dump_json())["times"]["encoder"][
        "speedup"]["value"] == 2  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    for shown in ("71.2", "2.00", "by FLOPs", "2.25", "0.84", "laco demo --seed 3", "12,345", "7.5 minutes"):
        assert shown in page


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(results: Results) -> None:
    page = render(results)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\((?!#)", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "which &lt;b&gt;word" in page
    assert "out of &lt;memory&gt;" in page
    assert page.count("<svg") == 2
    assert "var(--inside)" in page
    assert "#0b6e5f" not in page.split("</style>")[1]  # the plots take their colours from the page
    for tag in ("section", "table", "div", "dl", "ul", "figure", "article"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_the_finding_says_when_there_is_none(results: Results) -> None:
    assert "no clear difference" not in render(results)
    results.rows[2] = row("PixelShuffle@1/4", "inside", 68)
    results.rows.append(row("AveragePool@1/4", "inside", 40))
    page = render(results)
    assert "pixel-shuffle reaches 68\u00a0% (no clear difference: the intervals overlap)" in page
    assert "and plain averaging reaches 40\u00a0%.</p>" in page
    results.rows = results.rows[:1]
    assert "was not measured in this run" in render(results)


def test_labels_are_spread_in_order_within_the_axis() -> None:
    values = [50.0, 49.0, 50.5, 3.0, 99.5]
    placed = spread(values, 5, 0, 100)
    assert [i for _, i in sorted(zip(placed, range(5), strict=True))] == [3, 1, 0, 2, 4]
    assert all(b - a >= 5 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert min(placed) >= 0
    assert max(placed) <= 97.5
    assert all(abs(p - v) < 8 for p, v in zip(placed, values, strict=True))
    assert spread([10.0, 30.0], 5, 0, 100) == [10.0, 30.0]
