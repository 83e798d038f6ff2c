"""The model's share of short prompts: it tells them from full ones, lengthens them, and encodes pictures before.

How many placeholders a processor writes for a picture follows from its number of tokens by the rule that is here, too
(`families.counts`); so a prompt is told by counting. A full prompt is taken as ever.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from laco.families.compat import given_features, handed_features
from laco.families.reduction.cache import check_cache
from laco.families.reduction.pictures import Pictures
from laco.families.reduction.prompt import ANSWERS, PROMPT, prompt_of, within
from laco.families.reduction.short import Short

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
PICTURES = (*PIXELS.values(), "mm_encoder_outputs")
# What says how large pictures and videos are. `generate` keeps some of it from the model's forward.
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def named(run: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names."""
    given = dict(signature(run).bind(*args, **kwargs).arguments)
    return given | given.pop("kwargs", {})


def grids_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in GRIDS if given.get(name) is not None}


class TakesShortPrompts(PreTrainedModel):
    """Mixin of a model without its language-model head. Shape letters as in `short`.

    Class data: `pictures`; `family`, which knows how many tokens methods leave.
    """

    pictures: ClassVar[Pictures]
    family: ClassVar[Any]

    def placeholder(self, video: bool) -> int:
        """The token that stands for a row of a picture in a prompt."""
        return self.config.video_token_id if video else self.config.image_token_id

    def stand_for(
        self, ids_BL: Tensor, lengths: Sequence[int], grids: Mapping[str, Any], video: bool
    ) -> tuple[list[int], list[int]]:
        """How many placeholders stand for each picture, or video, of so many rows: in a full prompt, and in this one.

        Twice the first where this is a full one, or fits neither way, which the family's own code refuses.
        """
        pictures, counts = self.pictures, self.family.counts(self.config)
        full = pictures.placeholders(lengths, video)
        frames = [pictures.frames_of(self, tokens, grids) if video else 0 for tokens in full]
        left = {each: counts.placeholders(*each) for each in {*zip(full, frames, strict=True)}}
        short = [left[each] for each in zip(full, frames, strict=True)]
        there = int((ids_BL == self.placeholder(video)).sum())
        return full, short if there == sum(short) != sum(full) else full

    def handed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Features that were computed before a call of the model, by "image" or "video"."""
        handed = {**handed_features(self), **(given.get("mm_encoder_outputs") or {})}
        return {kind: features for kind, features in handed.items() if features}

    def tokens_of(self, given: Mapping[str, Any]) -> Tensor | None:
        """(B, l) the tokens of a call; None where embeddings alone are known."""
        if (ids_Bl := given.get("input_ids")) is None and (outer := PROMPT.get()) is not None:  # of `generate`
            return outer.ids_BL if outer.ids_BL.shape == given["inputs_embeds"].shape[:2] else None
        return ids_Bl

    def told_by(self, embeds_BlD: Tensor) -> Tensor:
        """(B, l) the placeholders among embeddings, and any other token for the rest."""
        ids_Bl = torch.full(embeds_BlD.shape[:2], self.padding, device=embeds_BlD.device)
        for placeholder in self.placeholders:
            own_D = self.get_input_embeddings()(torch.tensor(placeholder, device=embeds_BlD.device))
            ids_Bl[(embeds_BlD == own_D).all(dim=-1)] = placeholder
        return ids_Bl

    @property
    def placeholders(self) -> list[int]:
        numbers = (getattr(self.config, f"{kind}_token_id", None) for kind in PIXELS)
        return [number for number in numbers if number is not None]

    @property
    def padding(self) -> int:
        """Any token that is no placeholder."""
        return next(number for number in range(3) if number not in self.placeholders)

    def encoded_first(
        self, ids_Bl: Tensor, given: dict[str, Any], stack: ExitStack, known: bool = True
    ) -> tuple[dict[str, Any], Short | None]:
        """The arguments of a call with features instead of pixels, and how its prompt lies in the full one, if it is
        short.

        The arguments stay as they are where no method takes tokens away before the language model. `known`: whether the
        text of the prompt is, which methods may look at.
        """
        features = self.handed(given)
        pixels = {kind: name for kind, name in PIXELS.items() if given.get(name) is not None}
        if not (features or pixels):
            return given, None
        if self.config.selector is None and not getattr(self.pictures.encoder(self).config, "reducer", None):
            return given, None
        outer = PROMPT.get()  # of `generate`
        grids = {**(outer.grids if outer else {}), **grids_of(given)}
        if not features:
            with within(PROMPT, prompt_of(self, ids_Bl, given.get("attention_mask")) if known else None):
                features = {kind: self.encoded(kind, given) for kind in pixels}
            seen = {name: given[name] for name in pixels.values()}
            others = {name: value for name, value in given.items() if name not in seen}
            given = stack.enter_context(given_features(self, seen, others, features))
        counts = {}
        for kind, outputs in features.items():
            lengths = [len(rows) for rows in self.pictures.tokens(self, outputs.pooler_output)]
            counts[self.placeholder(kind == "video")] = self.stand_for(ids_Bl, lengths, grids, kind == "video")
        return given, Short.of(ids_Bl, counts)

    def encoded(self, kind: str, given: Mapping[str, Any]) -> Any:
        """Features of the pictures or videos of a call."""
        encode = getattr(self, f"get_{kind}_features")
        names = [name for name in signature(encode).parameters if name not in PIXELS.values()]
        further = {name: given[name] for name in names if given.get(name) is not None}
        return encode(given[PIXELS[kind]], **further, return_dict=True)

    def lengthened(self, short: Short, ids_Bl: Tensor, given: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
        """The arguments of a call for the full prompt."""
        mask, answers = given.get("attention_mask"), ANSWERS.get()
        if isinstance(mask, dict):  # made ready for a static cache
            check_cache(given.get("past_key_values"))
        if (kinds_Bl := given.get("mm_token_type_ids")) is not None:  # of the prompt, behind which candidates may stand
            given = {**given, "mm_token_type_ids": pad(kinds_Bl, (0, ids_Bl.shape[1] - kinds_Bl.shape[1]))}
        full = dict(given)
        for name, padding in (("input_ids", self.padding), ("mm_token_type_ids", 0), ("inputs_embeds", 0)):
            if given.get(name) is not None:
                full[name] = short.full(given[name], padding)
        full["position_ids"] = self.lengthened_positions(short, ids_Bl, given)
        if mask is None or isinstance(mask, Tensor):
            full["attention_mask"] = short.mask(mask, ids_Bl.shape[1])
        if isinstance(answers, int):
            stack.enter_context(within(ANSWERS, answers + short.source_BL.shape[1] - ids_Bl.shape[1]))
        elif answers is not None and answers.shape == ids_Bl.shape:
            stack.enter_context(within(ANSWERS, short.full(answers, -100)))
        return full

    def lengthened_positions(self, short: Short, ids_Bl: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """(B, L) positions for the full prompt; None where the model is to make them."""
        position_ids, past = given.get("position_ids"), given.get("past_key_values")
        if position_ids is None:
            read = 0 if past is None else past.get_seq_length()
            position_ids = torch.arange(read, read + ids_Bl.shape[1], device=ids_Bl.device)[None]
        return short.positions(position_ids)
