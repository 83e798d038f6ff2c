"""DART (arXiv 2502.11494): a few pivots, and the tokens least like them.

pivots = the tokens with the largest L1 norm of their keys, some visual, some of text
each takes, of the visual tokens that nobody has yet, those with the lowest cosine to it
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.base import MergerModule
from laco.methods.decoder import DecoderMethod, DecoderSignals, highest
from laco.methods.selector import Plan, cosines


@dataclass(frozen=True, kw_only=True)
class DART(DecoderMethod):
    """Duplication, not importance, decides: what is unlike the pivots stays.

    Args:
        visual_pivots, text_pivots: how many; fewer where there are not so many tokens.
        rule: `exact` keeps as many as `keep` says: text pivots come from all text, and each pivot takes its share until
            there are enough (the rule of the AngelSlim port). `authors`: text pivots come from behind the visual
            tokens, and visual pivots stay on top, so that p + (p + t) * floor(keep / (p + t)) remain, mostly more; of a
            budget for all, all remain.

    Pivots take turns from the largest norm on, visual ones first. The L1 norm of rotated keys changes with their
    positions, so a left-padded batch equals each prompt alone only with `position_ids` that leave padding out, as
    `generate` makes them; a plain forward of most models counts it.

    `strict_reference`, of the authors' rule: in the order of a Python set of their places in the sequence, which
    changes the result; and a budget for all is no exception.
    """

    name: ClassVar[str] = "dart"
    title: ClassVar[str] = "DART"
    paper: ClassVar[str] = "Stop Looking for Important Tokens: Duplication Matters More, EMNLP 2025, arXiv 2502.11494"
    confirmed: ClassVar[str] = (
        "norm of keys, pivots, shares, cosine behind the final norm, rules of the authors and a port"
    )
    assumed: ClassVar[str] = "after layer 2 of 32, as a depth; pivots in order of their norms"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "keys"})
    final_norm: ClassVar[bool] = True
    default_depths: ClassVar[tuple[float, ...]] = (2 / 32,)

    keep: int | float | tuple[int | float, ...] = 0.25
    visual_pivots: int = 4
    text_pivots: int = 4
    rule: Literal["exact", "authors"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_pivots < 0 or self.text_pivots < 0 or self.visual_pivots + self.text_pivots == 0:
            raise LacoError("dart needs pivots: visual_pivots and text_pivots are 0 or more, not both 0")

    def left(self, tokens: int, alive: int, stage: int = 0) -> int:
        """How many stay, where there is text enough for all text pivots."""
        wanted = super().left(tokens, alive, stage)
        if self.rule == "exact" or self.takes_all(wanted, alive):
            return wanted
        visual = min(self.visual_pivots, alive)
        return min(visual + (visual + self.text_pivots) * self.share(tokens, visual + self.text_pivots, stage), alive)

    def takes_all(self, wanted: int, alive: int) -> bool:
        return wanted == alive and not (self.strict_reference and self.rule == "authors")

    def share(self, tokens: int, pivots: int, stage: int) -> int:
        """How many each pivot takes by the authors' rule."""
        keep = self.keeps[stage]
        return int((keep * tokens if isinstance(keep, float) else min(keep, tokens)) / pivots) if pivots else 0

    def pivots(self, signals: DecoderSignals) -> tuple[Tensor, Tensor]:
        """(p,) and (t,) places in the sequence of the visual pivots and of those of text, the largest norm first."""
        assert signals.keys is not None
        norm_L = signals.keys.float().abs().sum(dim=(0, 2))
        text = signals.text if self.rule == "exact" else signals.text_behind
        visual = signals.visual
        return (
            visual[highest(norm_L[visual], self.visual_pivots)],
            text[highest(norm_L[text], self.text_pivots)],
        )

    def turns(self, pivots: Tensor) -> Tensor:
        """The pivots in the order in which they take tokens."""
        if not self.strict_reference or self.rule == "exact":
            return pivots
        return torch.tensor(list(set(pivots.tolist())), dtype=torch.long, device=pivots.device)

    def plan(self, signals: DecoderSignals, stage: int, module: MergerModule | None) -> Plan:
        assert signals.hidden is not None
        alive, tokens = len(signals.visual), signals.started_with
        visual, text = self.pivots(signals)
        if not len(visual) + len(text):
            raise LacoError("dart found no pivot: without visual_pivots it needs text")
        count = super().left(tokens, alive, stage)
        if self.takes_all(count, alive):
            return Plan(torch.arange(alive, device=signals.visual.device))
        if self.rule == "exact":
            visual = visual[:count]
            share = ceil((count - len(visual)) / (len(visual) + len(text)))
        else:
            share, count = self.share(tokens, len(visual) + len(text), stage), alive
        pivots = self.turns(torch.cat([visual, text]))
        similarity_PN = cosines(signals.hidden[pivots], signals.hidden[signals.visual])
        kept_N, number = torch.isin(signals.visual, visual), len(visual)
        for similarity_N in similarity_PN:
            taken = min(share, count - number)
            kept_N[highest((-similarity_N).masked_fill(kept_N, -torch.inf), taken)] = True
            number += taken
        return Plan(kept_N.nonzero().flatten())
