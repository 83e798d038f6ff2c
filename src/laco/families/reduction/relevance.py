"""What a selector by the question looks at, and is taught: the attention of the scoring layer, or how much the model's
own answer rests on each visual token.

For the latter the stock model reads prompt and answer with all tokens, and its attention is explained
(`methods.explainability`). These maps exist in full here, one sample at a time, in training alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laco.errors import LacoError
from laco.families.reduction.kept import entry, placed
from laco.families.reduction.lesson import Lesson, Taught
from laco.families.reduction.pictures import View
from laco.families.reduction.prompt import Prompt, Shown
from laco.methods import Signals
from laco.methods.explainability import relevance


def seen_of(
    model: Any, prompt: Prompt, row: int, view: View, rows_nD: Tensor, text_attention: Tensor | None
) -> Signals:
    """The signals of a view of a picture of a sample, `rows_nD` being the picture's input embeddings."""
    text = None
    if "text" in model.selector.needs and not len(text := prompt.text(row).detach()):
        raise LacoError(f"{model.selector.name} needs text, but the prompt has none beside its pictures")
    tokens_ND = rows_nD[view.rows.to(rows_nD.device)].detach()
    return Signals(grid=view.grid, tokens=tokens_ND, text=text, text_attention=text_attention)


def teach(
    model: Any,
    lesson: Lesson,
    prompt: Prompt,
    pictures: Sequence[Sequence[Shown]],
    attention: Sequence[Sequence[Sequence[Tensor]]],
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    others: Mapping[str, Any],
) -> None:
    """Gives the lesson the selector's loss for every view; of what learns from answers, where these are right.

    Arguments as of `scoring.text_attention`, `attention` being its result.
    """
    selector = model.selector
    assert isinstance(selector, Taught)
    for row, (shown, maps) in enumerate(zip(pictures, attention, strict=True)):
        if not shown:
            continue
        explained_TL: Tensor | None = None
        if selector.learns_from == "relevance":
            explained_TL = answer_relevance(
                model, lesson, prompt, row, inputs_embeds, attention_mask, position_ids, others
            )
        for picture, views in zip(shown, maps, strict=True):
            for view, map_HMN in zip(picture.views, views, strict=True):
                signals = seen_of(model, prompt, row, view, inputs_embeds[row, picture.columns], map_HMN)
                columns = picture.columns[view.rows.to(picture.columns.device)]
                target = map_HMN if explained_TL is None else explained_TL[:, columns]
                if target.sum() > 0:  # else the sample teaches nothing here
                    lesson.give(selector, selector.loss(signals, model.trained_module("selector"), target))


def answer_relevance(
    model: Any,
    lesson: Lesson,
    prompt: Prompt,
    row: int,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    others: Mapping[str, Any],
) -> Tensor:
    """(T, L) how much every token explains each of the T tokens of a sample's answers; T = 0 if one of them is wrong.

    An answer is right if the model would say it, token by token.
    """
    assert lesson.head is not None
    ids_L, said = prompt.ids_BL[row], prompt.said_BL[row].nonzero().flatten()
    there_BL = ~inputs_embeds[..., 0].isnan()
    entered = entry(
        (there_BL[row] & prompt.real_BL[row])[None],
        inputs_embeds[row : row + 1].detach().requires_grad_(),  # a graph, even where the whole model is frozen
        attention_mask if attention_mask is None else attention_mask[row : row + 1],
        placed(position_ids, 0, there_BL)[..., row : row + 1, :],
        of_sample(others, row),
    )
    mask, columns = entered.arguments["attention_mask"], entered.kept.columns_BK[0]
    if mask.ndim == 4 and mask.dtype == torch.bool:  # as eager attention takes it
        dtype = inputs_embeds.dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    out_TL = inputs_embeds.new_zeros(0, len(ids_L), dtype=torch.float32)
    with torch.enable_grad(), explaining(model):
        out = model.stock_forward(
            **entered.arguments | {"attention_mask": mask, "use_cache": False}, output_attentions=True
        )
        slots = torch.searchsorted(columns, said) - 1  # where an answer's token was put out
        logits_TV = lesson.head(out.last_hidden_state[0, slots])
        if len(said) and (logits_TV.argmax(dim=-1) == ids_L[said]).all():
            spoken = logits_TV.gather(1, ids_L[said][:, None])[:, 0]
            rows = [relevance(logit, out.attentions, int(slot)) for logit, slot in zip(spoken, slots, strict=True)]
            out_TL = out_TL.new_zeros(len(rows), len(ids_L)).index_copy(1, columns, torch.stack(rows))
    return out_TL


def of_sample(others: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The further arguments of a language model's forward for one sample; those of DeepStack count visual tokens."""
    out = dict(others)
    if (visual_BL := out.get("visual_pos_masks")) is not None:
        mine = visual_BL.nonzero()[:, 0] == row
        out["visual_pos_masks"] = visual_BL[row : row + 1]
        out["deepstack_visual_embeds"] = [level[mine].detach() for level in out["deepstack_visual_embeds"]]
    return out


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """While attention maps are wanted: eager, without dropout and without checkpoints of activations."""
    config: Any = model.config
    implementation, modes = config._attn_implementation, [(part, part.training) for part in model.modules()]
    config._attn_implementation = "eager"
    model.eval()
    try:
        yield
    finally:
        config._attn_implementation = implementation
        for part, training in modes:
            part.training = training
