"""Models whose language model reads fewer visual tokens than their encoder gives: what selectors, reducers and methods
inside the language model are put into.

A visual token that is not there is a row of NaN in the features of a picture. So every family's own code for tiles,
line breaks, placeholders and positions runs unchanged, and the language model, whose class is extended, takes these
rows out of its input before it computes anything with them. Whatever forgets to do so puts out NaN, never a wrong
number. Prompts may have a placeholder for every token, or for those alone that are left (`short`).
"""

from laco.families.reduction.cache import ReducedCacheLayer, computed_columns, kept_columns
from laco.families.reduction.language_model import extend, extended, restore
from laco.families.reduction.model import ReducedConfig, ReducedForConditionalGeneration, ReducedModel

__all__ = [
    "ReducedCacheLayer",
    "ReducedConfig",
    "ReducedForConditionalGeneration",
    "ReducedModel",
    "computed_columns",
    "extend",
    "extended",
    "kept_columns",
    "restore",
]
