"""CDPruner (arXiv 2506.10967): diverse tokens that matter to the question, by a conditional determinantal point
process.

L_ij = r_i cos(x_i, x_j) r_j,    r = relevance to the question, scaled to (0, 1]
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.greedy import Product, determinantal, gram
from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class CDPruner(Selector):
    """Greedy MAP of a DPP over the tokens, conditioned on the question.

    Args:
        relevance: `text` compares the question's input embeddings with the tokens (the rule of the OpenVINO port, for
            models without a CLIP text encoder); `clip` takes the *negated* similarity in CLIP's joint space, as the
            authors do for LLaVA 1.5.
        theta: sharpens or flattens relevance to exp(theta r / (2 - 2 theta)), as the OpenVINO port has it with 0.5;
            None = r itself, as in the authors' code.

    The reference scales relevance over all crops and pictures of a batch together; here every picture has its own
    scale, so that a batch changes nothing (`scaled` of a whole (B, N) tensor is the reference's).
    """

    name: ClassVar[str] = "cdpruner"
    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity, NeurIPS 2025, arXiv 2506.10967"
    )
    confirmed: ClassVar[str] = "kernel, negated CLIP relevance and its scaling, greedy MAP, spatial order"
    assumed: ClassVar[str] = "text relevance (OpenVINO's) where there is no CLIP text encoder; scaled per picture"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "text"})

    relevance: Literal["text", "clip"] = "text"
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise LacoError(f"cdpruner: theta lies in 0 .. 1, below 1; got {self.theta}")
        if self.relevance == "clip":
            object.__setattr__(self, "needs", frozenset({"tokens", "clip_tokens", "clip_text"}))

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        if self.relevance == "text":
            assert signals.text is not None
            relevance_N = scaled(cosines(signals.tokens, signals.text).mean(dim=1))
        else:
            assert signals.clip_tokens is not None
            assert signals.clip_text is not None
            relevance_N = scaled(-cosines(signals.clip_tokens, signals.clip_text).mean(dim=1))
        if self.theta is not None:
            # Divided by its largest, which decides nothing, and in float64: exp(1 / (1 - theta)) is soon too much.
            exponent_N = self.theta / (2 - 2 * self.theta) * relevance_N.double()
            relevance_N = (exponent_N - exponent_N.max()).clamp(min=-300).exp()
        kernel = conditional_kernel(signals.tokens, relevance_N)
        return Plan(determinantal(kernel, self.budget(signals.grid.tokens)).sort().values)


def scaled(relevance: Tensor) -> Tensor:
    """To (0, 1] over the whole tensor; all equal gives all ones."""
    low, high = relevance.min(), relevance.max()
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


def conditional_kernel(tokens_ND: Tensor, relevance_N: Tensor) -> Product:
    """(N, N) products of relevances with cosines: those of unit vectors, each times its relevance."""
    return gram(relevance_N[:, None] * normalize(tokens_ND.float(), dim=-1))
