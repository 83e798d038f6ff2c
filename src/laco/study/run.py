"""Runs a study: accuracy of everything side by side, then times with nothing beside, then results from both."""

from collections.abc import Sequence
from pathlib import Path

from laco.cost import machine
from laco.evaluate.report import command, versions
from laco.files import write_file
from laco.healing import Job, Study, finished_study, label, run_study
from laco.report.plots import as_png
from laco.study.measure import Costs, key_of, measure_costs, read_costs
from laco.study.page import as_csv, as_markdown
from laco.study.plan import Case, by_row, check_healing, chosen, make_plan, without_healing
from laco.study.plot import accuracy_against_time
from laco.study.recipe import StudyRecipe
from laco.study.results import StudyResults, make_lines, verdicts


def run(
    recipe: StudyRecipe,
    *,
    jobs: int | None = None,
    retime: bool = False,
    only: Sequence[str] = (),
    as_it_is: bool = False,
    finished: bool = False,
    progress: bool = True,
) -> StudyResults:
    """Judges what a recipe says; what is finished in its output directory is taken from there.

    The results are those of the whole recipe, also if only a part of it is run: nothing that was found before is lost.

    Args:
        recipe: see `laco.study.load_study`.
        jobs: processes at a time, of one thread each; None = one a core.
        retime: measures times again.
        only: rows to run beside the baselines; all if empty.
        as_it_is: runs what is judged without healing.
        finished: starts nothing, and gives what is there.
        progress: shows bars on stderr.

    Raises:
        LacoError: there is no such model, row or data, or the model as it is cannot be judged, or was not if
            `finished`.
    """
    plan, protocol = make_plan(recipe), recipe.protocol
    part = chosen(without_healing(plan, recipe) if as_it_is else plan, only)
    variants = [case.variant for case in plan.cases]
    folder, times = Path(recipe.output) / "jobs", Path(recipe.output) / "times.json"
    if finished:
        study = finished_study(variants, protocol, folder, seeds=recipe.seeds)
    else:
        if not as_it_is:
            check_healing(recipe)
        wanted = [case.variant for case in part.cases]
        ran = run_study(wanted, protocol, folder, seeds=recipe.seeds, workers=jobs, progress=progress)
        study = joined(ran, finished_study(variants, protocol, folder, seeds=recipe.seeds))
    costs = None
    if recipe.timing and finished:
        costs = read_costs(times, protocol.model, recipe.timing, protocol.data)
    elif recipe.timing:
        judged = {outcome.job.variant.name for outcome in study.outcomes}
        methods = [variant.method for variant in variants if variant.name in judged]
        costs = measure_costs(
            methods, protocol.model, recipe.timing, times, data=protocol.data, again=retime, progress=progress
        )
    found = make_lines(plan.cases, study, protocol.judged_on(), costs)
    # What was run only to know the hard questions stands at no budget of the recipe.
    lines = [line for line in found if line.budget is None or line.budget in recipe.budgets]
    shown = {line.row for line in lines}
    refused = plan.refused | {row: reason for row, reason in part.refused.items() if row not in shown}
    return StudyResults(
        command=command(),
        recipe=recipe.model_dump(),
        lines=lines,
        verdicts=verdicts(lines),
        refused=refused | refused_jobs(plan.cases, study, recipe),
        failures={name: reason for name, reason in study.failures.items() if name not in study.refused},
        untimed=untimed(plan.cases, costs) if costs else {},
        pending=len(study.pending),
        machine=costs.machine if costs else machine(),
        versions=versions(),
    )


def joined(ran: Study, found: Study) -> Study:
    """What a run of a part gave, and what is finished of all the rest."""
    names = {outcome.job.variant.name for outcome in ran.outcomes}
    rest = [outcome for outcome in found.outcomes if outcome.job.variant.name not in names]
    return Study(
        protocol=found.protocol,
        outcomes=[*ran.outcomes, *rest],
        failures=found.failures | ran.failures,
        refused=list(dict.fromkeys([*found.refused, *ran.refused])),
        pending=[name for name in found.pending if name not in ran.failures],
    )


def refused_jobs(cases: Sequence[Case], study: Study, recipe: StudyRecipe) -> dict[str, str]:
    """By row, why methods that stand in the model could not run in it."""
    reasons: dict[str, dict[str, str]] = {}
    for case in cases:
        for seed in recipe.seeds:
            name = label(Job(variant=case.variant, seed=seed, protocol=study.protocol))
            if name in study.refused:
                reasons.setdefault(case.row, {})[name] = study.failures[name]
    return {name: reason for row, found in reasons.items() for name, reason in by_row(row, found).items()}


def untimed(cases: Sequence[Case], costs: Costs) -> dict[str, str]:
    """By row, why times could not be taken."""
    reasons: dict[str, dict[str, str]] = {}
    for case in cases:
        if isinstance(found := costs.found.get(key_of(case.variant.method)), str):
            reasons.setdefault(case.row, {})[case.variant.name] = found
    return {name: reason for row, found in reasons.items() for name, reason in by_row(row, found).items()}


def write(results: StudyResults, output: str | Path, page: str | Path | None = None) -> list[Path]:
    """Writes results.json, results.csv, and results.md with its plot; returns their paths.

    Args:
        output: directory.
        page: a Markdown file that gets the page, too; its plot stands beside it.
    """
    output = Path(output)
    texts: dict[Path, str | bytes] = {
        output / "results.json": results.model_dump_json(indent=1) + "\n",
        output / "results.csv": as_csv(results),
    }
    plot = as_png(accuracy_against_time(results.lines)) if any(line.cost for line in results.lines) else None
    for place in [output / "results.md", *([] if page is None else [Path(page)])]:
        picture = place.with_suffix(".png")
        texts[place] = as_markdown(results, picture.name if plot else None)
        if plot:
            texts[picture] = plot
    for path, text in texts.items():
        write_file(path, text)
    return list(texts)
