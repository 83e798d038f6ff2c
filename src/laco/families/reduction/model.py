"""Models of a family whose configuration names methods behind the encoder or inside the language model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from laco.errors import LacoError
from laco.families.compat import handed_features
from laco.families.encoders import encoder_of
from laco.families.reduction.decisions import around_missing, teaching_reducer
from laco.families.reduction.decoder import learns
from laco.families.reduction.hooks import tapped
from laco.families.reduction.language_model import extend
from laco.families.reduction.layout import Choice, laid_out, starts
from laco.families.reduction.pictures import View
from laco.families.reduction.prompt import ANSWERS, PROMPT, Encoded, Prompt, prompt_of, within
from laco.families.reduction.short import SHORT
from laco.families.reduction.short_prompts import PICTURES, TakesShortPrompts, grids_of, named
from laco.families.reduction.signals import FROM_ENCODER, Rows, from_encoder, map_layers, maps_of
from laco.methods import DecoderMethod, Method, Selector, Signals, from_dict
from laco.methods.question import QuestionSelector

# Inside of a model's own call of `get_image_features`, of which the family's code may make several.
PASSING: ContextVar[bool] = ContextVar("laco_passing", default=False)


class ReducedConfig(PreTrainedConfig):
    """Mixin of a configuration.

    Args:
        reduction: `Method.to_dict` of a selector, a method inside the language model, or one of each.
    """

    reduction: list[dict[str, Any]] | None = None

    @property
    def reductions(self) -> list[Method]:
        return [from_dict(data) for data in self.reduction or []]

    @property
    def selector(self) -> Selector | None:
        return next((method for method in self.reductions if isinstance(method, Selector)), None)

    @property
    def decoder_method(self) -> DecoderMethod | None:
        return next((method for method in self.reductions if isinstance(method, DecoderMethod)), None)


def with_signature_of(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)  # Trainer and generate ask for the names of the arguments
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return method


class KeepsSignatures:
    """Mixin: methods named in `around` call the stock class's and look like them."""

    around: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next((kind for kind in cls.__mro__ if kind.__module__.startswith("transformers.models.")), None)
        for name in cls.around:
            if stock is not None and (theirs := getattr(stock, name, None)) is not None:
                ours = next(vars(kind)[name] for kind in cls.__mro__ if "around" in vars(kind) and name in vars(kind))
                setattr(cls, name, with_signature_of(theirs, ours))


class ReducedModel(KeepsSignatures, TakesShortPrompts):
    """Mixin of a model without its language-model head. Class data: `pictures`, and `family`, which sets itself."""

    around = ("forward", "get_image_features", "get_video_features")

    def __init__(self, config: Any):
        super().__init__(config)
        self.extend_language_model()

    def extend_language_model(self) -> None:
        """Makes the language model read what the configuration's methods leave."""
        encoder = self.pictures.encoder(self).config
        channels = encoder_of(encoder).width(encoder)
        extend(self.pictures.language_model(self), self.config.reductions, channels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = named(super().forward, args, kwargs)
        if given.get("input_ids") is None:
            self.check_embedded(given)
            if given.get("inputs_embeds") is None or not any(given.get(name) is not None for name in PICTURES):
                return super().forward(**given)
        with ExitStack() as stack:
            known = (ids_BL := self.tokens_of(given)) is not None
            ids_BL = self.told_by(given["inputs_embeds"]) if ids_BL is None else ids_BL
            given, short = self.encoded_first(ids_BL, given, stack, known)
            if short is not None:
                given = self.lengthened(short, ids_BL, given, stack)
                ids_BL = short.full(ids_BL, self.padding)
            if known:
                prompt = prompt_of(self, ids_BL, given.get("attention_mask"))
                handed = self.handed(given).values()
                if not handed and all(given.get(name) is None for name in PICTURES):
                    prompt.visual_BL.zero_()  # a placeholder that was generated is a word like others
                prompt.encoded.extend(features.encoded for features in handed if hasattr(features, "encoded"))
                self.check_labels(prompt)
                stack.enter_context(within(PROMPT, prompt))
            stack.enter_context(within(SHORT, short))
            return super().forward(**given)

    def check_embedded(self, given: Mapping[str, Any]) -> None:
        """Raises `LacoError` where a method wants to know of a prompt what its embeddings do not tell."""
        asking = [method for method in self.config.reductions if isinstance(method, DecoderMethod | QuestionSelector)]
        if not asking or all(given.get(name) is None for name in PICTURES):
            return
        prompt, embeds_BLD = PROMPT.get(), given.get("inputs_embeds")
        if prompt is None or embeds_BLD is None or prompt.ids_BL.shape != embeds_BLD.shape[:2]:  # else of `generate`
            raise LacoError(f"{asking[0].name} needs the question: give the model pictures and input_ids together")

    def check_labels(self, prompt: Prompt) -> None:
        """Raises `LacoError` where a method inside the language model would leave a picture as it is, as it reads no
        further than to the first answer.
        """
        method = self.config.decoder_method
        if method is None or method.reads_answers or not isinstance(ANSWERS.get(), Tensor):
            return
        if learns(method, self.pictures.language_model(self)):
            return
        columns_L = torch.arange(prompt.ids_BL.shape[1], device=prompt.ids_BL.device)
        if (prompt.visual_BL & (columns_L >= prompt.end_B[:, None])).any():
            raise LacoError(
                f"{method.name} reads a prompt up to the first answer, but labels begin before a picture does: set all"
                " labels but those of answers to -100, and let pictures stand before the first answer"
            )

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.encode(super().get_image_features, args, kwargs, video=False)  # type: ignore[misc]

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.encode(super().get_video_features, args, kwargs, video=True)  # type: ignore[misc]

    def encode(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any], video: bool) -> Any:
        """Features of pictures as `run` gives them, rows of NaN where the selector leaves a token out.

        What methods inside the language model want to know of them is noted on the way.
        """
        if (handed := handed_features(self).get("video" if video else "image")) is not None:
            return handed
        selector, pictures = self.config.selector, self.pictures
        mapped = map_layers(pictures.encoder(self), self.config.decoder_method)
        if (selector is None and not mapped) or PASSING.get():
            with self.reducing():
                outputs = run(*args, **kwargs)
            if not PASSING.get() and hasattr(outputs, "pooler_output"):
                self.check_numbers(pictures.tokens(self, outputs.pooler_output))
            return outputs
        inputs = named(run, args, kwargs)
        as_dict = kwargs.pop("return_dict", None)
        needed = set() if selector is None else set(selector.needs)
        if selector is not None and selector.applies_to == "features":
            needed.add("features")
        taps = needed & FROM_ENCODER
        with ExitStack() as stack:
            read = stack.enter_context(tapped(pictures.read_layer(self, inputs))) if taps else None
            last = selector is not None and selector.looks_at == "last"
            tap = stack.enter_context(tapped(pictures.last_layer(self))) if taps and last else read
            map_taps = [stack.enter_context(tapped(layer)) for layer in mapped]
            stack.enter_context(within(PASSING, True))
            outputs = run(*args, **kwargs, return_dict=True)
        tokens = pictures.tokens(self, outputs.pooler_output)
        self.check_numbers(tokens)
        lengths = [len(row) for row in tokens]
        views = pictures.views(self, lengths, inputs, video)
        if selector is None or isinstance(selector, QuestionSelector):
            # The choice is made in the language model.
            maps = maps_of(pictures, self, map_taps, views, inputs, video)
            stand_for = pictures.placeholders(lengths, video)
            outputs.encoded = Encoded(self.placeholder(video), stand_for, views, maps)
            if (prompt := PROMPT.get()) is not None:
                prompt.encoded.append(outputs.encoded)
            return outputs.to_tuple() if as_dict is False else outputs
        fields: list[dict[str, Rows]] = [{} for _ in tokens]
        if read and tap:
            fields = from_encoder(pictures, self, read, tap, len(tokens), inputs, video, taps)
        owners = self.owners(lengths, inputs, video) if "text" in needed else [None] * len(tokens)
        projects = pictures.projects_tokens(self) and not video
        choices = [
            [
                self.choice(selector, *parts, rows, field, owner, projects)
                for parts in zip(own, starts(own), strict=True)
            ]
            for own, rows, field, owner in zip(views, tokens, fields, owners, strict=True)
        ]
        project = (lambda x: pictures.project(self, x)) if projects else None
        outputs.pooler_output = pictures.like(
            [laid_out(rows, own, project) for rows, own in zip(tokens, choices, strict=True)], outputs.pooler_output
        )
        if (levels := getattr(outputs, "deepstack_features", None)) is not None:
            outputs.deepstack_features = [self.laid_out_level(level, choices, lengths) for level in levels]
        return outputs.to_tuple() if as_dict is False else outputs

    def check_numbers(self, tokens: Sequence[Tensor]) -> None:
        """Raises `LacoError` where tokens are NaN, which none are yet but those that a reducer drops."""
        if getattr(self.pictures.encoder(self).config, "reducer", None) and self.pictures.by_token:
            return  # `on_full_grids` and `around_missing` look at the others
        if len(tokens) and torch.stack([row.isnan().any() for row in tokens]).any():
            raise LacoError("the vision encoder or the projector puts out NaN")

    def laid_out_level(self, level: Any, choices: Sequence[Sequence[Choice]], lengths: Sequence[int]) -> Any:
        """Features of one layer for DeepStack; before transformers 5.18, of all pictures in one tensor."""
        parts = level.split(lengths) if isinstance(level, Tensor) else level
        parts = [laid_out(*pair) for pair in zip(parts, choices, strict=True)]
        return torch.cat(parts) if isinstance(level, Tensor) else type(level)(parts)

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Around a call of the encoder, inside of which a method may drop tokens."""
        encoder = self.pictures.encoder(self)
        with ExitStack() as stack:
            if getattr(encoder.config, "reducer", None) and self.pictures.by_token:
                stack.enter_context(around_missing(self.pictures.projector(self)))
            stack.enter_context(teaching_reducer(encoder))
            yield

    def choice(
        self,
        selector: Selector,
        view: View,
        first: int,
        tokens: Tensor,
        fields: Mapping[str, Rows],
        owner: tuple[Prompt, int] | None,
        projects: bool,
    ) -> Choice:
        """What the selector leaves of a view, which begins at row `first` of what the encoder gave.

        `projects`: whether features, those of prefix tokens too, can be mapped to what the language model reads.
        """
        if selector.video_only and view.grid.frames == 1:
            raise LacoError(
                f"{selector.name} compares frames of videos and would leave a still picture as it is; take another"
            )
        seen = {name: rows.of(first, view.grid.tokens) for name, rows in fields.items()}
        prefix = len(next(iter(fields.values())).prefix) if fields else 0
        if "cls_attention" in seen:
            seen["cls_attention"] = seen["cls_attention"][prefix:].T
        if "received" in seen:
            seen["received"] = seen["received"][:, 0]
        if not projects and "queries" not in seen:
            # CLS cannot stay, so it must not count as a token that does; methods with queries work out its attention.
            seen |= {name: seen[name][prefix:] for name in ("features", "keys") if name in seen}
            prefix = 0
        text = None if owner is None else owner[0].text(owner[1]).detach()
        if text is not None and not len(text):
            labelled = isinstance(ANSWERS.get(), Tensor)
            none = "none beside its pictures" + (" that is not labelled as an answer" if labelled else "")
            raise LacoError(f"{selector.name} needs text, but the prompt has {none}")
        detached = {name: value.detach() for name, value in seen.items()}
        signals = Signals(grid=view.grid, tokens=tokens[view.rows].detach(), text=text, **detached)
        plan = selector(signals, self.pictures.language_model(self).trained_module("selector"))
        if selector.applies_to == "tokens":
            return Choice(view, plan, 0, None)
        return Choice(view, plan, prefix, seen["features"])

    def owners(self, lengths: Sequence[int], inputs: Mapping[str, Any], video: bool) -> list[tuple[Prompt, int]]:
        """For each picture the prompt and the sample in which it stands."""
        prompt, name = PROMPT.get(), self.config.selector.name
        if prompt is None:
            raise LacoError(f"{name} needs the question: give the model pictures and input_ids together")
        samples = (prompt.ids_BL == self.placeholder(video)).nonzero()[:, 0]
        _, standing = self.stand_for(prompt.ids_BL, lengths, inputs, video)
        return [(prompt, int(samples[int(end) - 1])) for end in torch.tensor(standing).cumsum(0)]


class ReducedForConditionalGeneration(KeepsSignatures, PreTrainedModel, GenerationMixin):
    """Mixin of such a model with its language-model head: tells where the prompt ends."""

    around = ("forward",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = signature(super().forward).bind(*args, **kwargs).arguments.get("labels")
        with within(ANSWERS, labels) if labels is not None else nullcontext():
            return super().forward(*args, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids") if inputs is None else inputs
        run: Callable[..., Any] = super().generate  # type: ignore[misc]
        if ids is None:
            return run(inputs, *args, **kwargs)
        # Pictures may be encoded before the first forward.
        with within(ANSWERS, ids.shape[1]):
            prompt = prompt_of(self.base_model, ids, kwargs.get("attention_mask"), grids_of(kwargs))
            with within(PROMPT, prompt):
                return run(inputs, *args, **kwargs)

    def _expand_multimodal_outputs(
        self, input_ids: Tensor, mm_encoder_output: dict[str, Any], expand_size: int = 1, inputs_embeds: Any = None
    ) -> dict[str, Any]:
        """For beams: transformers tells by their placeholders which pictures belong to a sample, so it gets all."""
        if input_ids is not None and input_ids.numel():
            body: Any = self.base_model
            _, short = body.encoded_first(input_ids, {"mm_encoder_outputs": mm_encoder_output}, ExitStack())
            input_ids = input_ids if short is None else short.full(input_ids, body.padding)
        run: Any = super()._expand_multimodal_outputs  # type: ignore[misc]
        return run(input_ids, mm_encoder_output, expand_size, inputs_embeds)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        body: Any = self.base_model
        pictures = any(model_kwargs.get(name) is not None for name in PICTURES)
        if generation_config.prefill_chunk_size is not None and pictures:
            for method in body.config.reductions:
                if isinstance(method, DecoderMethod | QuestionSelector):
                    raise LacoError(
                        f"{method.name} chooses by a whole prompt, which prefill_chunk_size lets the model read in"
                        " parts; leave it out"
                    )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("mm_encoder_outputs"):
            _, short = body.encoded_first(input_ids, dict(model_kwargs), ExitStack())
            if short is not None:
                raise LacoError(
                    "prefill_chunk_size cuts prompts by their placeholders, of which this one has fewer than its"
                    " pictures have visual tokens; leave it out"
                )
        run: Any = super()._prefill  # type: ignore[misc]
        return run(input_ids, generation_config, model_kwargs, *args, **kwargs)
