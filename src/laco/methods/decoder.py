"""The contract of methods that drop or merge visual tokens between the layers of the language model, while the prompt
is read.

After some of its layers, at each of the method's `points`, a method gets the `DecoderSignals` of one sample and gives a
`Plan` over the visual tokens that are still there. Tokens of text stay. Behind that point the layers, and the cache of
their keys and values, have only what is left; the cache of the layers before keeps everything, unless `rewrites_cache`.

Shape letters: L tokens in the sequence, N of them visual, in its order; K visual tokens afterwards; M queries whose
attention is wanted, D channels, H heads of width d, G heads of keys. One sample, without padding.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods.base import MergerModule, Method, Place
from laco.methods.selector import Plan, Positions
from laco.precision import without_autocast


@dataclass(frozen=True, kw_only=True)
class DecoderSignals:
    """What is known of one sample at a point. A method's `needs` are the names of the fields that must be given.

    Args:
        visual: (N,) where the visual tokens are in the sequence, ascending.
        length: L.
        original: visual tokens before the first layer; N if left out.
        embeddings: (L, D) input embeddings, at the start only.
        hidden: (L, D) hidden states here; behind the final norm if the method's `final_norm` says so.
        attention: (H, M, L) softmax attention of the rows that `queries` names, in the method's `attention_layer`.
        logits: (H, M, L) the same before the softmax.
        keys: (H, L, d) of the last layer that ran, rotated.
        rotary: two (L, d), cosines and sines of the positions.
        answers: (A,) where answers begin, if there are any, for methods that read them.
        maps: hidden states (N, C) of vision encoder layers, one for each of the method's `maps`.
        grids: of the pictures that the visual tokens belong to.
        trailing: tokens at the end that leave with this plan: those which the method itself had put there.
        memory: what the method remembers of the layers before: see `DecoderMethod.start`, `observe` and `after`.
    """

    visual: Tensor
    length: int
    original: int | None = None
    embeddings: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    logits: Tensor | None = None
    keys: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    answers: Tensor | None = None
    maps: tuple[Tensor, ...] | None = None
    grids: tuple[Grid, ...] | None = None
    trailing: int = 0
    memory: Any = None

    @property
    def started_with(self) -> int:
        """Visual tokens before the first layer."""
        return len(self.visual) if self.original is None else self.original

    @property
    def text(self) -> Tensor:
        """(T,) where the text is."""
        every = torch.arange(self.length - self.trailing, device=self.visual.device)
        return every[~torch.isin(every, self.visual)]

    @property
    def text_behind(self) -> Tensor:
        """(M,) where the text behind the last visual token is: the question, and what the template adds."""
        first = int(self.visual[-1]) + 1 if len(self.visual) else 0
        return torch.arange(first, self.length - self.trailing, device=self.visual.device)

    @property
    def attended(self) -> Tensor:
        """(N,) attention that the visual tokens get, mean over heads and queries."""
        assert self.attention is not None, "checked by DecoderMethod.__call__"
        return self.attention[..., self.visual].float().mean(dim=0).mean(dim=0)

    def rows(self, plan: Plan) -> Tensor:
        """(L',) the sequence after a plan: which token of now stands in each place.

        Tokens of text stay where they are between the visual ones. Of a plan in another order than the sequence's, a
        token stands behind all that the plan has before it.
        """
        text, kept = self.text, self.visual[plan.kept]
        order = torch.cat([text, kept.cummax(dim=0).values if len(kept) else kept]).argsort(stable=True)
        return torch.cat([text, kept])[order]

    def visual_after(self, plan: Plan) -> Tensor:
        """(K,) where the visual tokens are in the sequence after a plan."""
        return torch.isin(self.rows(plan), self.visual).nonzero().flatten()

    def apply(self, plan: Plan, x_LD: Tensor) -> Tensor:
        """(L, D) -> (L', D)."""
        y_LD = x_LD[self.rows(plan)]
        if plan.weights is not None:
            y_LD[self.visual_after(plan)] = plan(x_LD[self.visual])
        return y_LD


class Step(NamedTuple):
    """A residual step of a layer: what its module reads, behind the norm, and puts out, before it is added; (L, D)."""

    read: Tensor
    put_out: Tensor


@dataclass(frozen=True, kw_only=True)
class DecoderMethod(Method):
    """Drops or merges visual tokens after one or more layers of the language model.

    Subclasses give `plan`. Class data `default_depths`: after which fraction of
    the layers the paper does so; `attention_layer`: `signals.attention` is that of the `last` layer that ran, or what
    the `next` one would compute, from its own norm, projections and rotary table; `reads_answers`: in training it gets
    the whole dialogue, others the prompt up to the first answer.

    Args:
        keep: visual tokens that stay after each point, as counts or fractions of those at the beginning.
        depths: the points, as fractions of the layers; `depth` or `layer`, where only one is wanted.
        positions: as those of `Selector`: `keep` is the default also where the reference counts anew. With `renumber`
            they are counted anew behind each point; the cache of the layers before keeps the old ones.
        strict_reference: with the quirks of the authors' code, which the class names.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"language_model"})
    trained: ClassVar[bool] = False
    attention_layer: ClassVar[Literal["last", "next"]] = "last"
    final_norm: ClassVar[bool] = False
    rewrites_cache: ClassVar[bool] = False
    reads_answers: ClassVar[bool] = False
    default_depths: ClassVar[tuple[float, ...]]

    keep: int | float | tuple[int | float, ...] = 0.5
    depths: tuple[float, ...] | None = None
    positions: Positions = "keep"
    strict_reference: bool = False

    def __post_init__(self) -> None:
        for name in ("keep", "depths"):  # lists are what JSON and YAML have for tuples
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        super().__post_init__()
        if any(not keep > 0 or (isinstance(keep, float) and keep > 1) for keep in self.keeps):  # NaN is not above 0
            raise LacoError(
                f"{self.name}: keep has counts of visual tokens, 1 or more, or fractions in (0, 1]; got {self.keep}"
            )
        if self.depths is not None and (self.depth is not None or self.layer is not None):
            raise LacoError(f"{self.name}: give depths, or depth or layer for a single point, not both")
        if not self.depths_used or not all(0 < depth < 1 for depth in self.depths_used):
            raise LacoError(
                f"{self.name}: depths lie between 0 and 1, the beginning and the end of the language model;"
                f" got {self.depths_used}"
            )
        if len(self.keeps) != len(self.depths_used):
            raise LacoError(
                f"{self.name}: keep has {len(self.keeps)} values for {len(self.depths_used)} points in the model;"
                " give one for each"
            )

    @property
    def keeps(self) -> tuple[int | float, ...]:
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    @property
    def depths_used(self) -> tuple[float, ...]:
        if self.layer is not None:
            return (0.5,)  # one point; where it is, `points` says
        if self.depth is not None:
            return (self.depth,)
        return self.default_depths if self.depths is None else self.depths

    # What is known before any feature exists.

    def points(self, num_layers: int) -> tuple[int, ...]:
        """After how many layers tokens are dropped; ascending, none twice, all inside the model."""
        points: list[int] = []
        for depth in self.depths_used:
            point = round(depth * num_layers) if self.layer is None else self.layer
            points.append(max(point, points[-1] + 1 if points else 1))
        if points[-1] >= num_layers:
            raise LacoError(
                f"{self.name} drops tokens between layers of the language model: with {num_layers} layers the last"
                f" point can be {num_layers - 1}; got {points[-1]}"
            )
        return tuple(points)

    def count(self, keep: int | float, tokens: int) -> int:
        """How many of so many visual tokens a value of `keep` means."""
        return min(max(self.rounded(keep * tokens), 1), tokens) if isinstance(keep, float) else min(keep, tokens)

    def rounded(self, tokens: float) -> int:
        """How the reference makes a count of a fraction of the tokens."""
        return int(tokens)

    def left(self, tokens: int, alive: int, stage: int = 0) -> int:
        """Of `alive` visual tokens, `tokens` at the beginning, how many are left after the point number `stage`.

        Raises:
            LacoError: `keep` has a count above `tokens`.
        """
        if not isinstance(keep := self.keeps[stage], float) and keep > tokens:
            raise LacoError(f"{self.name} cannot keep {keep} of {tokens} visual tokens")
        return min(self.count(keep, tokens), alive)

    def layer_tokens(self, tokens: int, num_layers: int) -> list[int]:
        """How many visual tokens each layer of the language model computes; their mean is a paper's average budget."""
        points, counts, alive = self.points(num_layers), [], tokens
        for index in range(num_layers):
            if index in points:
                alive = self.left(tokens, alive, points.index(index))
            counts.append(alive)
        return counts

    def observed(self, num_layers: int) -> tuple[int, ...]:
        """The layers, counted from 0, whose steps `observe` wants to see."""
        return ()

    # What is remembered between layers.

    def start(self, signals: DecoderSignals) -> Any:
        """The memory before the first layer."""
        return None

    def observe(self, memory: Any, attention: Step, mlp: Step) -> Any:
        """The memory after one of the layers that `observed` names."""
        return memory

    def after(self, memory: Any, rows: Tensor) -> Any:
        """The memory after a plan; `rows` are `DecoderSignals.rows`."""
        return memory

    # What is done at a point.

    def build(self, **sizes: Any) -> MergerModule | None:
        """What is trained, handed to `__call__`."""
        return None

    def queries(self, signals: DecoderSignals) -> Tensor:
        """(M,) the tokens whose attention is wanted: the last one."""
        return torch.tensor([signals.length - 1], device=signals.visual.device)

    def __call__(self, signals: DecoderSignals, stage: int = 0, module: MergerModule | None = None) -> Plan:
        """The plan of one sample at the point number `stage`; `LacoError` where a signal is missing that is needed."""
        for name in sorted(self.needs):
            if getattr(signals, name, None) is None:
                raise LacoError(f"{self.name} needs {name}, which is not there")
        if not len(signals.visual):
            return Plan(signals.visual)
        with torch.no_grad():
            if module is not None:
                return self.plan(signals, stage, module)
            with without_autocast(signals.visual.device):
                return self.plan(signals, stage, None)

    @abstractmethod
    def plan(self, signals: DecoderSignals, stage: int, module: MergerModule | None) -> Plan:
        """What `__call__` gives, all of `needs` being there and at least one visual token."""


@dataclass(frozen=True, kw_only=True)
class ScoringMethod(DecoderMethod):
    """Keeps the visual tokens of the highest scores, in the order of the sequence."""

    def plan(self, signals: DecoderSignals, stage: int, module: MergerModule | None) -> Plan:
        count = self.left(signals.started_with, len(signals.visual), stage)
        return Plan(highest(self.score(signals), count).sort().values)

    @abstractmethod
    def score(self, signals: DecoderSignals) -> Tensor:
        """(N,) how much each visual token matters."""


def highest(score_N: Tensor, count: int) -> Tensor:
    """(count,) the best first; of equally good ones the first."""
    return score_N.argsort(descending=True, stable=True)[:count]


def attention_logits(
    queries_HMd: Tensor,
    keys_GLd: Tensor,
    rows_M: Tensor,
    scaling: float | None = None,
    visible_ML: Tensor | None = None,
) -> Tensor:
    """(H, M, L) logits of a few queries only, in float32; what a query does not see is -inf.

    Args:
        queries_HMd, keys_GLd: rotated; G divides H, and neighbouring heads of queries share one of keys.
        rows_M: where in the sequence the queries are: each sees what stands up to there.
        scaling: 1 / sqrt(d) if left out.
        visible_ML: true where a query sees a key, where that is another rule: sliding windows, pictures that see
            themselves.
    """
    heads, _, width = queries_HMd.shape
    scaling = width**-0.5 if scaling is None else scaling
    grouped = queries_HMd.float().view(len(keys_GLd), -1, width)
    with without_autocast(grouped.device):
        logits_HML = (grouped @ keys_GLd.float().mT * scaling).view(heads, -1, keys_GLd.shape[1])
    if visible_ML is None:
        visible_ML = torch.arange(keys_GLd.shape[1], device=rows_M.device) <= rows_M[:, None]
    return logits_HML.masked_fill(~visible_ML, -torch.inf)


def attention_rows(
    queries_HMd: Tensor,
    keys_GLd: Tensor,
    rows_M: Tensor,
    scaling: float | None = None,
    visible_ML: Tensor | None = None,
) -> Tensor:
    """(H, M, L) softmax of `attention_logits`: a few rows of the attention, never the (L, L) map."""
    return attention_logits(queries_HMd, keys_GLd, rows_M, scaling, visible_ML).softmax(dim=-1)
