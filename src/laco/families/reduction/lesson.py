"""What methods are told in training beside the answers, and the losses of their own that they give back.

It reaches them where they stand, in the middle of a model's forward, and lasts as long as one.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods import MergerModule
from laco.methods.glimpse_prune import Box


@runtime_checkable
class Taught(Protocol):
    """A method with a loss of its own.

    Class data: `learns_from`, what `target` is: `boxes` around what a question is about; the `relevance` of tokens to
    the answer; the question's `attention` in the scoring layer; `targets`, where the method's own settings say what is
    wanted, and nothing is given.
    """

    name: str
    learns_from: str
    trained: bool

    def loss(self, signals: Any, module: MergerModule | None, target: Any) -> Tensor:
        """Of one sample or picture, or one call of the encoder, a scalar with a gradient."""


@dataclass
class Lesson:
    """Of a batch.

    Args:
        boxes: of each sample, what its (first) question is about in its picture; none where there is no question.
        head: of the language model, hidden states -> logits: for methods that learn from the model itself.
        losses: filled during the forward, by the method's name.
    """

    boxes: Sequence[Sequence[Box]] | None = None
    head: nn.Module | None = None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)

    def give(self, method: Any, loss: Tensor) -> None:
        self.losses.setdefault(method.name, []).append(loss)

    def boxes_of(self, row: int, method: Any) -> Sequence[Box]:
        if self.boxes is None:
            raise LacoError(f"{method.name} learns from boxes around what a question is about, which this data has not")
        return self.boxes[row]


LESSON: ContextVar[Lesson | None] = ContextVar("laco_lesson", default=None)
