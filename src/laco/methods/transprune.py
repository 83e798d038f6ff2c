"""TransPrune (arXiv 2507.20630): tokens that the layers change most, and that the question attends to.

ttv = |v| / |u| * softmax over tokens of (1 - cos(u, v)),    module input u behind its norm, output v
score = T / sum T + g / sum g,    T = sum of ttv of attention and MLP over layers,    g = attention of the text behind
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from laco.methods.decoder import DecoderSignals, ScoringMethod, Step


@dataclass(frozen=True, kw_only=True)
class TransPrune(ScoringMethod):
    """Token transition variation, accumulated from the first point's layer on, and instruction-guided attention.

    The softmax runs over the tokens of the sample; in the reference over a whole batch, which it never has.
    """

    name: ClassVar[str] = "transprune"
    title: ClassVar[str] = "TransPrune"
    paper: ClassVar[str] = "TransPrune: Token Transition Pruning for Efficient LVLMs, CVPR 2026, arXiv 2507.20630"
    confirmed: ClassVar[str] = (
        "after layers 7, 9, 12 of 32, shares of the original tokens, layers 7 .. 12 summed, score"
    )
    assumed: ClassVar[str] = "the same relative depths in other models; positions kept (the reference renumbers)"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "memory"})
    attention_layer: ClassVar[Literal["last", "next"]] = "next"
    default_depths: ClassVar[tuple[float, ...]] = (7 / 32, 9 / 32, 12 / 32)

    keep: int | float | tuple[int | float, ...] = (0.875, 0.625, 0.125)

    def observed(self, num_layers: int) -> tuple[int, ...]:
        points = self.points(num_layers)
        return tuple(range(points[0] - 1, points[-1]))

    def observe(self, memory: Any, attention: Step, mlp: Step) -> Tensor:
        """(L,) the sum so far, of every token of the sequence."""
        value_L = transition(attention) + transition(mlp)
        return value_L if memory is None else memory + value_L

    def after(self, memory: Any, rows: Tensor) -> Any:
        return None if memory is None else memory[rows]

    def queries(self, signals: DecoderSignals) -> Tensor:
        return signals.text_behind if len(signals.text_behind) else super().queries(signals)

    def score(self, signals: DecoderSignals) -> Tensor:
        return share(signals.memory[signals.visual]) + share(signals.attended)


def transition(step: Step) -> Tensor:
    """(L,) token transition variation of one module."""
    u_LD, v_LD = step.read.float(), step.put_out.float()
    turned_L = 1 - torch.cosine_similarity(u_LD, v_LD, dim=-1)
    return v_LD.norm(dim=-1) / u_LD.norm(dim=-1).clamp(min=1e-8) * turned_L.softmax(dim=-1)


def share(value_N: Tensor) -> Tensor:
    return value_N / (value_N.sum() + 1e-8)
