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

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        assert signals.text is not None
        if self.relevance == "text":
            relevance_N = cosines(signals.tokens, signals.text).mean(dim=1)
        elif signals.clip_tokens is None or signals.clip_text is None:
            raise LacoError('cdpruner: relevance="clip" needs clip_tokens and clip_text, which are not there')
        else:
            relevance_N = -cosines(signals.clip_tokens, signals.clip_text).mean(dim=1)
        kernel = conditional_kernel(signals.tokens, scaled(relevance_N))
        return Plan(determinantal(kernel, self.budget(signals.grid.tokens)).sort().values)


def scaled(relevance: Tensor) -> Tensor:
    """To (0, 1] over the whole tensor; all equal gives all ones."""
    low, high = relevance.min(), relevance.max()
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


def conditional_kernel(tokens_ND: Tensor, relevance_N: Tensor) -> Product:
    """(N, N) products of relevances with cosines: those of unit vectors, each times its relevance."""
    return gram(relevance_N[:, None] * normalize(tokens_ND.float(), dim=-1))
