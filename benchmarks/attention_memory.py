"""Peak memory of attention statistics: computed in chunks beside the kernel, and from full attention maps.

    python benchmarks/attention_memory.py

Takes three minutes on two cores. Writes benchmarks/results/attention_memory.json and .md. Each figure is the growth
of the peak resident memory over a process that makes queries and keys alone. Full maps are measured up to
4,096 tokens, where one layer's takes 1 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from laco.attention import cls_rows, received, rows
from laco.cost import machine
from laco.evaluate.report import command
from laco.files import write_file

RESULTS = Path(__file__).parent / "results"
HEADS, WIDTH = 16, 64
WAYS = {
    "nothing": lambda q, k: None,
    "received, in chunks": received,
    "CLS row": cls_rows,
    "full map": lambda q, k: rows(q, k).mean(dim=(1, 2)),
}


def peak(way: str, tokens: int) -> float:
    """MiB at most that a process of its own had, which computes this statistic once."""
    call = [sys.executable, __file__, "--one", way, "--tokens", str(tokens)]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def one(way: str, tokens: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, HEADS, tokens, WIDTH)
    WAYS[way](q, k)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.tokens[0])
        return 0
    table = []
    for tokens in given.tokens:
        base = peak("nothing", tokens)
        ways = [way for way in WAYS if way != "nothing" and (way != "full map" or tokens <= 4096)]
        table.append({"tokens": tokens, **{way: round(peak(way, tokens) - base, 1) for way in ways}})
        print(table[-1])
    heads = ["tokens", *(way for way in WAYS if way != "nothing")]
    lines = [
        "# Memory of attention statistics",
        "",
        f"`{command()}`: MiB beyond queries and keys; {HEADS} heads of {WIDTH} channels, fp32.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(str(row.get(head, '')) for head in heads)} |" for row in table),
    ]
    given.results.mkdir(parents=True, exist_ok=True)
    write_file(given.results / "attention_memory.md", "\n".join(lines) + "\n")
    write_file(
        given.results / "attention_memory.json",
        json.dumps({"command": command(), "rows": table, "machine": machine()}, indent=1) + "\n",
    )
    print(f"wrote {given.results / 'attention_memory.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
