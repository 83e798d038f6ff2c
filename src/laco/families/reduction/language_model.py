"""The language model's share: rows of NaN leave its input, with mask, positions and cache.

Outside, nothing changes its length: the last hidden states come out for every token of the prompt, where one was
dropped that of the token before it, which is what predicts the next. Hidden states of layers before are of what these
compute.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from laco.errors import LacoError
from laco.families.encoders.base import reset_compressor
from laco.families.reduction.cache import ReducedCacheLayer, check_cache, counting_entries, reduce_cache
from laco.families.reduction.decoder import DroppingLayer, Run, dropping, learns, new
from laco.families.reduction.kept import Entry, Kept, entry
from laco.families.reduction.lesson import LESSON
from laco.families.reduction.prompt import PROMPT
from laco.families.reduction.scoring import without_rest
from laco.families.reduction.short import SHORT, Short
from laco.families.reduction.trained import kind_of, trained_modules
from laco.methods import DecoderMethod, MergerModule, Method, Selector
from laco.methods.question import QuestionSelector
from laco.methods.selector import Positions


class ReducedLanguageModel(PreTrainedModel):
    """Mixin of a language model.

    Attributes:
        methods: a selector, a method inside the language model, or one of each.
        compressor: their modules, by `kind_of`, if there are any.
    """

    _laco_stock: ClassVar[type]
    methods: tuple[Method, ...] = ()
    layers: nn.ModuleList

    def __reduce_ex__(self, protocol: Any) -> Any:  # by the name of its class pickle finds the stock one
        return new, (extended, self._laco_stock), vars(self)

    @property
    def selector(self) -> Selector | None:
        return next((method for method in self.methods if isinstance(method, Selector)), None)

    @property
    def method(self) -> DecoderMethod | None:
        """What drops tokens between the layers."""
        return next((method for method in self.methods if isinstance(method, DecoderMethod)), None)

    @property
    def positions(self) -> Positions:
        """Of what enters the first layer: as in the full sequence, or counted anew."""
        return "keep" if self.selector is None else self.selector.positions

    def trained_module(self, kind: str) -> MergerModule | None:
        """What a method of this kind trains."""
        return dict(getattr(self, "compressor", {})).get(kind)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not reset_compressor(module, dict(getattr(self, "compressor", {})).values()):
            super()._init_weights(module)

    def stock_forward(self, **kwargs: Any) -> Any:
        """Over an input of which nothing is to be taken out."""
        return super().forward(**kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None
        batch, length = inputs_embeds.shape[:2]
        prompt = PROMPT.get()
        if prompt is not None and prompt.ids_BL.shape != (batch, length):
            prompt = None
        visual_BL = None if prompt is None else prompt.visual_BL
        if prompt is not None and not prompt.visual_BL.any():
            prompt = None
        if isinstance(self.selector, QuestionSelector) and prompt is not None:
            check_cache(past_key_values)
            inputs_embeds = without_rest(self, prompt, inputs_embeds, attention_mask, position_ids, kwargs)
        keep_BL = ~inputs_embeds[..., 0].isnan()
        everything = bool(keep_BL.all())
        if not everything and visual_BL is not None and not (keep_BL | visual_BL).all():
            raise LacoError("the embeddings of text are NaN")
        if (short := SHORT.get()) is not None:
            keep_BL = keep_BL & ~short.padding_BL
        first = past_key_values.layers[0] if past_key_values is not None and past_key_values.layers else None
        past = first if isinstance(first, ReducedCacheLayer) else None
        drops = self.method is not None and prompt is not None and bool((prompt.visual_BL & keep_BL).any())
        if self.method is not None and learns(self.method, self):
            drops = drops and LESSON.get() is not None
        if everything and past is None and not drops and short is None:
            return super().forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )

        check_cache(past_key_values)
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        entered = entry(
            keep_BL,
            inputs_embeds,
            attention_mask,
            position_ids,
            kwargs,
            positions=self.positions,
            past=past,
            read=read,
        )
        kept, arguments = entered.kept, entered.arguments
        outside = kept if short is None else short.given(kept)  # what the sequence is to the outside
        run = None
        if self.method is not None:
            run = Run(self.method, self, entered, attention_mask, read, past_key_values, prompt if drops else None)
            run.look_ahead(entered)
            arguments["reduction"] = run
        with counting_entries(past_key_values):
            outputs = super().forward(past_key_values=past_key_values, **arguments)
        end = kept if run is None else run.kept_at(len(self.layers))
        outputs.last_hidden_state = end.spread(outputs.last_hidden_state)
        if short is not None:
            rows = torch.arange(batch, device=keep_BL.device)[:, None]
            outputs.last_hidden_state = outputs.last_hidden_state[rows, outside.columns_BK]
        if (states := outputs.get("hidden_states")) and states[-1] is not None:  # those that are asked for alone
            outputs.hidden_states = (*states[:-1], outputs.last_hidden_state)
        # A cache that is given grows, even where none is to be put out.
        cache = past_key_values if outputs.past_key_values is None else outputs.past_key_values
        if cache is not None:
            self.write_down(cache, read, entered, run, outside, short)
        return outputs

    def write_down(
        self, cache: Cache, read: int, entered: Entry, run: Run | None, outside: Kept, short: Short | None
    ) -> None:
        """Lets each layer of the cache know which tokens it holds, and how their positions have moved."""
        kept = entered.kept
        end = kept if run is None else run.kept_at(len(self.layers))
        reduce_cache(cache, len(kept.keep_BL), read, kept.keep_BL.device)
        stage = None
        layers: list[Any] = cache.layers
        for index, layer in enumerate(layers):
            now = 0 if run is None else run.stage(index)
            if now != stage:
                stage, there = now, kept if run is None else run.kept_at(index)
                columns_BK = numbered(there, outside, short, read)
                moved = entered.moved_BL if run is None else run.moved_at(index)
                if short is not None:  # what follows a token counts: of its picture, more may have been dropped there
                    behind = short.behind(outside.columns_BK)
                    moved = moved.gather(1, behind - 1) - (short.gained(behind) - 1)
            layer.extend(columns_BK, moved)
            if there is not end and self.method is not None and self.method.rewrites_cache:
                last_BK = numbered(end, outside, short, read)
                layer.keep_of_newest(there.slots(end.columns_BK), last_BK, there.columns_BK.shape[1])


def numbered(there: Kept, outside: Kept, short: Short | None, read: int) -> Tensor:
    """(B, K) which tokens of the sequence these are to the outside, -1 = padding; `read` were read before."""
    number_BK = there.columns_BK if short is None else short.numbered(outside, there.columns_BK)
    return torch.where(number_BK >= 0, number_BK + read, -1)


@cache
def extended(kind: Any) -> Any:
    """The class of language models like this one that take rows of NaN out.

    It has the name of the stock class, by which transformers knows which outputs of a model can be captured.
    """
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_laco_stock": kind}
    return type(kind.__name__, (ReducedLanguageModel, kind), named)


def extend(model: Any, methods: Sequence[Method] = (), encoder_channels: int = 0) -> None:
    """Makes a language model, in place, take rows of NaN out, and drop tokens before and between its layers.

    Args:
        methods: a selector, a method inside the language model, or one of each. Modules of those that it has already
            stay.
        encoder_channels: of the vision encoder's tokens, on which modules may depend.
    """
    present = {kind_of(method): method for method in getattr(model, "methods", ())}
    modules = dict(getattr(model, "compressor", {}))
    restore(model)
    kind: Any = type(model)
    model.__class__ = extended(kind)
    model.methods = tuple(methods)
    old = {kind for method in methods if present.get(kind := kind_of(method)) == method}
    new = [method for method in methods if kind_of(method) not in old]
    like = next(model.parameters())
    with torch.device(like.device):
        fresh = trained_modules(new, model.config, encoder_channels)
    modules = {kind: module for kind, module in modules.items() if kind in old} | {
        kind: module.to(like.dtype).train(model.training) for kind, module in fresh.items()
    }
    if modules:
        model.compressor = nn.ModuleDict(modules)
    for index, layer in enumerate(model.layers):
        kind = type(layer)
        layer.__class__, layer.number = dropping(kind), index


def restore(model: Any) -> None:
    """Takes back what `extend` did."""
    if isinstance(model, ReducedLanguageModel):
        for layer in model.layers:
            if isinstance(layer, DroppingLayer):
                layer.__class__ = type(layer)._laco_stock
                del layer.number
        model.__class__ = type(model)._laco_stock
        del model.methods
        if hasattr(model, "compressor"):
            del model.compressor
