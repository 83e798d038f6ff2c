"""How the results of a study are shown: a table in the terminal, a Markdown page, CSV."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.table import Table

from laco.evaluate import FamilyScore
from laco.study.recipe import percent
from laco.study.results import Line, StudyResults, by_state

HEADS = ("method", "tokens", "accuracy", "hard", "easy", "loyalty", "encoder", "scoring", "prefill", "speed-up", "MB")
LEGEND = {
    "tokens": "visual tokens that a layer of the language model computes, on average",
    "accuracy": "mean of the families of questions in per cent, with half of its 95 % interval",
    "hard, easy": "accuracy on the questions that the down-sampled input (factor 2, not trained) gets wrong, and right",
    "loyalty": "answers that equal those of the model as it is, in per cent",
    "encoder, scoring, prefill": "milliseconds a question; scoring, a part of the others, is the method's own steps",
    "speed-up": "of encoder and prefill over the model as it is, measured in one interleaved run",
    "MB": "peak of the tensors that are made on the way, for one batch",
}


def table(results: StudyResults) -> Table:
    """All lines for the terminal, a section for each budget and state."""
    shown = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for head in HEADS:
        shown.add_column(head, no_wrap=True, justify="left" if head == HEADS[0] else "right")
    for group in by_state(results.lines):
        shown.add_row(f"[bold]{group[0].state}[/]")
        for line in group:
            shown.add_row(*cells(line))
    return shown


def remarks(results: StudyResults) -> Iterator[str]:
    """What stands below the table: what the baselines beat, and what is missing, with reasons."""
    yield from results.verdicts
    if results.pending:
        yield pending_text(results)
    for head, reasons in (("cannot", results.refused), ("no times", results.untimed), ("failed", results.failures)):
        yield from (f"{name} {head}: {reason}" for name, reason in reasons.items())


def plan_table(listed: Sequence[Mapping[str, Any]]) -> Table:
    """What `laco.study.plan.listing` gives, for the terminal."""
    shown = Table("row", "budget", "as it is", "healed", "settings", box=None, header_style="dim")
    for entry in listed:
        budget = "" if entry["budget"] is None else percent(entry["budget"])
        runs = [str(entry[state] or "") for state in ("as_it_is", "healed")]
        reason = f"cannot: {entry['cannot']}" if entry["cannot"] else entry["settings"]
        shown.add_row(entry["row"], budget, *runs, reason)
    totals = (str(sum(entry[state] for entry in listed)) for state in ("as_it_is", "healed"))
    shown.add_row("runs", "", *totals, style="bold")
    return shown


def cells(line: Line) -> list[str]:
    """A line as text, in the order of `HEADS`."""
    cost = line.cost
    return [
        line.row,
        f"{line.visual_tokens:.0f}",
        f"{line.average:.1f} ±{(line.high - line.low) / 2:.1f}",
        *("" if part is None else f"{part.accuracy:.0f}" for part in (line.hard, line.easy)),
        "" if line.loyalty is None else f"{line.loyalty:.0f}",
        *([f"{ms:.2f}" for ms in (cost.encoder_ms, cost.scoring_ms, cost.prefill_ms)] if cost else [""] * 3),
        f"{cost.speedup.value:.2f}" if cost else "",
        f"{cost.memory_mb:.1f}" if cost else "",
    ]


def as_csv(results: StudyResults) -> str:
    lines = [line.flat() for line in results.lines]
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_markdown(results: StudyResults, picture: str | None) -> str:
    """The page.

    Args:
        picture: the plot's name beside the page, if there is one.
    """
    return "\n".join(paragraphs(results, picture)) + "\n"


def paragraphs(results: StudyResults, picture: str | None) -> Iterator[str]:
    machine = results.machine
    yield "# Every method, one model, one protocol"
    yield ""
    yield f"`{results.command}`"
    yield ""
    yield protocol_text(results)
    yield ""
    if results.pending:
        yield f"**{pending_text(results)}**"
        yield ""
    yield f"{machine['processor']}, {machine['cores']} cores; torch {machine['torch']},"
    yield f"transformers {machine['transformers']}, laco {machine['laco']}."
    yield ""
    if picture:
        yield f"![Accuracy against measured time]({picture})"
        yield ""
    yield from (f"- **{head}**: {meaning}" for head, meaning in LEGEND.items())
    for group in by_state(results.lines):
        yield ""
        yield f"## {group[0].state[0].upper()}{group[0].state[1:]}"
        yield ""
        yield from markdown_table(HEADS, [cells(line) for line in group])
    yield ""
    yield "## What the baselines beat"
    yield ""
    yield from (f"- {sentence}" for sentence in results.verdicts)
    yield ""
    yield "## By family of questions"
    yield ""
    yield "Accuracy in per cent with Wilson's 95 % interval, the questions of all seeds together."
    for group in by_state(results.lines):
        names = list(group[0].families)
        yield ""
        yield f"### {group[0].state[0].upper()}{group[0].state[1:]}"
        yield ""
        rows = [[line.row, *(interval(line.families[name]) for name in names)] for line in group]
        yield from markdown_table(["method", *names], rows)
    for title, reasons in (
        ("What cannot be judged on this model", results.refused),
        ("What could not be timed", results.untimed),
        ("What failed", results.failures),
    ):
        if reasons:
            yield ""
            yield f"## {title}"
            yield ""
            yield from (f"- {name}: {reason}" for name, reason in reasons.items())


def protocol_text(results: StudyResults) -> str:
    """How everything was made, in a few sentences."""
    recipe = results.recipe
    judge, heal, timing = recipe["judge"], recipe["heal"], recipe["timing"]
    text = (
        f"Model: {recipe['model']}. {judge['samples']} questions ({judge['data']}, seed {judge['seed']});"
        f" seeds {', '.join(map(str, recipe['seeds']))} of everything that is random."
    )
    if heal:
        text += (
            f" Healing: {heal['adapt_steps']} steps of compressor and projector, {heal['heal_steps']} steps of"
            f" everything, {heal['batch_size']} pictures a step, for all methods alike."
        )
    if timing:
        text += f" Times: medians of {timing['rounds']} rounds in turn, {timing['batch']} questions a batch."
    return text


def pending_text(results: StudyResults) -> str:
    return (
        f"Runs of this study that have not been made yet: {results.pending}. A row is shown when all its seeds are"
        " there."
    )


def interval(score: FamilyScore) -> str:
    return f"{score.accuracy:.0f} ({score.low:.0f} – {score.high:.0f})"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
