"""Selectors by the attention of the question in a layer of the language model.

Such a choice costs a prefill up to that layer before the prefill of what is left, which goes through all of them.
"""

from dataclasses import dataclass
from typing import ClassVar

from laco.errors import LacoError
from laco.methods.selector import Selector


@dataclass(frozen=True, kw_only=True)
class QuestionSelector(Selector):
    """A selector that looks at `text_attention` of one layer of the language model.

    Args:
        scoring_depth: layers that run before the scoring layer, as a fraction; 0 = embeddings alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text_attention"})

    scoring_depth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.scoring_depth < 1:
            raise LacoError(f"{self.name}: scoring_depth lies between 0 and 1, 1 excluded; got {self.scoring_depth}")

    def scoring_layer(self, num_layers: int) -> int:
        """How many of the layers run before the one whose attention is read."""
        return min(round(self.scoring_depth * num_layers), num_layers - 1)

    def groups(self, frames: int) -> list[range]:
        """The frames of each scoring pass: all in one."""
        return [range(frames)]
