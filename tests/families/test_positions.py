"""Visual tokens and positions that the language model gets, against numbers worked out by hand, for every family.

The prompt is "what is <image> here?", the picture is 50 pixels high and 120 wide, and LaCo halves the grid's sides
after the first layer.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import laco
import tiny
from families.matrix import ONE, built
from laco.families import family_of

# How many visual tokens there are.
BY_HAND = {
    # 64 x 64 pixels in patches of 4, 16 x 16, merged 8 x 8; the projector averages 2 x 2.
    "gemma3-siglip": 4 * 4,
    # 1 x 2 tiles and the whole picture; 16 x 16 patches in each, merged 8 x 8; the connector joins 2 x 2.
    "idefics3-idefics3": 3 * 4 * 4,
    "smolvlm-smolvlm": 3 * 4 * 4,
    "internvl-internvit": 3 * 4 * 4,
    "internvl-internvit_6b": 3 * 4 * 4,
    "llama4": 3 * 4 * 4,
    # One picture of 6 x 6 patches, merged 3 x 3.
    "llava-siglip": 3 * 3,
    "llava-clip": 3 * 3,
    "llava-aimv2": 3 * 3,
    "llava-dinov2": 3 * 3,
    "paligemma-siglip": 3 * 3,
    # Of 1 x 3 tiles, 3 x 9 tokens, a picture of 2.4 : 1 fills 7 columns; a line break behind each row; 3 x 3 before.
    "llava_next-clip": 3 * 3 + 3 * (7 + 1),
    "llava_next-siglip": 3 * 3 + 3 * (7 + 1),
    # Of 2 x 3 tiles, 6 x 9 tokens, it fills 4 rows.
    "llava_onevision-siglip": 3 * 3 + 4 * (9 + 1),
    "llava_onevision-clip": 3 * 3 + 4 * (9 + 1),
    # 20 x 48 pixels, rounded up to patches of 8 after merging.
    "llava-pixtral": 3 * 6,
    # The same, rounded up to 16, as the projector joins 2 x 2.
    "mistral3-pixtral": 2 * 3,
    # Rounded to tokens of 16 pixels.
    "qwen2_vl-qwen2_vl": 3 * 8,
    "qwen2_5_vl-qwen2_5_vl": 3 * 8,
    "qwen3_vl-qwen3_vl": 3 * 8,
}
M_ROPE = [name for name in BY_HAND if name.startswith("qwen")]
BEGINS_AT = {"paligemma-siglip": 1}  # as in the stock model


def read(name: str) -> tuple[Tensor, Tensor]:
    """Where the visual tokens are in the prompt, and the positions that the rotary tables are made for."""
    model, processor = deepcopy(built(name, "stock"))
    laco.compress(model, processor, laco.LaCo(layer=1))
    batch = tiny.CASES[name].inputs(processor, ONE)
    seen: list[Tensor] = []
    tables: list[Any] = [
        module
        for key, module in family_of(model).language_model(model).named_modules()
        if key.endswith(("rotary_emb", "rotary_emb_local"))
    ]
    for table in tables:
        table.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([*args, *kwargs.values()][1]), with_kwargs=True
        )
    with torch.no_grad():
        model(**batch)
    assert tables
    assert all(torch.equal(positions, seen[0]) for positions in seen)
    return (batch["input_ids"][0] == model.config.image_token_id).nonzero().flatten(), seen[0]


@pytest.mark.parametrize("name", [name for name in BY_HAND if name not in M_ROPE])
def test_positions_count_the_merged_tokens(name):
    visual, positions = read(name)
    assert len(visual) == BY_HAND[name]
    first = BEGINS_AT.get(name, 0)
    assert positions.tolist() == [list(range(first, first + positions.shape[-1]))]
    assert visual[-1] < positions.shape[-1]


@pytest.mark.parametrize("name", M_ROPE)
def test_positions_in_three_dimensions_are_those_of_the_merged_grid(name):
    """Frame, row and column of 3 x 8 tokens behind eight of text; text goes on behind the widest side."""
    visual, positions = read(name)
    assert visual.tolist() == [*range(8, 8 + BY_HAND[name])]
    before, behind = list(range(8)), list(range(8 + 8, 8 + 8 + 6))
    assert positions[:, 0].tolist() == [
        [*before, *[8] * 24, *behind],
        [*before, *[8] * 8, *[9] * 8, *[10] * 8, *behind],
        [*before, *[8, 9, 10, 11, 12, 13, 14, 15] * 3, *behind],
    ]


@pytest.mark.skipif("minicpmv" not in tiny.CASES, reason="this version of transformers has no MiniCPM-V 4.6")
def test_minicpmv():
    """The whole picture and two slices, in tokens of 4 x 4 patches after merging."""
    visual, positions = read("minicpmv")
    assert positions[:, 0].tolist() == [list(range(positions.shape[-1]))] * 3
    assert len(visual) == 1 * 3 + 2 * (2 * 2)


def test_every_family_is_here():
    assert {*BY_HAND, "minicpmv"} == {*tiny.CASES, "minicpmv"}
