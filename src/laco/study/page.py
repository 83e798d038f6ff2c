"""How the results of a study are shown: a table in the terminal, a Markdown page, CSV."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from laco.evaluate import FamilyScore
from laco.report import data
from laco.study.absent import absent_baselines, left_out
from laco.study.recipe import BASELINES, StudyRecipe, percent
from laco.study.results import Line, StudyResults, by_state

HEADS = (
    *("method", "tokens", "accuracy", "runs", "hard", "easy", "loyalty"),
    *("encoder", "scoring", "prefill", "speed-up", "MB"),
)
OWN_LOSS = "†"
LEGEND = {
    "tokens": "visual tokens that a layer of the language model computes, on average",
    "accuracy": "mean of the families of questions in per cent, ± half of its 95 % interval",
    "runs": "with a seed each, healed or of differing answers; they tell which interval it is. With 1 (nothing is"
    " random, or no seed changes an answer) it comes from the number of questions. With more it is Student's t over the"
    " runs: it holds the chance of training and of random choice, but not that of the questions, which are the same for"
    " all, and where runs agree by luck it is too narrow",
    "hard, easy": "accuracy on the questions that the down-sampled input (factor 2, not trained) gets wrong, and on the"
    " others: the view of VTC-Bench (arXiv 2510.07143)",
    "loyalty": "answers that equal those of the model as it is, in per cent",
    "encoder, scoring, prefill": "milliseconds a question of the vision encoder with projector, of the method's own"
    " steps (a part of the others), and of the language model up to the first new token. Methods are timed in blocks,"
    " each beside the model as it is; their times are scaled to one time of that model, so encoder and prefill together"
    " are those of `none` divided by the speed-up. Healed rows have the times of their method before healing",
    "speed-up": "of encoder and prefill over the model as it is, from rounds in which both took turns",
    "MB": "peak of the tensors that are made on the way, for one batch",
}


def table(results: StudyResults) -> Table:
    """All lines for the terminal, a section for each budget and state."""
    shown = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for head in HEADS:
        shown.add_column(head, no_wrap=True, justify="left" if head == HEADS[0] else "right")
    for group in groups(results.lines):
        shown.add_row(f"[bold]{group[-1].state}[/]")
        for line in group:
            shown.add_row(*cells(line, group[-1].healed))
    return shown


def groups(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each table, the model as it is above those of a budget; healed, too, where they are healed."""
    whole, tables = [line for line in lines if line.budget is None], by_state([line for line in lines if line.budget])
    found = [[*(line for line in whole if line.healed <= group[0].healed), *group] for group in tables]
    shown = [line for group in found for line in group]
    return [*by_state([line for line in whole if line not in shown]), *found]


def remarks(results: StudyResults) -> Iterator[str]:
    """What stands below the table: what the baselines beat, and what is missing, with reasons."""
    yield from results.verdicts
    for group in groups(results.lines):
        yield from (f"{group[-1].state}: {sentence}" for sentence in absent_baselines(results, group))
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


def cells(line: Line, healed: bool) -> list[str]:
    """A line of a table of healed or other ones as text, in the order of `HEADS`."""
    cost = line.cost
    return [
        called(line, healed),
        f"{line.visual_tokens:.0f}",
        f"{line.average:.1f} ±{(line.high - line.low) / 2:.1f}",
        str(line.runs),
        *("" if part is None else f"{part.accuracy:.0f}" for part in (line.hard, line.easy)),
        "" if line.loyalty is None else f"{line.loyalty:.0f}",
        *([f"{ms:.2f}" for ms in (cost.encoder_ms, cost.scoring_ms, cost.prefill_ms)] if cost else [""] * 3),
        f"{cost.speedup.value:.2f}" if cost else "",
        f"{cost.memory_mb:.1f}" if cost else "",
    ]


def called(line: Line, healed: bool) -> str:
    """A line's name in a table of healed or other ones, with its mark."""
    return line.row + (f" {OWN_LOSS}" if line.own_loss else "") + ("" if line.healed == healed else ", as it is")


def as_csv(results: StudyResults) -> str:
    return data.as_csv([line.flat() for line in results.lines])


def as_markdown(results: StudyResults, picture: str | None) -> str:
    """The page.

    Args:
        picture: the plot's name beside the page, if there is one.
    """
    return "\n".join(paragraphs(results, picture)) + "\n"


def paragraphs(results: StudyResults, picture: str | None) -> Iterator[str]:
    machine = results.machine
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    yield f"# {title(results)}"
    yield ""
    yield f"`{results.command}`"
    yield ""
    yield protocol_text(results)
    yield ""
    if results.pending:
        yield f"**{pending_text(results)}**"
        yield ""
    yield f"{machine['processor']}, {machine['cores']} cores{threads}; torch {machine['torch']},"
    yield f"transformers {machine['transformers']}, laco {machine['laco']}."
    yield ""
    if picture:
        yield f"![Accuracy against measured time]({picture})"
        yield ""
    yield from (f"- **{head}**: {meaning}." for head, meaning in legend(results).items())
    for group in groups(results.lines):
        yield ""
        yield f"## {heading(group)}"
        yield ""
        yield from markdown_table(HEADS, [cells(line, group[-1].healed) for line in group])
        if absent := list(absent_baselines(results, group)):
            yield ""
            yield from (f"- {sentence}" for sentence in absent)
    yield from section(
        "What the baselines beat",
        results.verdicts,
        "Baselines that stand at other places, too, are no methods here, and rows that score the very same are one."
        ' "Within the intervals": the 95 % intervals of both overlap, so the order may be chance.',
    )
    yield from section("Rows that are left out of tables", left_out(results))
    yield ""
    yield "## By family of questions"
    yield ""
    yield "Accuracy in per cent with Wilson's 95 % interval, the questions of all runs together."
    for group in groups(results.lines):
        names = list(group[0].families)
        yield ""
        yield f"### {heading(group)}"
        yield ""
        yield from markdown_table(
            ["method", *names],
            [[called(line, group[-1].healed), *(interval(line.families[name]) for name in names)] for line in group],
        )
    for head, reasons in (
        ("What cannot be judged on this model", results.refused),
        ("What could not be timed", results.untimed),
        ("What failed", results.failures),
    ):
        yield from section(head, [f"{name}: {reason}" for name, reason in reasons.items()])


def section(head: str, sentences: Iterable[str], note: str = "") -> Iterator[str]:
    """A list under a heading; nothing where the list is empty."""
    if listed := [f"- {sentence}" for sentence in sentences]:
        yield from ("", f"## {head}", "", *([note, ""] if note else []), *listed)


def heading(group: Sequence[Line]) -> str:
    state = group[-1].state
    return state[0].upper() + state[1:]


def title(results: StudyResults) -> str:
    """What is compared, on which model."""
    methods = {line.method["method"] for line in results.lines if line.method and not line.is_baseline}
    compared = f"{len(methods)} method{'s' * (len(methods) > 1)} beside the baselines" if methods else "The baselines"
    return f"{compared} on {Path(results.recipe['model']).name}, one protocol"


def legend(results: StudyResults) -> dict[str, str]:
    """What budgets, names and columns mean."""
    recipe, names = StudyRecipe.model_validate(results.recipe), {line.row for line in results.lines}
    meanings = [
        "`none` is the model as it is, above every table, and healed, too, in those of healed rows",
        f"{', '.join(BASELINES[1:])} are the other baselines",
        "`average pool` is that of square windows before the projector, or, where none come near the budget, of as many"
        " regions behind it (grid_pool)",
    ]
    if any(name.endswith("@1/4") for name in names):
        meanings.append("`@1/4` stands after a quarter of the vision encoder's layers")
    if any(name.endswith("@external") for name in names):
        meanings.append("`@external` behind the whole encoder")
    for row in recipe.rows:
        if row.name in names:
            settings = " and ".join(f"`{key}: {value}`" for key, value in row.settings.items())
            meanings.append(f"`{row.name}` is {row.method}{f' with {settings}' if settings else ''}")
    if any(line.own_loss for line in results.lines):
        meanings.append(f"{OWN_LOSS} was healed by a loss of its own, too")
    return {
        "budget": "share of the visual tokens of the model as it is that the language model may read, on average over"
        " its layers; methods whose count depends on the picture come near it. The down-sampled input has that share of"
        " the pixels, and all tokens",
        "method": "; ".join(meanings),
        **LEGEND,
    }


def protocol_text(results: StudyResults) -> str:
    """How everything was made, in a few sentences."""
    recipe = results.recipe
    judge, heal, timing = recipe["judge"], recipe["heal"], recipe["timing"]
    text = (
        f"Model: {recipe['model']}. {judge['samples']} questions ({judge['data']}, seed {judge['seed']});"
        f" seeds {', '.join(map(str, recipe['seeds']))} of everything that is random."
    )
    if heal:
        own = list(dict.fromkeys(line.row for line in results.lines if line.own_loss))
        exceptions = (
            f", but those marked {OWN_LOSS}: {', '.join(own)} learn by a loss of their own beside the answers, and from"
            " one question a picture"
        )
        text += (
            f" Healing: {heal['adapt_steps']} steps of compressor and projector, {heal['heal_steps']} steps of"
            f" everything, {heal['batch_size']} pictures a step with {heal['questions']} questions each, for all"
            f" methods alike{exceptions if own else ''}."
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
