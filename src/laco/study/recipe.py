"""What a study is: a YAML file read into these models."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from laco.errors import LacoError
from laco.healing import Protocol
from laco.healing.variants import slug
from laco.methods import Merger, Method, get
from laco.recipes import Strict, load, nearest, parse


def area(side: int) -> float:
    """Which fraction of visual tokens windows of a side leave on a grid that they divide."""
    return side**-2


# So many times its budget a method may read, with more it is compared with no baseline; windows come as near to it.
SLACK = 1.5
RANDOM, DOWN_SAMPLED = "random", "down-sampled input"
BASELINES = ("none", DOWN_SAMPLED, RANDOM, "uniform stride", "average pool")  # rows that every study has


class Row(BaseModel):
    """A method at all budgets. Every key that is not named here is a setting of the method.

    Args:
        method: its name, see `laco methods`.
        name: in tables; by default the method's, with its depth.
        budgets: how the method comes to a budget. The name of a setting that gets the budget as it is, a fraction
            (`keep`); `factor`, which gets the window side r that leaves nearest to it; or {budget: settings} for what
            takes more than that. A budget that is left out, whose factor comes nearer to another, or which no factor
            comes near has no row.
        as_it_is: whether it is judged without training; by default if it has nothing to train.
        heal: whether it is judged after healing, too, or at which budgets only.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str
    name: str | None = None
    budgets: str | dict[float, dict[str, Any]]
    as_it_is: bool | None = None
    heal: bool | list[float] = True

    @field_validator("budgets", mode="before")
    @classmethod
    def _names_budgets(cls, budgets: Any) -> Any:
        """Said here in one sentence; what does not fit a union would be said of each of its types."""
        if isinstance(budgets, str):
            return budgets
        if not isinstance(budgets, dict) or not budgets:
            told = "nothing" if budgets is None else budgets
            raise ValueError(f"give the name of the setting that gets each budget, or {{budget: settings}}; got {told}")
        for budget, settings in budgets.items():
            if not isinstance(budget, int | float):
                raise ValueError(f"a budget is a fraction of the visual tokens, such as 0.25; got {budget}")
            if not isinstance(settings, dict):
                raise ValueError(f"the budget {budget} needs settings, such as {{keep: {budget}}}; got {settings}")
        return budgets

    @model_validator(mode="after")
    def _fits_the_method(self) -> "Row":
        known = [field.name for field in fields(get(self.method))]
        for key in self.settings:
            check_key(key, [*known, *Row.model_fields])
        settings = [{self.budgets: None}] if isinstance(self.budgets, str) else self.budgets.values()
        for key in (key for given in settings for key in given):
            check_key(key, known, " in budgets")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the method that hold at every budget."""
        return self.model_extra or {}

    @property
    def label(self) -> str:
        """The name in tables; that of a merger says where it stands."""
        if self.name or not issubclass(get(self.method), Merger):
            return self.name or self.method
        depth = self.settings.get("depth")
        places = {None: "", 0.25: "@1/4", 0.5: "@1/2", 1: "@external"}
        return self.method + places.get(depth, f"@{depth}")

    @property
    def is_judged_as_it_is(self) -> bool:
        return not get(self.method).trained if self.as_it_is is None else self.as_it_is

    def at(self, budgets: list[float], left: Callable[[int], float] = area) -> dict[float, dict[str, Any]]:
        """{budget: all settings that the recipe gives} for those budgets that it has a row at.

        Args:
            left: which fraction of the visual tokens windows of a side leave.
        """
        if isinstance(self.budgets, dict):
            own = {budget: self.budgets[budget] for budget in budgets if budget in self.budgets}
        elif self.budgets == "factor":
            own = {budget: {"factor": factor} for budget, factor in factors(budgets, left).items()}
        else:
            own = {budget: {self.budgets: budget} for budget in budgets}
        return {budget: {**self.settings, **settings} for budget, settings in own.items()}

    def build(self, settings: dict[str, Any]) -> Method:
        return get(self.method).from_fields(settings)


class Heal(Strict):
    """The short training, the same for all; see `laco.healing.Protocol`. `budgets`: where; everywhere if left out."""

    budgets: list[float] | None = None
    data: str = "world"
    adapt_steps: PositiveInt = 60
    heal_steps: PositiveInt = 140
    batch_size: PositiveInt = 32
    adapt_lr: PositiveFloat = 2e-3
    heal_lr: PositiveFloat = 5e-4
    questions: PositiveInt = 8
    distill: NonNegativeFloat = 0.0


class Judge(Strict):
    """The questions that everything is asked."""

    data: str = "world"
    seed: NonNegativeInt = 0
    samples: PositiveInt = 1000


class Timing(Strict):
    """How times are taken: `rounds` of every method in turn, over `batch` pictures with a question each."""

    rounds: PositiveInt = 12
    batch: PositiveInt = 8


class StudyRecipe(Strict):
    """A whole study. The baselines (none, random, uniform stride, average pool, down-sampled input) are always there.

    Args:
        output: directory where it keeps its state and writes its results.
        model: a directory or a name on the hub.
        budgets: fractions of the visual tokens.
        seeds: of everything that is random.
        heal: None = everything is judged as it is.
        timing: None = nothing is timed.
    """

    output: str
    model: str
    budgets: list[float] = Field(min_length=1)
    seeds: list[NonNegativeInt] = Field([0, 1, 2], min_length=1)
    heal: Heal | None = None
    judge: Judge = Judge()
    timing: Timing | None = Timing()
    rows: list[Row] = Field(default_factory=list)

    @model_validator(mode="after")
    def _budgets_are_the_studys(self) -> "StudyRecipe":
        if wrong := [budget for budget in self.budgets if not 0 < budget < 1]:
            raise ValueError(f"budgets are fractions of the visual tokens between 0 and 1; got {wrong[0]}")
        named: list[tuple[str, list[float]]] = [("heal", (self.heal and self.heal.budgets) or [])]
        for row in self.rows:
            for settings in row.at(self.budgets).values():
                row.build(settings)  # a value that the method refuses shows here
            named.append((row.label, [] if isinstance(row.budgets, str) else list(row.budgets)))
            named.append((row.label, [] if isinstance(row.heal, bool) else row.heal))
        for where, budgets in named:
            if foreign := [budget for budget in budgets if budget not in self.budgets]:
                raise ValueError(
                    f"{where} names the budget {foreign[0]}, which is not among the study's {self.budgets}"
                )
        return self

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> "StudyRecipe":
        named: list[tuple[str, list[Any]]] = [("seeds", self.seeds), ("budgets", list(map(percent, self.budgets)))]
        for where, values in named:
            if twice := [value for number, value in enumerate(values) if value in values[:number]]:
                raise ValueError(f"{where} have {twice[0]} twice; give each once")
        # Labels name folders and lines of tables: what shared one would be taken for one.
        taken = {slug(name): "a baseline" for name in BASELINES}
        for row in self.rows:
            if other := taken.get(slug(row.label)):
                raise ValueError(f"a row and {other} are both called {row.label!r}; give the row a name of its own")
            taken[slug(row.label)] = "another row"
        return self

    def heals(self, budget: float, row: Row | None = None) -> bool:
        """Whether a row (None: a baseline) is healed at a budget."""
        if self.heal is None or budget not in (self.heal.budgets or self.budgets):
            return False
        return row is None or (row.heal if isinstance(row.heal, bool) else budget in row.heal)

    @property
    def protocol(self) -> Protocol:
        """How all rows are healed and judged."""
        path = Path(self.model)
        healing = (self.heal or Heal()).model_dump(exclude={"budgets", "data"})
        return Protocol(
            model=str(path.resolve()) if path.is_dir() else self.model,
            train_data=self.heal.data if self.heal else "world",
            data=self.judge.data,
            samples=self.judge.samples,
            eval_seed=self.judge.seed,
            **healing,
        )


def percent(budget: float) -> str:
    """A budget as it stands in names and tables."""
    return f"{100 * budget:.3g} %"


def factors(budgets: list[float], left: Callable[[int], float]) -> dict[float, int]:
    """{budget: window side r > 1} that leaves what is nearest to the budget, off it by a ratio of `SLACK` at most; what
    is left several times (on a grid of 6 x 6, 2 x 2 tokens by r = 3, 4 and 5) only once, at the budget that it comes
    nearest to.
    """
    left = cache(left)  # a model is built for every side
    sides = {budget: nearest_side(budget, left) for budget in budgets}
    shares = {budget: left(side) for budget, side in sides.items()}
    return {
        budget: side
        for budget, side in sides.items()
        if budget == min(budgets, key=lambda other: off(shares[budget], other)) and off(shares[budget], budget) <= SLACK
    }


def nearest_side(budget: float, left: Callable[[int], float]) -> int:
    """The smallest window side r > 1 that leaves what is nearest to a budget, as a ratio."""
    sides: dict[float, int] = {}
    for r in range(2, 33):
        sides.setdefault(left(r), r)
        if min(sides) <= budget:  # larger windows leave less
            break
    return sides[min(sides, key=lambda share: off(share, budget))]


def off(share: float, budget: float) -> float:
    """How many times too much or too little a share of the visual tokens is; 1 = just the budget."""
    return max(share / budget, budget / share)


def down_sampling(budget: float) -> float:
    """Side of the squares of which the down-sampled input makes one pixel: 1/sqrt(budget), or the whole number that is
    near to it, so that 11 % and 1/9 are alike.
    """
    side = budget**-0.5
    whole = max(round(side), 2)
    return whole if abs(side - whole) < side / 20 else round(side, 3)


def check_key(key: str, known: list[str], where: str = "") -> None:
    """Raises a `LacoError` that names the nearest known key; `where` is text that follows the key."""
    if key not in known:
        raise LacoError(f"unknown key {key}{where}; {nearest(key, known)}")


def load_study(path: str | Path, **overrides: Any) -> StudyRecipe:
    """Reads and checks a study; as `laco.recipes.load`."""
    return load(StudyRecipe, path, **overrides)


def parse_study(raw: dict[str, Any], where: str = "the study") -> StudyRecipe:
    return parse(StudyRecipe, raw, where)
