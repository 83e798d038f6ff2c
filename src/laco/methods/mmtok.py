"""MMTok (arXiv 2508.18264): tokens that cover both the question and the picture.

C = [softmax_j(cos(t_i, x_j) / tau_t) / M ; alpha softmax_j(cos(c_i, c_j) / tau_v) / N],    greedy coverage of C's rows
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from laco.errors import LacoError
from laco.methods.greedy import coverage
from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class MMTok(Selector):
    """Maximum coverage of the question's words (t, by the tokens x) and of the picture (c, the encoder's features).

    Which words of the question count is not decided here: all of `Signals.text` do. The reference drops stop words and
    answer-format suffixes first.

    Args:
        alpha: weight of covering the picture.
        text_temperature, vision_temperature: tau_t (0.02 for LLaVA, 0.01 for Qwen2.5-VL) and tau_v.
    """

    name: ClassVar[str] = "mmtok"
    title: ClassVar[str] = "MMTok"
    paper: ClassVar[str] = "MMTok: Multimodal Coverage Maximization, ICLR 2026, arXiv 2508.18264"
    confirmed: ClassVar[str] = "both coverages, alpha = 0.5, temperatures, greedy rule, spatial order, keep = 20 %"
    assumed: ClassVar[str] = "all words of the question count; nothing is excluded as padding"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "features", "text"})

    keep: int | float = 0.2
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.text_temperature, self.vision_temperature) <= 0 or self.alpha < 0:
            raise LacoError("mmtok: temperatures must be above 0 and alpha 0 or more")

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        assert signals.features is not None
        assert signals.text is not None
        by_text_MN = (cosines(signals.text, signals.tokens) / self.text_temperature).softmax(dim=1)
        by_vision_NN = (cosines(signals.features[signals.prefix :]) / self.vision_temperature).softmax(dim=1)
        rows = torch.cat([by_text_MN / len(by_text_MN), self.alpha * by_vision_NN / len(by_vision_NN)])
        return Plan(coverage(rows, self.budget(signals.grid.tokens)).sort().values)
