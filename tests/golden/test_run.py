"""The runner of reference cases: on the shared cases where they are at hand, and on folders made here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run
from cases import CASES

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


def array(role: str, compare: str | None = None) -> dict:
    return {
        "role": role,
        "shape": [],
        "dtype": "float32",
        "meaning": "",
        **({"compare": compare} if compare else {}),
    }


def pool_by_hand(x: np.ndarray, height: int, width: int, factor: int) -> np.ndarray:
    """Connector order by slices: position (dr, dc) first, then the channel."""
    grid = x.reshape(len(x), height, width, -1)
    parts = [grid[:, dr::factor, dc::factor] for dr in range(factor) for dc in range(factor)]
    return np.concatenate(parts, axis=-1).reshape(len(x), -1, factor**2 * x.shape[-1])


def shuffle_case(
    folder: Path, name: str, error: float = 0.0, compare: str = "exact", method: str = "pixel_shuffle"
) -> dict:
    x = np.random.default_rng(0).standard_normal((3, 24, 5), dtype=np.float32)
    y = pool_by_hand(x, 4, 6, 2)
    y[1, 2, 3] += error
    np.savez(folder / f"{name}.npz", x=x, y=y)
    return {
        "id": name,
        "file": f"{name}.npz",
        "method": method,
        "variant": "",
        "hyper": {"grid": [4, 6], "r": 2, "ps_version": "v2"},
        "arrays": {"x": array("input"), "y": array("output", compare)},
        "tolerance": {"atol": 1e-3, "rtol": 0},
    }


def run_on(folder: Path, entries: object, capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    (folder / "index.json").write_text(json.dumps(entries))
    code = run.main([str(folder)])
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no reference cases at {SHARED}")
def test_shared_cases_are_equal(capsys: pytest.CaptureFixture) -> None:
    assert run.main([str(SHARED)]) == 0
    lines = capsys.readouterr().out.splitlines()
    methods = [entry["method"] for entry in run.read_index(SHARED)]
    known = sum(method in CASES for method in methods)
    assert known >= 13
    assert lines[-1] == f"{known} equal, 0 different, {len(methods) - known} not implemented"


def test_reports_equal_different_and_not_implemented(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    entries = [
        shuffle_case(tmp_path, "right"),
        shuffle_case(tmp_path, "near", error=5e-4, compare="allclose, order as given"),
        shuffle_case(tmp_path, "far", error=5e-3, compare="allclose"),
        shuffle_case(tmp_path, "inexact", error=5e-4),
        shuffle_case(tmp_path, "nan", error=np.nan, compare="allclose"),
        shuffle_case(tmp_path, "strange", compare="more or less"),
        shuffle_case(tmp_path, "other", method="no_such_method"),
        shuffle_case(tmp_path, "lost"),
        shuffle_case(tmp_path, "renamed"),
    ]
    (tmp_path / "lost.npz").unlink()
    entries[-1]["hyper"]["grid"] = [6, 6]
    code, lines = run_on(tmp_path, {"cases": entries}, capsys)
    assert code == 1
    assert [(line[:15].strip(), line.split()[-1] if line.startswith("not") else "") for line in lines[:-1]] == [
        ("equal", ""),
        ("equal", ""),
        ("different", ""),
        ("different", ""),
        ("different", ""),
        ("different", ""),
        ("not implemented", "no_such_method"),
        ("different", ""),
        ("different", ""),
    ]
    assert "max abs diff 0.005" in lines[2]
    assert "unknown comparison" in lines[5]
    assert "FileNotFoundError" in lines[7]
    assert lines[-1] == "2 equal, 6 different, 1 not implemented"


def test_all_equal_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    entries = [shuffle_case(tmp_path, "right"), shuffle_case(tmp_path, "other", method="no_such_method")]
    assert run_on(tmp_path, {"cases": entries}, capsys) == (
        0,
        [
            "equal            right  pixel_shuffle  max abs diff 0",
            "not implemented  other  no_such_method",
            "1 equal, 0 different, 1 not implemented",
        ],
    )


@pytest.mark.parametrize("index", [None, "not json", "[]", '{"cases": 3}', '{"cases": [{"id": "x"}]}'])
def test_a_foreign_folder_exits_with_2(tmp_path: Path, index: str | None, capsys: pytest.CaptureFixture) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    assert run.main([str(tmp_path)]) == 2
    assert "index.json" in capsys.readouterr().err


def test_as_a_script(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"cases": [shuffle_case(tmp_path, "wrong", error=1.0)]}))
    done = subprocess.run([sys.executable, run.__file__, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "0 equal, 1 different, 0 not implemented"


def test_comparisons() -> None:
    def largest(rule: str, ours: dict, theirs: dict, name: str = "y") -> float:
        return run.compare(name, rule, {"atol": 0.1, "rtol": 0.0}, ours, theirs)

    def one(values: list) -> dict:
        return {"y": np.array(values)}

    assert largest("exact as a set", one([3, 1, 2]), one([1, 2, 3])) == 0
    assert largest("exact (set per row)", one([[2, 1], [3, 4]]), one([[1, 2], [4, 3]])) == 0
    assert largest("allclose", one([1.0, 2.05]), one([1.0, 2.0])) == pytest.approx(0.05)
    with pytest.raises(run.Different):
        largest("exact (set per row)", one([[2, 3], [1, 4]]), one([[1, 2], [4, 3]]))
    with pytest.raises(run.Different):
        largest("exact, order-sensitive", one([3, 1, 2]), one([1, 2, 3]))
    with pytest.raises(run.Different, match="shape"):
        largest("allclose", one([1.0]), one([1.0, 1.0]))
    with pytest.raises(run.Different, match="not among the outputs"):
        largest("allclose", {}, one([1.0]))

    rule = "allclose after matching rows by source_map (no CLS: unmerged part comes in score order)"
    theirs = {"source_map": np.array([[[1, 1, 0], [0, 0, 1]]]), "y": np.array([[[5.0], [6.0]]])}
    swapped = {name: value[:, ::-1] for name, value in theirs.items()}
    assert largest(rule, swapped, theirs) == 0
    assert largest(rule, swapped, theirs, "source_map") == 0
    with pytest.raises(run.Different):
        largest(rule, {**swapped, "y": theirs["y"]}, theirs)
    with pytest.raises(run.Different, match="other tokens"):
        largest(rule, {**theirs, "source_map": np.array([[[1, 0, 1], [0, 1, 0]]])}, theirs)
