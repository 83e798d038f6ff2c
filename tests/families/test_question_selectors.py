"""Selectors by the question's attention in a layer of the language model: against the stock model's own attention."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import laco
import tiny
from families.matrix import ONE, TWO, built
from families.test_reductions import (
    CASES,
    LANGUAGE_LAYERS,
    every_case,
    generated,
    last_logits,
    prompts,
    reduced,
    views_by_hand,
)
from laco.families import family_of
from laco.families.reduction import kept_columns
from laco.grid import Grid
from laco.methods import FlexSelect, Signals

VIDEOS = ["llava_onevision-siglip", "qwen2_vl-qwen2_vl", "qwen2_5_vl-qwen2_5_vl", "qwen3_vl-qwen3_vl"]


def scored(name: str) -> int:
    return FlexSelect().scoring_layer(LANGUAGE_LAYERS[name])


def read_by_language_model(model: Any, batch: Any) -> dict[str, Any]:
    """What the language model of a stock model is called with."""
    seen: dict[str, Any] = {}
    language_model = family_of(model).language_model(model)
    hook = language_model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    last_logits(model, batch)
    hook.remove()
    return seen


def attention_of_stock(model: Any, seen: dict[str, Any], layer: int, columns: Tensor | None = None, **given) -> Tensor:
    """(H, L, L) of a layer, over some of the input's columns."""
    columns = torch.arange(seen["inputs_embeds"].shape[1]) if columns is None else columns
    language_model = deepcopy(family_of(model).language_model(model))
    language_model.set_attn_implementation("eager")
    extra: dict[str, Any] = {}
    if (mask := seen.get("visual_pos_masks")) is not None:
        there = torch.isin(mask[0].nonzero().flatten(), columns)
        extra = {
            "visual_pos_masks": mask[:, columns],
            "deepstack_visual_embeds": [level[there] for level in seen["deepstack_visual_embeds"]],
        }
    with torch.no_grad():
        out = language_model(
            inputs_embeds=seen["inputs_embeds"][:, columns],
            attention_mask=torch.ones(1, len(columns), dtype=torch.long),
            output_attentions=True,
            **extra,
            **given,
        )
    return out.attentions[layer][0]


def left_of(model: Any, batch: Any) -> list[int]:
    """Which columns of the prompt the language model computes."""
    with torch.no_grad():
        (columns, *_) = kept_columns(model(**batch, use_cache=True).past_key_values)
    return columns[0].tolist()


@every_case
def test_what_stays_is_what_the_question_attends_to_in_the_stock_model(name):
    method = FlexSelect(keep=0.3)
    model, _ = reduced(name, method)
    stock, its = built(name, "stock")
    batch = tiny.CASES[name].inputs(its, prompts(name)[-1])
    seen = read_by_language_model(stock, batch)
    attention_HLL = attention_of_stock(stock, seen, scored(name), position_ids=seen.get("position_ids"))
    columns = (batch["input_ids"][0] == stock.config.image_token_id).nonzero().flatten()
    question = torch.arange(int(columns[-1]) + 1, attention_HLL.shape[-1])
    wanted, structure = set(), set(range(len(columns)))
    for rows, grid in views_by_hand(name, stock, batch, len(columns)):
        attended = attention_HLL[:, question][..., columns[rows]]
        kept = rows[method(Signals(grid=grid, text_attention=attended)).kept]
        wanted |= set(columns[kept].tolist())
        structure -= set(rows.tolist())
    left, visual = set(left_of(model, batch)), set(columns.tolist())
    assert (left & visual) - {int(columns[row]) for row in structure} == wanted
    assert left - visual == set(range(attention_HLL.shape[-1])) - visual


@pytest.mark.parametrize("name", VIDEOS)
def test_groups_of_frames_are_scored_like_videos_of_their_own(name):
    method = FlexSelect(keep=0.4, max_frames=2)
    model, _ = reduced(name, method)
    stock, its = built(name, "stock")
    batch = tiny.CASES[name].videos(stock, its, 5 if name.startswith("llava") else 10, 0)
    seen = read_by_language_model(stock, batch)
    ids = batch["input_ids"]
    columns = (ids[0] == stock.config.video_token_id).nonzero().flatten()
    breaks = int(name.startswith("llava"))  # a line break at the end
    columns = columns[: len(columns) - breaks]
    frames_Fn = columns.view(5, -1)
    every, question = torch.arange(ids.shape[1]), torch.arange(int(columns[-1]) + 1 + breaks, ids.shape[1])
    attended = torch.empty(2, len(question), *frames_Fn.shape)
    for group in ([0, 3], [1, 4], [2]):
        shown = every[~torch.isin(every, columns) | torch.isin(every, frames_Fn[group])]
        given = fresh_positions(stock, batch, shown, len(group), seen)
        attention_HLL = attention_of_stock(stock, seen, scored(name), shown, **given)
        rows = torch.isin(shown, question).nonzero().flatten()
        places = torch.isin(shown, frames_Fn[group]).nonzero().flatten()
        attended[:, :, group] = attention_HLL[:, rows][..., places].unflatten(-1, (len(group), -1))
    # The shape of frames does not matter to the method.
    signals = Signals(grid=Grid(5, 1, frames_Fn.shape[1]), text_attention=attended.flatten(2))
    wanted = columns[method(signals).kept].tolist()
    assert [column for column in left_of(model, batch) if column in set(columns.tolist())] == wanted
    cached, uncached = (generated(model, batch, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def fresh_positions(stock: Any, batch: Any, shown: Tensor, frames: int, seen: dict[str, Any]) -> dict[str, Any]:
    """Those that the stock model gives to a prompt with a video of so many frames; with times between the frames, of
    which all stay, those of the whole.
    """
    if "video_grid_thw" not in batch:
        return {"position_ids": torch.arange(len(shown))[None]}
    if stock.config.model_type == "qwen3_vl":
        return {"position_ids": seen["position_ids"][..., shown]}
    grid = batch["video_grid_thw"].clone()
    grid[0, 0] = frames
    seconds = {name: batch[name] for name in ("second_per_grid_ts",) if name in batch}
    positions, _ = stock.model.get_rope_index(
        batch["input_ids"][:, shown],
        video_grid_thw=grid,
        mm_token_type_ids=batch["mm_token_type_ids"][:, shown],
        **seconds,
    )
    return {"position_ids": positions}


@pytest.mark.parametrize("name", ["llava-siglip", "qwen2_5_vl-qwen2_5_vl"])
def test_the_vision_encoder_runs_once(name):
    model, processor = reduced(name, FlexSelect(keep=0.3))
    batch = tiny.CASES[name].inputs(processor, prompts(name)[0])
    runs: list[Any] = []
    family_of(model).encoder(model).register_forward_hook(lambda *_: runs.append(1))
    last_logits(model, batch)
    assert len(runs) == 1
    generated(model, batch)
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["llava-siglip", "qwen3_vl-qwen3_vl"])
def test_features_that_are_handed_over(name):
    from laco.families.compat import given_features

    model, processor = reduced(name, FlexSelect(keep=0.3))
    batch = dict(tiny.CASES[name].inputs(processor, *prompts(name)))
    wanted = last_logits(model, batch)
    seen = {key: batch.pop(key) for key in ("pixel_values", "image_grid_thw") if key in batch}
    with torch.no_grad():
        features = model.get_image_features(**seen, return_dict=True)
        with given_features(
            model, seen, batch | {k: v for k, v in seen.items() if "grid" in k}, {"image": features}
        ) as given:
            logits = model(**given).logits[:, -1]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


def test_beams_share_the_pictures_of_their_sample():
    model, processor = reduced("llava-siglip", FlexSelect(keep=0.3))
    batch = tiny.CASES["llava-siglip"].inputs(processor, *prompts("llava-siglip")[:3])
    cached, uncached = (generated(model, batch, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_another_question_leaves_other_tokens():
    model, _ = reduced("llava-siglip", FlexSelect(keep=0.2))
    picture, its = ONE[1], built("llava-siglip", "stock")[1]
    left = [
        left_of(model, tiny.CASES["llava-siglip"].inputs(its, (f"<image> {question}", picture)))[: 7 + 1]
        for question in ("what is here now?", "no or say well not?")
    ]
    assert left[0] != left[1]


def test_text_behind_the_pictures_is_needed():
    model, processor = reduced("llava-siglip", FlexSelect(keep=0.3))
    batch = tiny.CASES["llava-siglip"].inputs(processor, TWO)
    with pytest.raises(laco.LacoError, match="needs text behind the pictures"):
        model(**batch)


def test_every_family_is_tried():
    assert {name for name in VIDEOS if tiny.CASES[name].videos} <= set(CASES)


def test_flexselect_in_a_compiled_model():
    """The pass that scores ends before the last layers, which no graph can."""
    name = "llava-siglip"
    model, processor = reduced(name, FlexSelect(keep=0.4))
    batch = tiny.CASES[name].inputs(processor, (f"{ONE[0]} or not?", ONE[1]))
    wanted = last_logits(model, batch)
    torch.compiler.reset()
    torch.testing.assert_close(last_logits(torch.compile(model, backend="eager"), batch), wanted)
