"""What a selector leaves of a picture, laid out over the rows that the language model would read of all of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from laco.errors import LacoError
from laco.families.reduction.pictures import View
from laco.methods import Plan


class Choice(NamedTuple):
    """What is left of a view: the plan, whose rows are `prefix` tokens first, and the features that it is about, if not
    the tokens.
    """

    view: View
    plan: Plan
    prefix: int
    features: Tensor | None


def starts(views: Sequence[View]) -> list[int]:
    """Where each view begins among the values that the encoder gives, line breaks left out."""
    sizes = [view.grid.tokens for view in views]
    return [sum(sizes[:index]) for index in range(len(sizes))]


def laid_out(tokens_nD: Tensor, choices: Sequence[Choice], project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(n, D) of a picture, rows of NaN where a token is not there; a line break leaves with the last of its row.

    Raises:
        LacoError: a plan keeps a token twice, or one that is not there.
    """
    out_nD = torch.full_like(tokens_nD, torch.nan)
    part_n = torch.zeros(len(tokens_nD), dtype=torch.long, device=out_nD.device)
    for number, (view, plan, prefix, features) in enumerate(choices, 1):
        stay = plan.kept.unique()
        if len(stay) < len(plan.kept) or (stay < 0).any():
            raise LacoError(
                "the plan of the selector keeps a token twice, or one that is not there, which has no place in a model;"
                " leave out strict_reference, with which plans may be so"
            )
        rows = view.rows.to(out_nD.device)
        kept, own = plan.kept - prefix, plan.kept >= prefix
        place = rows[kept.clamp(min=0)]
        free = rows[~torch.isin(rows, place[own])][: int((~own).sum())]
        shown = own.clone()
        if features is not None and project is not None:  # CLS, where it is kept, takes the first place that is free
            place[(~own).nonzero().flatten()[: len(free)]] = free
            shown[(~own).nonzero().flatten()[: len(free)]] = True
        if plan.weights is None and bool(own[shown].all()):
            values = tokens_nD[place]
        elif features is not None and project is not None:
            values = project(plan(features))
        else:
            weights = plan.weights
            assert weights is not None
            values = Plan(plan.kept, weights[:, prefix:])(tokens_nD[rows])
        out_nD = out_nD.index_copy(0, place[shown], values[shown].to(out_nD.dtype))
        part_n[rows] = number
    return with_breaks(tokens_nD, out_nD, part_n)


def with_breaks(tokens_nD: Tensor, out_nD: Tensor, part_n: Tensor) -> Tensor:
    """Puts back what belongs to no view (`part` 0), behind rows of which anything is left."""
    breaks = (part_n == 0).nonzero().flatten()
    if not len(breaks):
        return out_nD
    left_n = torch.nn.functional.pad((~out_nD[:, 0].isnan() & (part_n > 0)).cumsum(0), (1, 0))
    begins_n = torch.ones_like(part_n, dtype=torch.bool)
    begins_n[1:] = (part_n[1:] != part_n[:-1]) & (part_n[1:] > 0)
    index_n = torch.arange(len(part_n), device=part_n.device)
    begin_n = torch.where(begins_n, index_n, 0).cummax(0).values[breaks - 1] * (breaks > 0)
    stay = breaks[(left_n[breaks] > left_n[begin_n]) | (begin_n == breaks)]
    return out_nD.index_copy(0, stay, tokens_nD[stay])
