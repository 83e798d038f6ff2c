"""`laco study`: every method of a recipe on one model, at several budgets, as it is and healed, in one table."""

from laco.study.recipe import StudyRecipe, load_study
from laco.study.results import Line, StudyResults
from laco.study.run import run, write

__all__ = ["Line", "StudyRecipe", "StudyResults", "load_study", "run", "write"]
