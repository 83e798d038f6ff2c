"""The paper's comparison on laco-tiny: methods after a quarter of the layers and external, healed alike, 3 seeds.

    python benchmarks/healing.py

Takes about an hour on two cores (one single-thread process each); what is finished is kept in out/healing, so the
command can be stopped and given again. Writes benchmarks/results/healing.json and healing.md. Exits with 1 if a variant
failed. Baselines beside: the model as it is, the same after the same training (so that more training is not taken for
a merit of compression), down-sampled input as it is and after the same training, a random token of each window,
average pooling.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from laco.cost import machine
from laco.evaluate.report import command
from laco.files import write_file
from laco.healing import (
    HALVED_HEALED,
    Protocol,
    Study,
    Summary,
    Variant,
    average_interval,
    comparison,
    run_study,
    variant,
)
from laco.methods import LaCo
from laco.world import FAMILIES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
VARIANTS = [
    *comparison(),
    Variant(name="none, healed"),
    HALVED_HEALED,
    variant(LaCo(depth=1 / 4, shortcut="saliency"), "LaCo@1/4, saliency"),
    variant(LaCo(depth=1 / 2)),
]


def as_markdown(study: Study, seeds: Sequence[int]) -> str:
    """The table of the results, with the command and the protocol."""
    protocol, summaries = study.protocol, study.summaries()
    families = [name for name in FAMILIES if name in summaries[0].families]
    heads = ["variant", "tokens", "average", "95 % over seeds", "95 % over questions", *families, "loyalty"]
    lines = [
        "# Healing on laco-tiny",
        "",
        f"`{command()}`",
        "",
        f"{protocol.adapt_steps} steps of compressor and projector, {protocol.heal_steps} steps of everything,"
        f" {protocol.batch_size} pictures a step; {protocol.samples} held-out questions; seeds"
        f" {', '.join(map(str, seeds))} of initialisation and data order. Accuracies in per cent. The interval over"
        " seeds is Student's t, that over questions pools all seeds and leaves out the chance of the seed.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(cells(summary, families))} |" for summary in summaries),
    ]
    if study.failures:
        lines += ["", "Failed:", *(f"- {name}: {text}" for name, text in study.failures.items())]
    return "\n".join(lines) + "\n"


def cells(summary: Summary, families: Sequence[str]) -> list[str]:
    low, high = average_interval(list(summary.families.values()))
    return [
        summary.name if summary.healed else f"{summary.name} (as it is)",
        f"{summary.visual_tokens:.0f}",
        f"{summary.average:.1f}",
        f"{summary.low:.1f} – {summary.high:.1f}" if len(summary.seeds) > 1 else "one run",
        f"{low:.1f} – {high:.1f}",
        *(f"{summary.families[name].accuracy:.1f}" for name in families),
        "" if summary.loyalty is None else f"{summary.loyalty:.1f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "laco-tiny"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--adapt-steps", type=int, default=80)
    parser.add_argument("--heal-steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1400)
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the uncompressed model's logits")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", choices=[v.name for v in VARIANTS], help="all if left out"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes at a time; one a core when left out")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "healing", help="where jobs keep their state")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()

    protocol = Protocol(
        model=given.model,
        adapt_steps=given.adapt_steps,
        heal_steps=given.heal_steps,
        samples=given.samples,
        distill=given.distill,
    )
    chosen = [row for row in VARIANTS if not given.variants or row.name in given.variants]
    study = run_study(chosen, protocol, given.output, seeds=given.seeds, workers=given.workers)
    table = as_markdown(study, given.seeds)
    Console().print(Markdown(table))
    result = {
        "command": command(),
        "machine": machine(),
        "protocol": protocol.model_dump(exclude={"model"}),
        "variants": [summary.model_dump() for summary in study.summaries()],
        "averages_by_seed": [
            {"name": o.job.variant.name, "seed": o.job.seed, "average": o.report.average} for o in study.outcomes
        ],
        "failures": study.failures,
    }
    write_file(given.results / "healing.json", json.dumps(result, indent=1) + "\n")
    write_file(given.results / "healing.md", table)
    print(f"wrote {given.results / 'healing.json'} and healing.md")
    return 1 if study.failures else 0


if __name__ == "__main__":
    sys.exit(main())
