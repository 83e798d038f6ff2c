"""From a recipe to what is run: every row at every budget as a variant; and what a model cannot take, with reasons."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self

from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from laco.data import WORLDS, Sample, load_samples
from laco.errors import LacoError
from laco.evaluate.generation import check_videos, count_visual_tokens, encode, visual_tokens
from laco.families import family_of_config
from laco.healing import NONE, Variant, outline
from laco.methods import DecoderMethod, Merger, Method, Reducer
from laco.study.recipe import DOWN_SAMPLED, RANDOM, Row, StudyRecipe, area, down_sampling, percent
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
    trial = Trial.of(recipe)
    cases = [Case("none", "baseline", None, NONE)]
    if recipe.heal:
        cases.append(Case("none", "baseline", None, Variant(name="none, healed")))
    sides = {budget: down_sampling(budget) for budget in recipe.budgets}
    if 2 not in sides.values():
        sides[1 / 4] = 2  # what it gets wrong are the hard questions
    for budget, side in sides.items():
        cases += in_both_states(recipe, DOWN_SAMPLED, "baseline", budget, {"down_sample": side}, down_sample=side)
    refused: dict[str, str] = {}
    for row, is_baseline in [(row, True) for row in baseline_rows()] + [(row, False) for row in recipe.rows]:
        reasons: dict[str, str] = {}
        found: list[Case] = []
        there = {case.budget for case in cases if case.row == row.label}
        standing = row.at(recipe.budgets, partial(trial.left, row))
        for budget, settings in standing.items():
            if budget in there:
                continue
            method = row.build(settings)
            if reason := trial.why_not(method):
                reasons[f"{row.label} {percent(budget)}"] = reason
                continue
            place = "baseline" if is_baseline else place_of(method)
            given = {"method": row.method, **settings}
            found += in_both_states(recipe, row.label, place, budget, given, row, method=method.to_dict())
        if not is_baseline and not standing:
            reasons = {row.label: "no window of r x r tokens leaves a share that is near a budget of this study"}
        elif standing and not found and not reasons and not there:
            reasons = {row.label: why_nothing(row, recipe.heal is not None)}
        cases += found
        refused |= reasons if there else by_row(row.label, reasons)  # only some budgets, if it stands at others
    return Plan(cases, refused)


def baseline_rows() -> list[Row]:
    """The baselines that are methods; of two of one name the later stands at the budgets where the first has none."""
    rows: list[dict[str, Any]] = [
        {"method": "random_tokens", "name": RANDOM, "budgets": "keep"},
        {"method": "uniform_stride", "name": "uniform stride", "budgets": "keep"},
        {"method": "average_pool", "name": "average pool", "depth": 1.0, "budgets": "factor"},
        {"method": "grid_pool", "name": "average pool", "budgets": "keep"},
    ]
    return [Row.model_validate(row) for row in rows]


def in_both_states(
    recipe: StudyRecipe,
    label: str,
    place: Place,
    budget: float,
    given: Mapping[str, Any],
    row: Row | None = None,
    **what: Any,
) -> list[Case]:
    """A row at a budget as it is and healed, as far as the recipe wants either; `what` are fields of the variant."""
    name = f"{label} {percent(budget)}"
    found = [Variant(name=name, heal=False, **what)] if row is None or row.is_judged_as_it_is else []
    found += [Variant(name=f"{name}, healed", **what)] if recipe.heals(budget, row) else []
    text = ", ".join(f"{key}: {value}" for key, value in given.items())
    return [Case(label, place, budget, variant, text) for variant in found]


def why_nothing(row: Row, heals: bool) -> str:
    """Why a row that a model can take is neither judged as it is nor healed in a study that heals, or does not."""
    reason = "has to be trained" if row.as_it_is is None else "is not to be judged as it is"
    return f"{reason}, and this study heals {'it at none of its budgets' if heals else 'nothing'}"


@dataclass(frozen=True)
class Trial:
    """Where methods are tried before anything runs: a model without its weights, and a question that it will be asked.

    Args:
        source: a directory, or a name on the hub.
        processor: that of the model as it is.
        sample: the question.
        shows_videos: all that is asked is about videos.
    """

    source: str
    processor: ProcessorMixin
    sample: Sample
    shows_videos: bool

    @classmethod
    def of(cls, recipe: StudyRecipe) -> Self:
        """Raises `LacoError` if there is no such model, it is of no known family, or there is nothing to ask."""
        source, judge = recipe.protocol.model, recipe.judge
        try:
            family = family_of_config(AutoConfig.from_pretrained(source))
            processor = family.auto_processor.from_pretrained(source)
        except LacoError:
            raise
        except (ImportError, OSError, ValueError) as error:
            raise LacoError(f"cannot load {source}: {' '.join(str(error).split())}") from error
        asked = load_samples(judge.data, limit=1 if judge.data in WORLDS else judge.samples, seed=judge.seed)
        return cls(source, processor, asked[0], all(sample.video for sample in asked))

    def compressed(self, method: Method) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model with a method in it; `LacoError` if it cannot stand there, or not on what is asked."""
        model, processor = outline(self.source), deepcopy(self.processor)
        check_videos(model, method)
        if getattr(method, "video_only", False) and not self.shows_videos:
            raise LacoError(f"{method.name} compares frames of videos, but it is judged on pictures")
        compress(model, processor, method)
        visual_tokens(model, processor)  # raises where a budget counts more than there are
        return model, processor

    def why_not(self, method: Method) -> str | None:
        """Why a method cannot be judged; None if it can."""
        try:
            self.compressed(method)
        except LacoError as error:
            return str(error)
        return None

    def left(self, row: Row, factor: int) -> float:
        """Which fraction of the visual tokens a method leaves by windows of a side."""
        try:
            compressed = self.compressed(row.build({**row.settings, "factor": factor}))
        except LacoError:  # the reason is told at the budget that such windows would be for
            return area(factor)
        return self.tokens(*compressed) / self.tokens(outline(self.source), self.processor)

    def tokens(self, model: PreTrainedModel, processor: ProcessorMixin) -> float:
        """Visual tokens of the question."""
        asked = self.sample
        return count_visual_tokens(model, encode(processor, [asked.question], [asked.pictures()], [asked.video]))[0]


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


def without_healing(plan: Plan, recipe: StudyRecipe) -> Plan:
    """What is judged as it is; rows that have nothing of it are among those that cannot."""
    cases = [case for case in plan.cases if not case.variant.heal]
    dropped = {case.row for case in plan.cases} - {case.row for case in cases}
    reasons = {row.label: why_nothing(row, heals=False) for row in recipe.rows if row.label in dropped}
    return Plan(cases, plan.refused | reasons)


def check_healing(recipe: StudyRecipe) -> None:
    """Raises `LacoError` if there is nothing to heal on; a study that is finished needs it no more."""
    if recipe.heal is not None:
        load_samples(recipe.heal.data, limit=1)


def listing(recipe: StudyRecipe, only: Sequence[str] = (), as_it_is: bool = False) -> list[dict[str, Any]]:
    """What a study would run: {row, budget, as_it_is, healed (numbers of runs), settings, cannot (the reason)}."""
    plan = make_plan(recipe)
    if as_it_is:
        plan = without_healing(plan, recipe)
    else:
        check_healing(recipe)
    plan = chosen(plan, only)
    rows: dict[tuple[str, float | None], dict[str, Any]] = {}
    for case in plan.cases:
        start = {"row": case.row, "budget": case.budget, "as_it_is": 0, "healed": 0}
        entry = rows.setdefault((case.row, case.budget), {**start, "settings": case.given, "cannot": None})
        entry["healed" if case.variant.heal else "as_it_is"] += len(recipe.seeds) if case.variant.random else 1
    nothing = {"budget": None, "as_it_is": 0, "healed": 0, "settings": ""}
    return [*rows.values(), *({"row": row, **nothing, "cannot": reason} for row, reason in plan.refused.items())]
