"""Choices by what a layer of the language model says: how much the question attends to each visual token.

The language model runs over the whole prompt, stops before the scoring layer, and then runs over what is left. It does
so where it is called, with features of pictures, positions and masks as they are given, so pictures are encoded once.

Shape letters as in `laco.methods.decoder`, B samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.families.reduction.ahead import Reached, run_up_to
from laco.families.reduction.kept import Entry, entry, placed
from laco.families.reduction.layout import Choice, laid_out
from laco.families.reduction.lesson import LESSON
from laco.families.reduction.pictures import View
from laco.families.reduction.projections import at, queries_keys
from laco.families.reduction.prompt import Prompt, Shown, seen_pairs
from laco.families.reduction.relevance import seen_of, teach
from laco.methods.decoder import attention_rows
from laco.methods.selector import Positions


def without_rest(
    model: Any,
    prompt: Prompt,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    others: Mapping[str, Any],
) -> Tensor:
    """(B, L, D) input embeddings, rows of NaN where the selector of a language model leaves a visual token out.

    Behind a cache, only what is new is looked at. Arguments as of the model's forward.

    Raises:
        LacoError: nothing is known of the pictures, or there is no text behind them.
    """
    selector = model.selector
    pictures = prompt.pictures(selector.name)
    given = (inputs_embeds.detach(), attention_mask, position_ids, others)
    lesson = LESSON.get() if model.training and selector.trained else None
    attention: list[list[list[Any]]] = [[[None] * len(picture.views) for picture in row] for row in pictures]
    if "text_attention" in selector.needs or lesson is not None:
        attention = text_attention(model, prompt, pictures, *given)
    if lesson is not None:
        teach(model, lesson, prompt, pictures, attention, *given)
    out_BLD = inputs_embeds.clone()
    for row, (shown, maps) in enumerate(zip(pictures, attention, strict=True)):
        for picture, views in zip(shown, maps, strict=True):
            rows_nD = inputs_embeds[row, picture.columns]
            choices = []
            for view, map_HMN in zip(picture.views, views, strict=True):
                signals = seen_of(model, prompt, row, view, rows_nD, map_HMN)
                choices.append(Choice(view, selector(signals, model.trained_module("selector")), 0, None))
            out_BLD[row, picture.columns] = laid_out(rows_nD, choices)
    return out_BLD


@torch.no_grad()
def text_attention(
    model: Any,
    prompt: Prompt,
    pictures: Sequence[Sequence[Shown]],
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    others: Mapping[str, Any],
) -> list[list[list[Tensor]]]:
    """(H, M, N) `Signals.text_attention` of every view of every picture of every sample."""
    selector = model.selector
    number = selector.scoring_layer(len(model.layers))
    grouped = [[[selector.groups(view.grid.frames) for view in picture.views] for picture in row] for row in pictures]
    passes = max((len(groups) for row in grouped for picture in row for groups in picture), default=0)
    there_BL = ~inputs_embeds[..., 0].isnan()
    position_ids = placed(position_ids, 0, there_BL)
    out: list[list[list[Tensor]]] = [[[torch.empty(0)] * len(picture.views) for picture in row] for row in pictures]
    for turn in range(passes):
        keep_BL, now = there_BL.clone(), position_ids.clone()
        for row, shown in enumerate(pictures):
            for picture, views in zip(shown, grouped[row], strict=True):
                for view, groups in zip(picture.views, views, strict=True):
                    if len(groups) > 1:
                        show(keep_BL[row], now[..., row, :], picture.columns, view, groups[turn % len(groups)])
        # A group of frames stands like a video of its own: nothing is missing in front of what follows it.
        alone: Positions = "renumber" if passes > 1 and now.ndim == 2 else "keep"
        entered = entry(keep_BL, inputs_embeds, attention_mask, now, others, positions=alone)
        reached = run_up_to(model, number, entered)
        for row, shown in enumerate(pictures):
            if not shown:
                continue
            attention_HML = sample_attention(model, number, prompt, row, entered, reached)
            for index, picture in enumerate(shown):
                for place, (view, groups) in enumerate(zip(picture.views, grouped[row][index], strict=True)):
                    if turn >= len(groups):
                        continue
                    rows = in_frames(view.rows.to(keep_BL.device), view)
                    map_HMFn = attention_HML[..., picture.columns[rows]]
                    if turn:
                        earlier_HMFn = out[row][index][place].unflatten(-1, rows.shape)
                        earlier_HMFn[..., groups[turn], :] = map_HMFn[..., groups[turn], :]
                        map_HMFn = earlier_HMFn
                    out[row][index][place] = map_HMFn.flatten(-2)
    return out


def in_frames(x_N: Tensor, view: View) -> Tensor:
    return x_N.view(view.grid.frames, -1)


def show(keep_L: Tensor, position_L: Tensor, columns: Tensor, view: View, group: range) -> None:
    """Leaves of a video these frames alone, in place; they get the positions of its first ones."""
    columns_Fn = in_frames(columns[view.rows.to(columns.device)], view)
    keep_L[columns_Fn.flatten()] = False
    keep_L[columns_Fn[group].flatten()] = True
    if int(columns_Fn[-1, -1] - columns_Fn[0, 0]) < columns_Fn.numel():  # no text between the frames
        position_L[..., columns_Fn[group]] = position_L[..., columns_Fn[: len(group)]]


def sample_attention(model: Any, number: int, prompt: Prompt, row: int, entered: Entry, reached: Reached) -> Tensor:
    """(H, M, L) softmax attention of a sample's text behind its pictures to all tokens; 0 where one did not enter."""
    kept, (cos, sin) = entered.kept, reached.kwargs["position_embeddings"]
    columns_K = kept.columns_BK[row]
    slots = ((columns_K >= 0) & prompt.real_BL[row, columns_K]).nonzero().flatten()
    columns = columns_K[slots]
    rows_M = prompt.behind(row)[columns].nonzero().flatten()
    if not len(rows_M):
        raise LacoError(f"{model.selector.name} needs text behind the pictures, but the prompt has none")
    layer, mask = model.layers[number], entered.arguments["attention_mask"]
    q_HLd, k_GLd = queries_keys(
        layer, reached.x_BKD[row, slots], at(cos, row)[..., slots, :], at(sin, row)[..., slots, :]
    )
    visible_ML = seen_pairs(mask)[row, 0, slots[rows_M][:, None], slots] if mask.ndim == 4 else None
    attention_HMK = attention_rows(q_HLd[:, rows_M], k_GLd, rows_M, layer.self_attn.scaling, visible_ML)
    out_HML = attention_HMK.new_zeros(*attention_HMK.shape[:2], prompt.real_BL.shape[1])
    return out_HML.index_copy(-1, columns, attention_HMK)
