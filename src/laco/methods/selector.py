"""The contract of methods that keep or merge tokens behind the vision encoder: signals in, a plan out.

Shape letters: N visual tokens of one picture or video in raster order, K of them kept, C channels of the encoder, D
of the language model, H attention heads, M tokens of text. Everything here is about one picture or video; what a
batch adds is the business of whoever calls.
"""

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods.base import MergerModule, Method, Place
from laco.precision import without_autocast

Positions = Literal["keep", "renumber", "representative"]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a selector may look at. A method's `needs` are the names of the fields that must be given.

    Args:
        grid: frames x height x width of the tokens; N = their product.
        tokens: (N, D), what the language model would read: behind the projector.
        features: (prefix + N, C), what the projector reads, prefix tokens (CLS) first.
        keys: (prefix + N, H, d), keys of the encoder layer that puts out `features`.
        queries: the same of its queries.
        cls_attention: (H, N), softmax attention of the CLS query to the patches in that layer.
        received: (N,), attention that each token receives in that layer, mean over heads and queries. Of encoders
            without CLS it stands in for `cls_attention` (the substitute that VisionZip, HoloV and others use there).
        text: (M, D), input embeddings of the question's tokens.
        text_attention: (H, M, N), softmax attention of the text behind the visual tokens to each of them, in a layer
            of a language model; of `FlexSelect`, each group of frames in a pass of its own.
        clip_tokens, clip_text: (N, c) and (S, c), patches and text in the joint space of a CLIP model.
    """

    grid: Grid
    tokens: Tensor | None = None
    features: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    cls_attention: Tensor | None = None
    received: Tensor | None = None
    text: Tensor | None = None
    text_attention: Tensor | None = None
    clip_tokens: Tensor | None = None
    clip_text: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the signals are, for methods that look at none of them."""
        given = (getattr(self, field.name) for field in fields(self))
        return next((value.device for value in given if isinstance(value, Tensor)), torch.device("cpu"))

    @property
    def prefix(self) -> int:
        """Prefix tokens in `features`, `keys` and `queries`."""
        for rows in (self.features, self.keys):
            if rows is not None:
                return len(rows) - self.grid.tokens
        return 0

    def saliency(self, heads: Literal["sum", "mean"]) -> Tensor:
        """(N,) attention of CLS summed or averaged over heads; of encoders without CLS, attention received."""
        if self.cls_attention is not None:
            return self.cls_attention.float().sum(0) if heads == "sum" else self.cls_attention.float().mean(0)
        assert self.received is not None, "checked by Selector.__call__"
        return self.received.float()


@dataclass(frozen=True)
class Plan:
    """Which tokens remain: out = W x, in the order of `kept`.

    Args:
        kept: (K,) indices of the tokens that stay, or of those that stand for what was merged into them. In the order
            in which the method, as published, hands them on. A model puts each at its place in the picture, so its
            language model reads them in raster order.
        weights: (K, N) merging weights W; None = the tokens as they are.
    """

    kept: Tensor
    weights: Tensor | None = None

    def __call__(self, x_NC: Tensor) -> Tensor:
        """(N, C) -> (K, C), in the dtype of the tokens."""
        if self.weights is None:
            return x_NC[self.kept]
        exact = torch.promote_types(x_NC.dtype, self.weights.dtype)
        with without_autocast(x_NC.device):
            return (self.weights.to(exact) @ x_NC.to(exact)).to(x_NC.dtype)


@dataclass(frozen=True, kw_only=True)
class Selector(Method):
    """A method between vision encoder and language model: it keeps or merges tokens of one picture or video.

    Subclasses give `plan`; those that are `trained` also `build` and `plan_with`. Class data `applies_to`: the plan's
    rows are `tokens` (behind the projector) or `features` (before it; the projector then reads what remains).

    Args:
        keep: the budget: so many tokens, or such a fraction of them.
        positions: `keep` leaves every token the position that it had in the full sequence, `renumber` counts anew;
            `representative` gives a merged token that of the token that stands for it, as `keep` does, too. Rotary
            language models lose grounding when positions move (arXiv 2506.21873), so `keep` is the default also where
            the reference counts anew.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"external"})
    trained: ClassVar[bool] = False
    has_depth: ClassVar[bool] = False
    applies_to: ClassVar[Literal["tokens", "features"]] = "tokens"
    # Whose queries and keys the method sees: the encoder layer's that the language model reads, or those of the last.
    looks_at: ClassVar[Literal["read", "last"]] = "read"
    # Tokens in another order give the same choice: nothing depends on where in the sequence a token stands.
    equivariant: ClassVar[bool] = True
    # A still picture would stay as it is, so models refuse one.
    video_only: ClassVar[bool] = False

    keep: int | float = 0.25
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep > 0 or (isinstance(self.keep, float) and self.keep > 1):  # NaN is not above 0
            raise LacoError(
                f"{self.name}: keep is a count of visual tokens, 1 or more, or a fraction in (0, 1]; got {self.keep}"
            )

    @staticmethod
    def rounding(count: float) -> int:
        """How the reference makes a count of a fraction of the tokens."""
        return round(count)

    def budget(self, tokens: int) -> int:
        """How many of so many visual tokens stay."""
        if isinstance(self.keep, float):
            return min(max(self.rounding(self.keep * tokens), 1), tokens)
        if self.keep > tokens:
            raise LacoError(f"{self.name} cannot keep {self.keep} of {tokens} visual tokens")
        return self.keep

    def left(self, tokens: int, prefix: int = 0, frames: int = 1) -> int:
        """How many tokens the language model reads, of so many visual ones in these frames and an encoder's prefix
        tokens.
        """
        return self.budget(tokens)

    def build(self, width: int) -> MergerModule | None:
        """What is trained, for rows of `width` channels (see `applies_to`); handed to `__call__`. None: nothing is."""
        return None

    @torch.compiler.disable  # what comes next depends on what was chosen: nothing there is to be compiled
    def __call__(self, signals: Signals, module: MergerModule | None = None) -> Plan:
        """The plan for one picture or video.

        Args:
            signals: what the method looks at.
            module: what `build` gave; without it a trained method does what it does before any training.

        Raises:
            LacoError: a signal is missing that the method needs, or the module is of another method.
        """
        for name in sorted(self.needs):
            given = getattr(signals, name, None)
            if name == "cls_attention" and given is None:
                given = signals.received
            if given is None:
                raise LacoError(f"{self.name} needs {name}, which is not there")
        with torch.no_grad():
            if module is not None:
                return self.plan_with(signals, module)
            with without_autocast(signals.device):
                return self.plan(signals)

    @abstractmethod
    def plan(self, signals: Signals) -> Plan:
        """What `__call__` gives without a module, all of `needs` being there."""

    def plan_with(self, signals: Signals, module: MergerModule) -> Plan:
        """What `__call__` gives with a module."""
        raise LacoError(f"{self.name} takes no module: nothing of it is trained")


def cosines(x_NC: Tensor, y_MC: Tensor | None = None) -> Tensor:
    """(N, M) cosines in float32; of the tokens with one another without `y`. Zero vectors are similar to none."""
    x = torch.nn.functional.normalize(x_NC.float(), dim=-1)
    with without_autocast(x.device):
        return x @ (x if y_MC is None else torch.nn.functional.normalize(y_MC.float(), dim=-1)).T
