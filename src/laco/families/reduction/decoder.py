"""Methods inside the language model: after some of its layers, visual tokens leave.

The stock loop over the layers goes on as ever. From the first point on, every layer gets mask, rotary table and
positions of what is left; what is known between layers, a `Run`, rides along with their arguments, and is kept by the
number of the layer, so that a layer can be computed anew (gradient checkpointing).

A method that also clears the caches of the layers before (`rewrites_cache`) hides from answers, in these layers too,
what was dropped. Where prompt and answers are read in one call, its choice is made in a first pass over these layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from laco.errors import LacoError
from laco.families.reduction.ahead import run_up_to
from laco.families.reduction.beside import BringsToken, TokenBeside
from laco.families.reduction.cache import ReducedCacheLayer
from laco.families.reduction.hooks import Tap, tapped
from laco.families.reduction.kept import Entry, Kept, kept_mask, largest, renumbered
from laco.families.reduction.lesson import LESSON, Lesson, Taught
from laco.families.reduction.projections import at, queries_keys
from laco.families.reduction.prompt import Prompt, Shown, seen_pairs
from laco.methods import DecoderMethod, DecoderSignals, Plan
from laco.methods.decoder import Step, attention_logits


class DroppingLayer(nn.Module):
    """Mixin of a layer of a language model whose input may have lost tokens. `number` counts layers from 0.

    Where it has (`one_text`), the attention is not told positions: rotary tables are made already, and flash attention
    takes gaps between positions for the beginnings of new texts.
    """

    _laco_stock: ClassVar[type]
    number: int
    self_attn: Any
    mlp: Any

    def __reduce_ex__(self, protocol: Any) -> Any:  # by the name of its class pickle finds the stock one
        return new, (dropping, self._laco_stock), vars(self)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Once, however often a checkpoint computes `forward` anew.
        if (reduction := kwargs.get("reduction")) is not None:
            reduction.watch(self.number, hidden_states, kwargs)
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        reduction: "Run | None" = None,
        one_text: bool = False,
        **kwargs: Any,
    ) -> Any:
        if one_text:
            kwargs["position_ids"] = None
        if reduction is None:
            return super().forward(hidden_states, *args, **kwargs)
        hidden_states, kwargs = reduction.enter(self.number, hidden_states, kwargs)
        if not reduction.observes(self.number):
            return super().forward(hidden_states, *args, **kwargs)
        with tapped(self.self_attn) as attention, tapped(self.mlp) as mlp:
            out = super().forward(hidden_states, *args, **kwargs)
        reduction.observe(self.number, [attention, mlp])
        return out


def new(kinds: Callable[[Any], Any], stock: type) -> Any:
    """An object of a class that one of `kinds` makes of the stock one, still empty."""
    kind = kinds(stock)
    return kind.__new__(kind)


@cache
def dropping(kind: Any) -> Any:
    """The class of layers like this one that may lose tokens; of the same name, by which layers are kept whole."""
    return type(kind.__name__, (DroppingLayer, kind), {"__module__": kind.__module__, "_laco_stock": kind})


def learns(method: DecoderMethod, model: nn.Module) -> bool:
    """Whether a method is being trained: then it drops nothing."""
    return method.trained and model.training


class Run:
    """One call of a language model in which a method drops tokens.

    A method that is trained drops nothing in training; there its own loss is computed, if there is a lesson.

    Args:
        method: what drops them.
        model: the language model.
        entered: what it computes, before any is dropped.
        mask: as it was given for all tokens, and `read`, how many were read before.
        past: the cache, if there is one.
        prompt: where visual tokens are; None if none are to be dropped, as in later steps of decoding.
    """

    def __init__(
        self,
        method: DecoderMethod,
        model: Any,
        entered: Entry,
        mask: Any,
        read: int,
        past: Cache | None,
        prompt: Prompt | None,
    ) -> None:
        self.method, self.model, self.mask, self.read, self.past = method, model, mask, read, past
        self.layers: Sequence[Any] = model.layers
        self.module = model.trained_module("decoder")
        self.prompt = prompt
        self.marks = method.points(len(self.layers))
        self.lesson: Lesson | None = LESSON.get() if learns(method, model) else None
        self.points = () if learns(method, model) else self.marks
        self.kept: list[Kept] = [entered.kept]  # before the first point, and after each
        self.position_ids: Tensor = entered.arguments["position_ids"]
        self.plans: list[list[tuple[Tensor, Plan | None, Tensor]]] = []
        self.masks: dict[int, Any] = {}
        self.before: Tensor | None = None
        self.tables: dict[str, Any] = {}
        self.entry_moved_BL = entered.moved_BL
        self.places: dict[int, tuple[Tensor, Tensor]] = {}  # after so many points, as `placed_at` gives them
        self.turned: dict[int, Any] = {}  # rotary tables of these places
        self.memory: dict[int, Any] = {}
        self.original: list[int] = []
        self.observed: set[int] = set()
        self.seen_BKK: Tensor | None = None  # before the first point: true where a token may see another
        self.batch = len(entered.kept.columns_BK)
        self.shown: list[list[Shown]] = []
        if prompt is not None:
            self.visual_BL = prompt.visual_BL
            if {"maps", "grids"} & method.needs:
                self.know_pictures(prompt)
        self.beside: TokenBeside | None = None
        if prompt is not None and isinstance(self.module, BringsToken):
            self.beside = TokenBeside(model, self.module)

    def know_pictures(self, prompt: Prompt) -> None:
        """Line breaks between rows belong to no grid; for methods that judge grids they are text, which stays."""
        pictures = prompt.pictures(self.method.name)
        self.shown = [sorted(row, key=lambda shown: int(shown.columns[0])) for row in pictures]
        self.visual_BL = torch.zeros_like(prompt.visual_BL)
        for row, some in enumerate(self.shown):
            for shown in some:
                self.visual_BL[row, shown.places] = True

    def stage(self, number: int) -> int:
        """How many points lie before a layer."""
        return sum(point <= number for point in self.points)

    def kept_after(self, stage: int) -> Kept:
        """What is left after so many points."""
        return self.kept[min(stage, len(self.kept) - 1)]

    def kept_at(self, number: int) -> Kept:
        """What a layer computes; of one past the last, what the language model puts out."""
        return self.kept_after(self.stage(number))

    def observes(self, number: int) -> bool:
        return (
            self.prompt is not None and number not in self.observed and number in self.method.observed(len(self.layers))
        )

    # Before a layer, once.

    def watch(self, number: int, x_BKD: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Lets a token of the method's own read along up to the first point, and the method learn there."""
        if self.prompt is None or number > self.marks[0] or self.plans:
            return
        for row in range(self.batch):
            slots, visual = self.prompt_tokens(row, self.kept[0])
            if not len(visual):
                continue
            if self.beside is not None and number < self.marks[0]:
                with torch.set_grad_enabled(self.lesson is not None):
                    self.beside.enter(row, number, self.position_ids[..., row, slots])
                    if number + 1 < self.marks[0]:
                        cos, sin = (at(table, row)[..., slots, :] for table in kwargs["position_embeddings"])
                        ours = ("reduction", "one_text")
                        others = {name: value for name, value in kwargs.items() if name not in ours}
                        self.beside.pass_through(row, number, x_BKD[row, slots].detach(), (cos, sin), others)
            if number == self.marks[0] and self.lesson is not None:
                self.teach(row, x_BKD, slots, visual)

    def teach(self, row: int, x_BKD: Tensor, slots: Tensor, visual: Tensor) -> None:
        assert self.lesson is not None
        assert isinstance(self.method, Taught)
        if len(boxes := self.lesson.boxes_of(row, self.method)):
            signals = self.signals(row, 0, self.marks[0], x_BKD, slots, visual)
            self.lesson.give(self.method, self.method.loss(signals, self.module, boxes))

    @torch.no_grad()
    def look_ahead(self, entered: Entry) -> None:
        """Where answers stand behind the prompt already: chooses before they are read, and hides what leaves from them.

        `LacoError` where that cannot be.
        """
        if self.prompt is None or not self.points or not self.method.rewrites_cache:
            return
        columns_BK = self.kept[0].columns_BK
        answers_BK = columns_BK >= self.prompt.end_B[:, None]
        if not answers_BK.any():
            return
        if self.read or "flash" in str(self.model.config._attn_implementation):
            raise LacoError(
                f"{self.method.name} hides from answers what it drops, which needs a mask of pairs of tokens where"
                " pictures and answers are read at once: use attention by sdpa, and no cache of earlier turns"
            )
        arguments = {**entered.arguments, "reduction": self}
        self.drop(0, self.points[0], run_up_to(self.model, self.points[0], entered._replace(arguments=arguments)).x_BKD)
        gone_BK = ~self.kept[1].keep_BL.gather(1, columns_BK.clamp(min=0))
        self.seen_BKK = ~(answers_BK[:, :, None] & gone_BK[:, None])

    # What a layer gets.

    def enter(self, number: int, x_BKD: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The input and the arguments of a layer for the tokens that are left."""
        if number == 0:
            self.begin(x_BKD, kwargs)
        if self.prompt is not None and number in self.points:
            x_BKD = self.drop(self.points.index(number), number, x_BKD)
        if self.prompt is not None and number + 1 in self.marks:
            self.before = x_BKD.detach()
        stage = self.stage(number)
        if not stage and self.seen_BKK is None:
            return x_BKD, kwargs
        return x_BKD, {**kwargs, **self.narrowed(stage, kwargs), "attention_mask": self.mask_of(stage, number, x_BKD)}

    def narrowed(self, stage: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The rotary tables of the tokens that are left after so many points."""
        if stage and self.method.positions == "renumber":
            place, _ = self.placed_at(stage)
            if stage not in self.turned:
                axes = place[-3:] if place.ndim > 2 else place  # of M-RoPE; a plain position may stand before them
                self.turned[stage] = self.model.rotary_emb(kwargs["position_embeddings"][0], axes)
            return {"position_embeddings": self.turned[stage]}
        if (kept := self.kept_after(stage)) is self.kept[0]:
            return {}
        slot_BK = self.kept[0].slots(kept.columns_BK)
        return {"position_embeddings": tuple(pick(table, slot_BK) for table in kwargs["position_embeddings"])}

    def placed_at(self, stage: int) -> tuple[Tensor, Tensor]:
        """After so many points: positions, (B, K) or (3 or 4, B, K); by how much they moved, (B, L) as in `Entry`."""
        if stage not in self.places:
            kept = self.kept_after(stage)
            before_B = self.moved_before(stage)
            given = pick(self.position_ids[..., None], self.kept[0].slots(kept.columns_BK))[..., 0]
            now = given - before_B[:, None]
            renumbers = stage and self.prompt is not None and self.method.positions == "renumber"
            if renumbers:
                by_token = renumbered(now.movedim(-2, 0).movedim(-1, 1), kept.real_BK)
                now = by_token.movedim(1, -1).movedim(0, -2)
            moved_BL = kept.spread((given - now).view(-1, *given.shape[-2:])[-1])  # of M-RoPE any axis
            if renumbers:  # the last tokens may have been dropped
                moved_BL[:, -1] = largest(self.position_ids) - largest(now)
            self.places[stage] = now, self.entry_moved_BL + moved_BL
        return self.places[stage]

    def moved_at(self, number: int) -> Tensor:
        """(B, L) by how much positions in a layer are lower than in the full sequence."""
        return self.placed_at(self.stage(number))[1]

    def moved_before(self, stage: int) -> Tensor:
        """(B,) by how much positions behind a point are lower than before the first, for what was read before."""
        layers = [] if self.past is None or not stage else self.past.layers
        if layers and isinstance(first := layers[0], ReducedCacheLayer):
            behind: Any = layers[self.points[stage - 1]]
            return behind.moved_B - first.moved_B
        return torch.zeros_like(self.entry_moved_BL[:, 0])

    def mask_of(self, stage: int, number: int, x_BKD: Tensor) -> Any:
        """The mask of a layer in the form that its attention takes; all layers between two points share it."""
        if stage not in self.masks:
            kept = self.kept_at(number)
            layers = [] if self.past is None else self.past.layers[number : number + 1]
            layer = next(iter(layers), None)
            held = layer if isinstance(layer, ReducedCacheLayer) else None
            cache = None
            if layer is not None:
                cache = DynamicCache()
                cache.layers = [layer]
            mask, seen_BKK = kept_mask(self.mask, kept, held, self.read), None if stage else self.seen_BKK
            if seen_BKK is not None and mask.ndim == 4:
                mask = mask.masked_fill(~seen_BKK[:, None], False if mask.dtype == torch.bool else -torch.inf)
            self.masks[stage] = create_causal_mask(
                config=self.model.config,
                inputs_embeds=x_BKD,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=None,
                and_mask_function=None if seen_BKK is None else lambda b, h, q, k: seen_BKK[b, q, k],
            )
        return self.masks[stage]

    # What is dropped.

    def begin(self, x_BKD: Tensor, kwargs: dict[str, Any]) -> None:
        self.tables = kwargs
        if self.prompt is None or self.original:
            return
        for row in range(self.batch):
            slots, visual = self.prompt_tokens(row, self.kept[0])
            self.original.append(len(visual))
            signals = DecoderSignals(visual=visual, length=len(slots), embeddings=x_BKD.detach()[row, slots])
            self.memory[row] = self.method.start(signals) if len(visual) else None

    def prompt_tokens(self, row: int, kept: Kept) -> tuple[Tensor, Tensor]:
        """(L,) the slots of a sample that hold its prompt, and (N,) which of those are visual."""
        assert self.prompt is not None
        columns_K = kept.columns_BK[row]
        there_K = (columns_K >= 0) & self.prompt.real_BL[row, columns_K]
        if not self.method.reads_answers:
            there_K &= columns_K < self.prompt.end_B[row]
        slots = there_K.nonzero().flatten()
        return slots, self.visual_BL[row, columns_K[slots]].nonzero().flatten()

    @torch.no_grad()
    def observe(self, number: int, taps: Sequence[Tap]) -> None:
        self.observed.add(number)
        steps = [(tap.entered, tap.put_out) for tap in taps]
        for row in range(self.batch):
            slots, visual = self.prompt_tokens(row, self.kept_at(number))
            if len(visual):
                mine = [Step(*(x[row, slots] for x in step if x is not None)) for step in steps]
                self.memory[row] = self.method.observe(self.memory[row], *mine)

    def drop(self, stage: int, number: int, x_BKD: Tensor) -> Tensor:
        """The input of a layer without the tokens that leave before it."""
        kept = self.kept[stage]
        if len(self.plans) == stage:
            self.plans.append([self.plan(row, stage, number, x_BKD) for row in range(self.batch)])
            self.kept.append(kept.after([order for order, _, _ in self.plans[stage]]))
        rows = []
        for row, (order, plan, visual) in enumerate(self.plans[stage]):
            x_KD = x_BKD[row]
            if plan is not None and plan.weights is not None:
                merged = plan(x_KD[visual])
                x_KD = x_KD.index_copy(0, visual[plan.kept], merged)
            rows.append(x_KD[order])
        most = max(len(row) for row in rows)
        return torch.stack([nn.functional.pad(row, (0, 0, most - len(row), 0)) for row in rows])

    @torch.no_grad()
    def plan(self, row: int, stage: int, number: int, x_BKD: Tensor) -> tuple[Tensor, Plan | None, Tensor]:
        """Of a sample: the slots that stay, in order; the plan; the slots of its visual tokens of now."""
        kept, method = self.kept[stage], self.method
        slots, visual = self.prompt_tokens(row, kept)
        real = (kept.columns_BK[row] >= 0).nonzero().flatten()
        if not len(visual):
            return real, None, visual
        signals = self.signals(row, stage, number, x_BKD, slots, visual)
        plan = method(signals, stage, self.module)
        order = signals.rows(plan)
        self.memory[row] = method.after(self.memory.get(row), order)
        behind = real[real > slots[-1]]  # answers; padding in front of the prompt leaves too
        return torch.cat([slots[order], behind]), plan, slots[visual]

    def signals(
        self, row: int, stage: int, number: int, x_BKD: Tensor, slots: Tensor, visual: Tensor
    ) -> DecoderSignals:
        """What the method looks at, of a sample's prompt, which is in these slots.

        A token of its own comes last among queries and keys.
        """
        method = self.method
        hidden_LD, shown_here = x_BKD[row, slots], self.shown[row] if self.shown else []
        assert self.before is not None
        assert self.prompt is not None
        last = method.attention_layer == "last"
        layer = self.layers[number - 1 if last else number]
        tables: tuple[Tensor, Tensor] = (self.tables | self.narrowed(stage, self.tables))["position_embeddings"]
        cos, sin = (at(table, row)[..., slots, :] for table in tables)
        rotary = (cos, sin) if cos.ndim == 2 else (cos[0], sin[0])  # of M-RoPE in three tables, that of time
        read_LD = self.before[row, slots] if last else hidden_LD
        if self.beside is not None:
            assert last
            read_LD = torch.cat([read_LD, self.beside.state[row]])
            cos, sin = (
                torch.cat([table, at(own, 0)], dim=-2)
                for table, own in zip((cos, sin), self.beside.tables[row], strict=True)
            )
        q_HLd, k_GLd = queries_keys(layer, read_LD, cos, sin)
        maps = tuple(torch.cat(level) for level in zip(*(shown.maps for shown in shown_here), strict=True))
        said_L = self.prompt.said_BL[row, self.kept[stage].columns_BK[row, slots]]
        answers = (said_L & ~said_L.roll(1)).nonzero().flatten()
        signals = DecoderSignals(
            visual=visual,
            length=len(read_LD),
            answers=answers if len(answers) else None,
            trailing=len(read_LD) - len(slots),
            maps=maps or None,
            grids=tuple(view.grid for shown in shown_here for view in shown.views) or None,
            original=self.original[row],
            hidden=self.model.norm(hidden_LD) if method.final_norm else hidden_LD,
            keys=k_GLd,
            rotary=rotary,
            memory=self.memory.get(row),
        )
        rows_M, visible_ML = method.queries(signals), None
        if isinstance(self.mask, Tensor) and self.mask.ndim == 4:
            columns = self.kept[stage].columns_BK[row, slots]
            mask_LL = seen_pairs(self.mask).expand(self.batch, -1, -1, -1)[row, 0, columns[:, None], columns]
            hidden_LL = nn.functional.pad(mask_LL, (0, signals.trailing))  # from all others, tokens of the method's own
            visible_ML = nn.functional.pad(hidden_LL, (0, 0, 0, signals.trailing), value=True)[rows_M]
        logits_HML = attention_logits(q_HLd[:, rows_M], k_GLd, rows_M, layer.self_attn.scaling, visible_ML)
        return replace(signals, logits=logits_HML, attention=logits_HML.softmax(dim=-1))


def pick(x: Tensor, slot_BK: Tensor) -> Tensor:
    """(..., B or 1, L, d) -> (..., B, K, d)."""
    x = x.expand(*x.shape[:-3], len(slot_BK), *x.shape[-2:])
    return x.gather(-2, slot_BK[..., None].expand(*x.shape[:-3], *slot_BK.shape, x.shape[-1]))
