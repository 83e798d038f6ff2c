"""The demo from end to end on a tiny random model: everything runs, one variant fails, and a second start resumes."""

import csv
import re
from pathlib import Path

import pytest

import laco
from laco import demo
from laco.errors import LacoError
from laco.healing import Variant, run_study, variant
from laco.report import Results

VARIANTS = (variant(laco.LaCo(depth=1 / 4)), Variant(name="broken", method={"method": "laco", "layer": 99}))


@pytest.fixture(scope="module")
def made(talker_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    output = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "INSERTED", (laco.LaCo, laco.AveragePool))
        return demo.run(output, quick=True, model=talker_directory, variants=VARIANTS, progress=False), output


def test_every_file_is_there_and_says_the_same(made: tuple[Results, Path]) -> None:
    results, output = made
    assert {path.name for path in output.iterdir()} == {
        "report.html", "results.json", "results.csv", "accuracy-time.png", "pictures", "healing",
    }  # fmt: skip
    assert Results.model_validate_json((output / "results.json").read_text()) == results
    lines = {line["name"]: line for line in csv.DictReader((output / "results.csv").open())}
    assert list(lines) == ["none", "down-sampled input", "LaCo@1/4"]
    for row in results.rows:
        assert float(lines[row.name]["average"]) == row.average
        assert float(lines[row.name]["encoder_ms"]) == row.times["encoder"].milliseconds
    page = (output / "report.html").read_text()
    assert not re.search(r"https?://", page)
    assert f"{results.rows[2].times['encoder'].speedup.value:.2f}" in page


def test_what_the_demo_finds_is_real(made: tuple[Results, Path]) -> None:
    results, output = made
    none, small, merged = results.rows
    assert (none.visual_tokens, small.visual_tokens, merged.visual_tokens) == (36, 36, 9)
    assert none.loyalty == 100
    assert (none.healed, small.healed, merged.healed) == (False, False, True)
    assert merged.times["encoder"].predicted > 1.5
    assert merged.times["encoder"].milliseconds > 0
    plain, ours, mean = results.insertions
    assert plain.cosine is None
    # LaCo starts as average pooling: its last layer is zero.
    assert ours.cosine == pytest.approx(mean.cosine, abs=1e-5)
    assert 0.3 < mean.cosine < 1

    healed, _ = laco.from_pretrained(output / "healing" / "laco-1-4--seed-0" / "model")
    layer = healed.model.vision_tower.encoder.layers[0]
    assert layer.compressor.fc2.weight.abs().sum() > 0  # it has learnt something
    assert len(list((output / "pictures").glob("*.png"))) == len(results.shown) == demo.QUICK.pictures


def test_a_failing_variant_is_reported(made: tuple[Results, Path]) -> None:
    results, output = made
    assert list(results.failures) == ["broken, seed 0"]
    assert "layer 99 is past the end" in results.failures["broken, seed 0"]
    assert "layer 99 is past the end" in (output / "report.html").read_text()


def test_a_second_start_skips_what_is_done(made: tuple[Results, Path]) -> None:
    results, output = made
    protocol = {key: value for key, value in results.protocol.items() if key not in ("steps", "seeds")}
    before = {path: path.stat().st_mtime_ns for path in output.glob("healing/*/outcome.json")}
    assert len(before) == 3
    rows = [demo.HALVED, VARIANTS[0]]
    study = run_study(rows, demo.Protocol(**protocol), output / "healing", seeds=(0,), progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [summary.average for summary in study.summaries()] == [row.average for row in results.rows]
    assert not study.failures


def test_without_a_model_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LacoError, match="there is no model at"):
        demo.run(tmp_path / "out", model=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
