"""Runs the numeric cases of a folder against this tree: `python tests/golden/run.py DIR`.

DIR holds `index.json` and one `.npz` a case. Every case gets one line; the last line is
`N equal, N different, N not implemented`. Exit code 1 if any case is different (or fails to run), 2 if DIR is
no such folder. Tolerance and comparison are those of the index.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Case

Arrays = dict[str, np.ndarray]
# The comparisons of an index, the more special first; what follows one there is a remark.
RULES = (
    "allclose after matching rows by source_map",
    "allclose",
    "exact as a set",
    "exact (set per row)",
    "exact",
)


class Different(Exception):
    """Why a case is different, in words."""


def match_rows(ours: Arrays, theirs: Arrays) -> np.ndarray:
    """The order (B, K) that brings our rows to theirs: rows with the same source tokens are the same."""
    if ours["source_map"].shape != theirs["source_map"].shape:
        raise Different(f"source_map has shape {ours['source_map'].shape}, not {theirs['source_map'].shape}")
    order = []
    for mine, wanted in zip(ours["source_map"] != 0, theirs["source_map"] != 0, strict=True):
        rows = {row.tobytes(): index for index, row in enumerate(mine)}
        if {row.tobytes() for row in wanted} != set(rows):
            raise Different("source_map: other tokens were merged")
        order.append([rows[row.tobytes()] for row in wanted])
    return np.array(order)


def compare(name: str, rule: str, tolerance: dict[str, float], ours: Arrays, theirs: Arrays) -> float:
    """The largest absolute difference of an output; raises `Different` if `rule` does not allow it."""
    if name not in ours:
        raise Different(f"{name} is not among the outputs")
    mine, wanted = ours[name].astype(np.float64), theirs[name].astype(np.float64)
    if mine.shape != wanted.shape:
        raise Different(f"{name} has shape {mine.shape}, not {wanted.shape}")
    kind = next((kind for kind in RULES if rule.startswith(kind)), None)
    if kind is None:
        raise Different(f"{name}: unknown comparison {rule!r}")
    if kind == "allclose after matching rows by source_map":
        order = match_rows(ours, theirs)
        mine = np.take_along_axis(mine, order.reshape(order.shape + (1,) * (mine.ndim - 2)), axis=1)
    elif kind == "exact as a set":
        mine, wanted = np.sort(mine, axis=None), np.sort(wanted, axis=None)
    elif kind == "exact (set per row)":
        mine, wanted = np.sort(mine), np.sort(wanted)
    difference = np.abs(mine - wanted)
    allowed = 0 if kind.startswith("exact") else tolerance["atol"] + tolerance["rtol"] * np.abs(wanted)
    worst = float(difference.max(initial=0))
    if not np.all(difference <= allowed):  # also true of NaN
        raise Different(f"{name}: max abs diff {worst:.3g} ({rule})")
    return worst


def run_case(folder: Path, entry: dict[str, Any]) -> float:
    """The largest absolute difference over the outputs of a case; raises whatever is wrong with it."""
    with np.load(folder / entry["file"]) as file:
        stored = dict(file)
    described = entry["arrays"]
    if missing := described.keys() - stored.keys():
        raise Different(f"{entry['file']} lacks the array {min(missing)}")
    given = {name: torch.from_numpy(stored[name]) for name in described if described[name]["role"] != "output"}
    with torch.inference_mode():
        outputs = CASES[entry["method"]](Case(given, entry["hyper"], entry["variant"]))
    ours = {name: output.numpy() for name, output in outputs.items()}
    wanted = [name for name in described if described[name]["role"] == "output"]
    if not wanted:
        raise Different("the index names no output")
    return max(compare(name, described[name]["compare"], entry["tolerance"], ours, stored) for name in wanted)


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The entries of DIR/index.json; a `ValueError` says in a sentence what else it is."""
    path = folder / "index.json"
    try:
        entries = json.loads(path.read_text())["cases"]
        if not all({"id", "method", "file", "arrays"} <= entry.keys() for entry in entries):
            raise KeyError
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a folder with index.json and .npz files"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is no index of numeric cases: it has no list of cases with id, method, file, arrays"
        ) from None
    return entries


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: run.py DIR, a folder with index.json and the .npz file of every case", file=sys.stderr)
        return 2
    try:
        entries = read_index(folder := Path(arguments[0]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    count = dict.fromkeys(("equal", "different", "not implemented"), 0)
    for entry in entries:
        if entry["method"] not in CASES:
            outcome, detail = "not implemented", ""
        else:
            try:
                outcome, detail = "equal", f"max abs diff {run_case(folder, entry):.3g}"
            except Different as reason:
                outcome, detail = "different", str(reason)
            except Exception as error:  # one broken case must not hide the others
                outcome, detail = "different", f"{type(error).__name__}: {error}"
        count[outcome] += 1
        print(f"{outcome:<15}  {entry['id']}  {entry['method']}  {detail}".rstrip())
    print(", ".join(f"{number} {outcome}" for outcome, number in count.items()))
    return 1 if count["different"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
