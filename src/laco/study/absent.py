"""Why a row has no line in a table: by the recipe, or by what came of it."""

from collections.abc import Iterator, Sequence

from laco.methods import DecoderMethod, get
from laco.study.recipe import BASELINES, Row, StudyRecipe, area, nearest_side, percent
from laco.study.results import Line, StudyResults, by_state


def absent_baselines(results: StudyResults, group: Sequence[Line]) -> Iterator[str]:
    """A sentence for every baseline without a line among those of one budget and state."""
    if (budget := group[-1].budget) is None:
        return
    stopped = results.refused | results.failures
    none = "it has not been run yet" if results.pending else "the study has none at this budget"
    for name in BASELINES:
        if name == "none" or any(line.row == name for line in group):
            continue
        keys = [key for key in stopped if key == name or key.startswith(f"{name} {percent(budget)}")]
        yield f"{name} is not here: {stopped[keys[0]] if keys else none}."


def left_out(results: StudyResults) -> Iterator[str]:
    """A sentence for all rows that the recipe leaves out of the same tables for the same reason."""
    recipe = StudyRecipe.model_validate(results.recipe)
    tables: dict[tuple[str, str], list[str]] = {}  # by reason and row
    for group in by_state([line for line in results.lines if line.budget]):
        for row in (row for row in recipe.rows if row.label not in results.refused):
            if reason := why_absent(row, group, recipe):
                tables.setdefault((reason, row.label), []).append(group[0].state)
    rows: dict[tuple[str, str], list[str]] = {}  # by reason and tables
    for (reason, label), states in tables.items():
        rows.setdefault((reason, "; ".join(states)), []).append(label)
    yield from (f"{states}: {', '.join(labels)}: {reason}." for (reason, states), labels in rows.items())


def why_absent(row: Row, group: Sequence[Line], recipe: StudyRecipe) -> str | None:
    """Why a recipe has no such row at the budget and in the state of some lines; None where it has."""
    budget, healed = group[-1].budget, group[-1].healed
    assert budget is not None
    if budget not in row.at(recipe.budgets):
        if row.budgets == "factor":
            side = nearest_side(budget, area)
            return f"the window that comes nearest, {side} x {side}, leaves {percent(side**-2)}"
        if issubclass(get(row.method), DecoderMethod):
            return (
                "the language model's layers before the first drop read all tokens, so small budgets are out of reach"
            )
        return "the recipe has no settings that come to this budget"
    if healed and not recipe.heals(budget, row):
        return "the recipe does not heal it there"
    if not healed and not row.is_judged_as_it_is:
        return "it must be trained first" if get(row.method).trained else "the recipe judges it after healing alone"
    return None
