"""Explainability-driven compression (arXiv 2506.01097): a small convolution foresees which tokens explain the answer.

a = attention of the question to the visual tokens in the first layer of the language model
r~ = softmax(f(a)),    f = five layers of convolution along the sequence
R <- (I + mean_h max(0, A_l * dy/dA_l)) R    over all layers l, from R = I, for each token of the answer and its logit y
r = mean over these of the row of R at the place that put the token out, its visual part
r* = r, its lower half set to 0, divided by its sum,    loss = KL(r* || r~)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods.base import MergerModule
from laco.methods.decoder import highest
from laco.methods.question import QuestionSelector
from laco.methods.selector import Plan, Signals

CHANNELS = (32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Explainability(QuestionSelector):
    """Only embeddings and the attention of one layer are needed before the choice; the prefill is then a short one.

    `text_attention` is that of the question's tokens in the layer at `scoring_depth`. What the paper explains with the
    whole model, `relevance` and `label` compute, once, for answers that are right; `relevance_loss` trains `build`'s
    module on them (Adam, batch 128, about 100 epochs, 10k pictures; learning rate 1e-3 assumed). Before any training
    the module passes the attention on, so the tokens with most attention are kept.

    Args:
        keep: fraction rho or count; of a fraction floor(rho N) tokens.
        kernel: width of the convolutions, odd.
    """

    name: ClassVar[str] = "explainability"
    title: ClassVar[str] = "explainability-driven compression"
    paper: ClassVar[str] = (
        "Generic/Task-Related Token Compression in MLLMs from the Perspective of Explainability, ICLR 2026,"
        " arXiv 2506.01097"
    )
    confirmed: ClassVar[str] = "labels, channels of the convolution, loss, place, order (from notes on the paper)"
    assumed: ClassVar[str] = (
        "gradients of logits; attention averaged over heads and the question's tokens, relative to its mean; kernel 5,"
        " same padding, ReLU, no norm; passing the attention on before training; positions kept"
    )
    trained: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False
    learns_from: ClassVar[str] = "relevance"

    keep: int | float = 0.5
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise LacoError(f"explainability: kernel is an odd number, 1 or more; got {self.kernel}")

    @staticmethod
    def rounding(count: float) -> int:
        return int(count)

    def build(self, width: int | None = None) -> "RelevancePredictor":
        """The convolution; it reads attention, so no width matters."""
        return RelevancePredictor(self.kernel)

    def attention(self, signals: Signals) -> Tensor:
        """(N,) what the module reads: float32, with mean 1 whatever the picture's size and the text around it."""
        assert signals.text_attention is not None
        attention_N = signals.text_attention.float().flatten(0, 1).mean(dim=0)
        return attention_N / attention_N.mean().clamp(min=torch.finfo(torch.float).tiny)

    def plan(self, signals: Signals) -> Plan:
        return self.best(self.attention(signals))

    def plan_with(self, signals: Signals, module: MergerModule) -> Plan:
        if not isinstance(module, RelevancePredictor):
            raise LacoError("explainability needs the module that its build gives")
        return self.best(module(self.attention(signals)))

    def loss(self, signals: Signals, module: MergerModule | None, target: Tensor) -> Tensor:
        """`relevance_loss` of one picture, `target` being the (T, N) relevance of its tokens to each token of a right
        answer.
        """
        if not isinstance(module, RelevancePredictor):
            raise LacoError("explainability needs the module that its build gives")
        return relevance_loss(module(self.attention(signals)), label(target))

    def best(self, score_N: Tensor) -> Plan:
        return Plan(highest(score_N, self.budget(len(score_N))).sort().values)


class RelevancePredictor(MergerModule):
    """(..., N) attention in raster order -> (..., N) logits of relevance; N may differ from call to call."""

    def __init__(self, kernel: int = 5) -> None:
        super().__init__()
        widths = zip((1, *CHANNELS), CHANNELS, strict=False)
        self.layers = nn.Sequential(*(SeparableConv(*pair, kernel) for pair in widths))
        self.outward = nn.Conv1d(CHANNELS[-1], 1, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first channel of every layer hands on its input, and the result is that channel: the attention, exactly
        (but for rounding in models of less than float32).

        All others begin at random (He et al.: nothing else keeps their size over ten convolutions without norms), so
        that they are there when training wants them.
        """
        for part in self.modules():
            if isinstance(part, nn.Conv1d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu" if part.groups == 1 else "linear")
                if part is self.outward:
                    nn.init.zeros_(part.weight)
                with torch.no_grad():
                    hand_on(part)

    def forward(self, attention: Tensor) -> Tensor:
        x_B1N = attention.to(self.outward.weight.dtype).reshape(-1, 1, attention.shape[-1])
        return self.outward(self.layers(x_B1N)).view(attention.shape)


class SeparableConv(nn.Module):
    """(B, C, N) -> (B, C', N): along the sequence in every channel, then across channels; ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.along = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.across = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x_BCN: Tensor) -> Tensor:
        return self.across(self.along(x_BCN)).relu()


def hand_on(conv: nn.Conv1d) -> None:
    """Makes the first channel that a convolution puts out the first that it reads."""
    conv.weight[0] = 0
    conv.weight[0, 0, conv.kernel_size[0] // 2] = 1
    if conv.bias is not None:
        conv.bias.zero_()


def relevance(logit: Tensor, attentions: Sequence[Tensor], row: int = -1) -> Tensor:
    """How much every token of the sequence explains one token of the answer.

    Of R only one row is wanted, so a vector goes from the last layer back to the first, and no (L, L) product is made.
    Several tokens of one answer need one forward pass over prompt and answer together: a causal model's logits at one
    place do not depend on attention at later ones.

    Args:
        logit: scalar, of the answer's token, from a forward pass with gradients.
        attentions: softmax attention of every layer, first layer first: (H, L, L), or (1, H, L, L) as
            transformers gives it. The very tensors that the logit was computed from.
        row: the place in the sequence at which the logit was put out.

    Returns:
        (L,) not negative; 1 at `row` where no gradient is positive. The graph is kept for further calls.
    """
    gradients = torch.autograd.grad(logit, attentions, retain_graph=True)
    row_L = torch.zeros(attentions[0].shape[-1], device=logit.device)
    row_L[row] = 1
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        positive_HLL = (attention.detach() * gradient).float().clamp(min=0).flatten(end_dim=-3)
        row_L = row_L + row_L @ positive_HLL.mean(dim=0)
    return row_L


def label(relevance_TN: Tensor) -> Tensor:
    """(T, N) relevance of the visual tokens to each token of a right answer -> (N,) what the module shall foresee.

    Raises:
        LacoError: no token has any relevance, so the sample teaches nothing.
    """
    mean_N = relevance_TN.float().mean(dim=0)
    upper = highest(mean_N, len(mean_N) - len(mean_N) // 2)
    label_N = torch.zeros_like(mean_N).index_copy(0, upper, mean_N[upper])
    if not (total := label_N.sum()) > 0:
        raise LacoError("explainability: no visual token explains this answer, which gives no label; leave it out")
    return label_N / total


def relevance_loss(logits: Tensor, label: Tensor) -> Tensor:
    """KL(label || softmax(logits)) of (..., N) both, a mean over pictures; 0 where they agree."""
    return F.kl_div(logits.float().log_softmax(dim=-1), label, reduction="none").sum(dim=-1).mean()
