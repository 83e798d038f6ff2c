"""EViT (arXiv 2202.07800): tokens that CLS does not look at are dropped or fused into one, between attention and MLP.

    a_i = mean over heads of the attention of CLS to token i,    fused = sum a_i x_i

Kept are the ceil(keep * N) tokens with the largest a_i, fused are the others.
"""

from dataclasses import dataclass
from math import ceil, cos, pi
from typing import ClassVar

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.reducer import LayerSignals, Merge, Reducer, State, at_least_float32, indices, take


@dataclass(frozen=True, kw_only=True)
class EViT(Reducer):
    """Keeps the most attended tokens at a few layers, by default after 1/4, 1/2 and 3/4 of them.

    In the encoder the kept tokens stand in descending order of attention; they leave it in raster order. The fused
    token is an ordinary token from then on; it has the place of the most attended of those in it.

    Args:
        keep: fraction of the visual tokens that stays at each of these layers.
        fuse: the others become one token, the sum of them weighted by attention (not normalised), the last one.

    `strict_reference`: a product like 0.55 * 100, which is slightly more than 55 in binary fractions, is rounded up.
    """

    name: ClassVar[str] = "evit"
    title: ClassVar[str] = "EViT token reorganisation"
    paper: ClassVar[str] = "Not All Patches are What You Need: EViT, ICLR 2022, arXiv 2202.07800"
    confirmed: ClassVar[str] = "layers 3, 6, 9 of 12, score, count, order, fused token, training schedule of keep"
    assumed: ClassVar[str] = "attention received where there is no CLS; the same relative depths in other encoders"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    keep: float = 0.7
    fuse: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise LacoError(f"evit: keep is a fraction of the visual tokens in (0, 1]; got {self.keep}")

    @property
    def drops(self) -> bool:
        return not self.fuse and self.keep < 1

    def layers(self, num_layers: int, last: int | None = None) -> tuple[int, ...]:
        return self.points(num_layers, last, (1 / 4, 1 / 2, 3 / 4))

    def kept(self, tokens: int) -> int:
        """Of so many visual tokens, how many stay as they are."""
        return ceil(self.keep * tokens if self.strict_reference else round(self.keep * tokens, 9))

    def left(self, tokens: int, index: int = 0, num_layers: int = 0, last: int | None = None) -> int:
        kept = self.kept(tokens)
        return kept + (self.fuse and kept < tokens)

    def before_mlp(self, x_BNC: Tensor, state: State, index: int, signals: LayerSignals) -> tuple[Tensor, State]:
        if not self.reduces(state, index):
            return x_BNC, state
        self.check(signals)
        assert signals.saliency_BN is not None
        prefix, tokens = state.prefix, x_BNC.shape[1]
        kept, attention_BN = self.kept(tokens - prefix), signals.saliency_BN
        if kept == tokens - prefix:
            return x_BNC, state
        ranked_BN = prefix + attention_BN[:, prefix:].argsort(dim=1, descending=True, stable=True)
        kept_BK = torch.cat([indices(x_BNC)[:, :prefix], ranked_BN[:, :kept]], dim=1)
        y_BKC = take(x_BNC, kept_BK)
        if not self.fuse:
            return y_BKC, state.after(Merge(tokens, kept_BK))
        rest_BR = ranked_BN[:, kept:]
        weighted_BRC = at_least_float32(take(x_BNC, rest_BR)) * take(attention_BN, rest_BR)[..., None]
        fused_B1C = weighted_BRC.sum(dim=1, keepdim=True).to(x_BNC.dtype)
        first_B1, further_BR = rest_BR.tensor_split([1], dim=1)
        kept_BK = torch.cat([kept_BK, first_B1], dim=1)
        merge = Merge(tokens, kept_BK, further_BR, torch.full_like(further_BR, kept_BK.shape[1] - 1))
        return torch.cat([y_BKC, fused_B1C], dim=1), state.after(merge)


def keep_rate(step: int, steps_per_epoch: int, keep: float, first_epoch: int = 10, last_epoch: int = 110) -> float:
    """The keep rate in training: 1, from `first_epoch` to `last_epoch` down to `keep` along a cosine, then `keep`."""
    done = (step - first_epoch * steps_per_epoch) / max((last_epoch - first_epoch) * steps_per_epoch, 1)
    return keep + (1 - keep) * (1 + cos(pi * min(max(done, 0), 1))) / 2
