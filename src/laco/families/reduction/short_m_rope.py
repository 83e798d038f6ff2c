"""Short prompts of models with positions in three dimensions (M-RoPE), which their own code makes from full grids.

`generate` asks for positions before there are features, counts on from the last of them, and hands them to the forward.
So they are, as those of all short prompts from the outside, lower than in the full prompt by as many tokens as have no
placeholder; those of placeholders say nothing. In the forward they are made anew, of the full prompt.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.families.reduction.prompt import PROMPT
from laco.families.reduction.short import Short
from laco.families.reduction.short_prompts import TakesShortPrompts, grids_of, named


class TakesShortMRope(TakesShortPrompts):
    """Mixin of a model without its language-model head, before the stock class. Shape letters as in `short`."""

    def get_rope_index(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = named(super().get_rope_index, (input_ids, *args), kwargs)  # type: ignore[misc]
        counts = {}
        for kind in ("image", "video"):
            if given.get(f"{kind}_grid_thw") is not None:
                video, pictures = kind == "video", self.pictures
                lengths = [grid.tokens for grid in pictures.grids(self, given, video)]  # type: ignore[attr-defined]
                counts[self.placeholder(video)] = self.stand_for(input_ids, lengths, given, video)
        if (short := Short.of(input_ids, counts)) is None:
            return super().get_rope_index(**given)  # type: ignore[misc]
        positions, deltas = self.full_rope_index(short, given)
        return outside(short, positions), deltas

    def full_rope_index(self, short: Short, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The stock model's, (3, B, L) and (B, 1), for the full prompt."""
        full = {
            "input_ids": short.full(given["input_ids"], 0),
            "mm_token_type_ids": short.full(given["mm_token_type_ids"], 0),
            "attention_mask": short.mask(given.get("attention_mask"), given["input_ids"].shape[1]),
        }
        return super().get_rope_index(**{**given, **full})  # type: ignore[misc]

    def lengthened_positions(self, short: Short, ids_Bl: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """(3, B, L) for the full prompt, or (4, B, L) with plain ones before; None where the model is to make them.

        Raises:
            LacoError: those that are given are not the model's own, or nothing says how large pictures are.
        """
        if (position_ids := given.get("position_ids")) is None:
            return None
        mask, outer = given.get("attention_mask"), PROMPT.get()
        grids, beams = grids_of(given), 1
        if outer is not None and outer.grids:  # `generate` has them
            grids, beams = dict(outer.grids), len(ids_Bl) // len(outer.ids_BL)
        if not grids:  # nor do embeddings tell of which prompt they are
            raise LacoError("generate needs input_ids, not inputs_embeds alone, where a method drops visual tokens")
        if mask is not None:
            mask = mask[:, -ids_Bl.shape[1] :]
        if (kinds_Bl := given.get("mm_token_type_ids")) is None:
            kinds_Bl = (ids_Bl == self.placeholder(False)) + 2 * (ids_Bl == self.placeholder(True))
        mine: dict[str, Any] = {"input_ids": ids_Bl, "mm_token_type_ids": kinds_Bl, "attention_mask": mask}
        mine = {name: None if x is None else x[::beams] for name, x in mine.items()}
        each = Short(short.source_BL[::beams], short.chosen_BL[::beams])
        positions_3BL = self.full_rope_index(each, {**mine, **grids})[0].repeat_interleave(beams, dim=1)

        text_Bl = kinds_Bl == 0 if mask is None else (kinds_Bl == 0) & mask.bool()
        if outer is not None:  # behind the prompt `generate` counts on from its last token, also where that is visual
            text_Bl[:, outer.ids_BL.shape[1] :] = False
        first_B1 = text_Bl.int().argmax(dim=1, keepdim=True)
        wanted_3Bl = outside(short, positions_3BL)
        given_3Bl = position_ids[-3:] if position_ids.ndim == 3 else position_ids.expand_as(wanted_3Bl)
        read_B1 = (given_3Bl[0] - wanted_3Bl[0]).gather(1, first_B1)  # behind what a cache holds
        if not torch.equal((wanted_3Bl + read_B1)[:, text_Bl], given_3Bl[:, text_Bl]):
            raise LacoError(
                "position_ids are those that the model makes itself, where a prompt has no placeholders for tokens that"
                " are dropped; leave them out"
            )
        plain = position_ids[:-3] if position_ids.ndim == 3 else position_ids[:0]
        return torch.cat([short.positions(plain), positions_3BL + read_B1])


def outside(short: Short, positions_3BL: Tensor) -> Tensor:
    """(3, B, l) what the outside takes for positions of the prompt as it was given."""
    first_Bl = short.first_Bl
    rows = torch.arange(len(first_Bl), device=first_Bl.device)[:, None]
    return positions_3BL[:, rows, first_Bl] - short.gained(first_Bl)
