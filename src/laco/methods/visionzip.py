"""VisionZip (arXiv 2412.04467): the tokens that CLS looks at, and a few that gather the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from laco.errors import LacoError
from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class VisionZip(Selector):
    """Dominant tokens as they are, the CLS token among them; of the rest every few one, with the mean of its like
    added.

    Args:
        keep: dominant and contextual tokens together; a CLS token comes on top.
        contextual: share of them that gathers the rest (the paper's 54 + 10, 108 + 20, 162 + 30).

    A contextual token is itself plus the mean of what joins it, as in the reference, so its weights sum to 2.
    """

    name: ClassVar[str] = "visionzip"
    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary in VLMs, CVPR 2025, arXiv 2412.04467"
    confirmed: ClassVar[str] = (
        "CLS attention summed over heads, mean keys as metric, evenly spaced targets, merging, order"
    )
    assumed: ClassVar[str] = "attention received where there is no CLS; share of contextual tokens 10 / 64"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "keys", "cls_attention"})
    applies_to: ClassVar = "features"
    equivariant: ClassVar[bool] = False

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise LacoError(f"visionzip: contextual is a share in 0 .. 1; got {self.contextual}")

    def left(self, tokens: int, prefix: int = 0, frames: int = 1) -> int:
        return min(self.budget(tokens) + prefix, tokens)

    def plan(self, signals: Signals) -> Plan:
        assert signals.keys is not None
        count = self.budget(signals.grid.tokens)
        return self.zip(signals, count - (gathering := round(count * self.contextual)), gathering)

    def zip(self, signals: Signals, dominant: int, contextual: int) -> Plan:
        """The plan for so many dominant (without CLS) and contextual tokens."""
        assert signals.keys is not None
        prefix, total = signals.prefix, len(signals.keys)
        saliency_N = signals.saliency("sum")
        chosen = torch.zeros(total, dtype=torch.bool, device=saliency_N.device)
        chosen[:prefix] = True
        chosen[prefix + saliency_N.argsort(descending=True, stable=True)[:dominant]] = True
        rest = (~chosen).nonzero().flatten()
        targets, group = contextual_groups(cosines(signals.keys.float().mean(dim=1)), rest, contextual)
        kept = torch.cat([chosen.nonzero().flatten(), targets])
        weights = torch.zeros(len(kept), total, device=saliency_N.device)
        weights[torch.arange(len(kept)), kept] = 1
        if len(targets):
            joined = torch.nn.functional.one_hot(group, len(targets)).float()
            joined[torch.isin(rest, targets)] = 0
            weights[-len(targets) :, rest] += (joined / joined.sum(dim=0).clamp(min=1)).T
        return Plan(kept, weights)


def contextual_groups(similarity_NN: torch.Tensor, rest: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` evenly spaced targets of the rest, and for each of the rest the target most like it."""
    if not count or not len(rest):
        return rest[:0], rest[:0]
    targets = rest[:: max(1, len(rest) // count)][:count]
    group = similarity_NN[rest][:, targets].argmax(dim=1)
    is_target = torch.isin(rest, targets)
    group[is_target] = torch.arange(len(targets), device=rest.device)
    return targets, group
