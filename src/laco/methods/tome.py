"""ToMe (arXiv 2210.09461): in every layer the r most similar pairs of tokens become one, between attention and MLP.

    A, B = tokens at even, odd positions;    score_a = max_b cos(key_a, key_b);    the r best a join their b
    x'_b = sum s_i x_i / sum s_i,    s'_b = sum s_i,    attention = softmax(q k^T / sqrt(d) + log s)

The size s of a token is the number of original tokens in it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from laco.errors import LacoError
from laco.methods.reducer import LayerSignals, Merge, Reducer, State, at_least_float32, indices
from laco.precision import without_autocast

Order = Literal["split", "score", "index"]


@dataclass(frozen=True, kw_only=True)
class ToMe(Reducer):
    """Bipartite soft matching on the head mean of the keys, with size-weighted means and proportional attention.

    Prefix tokens are never merged; all pictures of a batch lose equally many tokens. In the encoder the tokens
    stand in the order [unmerged A, B], which decides the next layer's halves; they leave it in raster order.

    Args:
        r: tokens to merge in each layer, or a number for each of the first layers. At most half of them are.
        inflection: of a single r: from -1 (twice as many in the first layer, none in the last) over 0 (constant) to 1.
        proportional: attention to a token counts as often as the token has sources.

    `strict_reference`: the schedule with the rounding errors of binary fractions, and, without prefix tokens, the
    unmerged tokens in the order of their scores.
    """

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe token merging"
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461"
    confirmed: ClassVar[str] = (
        "matching, protected CLS and distillation token, weighted mean, order, schedules, log sizes"
    )
    assumed: ClassVar[str] = "r = 16 by default; further prefix tokens protected like CLS; depth postpones the schedule"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    r: int | tuple[int, ...] = 16
    inflection: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.r, list):  # from JSON and YAML
            object.__setattr__(self, "r", tuple(self.r))
        super().__post_init__()
        if min(self.r if isinstance(self.r, tuple) else (self.r,), default=0) < 0:
            raise LacoError(f"tome: r counts tokens to merge, 0 or more; got {self.r}")
        if not -1 <= self.inflection <= 1:
            raise LacoError(f"tome: inflection lies in -1 .. 1; got {self.inflection}")
        if self.inflection and isinstance(self.r, tuple):
            raise LacoError("tome: inflection bends a single r; with a number for each layer leave it 0")

    def schedule(self, num_layers: int, last: int | None = None) -> list[int]:
        """(num_layers) how many tokens each layer is to merge."""
        first = 0 if self.depth is None and self.layer is None else self.points(num_layers, last, ())[0]
        layers = num_layers - first
        if isinstance(self.r, tuple):
            amounts = [*self.r, *[0] * layers][:layers]
        elif layers == 1 or not self.inflection:
            amounts = [self.r] * layers
        else:
            exact = self.r * (1 - self.inflection)
            start = int(exact if self.strict_reference else round(exact, 9))
            rise = 2 * (self.r - start)
            amounts = [start + rise * index // (layers - 1) for index in range(layers)]
            if self.strict_reference:
                amounts = [int(start + rise / (layers - 1) * index) for index in range(layers)]
        return [0] * first + amounts

    def layers(self, num_layers: int, last: int | None = None) -> tuple[int, ...]:
        return tuple(index for index, r in enumerate(self.schedule(num_layers, last)[:last]) if r)

    def left(self, tokens: int, index: int, num_layers: int, last: int | None = None) -> int:
        return tokens - min(self.schedule(num_layers, last)[index], tokens // 2)

    def attention_bias(self, state: State) -> Tensor | None:
        return state.size_BN.log()[:, None, None] if self.proportional and state.merges else None

    def before_mlp(self, x_BNC: Tensor, state: State, index: int, signals: LayerSignals) -> tuple[Tensor, State]:
        amount = self.schedule(state.num_layers, state.last)[index]
        if not amount:
            return x_BNC, state
        self.check(signals)
        assert signals.keys is not None
        order: Order = "score" if self.strict_reference and not state.prefix else "split"
        key_BNd = at_least_float32(signals.keys).sum(dim=1)  # as good as the mean where only angles count
        merge = match(key_BNd, amount, state.prefix, order=order)
        return state.merged(x_BNC, merge)


def match(
    metric_BNd: Tensor, amount: int, prefix: int = 0, penalty_BN: Tensor | None = None, order: Order = "split"
) -> Merge:
    """Bipartite soft matching: of the tokens at even positions, those most similar to one at an odd position join it.

    Args:
        metric_BNd: compared by cosine.
        amount: of tokens to merge, at most half of those that are not prefix.
        prefix: tokens at the beginning that neither join nor are joined.
        penalty_BN: taken from a token's score when the tokens to merge are chosen.
        order: of the result: `split` [prefix, unmerged even, odd], `score` the same with the unmerged in descending
            order of score, `index` as they stood.
    """
    tokens = metric_BNd.shape[1]
    amount = min(amount, (tokens - prefix) // 2)
    if amount <= 0:
        return Merge(tokens, indices(metric_BNd))
    metric_BNd = at_least_float32(metric_BNd.detach())
    # As torch.nn.functional.normalize, whose own steps cost more than these where tokens are few.
    metric_BNd = metric_BNd / vector_norm(metric_BNd, dim=-1, keepdim=True).clamp_min(1e-12)
    with without_autocast(metric_BNd.device):
        score_BAB = metric_BNd[:, ::2].bmm(metric_BNd[:, 1::2].mT)
    if prefix > 1:
        score_BAB[:, :, : prefix // 2] = -torch.inf
    best_BA, partner_BA = score_BAB.max(dim=-1)
    if penalty_BN is not None:
        best_BA = best_BA - penalty_BN.detach()[:, ::2]
    if prefix:
        best_BA[:, : (prefix + 1) // 2] = -torch.inf

    joining_Br, staying_BA = best_BA.argsort(dim=1, descending=True, stable=True).tensor_split([amount], dim=1)
    if order != "score":
        staying_BA = staying_BA.sort(dim=1).values
    odd_BB = torch.arange(1, tokens, 2, device=metric_BNd.device).expand(metric_BNd.shape[0], -1)
    kept_BK = torch.cat([2 * staying_BA, odd_BB], dim=1)
    merge = Merge(tokens, kept_BK, 2 * joining_Br, partner_BA.gather(1, joining_Br) + staying_BA.shape[1])
    if order == "index":
        return merge.ordered(kept_BK.argsort(dim=1))
    if prefix > 1:  # prefix tokens at odd positions go back to the front
        return merge.ordered(torch.where(kept_BK < prefix, kept_BK, prefix).argsort(dim=1, stable=True))
    return merge
