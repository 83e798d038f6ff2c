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
from laco.study.plan import Case, by_row, check_healing, chosen, make_plan
from laco.study.plot import accuracy_against_time
from laco.study.recipe import StudyRecipe
from laco.study.results import StudyResults, make_lines, verdicts


def run(
    recipe: StudyRecipe,
    *,
    jobs: int | None = None,
    retime: bool = False,
    only: Sequence[str] = (),
    finished: bool = False,
    progress: bool = True,
) -> StudyResults:
    """Judges what a recipe says; what is finished in its output directory is taken from there.

    Args:
        recipe: see `laco.study.load_study`.
        jobs: processes at a time, of one thread each; None = one a core.
        retime: measures times again.
        only: rows to judge beside the baselines; all if empty.
        finished: starts nothing, and gives what is there.
        progress: shows bars on stderr.

    Raises:
        LacoError: there is no such model, row or data, or the model as it is cannot be judged, or was not if
            `finished`.
    """
    (cases, refused), output, protocol = chosen(make_plan(recipe), only), Path(recipe.output), recipe.protocol
    if not finished:
        check_healing(recipe)
    variants = [case.variant for case in cases]
    costs, times = None, output / "times.json"
    if finished:
        study = finished_study(variants, protocol, output / "jobs", seeds=recipe.seeds)
        costs = read_costs(times)
    else:
        study = run_study(variants, protocol, output / "jobs", seeds=recipe.seeds, workers=jobs, progress=progress)
    if recipe.timing and not finished:
        judged = {outcome.job.variant.name for outcome in study.outcomes}
        methods = [variant.method for variant in variants if variant.name in judged]
        costs = measure_costs(
            methods, protocol.model, recipe.timing, times, data=protocol.data, again=retime, progress=progress
        )
    lines = make_lines(cases, study, protocol.judged_on(), costs)
    return StudyResults(
        command=command(),
        recipe=recipe.model_dump(),
        lines=lines,
        verdicts=verdicts(lines),
        refused=refused | refused_jobs(cases, study, recipe),
        failures={name: reason for name, reason in study.failures.items() if name not in study.refused},
        untimed=untimed(cases, costs) if costs else {},
        pending=len(study.pending),
        machine=costs.machine if costs else machine(),
        versions=versions(),
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
    """Writes results.json, results.csv, and a page with its plot; returns their paths.

    Args:
        output: directory.
        page: the Markdown file; its plot stands beside it. By default results.md in `output`.
    """
    output = Path(output)
    page = output / "results.md" if page is None else Path(page)
    picture = page.with_suffix(".png")
    is_timed = any(line.cost for line in results.lines)
    texts: dict[Path, str | bytes] = {
        output / "results.json": results.model_dump_json(indent=1) + "\n",
        output / "results.csv": as_csv(results),
        page: as_markdown(results, picture.name if is_timed else None),
    }
    if is_timed:
        texts[picture] = as_png(accuracy_against_time(results.lines))
    for path, text in texts.items():
        write_file(path, text)
    return list(texts)
