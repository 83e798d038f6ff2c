"""FOLDER (arXiv 2501.02430): most tokens are merged at once, in the last layer that the language model reads.

    score_a = max_b cos(key_a, key_b) - 100 alpha * (attention of CLS to a),    A, B = tokens at even, odd positions

One matching can merge half of the tokens at most, so it is repeated ("folded") until as few remain as are wanted.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.reducer import LayerSignals, Merge, Reducer, State, at_least_float32, indices
from laco.methods.tome import Order, match


@dataclass(frozen=True, kw_only=True)
class Folder(Reducer):
    """Bipartite matching that spares what CLS looks at, repeated, with one size-weighted mean at the end.

    Args:
        keep: so many visual tokens remain, or such a fraction of them. The paper removes r tokens for each of L
            layers: of 576 tokens with L = 24, r = 16 keeps 1/3 and r = 18 keeps 1/4.
        alpha: weight of the attention.
        form: `block`, in the last layer between attention and MLP, by keys (the authors' LLaVA); `features`, behind
            the last layer, by the features themselves, without attention and with the factor of `log_size` (their
            simplified form).
        log_size: in the form `features`, multiplies every token by 1 + log(number of its sources).
        minimum: in the form `block`, fewer visual tokens than that are left as they are.

    `strict_reference`: the factor of `log_size` is left out if a single matching was enough and merged so many
    tokens that they are no fewer than half of those that remain.
    """

    name: ClassVar[str] = "folder"
    title: ClassVar[str] = "FOLDER token merging"
    paper: ClassVar[str] = "FOLDER: Accelerating MLLMs with Enhanced Performance, ICCV 2025, arXiv 2501.02430"
    confirmed: ClassVar[str] = (
        "place, score with penalty, folding, means of features, keys and attention, order, log size"
    )
    assumed: ClassVar[str] = (
        "budget as a fraction; attention received where there is no CLS; few tokens, CLS not counted, left alone"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "cls_attention"})  # of the form `block`

    keep: int | float = 1 / 3
    alpha: float = 5.0
    form: Literal["block", "features"] = "block"
    log_size: bool = True
    minimum: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep > 0 or (isinstance(self.keep, float) and self.keep > 1):
            raise LacoError(
                f"folder: keep is a count of visual tokens, 1 or more, or a fraction in (0, 1]; got {self.keep}"
            )
        if not self.alpha >= 0:  # NaN is not either
            raise LacoError(f"folder: alpha is a weight, 0 or more; got {self.alpha}")
        if self.form == "features" and (self.depth, self.layer) != (None, None):
            raise LacoError("folder: the form features merges behind the last layer; it takes neither depth nor layer")

    def layers(self, num_layers: int, last: int | None = None) -> tuple[int, ...]:
        if self.form == "features":
            return ()
        if self.depth is None and self.layer is None:
            return ((num_layers if last is None else last) - 1,)
        return self.points(num_layers, last, ())

    def budget(self, tokens: int) -> int:
        if isinstance(self.keep, float):
            return max(round(self.keep * tokens), 1)
        if self.keep > tokens:
            raise LacoError(f"folder cannot keep {self.keep} of {tokens} visual tokens")
        return self.keep

    def left(self, tokens: int, index: int = 0, num_layers: int = 0, last: int | None = None) -> int:
        return tokens if tokens < self.minimum and self.form == "block" else self.budget(tokens)

    def num_tokens(self, tokens: int, num_layers: int, last: int | None = None) -> int:
        return self.left(tokens) if self.form == "features" else super().num_tokens(tokens, num_layers, last)

    def before_mlp(self, x_BNC: Tensor, state: State, index: int, signals: LayerSignals) -> tuple[Tensor, State]:
        if not self.reduces(state, index):
            return x_BNC, state
        self.check(signals)
        assert signals.keys is not None
        assert signals.saliency_BN is not None
        tokens = x_BNC.shape[1] - state.prefix
        penalty_BN = 100 * self.alpha * at_least_float32(signals.saliency_BN)
        key_BNd = at_least_float32(signals.keys).mean(dim=1)
        return state.merged(x_BNC, fold(key_BNd, tokens - self.left(tokens), state, penalty_BN))

    def after_layers(self, x_BNC: Tensor, state: State) -> tuple[Tensor, State]:
        if self.form == "block":
            return super().after_layers(x_BNC, state)
        tokens = x_BNC.shape[1]
        amount = tokens - state.prefix - self.left(tokens - state.prefix)
        x_BNC, state = state.merged(x_BNC, fold(at_least_float32(x_BNC), amount, state, order="index"))
        once = amount if amount <= most(tokens, state.prefix) else 0
        if self.log_size and (not self.strict_reference or once < x_BNC.shape[1] // 2):
            x_BNC = (x_BNC * (1 + state.size_BN.log()[..., None])).to(x_BNC.dtype)
        return x_BNC, state


def most(tokens: int, prefix: int) -> int:
    """How many tokens one matching merges at most; one of two where that is all there is."""
    return max((tokens - max(prefix, 1)) // 2, int(tokens - prefix > 1))


@torch.no_grad()
def fold(
    metric_BNd: Tensor, amount: int, state: State, penalty_BN: Tensor | None = None, order: Order = "split"
) -> Merge:
    """As many matchings as it takes to merge `amount` tokens.

    Between two of them the metric is averaged by size, the penalty over the tokens that met, whatever their size.
    """
    size_BN = state.size_BN
    total = Merge(metric_BNd.shape[1], indices(metric_BNd))
    while amount > 0:
        step = min(amount, most(metric_BNd.shape[1], state.prefix))
        merge = match(metric_BNd, step, state.prefix, penalty_BN, order)
        metric_BNd = merge.mean(metric_BNd, size_BN)
        if penalty_BN is not None:
            penalty_BN = merge.mean(penalty_BN, torch.ones_like(size_BN))
        size_BN = merge.sum(size_BN)
        total, amount = total.then(merge), amount - step
    return total
