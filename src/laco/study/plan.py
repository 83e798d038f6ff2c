"""From a recipe to what is run: every row at every budget as a variant; and what a model cannot take, with reasons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers import AutoConfig

from laco.data import WORLDS, load_samples
from laco.errors import LacoError
from laco.evaluate.generation import check_videos
from laco.families import family_of_config
from laco.healing import NONE, Variant, outline
from laco.methods import DecoderMethod, Merger, Method, Reducer
from laco.study.recipe import DOWN_SAMPLED, RANDOM, Row, StudyRecipe, factors, percent
from laco.surgery import compress

Place = Literal["baseline", "encoder", "external", "language_model"]


@dataclass(frozen=True)
class Case:
    """One row at one budget (None for the model as it is), as it is or healed; `given` are the recipe's settings."""

    row: str
    place: Place
    budget: float | None
    variant: Variant
    given: str = ""


class Plan(NamedTuple):
    """What is run; by row (and budget, where that matters) why it cannot be."""

    cases: list[Case]
    refused: dict[str, str]


def make_plan(recipe: StudyRecipe) -> Plan:
    """All cases of a study, baselines first; every method is tried on the outline of the model.

    Raises:
        LacoError: there is no such model, or there are no questions to judge on.
    """
    find(recipe.protocol.model)
    judge = recipe.judge
    asked = load_samples(judge.data, limit=1 if judge.data in WORLDS else judge.samples, seed=judge.seed)
    shows_videos = all(sample.video for sample in asked)
    cases = [Case("none", "baseline", None, NONE)]
    if recipe.heal:
        cases.append(Case("none", "baseline", None, Variant(name="none, healed")))
    sides = factors(recipe.budgets)
    if 2 not in sides.values():
        sides[1 / 4] = 2  # what it gets wrong are the hard questions
    for budget, side in sides.items():
        cases += in_both_states(recipe, DOWN_SAMPLED, "baseline", budget, down_sample=side)
    refused: dict[str, str] = {}
    for row, is_baseline in [(row, True) for row in baseline_rows()] + [(row, False) for row in recipe.rows]:
        reasons: dict[str, str] = {}
        for budget, settings in row.at(recipe.budgets).items():
            method = row.build(settings)
            if reason := why_not(recipe.protocol.model, method, shows_videos):
                reasons[f"{row.label} {percent(budget)}"] = reason
                continue
            place = "baseline" if is_baseline else place_of(method)
            cases += in_both_states(recipe, row.label, place, budget, row, method=method.to_dict())
        refused |= by_row(row.label, reasons)
    return Plan(cases, refused)


def baseline_rows() -> list[Row]:
    """The baselines that are methods."""
    rows: list[dict[str, Any]] = [
        {"method": "random_tokens", "name": RANDOM, "budgets": "keep"},
        {"method": "uniform_stride", "name": "uniform stride", "budgets": "keep"},
        {"method": "average_pool", "name": "average pool", "depth": 1.0, "budgets": "factor"},
    ]
    return [Row.model_validate(row) for row in rows]


def in_both_states(
    recipe: StudyRecipe, label: str, place: Place, budget: float, row: Row | None = None, **what: Any
) -> list[Case]:
    """A row at a budget as it is and healed, as far as the recipe wants either."""
    name = f"{label} {percent(budget)}"
    found = [Variant(name=name, heal=False, **what)] if row is None or row.is_judged_as_it_is else []
    found += [Variant(name=f"{name}, healed", **what)] if recipe.heals(budget, row) else []
    given = {"method": row.method, **row.at([budget])[budget]} if row else what
    text = ", ".join(f"{key}: {value}" for key, value in given.items())
    return [Case(label, place, budget, variant, text) for variant in found]


def why_not(source: str, method: Method, shows_videos: bool) -> str | None:
    """Why a method cannot stand in a model, or on pictures that are no videos; None if it can."""
    model = outline(source)
    try:
        check_videos(model, method)
        if getattr(method, "video_only", False) and not shows_videos:
            return f"{method.name} compares frames of videos, but it is judged on pictures"
        compress(model, None, method)
    except LacoError as error:
        return str(error)
    return None


def find(source: str) -> None:
    """Raises `LacoError` if there is no such model, or it is of no known family."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise LacoError(f"there is no model {source}: {' '.join(str(error).split())}") from error
    family_of_config(config)


def place_of(method: Method) -> Place:
    """Where a method works."""
    match method:
        case DecoderMethod():
            return "language_model"
        case Reducer():
            return "encoder"
        case Merger():
            depth = method.default_depth if method.depth is None else method.depth
            return "external" if depth == 1 and method.layer is None else "encoder"
    return "external"


def by_row(row: str, reasons: dict[str, str]) -> dict[str, str]:
    """Reasons {name: reason} under the row's name alone if they are all the same."""
    return {row: next(iter(reasons.values()))} if len(set(reasons.values())) == 1 else reasons


def chosen(plan: Plan, names: Sequence[str]) -> Plan:
    """The baselines, and of the other rows those that are named; everything without names.

    Raises:
        LacoError: there is no such row.
    """
    if not names:
        return plan
    cases = [case for case in plan.cases if case.place == "baseline" or case.row in names]
    refused = {key: plan.refused[key] for name in names for key in plan.refused if f"{key} ".startswith(f"{name} ")}
    for name in names:
        if name not in {case.row for case in cases} and not any(f"{key} ".startswith(f"{name} ") for key in refused):
            there = ", ".join(dict.fromkeys(case.row for case in plan.cases))
            raise LacoError(f"the study has no row {name!r}; it has {there}")
    return Plan(cases, refused)


def check_healing(recipe: StudyRecipe) -> None:
    """Raises `LacoError` if there is nothing to heal on; a study that is finished needs it no more."""
    if recipe.heal is not None:
        load_samples(recipe.heal.data, limit=1)


def listing(recipe: StudyRecipe, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What a study would run: {row, budget, as_it_is, healed (numbers of runs), settings, cannot (the reason)}."""
    check_healing(recipe)
    plan = chosen(make_plan(recipe), only)
    rows: dict[tuple[str, float | None], dict[str, Any]] = {}
    for case in plan.cases:
        start = {"row": case.row, "budget": case.budget, "as_it_is": 0, "healed": 0}
        entry = rows.setdefault((case.row, case.budget), {**start, "settings": case.given, "cannot": None})
        entry["healed" if case.variant.heal else "as_it_is"] += len(recipe.seeds) if case.variant.random else 1
    nothing = {"budget": None, "as_it_is": 0, "healed": 0, "settings": ""}
    return [*rows.values(), *({"row": row, **nothing, "cannot": reason} for row, reason in plan.refused.items())]
