"""FastV (arXiv 2403.06764): half of the visual tokens leave after the second layer of the language model.

score_j = mean over heads of the attention of the prompt's last token to visual token j, in the layer before
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from laco.methods.decoder import DecoderSignals, ScoringMethod


@dataclass(frozen=True, kw_only=True)
class FastV(ScoringMethod):
    """Keeps what the last token of the prompt attends to in the last layer that ran.

    Args:
        count_by: `round` (half to even), as the authors' code for transformers, or `floor`, as that for lmms-eval.

    The paper's K = 2 of 32 layers is taken as a depth.
    """

    name: ClassVar[str] = "fastv"
    title: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arXiv 2403.06764"
    confirmed: ClassVar[str] = (
        "layer 2, attention of the last token in the layer before, mean over heads, positions kept"
    )
    assumed: ClassVar[str] = "the same relative depth where there are not 32 layers; at least one token stays"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    default_depths: ClassVar[tuple[float, ...]] = (2 / 32,)

    count_by: Literal["round", "floor"] = "round"

    def rounded(self, tokens: float) -> int:
        return round(tokens) if self.count_by == "round" else int(tokens)

    def score(self, signals: DecoderSignals) -> Tensor:
        return signals.attended
