"""PyramidDrop (arXiv 2410.17247): half of the visual tokens leave after each quarter of the language model.

score_j = mean over heads of the attention of the prompt's last token to visual token j, in the layer that comes next
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from laco.methods.decoder import DecoderSignals, ScoringMethod


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ScoringMethod):
    """Keeps fewer and fewer tokens; works in training too, where the tokens right before the answers are the queries.

    The next layer's queries and keys are computed once more for it, from the hidden states of now.
    """

    name: ClassVar[str] = "pyramid_drop"
    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating LVLMs via Pyramid Visual Redundancy Reduction, CVPR 2025, 2410.17247"
    )
    confirmed: ClassVar[str] = (
        "after layers 8, 16, 24 of 32, 1/2, 1/4, 1/8 of the original tokens, rounded down; queries"
    )
    assumed: ClassVar[str] = (
        "positions kept (the reference renumbers); several pictures as one; at least one token stays"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    attention_layer: ClassVar[Literal["last", "next"]] = "next"
    reads_answers: ClassVar[bool] = True
    default_depths: ClassVar[tuple[float, ...]] = (1 / 4, 1 / 2, 3 / 4)

    keep: int | float | tuple[int | float, ...] = (1 / 2, 1 / 4, 1 / 8)

    def queries(self, signals: DecoderSignals) -> Tensor:
        return super().queries(signals) if signals.answers is None else signals.answers - 1

    def score(self, signals: DecoderSignals) -> Tensor:
        return signals.attended
