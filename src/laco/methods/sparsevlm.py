"""SparseVLM (arXiv 2410.04417): words that the picture is about rate the visual tokens; those dropped are recycled.

raters = { j : m_j > mean m },    m_j = mean over visual tokens i of softmax_j(v_i . t_j),    at the model's input
score = mean over heads and raters of their attention, in the layer that has just run
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.base import MergerModule
from laco.methods.decoder import DecoderMethod, DecoderSignals, highest
from laco.methods.dpc_knn import averaging, density_peaks
from laco.methods.selector import Plan
from laco.precision import without_autocast

# The authors' numbers of tokens for a picture of 576, by the mean over all layers, where a layer whose output is pruned
# counts as pruned.
BUDGETS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PLUS_BUDGETS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderMethod):
    """Keeps the tokens that the raters attend to; a third of the others are clustered, and the means stand behind them.

    Args:
        keep: kept after each point; in version 1, clusters come on top. If left out, the authors' numbers for a mean of
            192 of 576 tokens, by version; `as_settings` has their other ones.
        version: `1` recycles what is dropped. `plus` does not; instead it divides attention by what rotary embedding
            alone gives to two tokens at such a distance, and takes only some heads.
        heads: that `plus` takes, as count or fraction: those whose raters look most at visual tokens.

    A merged token stands where the centre of its cluster stood. What `plus` divides by shrinks with distance and may
    become negative (heads of 128 channels and base 1e4: from 1707 on): it stays above a tenth of its largest value,
    which is out of reach up to a distance of about 700.

    `strict_reference`: no such bound; at least one token is always dropped; centres as `density_peaks` says.
    """

    name: ClassVar[str] = "sparsevlm"
    title: ClassVar[str] = "SparseVLM and SparseVLM+"
    paper: ClassVar[str] = "SparseVLM: Visual Token Sparsification for Efficient VLM Inference, ICML 2025, 2410.04417"
    confirmed: ClassVar[str] = (
        "after layers 3, 7, 16 of 32, raters, score, recycling, rotary correction, 14 of 32 heads"
    )
    assumed: ClassVar[str] = (
        "the same relative depths and shares in other models; positions kept (version 1 renumbers); no noise"
        " in densities; all words rate where none stands out"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "memory"})
    default_depths: ClassVar[tuple[float, ...]] = (3 / 32, 7 / 32, 16 / 32)

    keep: int | float | tuple[int | float, ...] | None = None  # type: ignore[assignment]
    version: Literal["1", "plus"] = "1"
    heads: int | float = 14 / 32

    def __post_init__(self) -> None:
        if self.keep is None:
            object.__setattr__(self, "keep", as_settings(192, self.version)["keep"])
        super().__post_init__()
        if self.heads <= 0 or (isinstance(self.heads, float) and self.heads > 1):
            raise LacoError(f"sparsevlm: heads is a count, 1 or more, or a fraction in (0, 1]; got {self.heads}")

    def rounded(self, tokens: float) -> int:
        return round(tokens)

    def kept(self, tokens: int, alive: int, stage: int = 0) -> int:
        """Of so many visual tokens, how many stay as they are."""
        count = super().left(tokens, alive, stage)
        return min(count, alive - 1) if self.strict_reference else count

    def left(self, tokens: int, alive: int, stage: int = 0) -> int:
        kept = self.kept(tokens, alive, stage)
        return kept + (recycling(alive - kept)[1] if self.version == "1" else 0)

    def start(self, signals: DecoderSignals) -> Tensor:
        """(R,) the raters, as numbers among the tokens of text behind the visual ones."""
        text = signals.text_behind
        if signals.embeddings is None or not len(text):
            raise LacoError("sparsevlm needs embeddings and, behind the visual tokens, text: words that rate them")
        v_ND, t_TD = signals.embeddings[signals.visual].float(), signals.embeddings[text].float()
        with torch.no_grad(), without_autocast(text.device):
            mean_T = (v_ND @ t_TD.T).softmax(dim=1).mean(dim=0)
        above_T = mean_T > mean_T.mean()
        return (above_T if above_T.any() else torch.ones_like(above_T)).nonzero().flatten()

    def queries(self, signals: DecoderSignals) -> Tensor:
        return signals.text_behind[signals.memory]

    def score(self, signals: DecoderSignals) -> Tensor:
        if self.version == "1":
            return signals.attended
        if signals.attention is None or signals.rotary is None:
            raise LacoError('sparsevlm: version="plus" needs attention and rotary, which are not there')
        gravity_RN = gravity(signals.rotary, self.queries(signals), signals.visual)
        if not self.strict_reference:
            gravity_RN = gravity_RN.clamp(min=signals.rotary[0].shape[-1] ** 0.5 / 10)
        attention_HRN = signals.attention[..., signals.visual].float() / gravity_RN
        count = self.heads if isinstance(self.heads, int) else max(round(self.heads * len(attention_HRN)), 1)
        return attention_HRN[highest(attention_HRN.sum(dim=(1, 2)), count)].mean(dim=0).mean(dim=0)

    def plan(self, signals: DecoderSignals, stage: int, module: MergerModule | None) -> Plan:
        alive = len(signals.visual)
        ranked = self.score(signals).argsort(descending=True, stable=True)
        count = self.kept(signals.started_with, alive, stage)
        kept, dropped = ranked[:count].sort().values, ranked[count:]
        if self.version == "plus" or not len(dropped):
            return Plan(kept)
        if signals.hidden is None:
            raise LacoError("sparsevlm needs hidden, which is not there, to cluster what it recycles")
        taken, clusters = recycling(len(dropped))
        recycled = dropped[:taken]
        centres, joined = density_peaks(
            signals.hidden[signals.visual[recycled]], clusters, clusters, self.strict_reference
        )
        weights = torch.zeros(count + clusters, alive, device=kept.device)
        weights[torch.arange(count), kept] = 1
        weights[count:, recycled] = averaging(joined, clusters)
        return Plan(torch.cat([kept, recycled[centres]]), weights)


def recycling(dropped: int) -> tuple[int, int]:
    """Of so many dropped tokens, how many are recycled, and into how many clusters."""
    taken = int(0.3 * dropped) + 1 if dropped else 0
    return taken, taken // 10 + 1 if dropped else 0


def gravity(rotary: tuple[Tensor, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """(M, N) logits of attention that rotary embedding gives to vectors of ones: what distance alone contributes."""
    cos, sin = (table.float() for table in rotary)
    half = cos.shape[-1] // 2
    ones = cos + torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return ones[rows] @ ones[columns].T * cos.shape[-1] ** -0.5


def as_settings(budget: int, version: Literal["1", "plus"] = "1") -> dict[str, Any]:
    """The authors' settings for a mean of 192, 128, 96 or 64 of 576 tokens over all layers."""
    budgets = BUDGETS if version == "1" else PLUS_BUDGETS
    if budget not in budgets:
        raise LacoError(f"sparsevlm has budgets for {', '.join(map(str, budgets))} tokens; got {budget}")
    return {"keep": tuple(count / 576 for count in budgets[budget]), "version": version}
