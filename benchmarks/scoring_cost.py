"""What it costs to choose: every selector's plan on random signals, on the CPU.

576 tokens are a LLaVA-1.5 picture, 2880 five such crops (LLaVA-NeXT), 160 of them stay; encoder and language model
are 1024 wide. Signals are ready before the clock starts: the attention that some methods need has its own price in a
model. Pictures of a batch are chosen one after the other. Everything of one size runs in one interleaved run. Below
the methods stand the choices that several share, on a matrix that is ready, and what a matrix of all products costs.

    python benchmarks/scoring_cost.py

Writes benchmarks/scoring_cost.csv: medians in milliseconds for a whole batch, with 95 % intervals; command and
machine stand in the comment above. `--width 16 --tokens 20 --batches 1 --keep 5 --rounds 1` is a trial. Goal: farthest
points, determinants, coverage and independent set at 2880 tokens under 60 ms on two cores.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from laco.cost import interleave, machine, median_interval
from laco.evaluate.report import command
from laco.files import write_file
from laco.grid import Grid
from laco.methods import Selector, Signals, registry
from laco.methods.greedy import coverage, determinantal, farthest_points, independent_set

RESULT = Path(__file__).with_suffix(".csv")
CROP, HEADS, WORDS = 576, 16, 32
SELECTORS = {name: cls for name, cls in registry().items() if issubclass(cls, Selector)}


def random_signals(tokens: int, width: int) -> Signals:
    """One picture, in crops of 24 x 24 where these make up its tokens, with a CLS token."""
    crops, rest = divmod(tokens, CROP)
    heads = HEADS if width % HEADS == 0 else 1
    keys = partial(torch.randn, 1 + tokens, heads, width // heads)
    return Signals(
        grid=Grid(1, 1, tokens) if rest else Grid(crops, 24, 24),
        tokens=torch.randn(tokens, width),
        features=torch.randn(1 + tokens, width),
        keys=keys(),
        queries=keys(),
        cls_attention=torch.randn(heads, tokens).softmax(dim=1),
        text=torch.randn(WORDS, width),
        text_attention=torch.randn(heads, WORDS, tokens).softmax(dim=2),
    )


def plans(cls: type[Selector], pictures: list[Signals], keep: int, width: int) -> Callable[[], Any]:
    """Chooses in every picture; methods whose count depends on the picture have their own settings."""
    method = cls(keep=keep) if cls.static_count else cls()
    module = method.build(width)

    @torch.inference_mode()
    def run() -> None:
        for signals in pictures:
            method(signals, module)

    return run


def choices(pictures: list[Signals], keep: int) -> dict[str, Callable[[], Any]]:
    """The shared choices on matrices of one picture that are ready, and the product that makes such a matrix."""
    x_ND = normalize(pictures[0].tokens, dim=-1)
    cosines_NN, weight_N = x_ND @ x_ND.T, torch.rand(len(x_ND))
    distance_NN = 1 - cosines_NN

    def each(call: Callable[[], Any]) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> None:
            for _ in pictures:
                call()

        return run

    return {
        "(farthest points)": each(lambda: farthest_points(distance_NN, keep)),
        "(determinants)": each(lambda: determinantal(cosines_NN, keep)),
        "(coverage)": each(lambda: coverage(cosines_NN, keep, weight_N)),
        "(independent set)": each(lambda: independent_set(weight_N, cosines_NN, 0.9, keep)),
        "(matrix of all products)": each(lambda: x_ND @ x_ND.T),
    }


def measure(names: list[str], tokens: int, batch: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method at one size."""
    torch.manual_seed(0)
    pictures = [random_signals(tokens, given.width) for _ in range(batch)]
    calls = {name: plans(SELECTORS[name], pictures, given.keep, given.width) for name in names}
    timings = interleave(calls | choices(pictures, given.keep), rounds=given.rounds, warmup=1)
    rows = []
    for name, values in timings.milliseconds.items():
        found = median_interval(values)
        low, high = (f"{value:.3f}" for value in (found.low, found.high))
        rows.append(
            {"method": name, "tokens": tokens, "batch": batch, "ms": f"{found.value:.3f}", "low": low, "high": high}
        )
    return rows


def as_csv(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    text = io.StringIO()
    settings = {"keep": given.keep, "width": given.width, "rounds": given.rounds}
    text.write(f"# {command()}\n# {json.dumps(settings | machine())}\n")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each method, a column for each size."""
    sizes = list(dict.fromkeys((row["tokens"], row["batch"]) for row in rows))
    table = Table("method", *(f"{tokens} x {batch}, ms" for tokens, batch in sizes), box=None, header_style="dim")
    for name in dict.fromkeys(row["method"] for row in rows):
        found = {(row["tokens"], row["batch"]): row["ms"] for row in rows if row["method"] == name}
        table.add_row(name, *(f"{float(found[size]):.1f}" for size in sizes))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=SELECTORS, metavar="NAME", default=list(SELECTORS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[CROP, 5 * CROP])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--keep", type=int, default=160)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="all cores when left out")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.keep > min(given.tokens):
        parser.error(f"--keep {given.keep} is more than {min(given.tokens)} tokens")
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for tokens in given.tokens:
        for batch in given.batches:
            rows += measure(given.methods, tokens, batch, given)
    out = Console()
    out.print(as_table(rows))
    write_file(given.output, as_csv(rows, given))
    out.print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
