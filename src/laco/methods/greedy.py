"""Greedy choices of K among N tokens that several methods share. Of equally good tokens the first is taken."""

import torch
from torch import Tensor


def farthest_points(distance_NN: Tensor, count: int) -> Tensor:
    """Max-min diversity: the token farthest from its nearest neighbour, then each time the one farthest from all picks.

    Args:
        distance_NN: (..., N, N), distance of token j (column) from token i (row).

    Returns:
        (..., count) indices in the order of picking, none twice.
    """
    alone = distance_NN.clone()
    alone.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    picks = [alone.amin(dim=-2).argmax(dim=-1, keepdim=True)]
    nearest_N = torch.full_like(distance_NN[..., 0, :], torch.inf)
    for _ in range(count - 1):
        nearest_N = torch.minimum(nearest_N, distance_NN.take_along_dim(picks[-1][..., None], dim=-2)[..., 0, :])
        nearest_N.scatter_(-1, picks[-1], -torch.inf)
        picks.append(nearest_N.argmax(dim=-1, keepdim=True))
    return torch.cat(picks, dim=-1)


def determinantal(kernel_NN: Tensor, count: int, exhausted: float = 1e-6) -> Tensor:
    """Greedy MAP of a determinantal point process: each time the token that adds most to log det of the kernel.

    Fast form with an incremental Cholesky factor (Chen et al. 2018, arXiv 1709.05135). Once no token adds more than
    `exhausted` times the largest diagonal entry, the kernel's rank is used up and what follows would be rounding noise
    (and roots of negative numbers): the largest diagonal entries fill up.

    Returns:
        (count,) indices in the order of picking, none twice.
    """
    diagonal_N = kernel_NN.diagonal()
    gain_N, least = diagonal_N.clone(), exhausted * diagonal_N.max()
    factor_KN = kernel_NN.new_zeros(count, len(kernel_NN))
    free_N = torch.ones_like(gain_N, dtype=torch.bool)
    picks: list[Tensor] = []
    for step in range(count):
        pick = gain_N.argmax()
        if gain_N[pick] <= least:
            rest = torch.where(free_N, diagonal_N, -torch.inf).argsort(descending=True, stable=True)
            return torch.stack([*picks, *rest[: count - step]])
        picks.append(pick)
        free_N[pick] = False
        projected_N = factor_KN[:step, pick] @ factor_KN[:step]
        factor_KN[step] = (kernel_NN[pick] - projected_N) / gain_N[pick].sqrt()
        gain_N -= factor_KN[step].square()
        gain_N[pick] = -torch.inf
    return torch.stack(picks)


def coverage(similarity_MN: Tensor, count: int, weight_N: Tensor | None = None, block: int = 16) -> Tensor:
    """Facility location: each time the token j with the largest weight_j * sum_i max(0, s_ij - what already covers i).

    Gains only shrink as more is covered, so an old gain bounds the new one from above: only tokens whose old gain could
    still win are computed anew (Minoux's lazy greedy), a block at a time. The picks are those of the plain rule.

    Args:
        similarity_MN: how well token j covers what row i stands for.
        count: picks.
        weight_N: factor of each token's gain, not negative; 1 if left out.
        block: gains computed at once.

    Returns:
        (count,) indices in the order of picking, none twice.
    """
    similarity_NM = similarity_MN.T.contiguous()
    weight_N = similarity_NM.new_ones(len(similarity_NM)) if weight_N is None else weight_N
    covered_M = similarity_NM.new_zeros(similarity_NM.shape[1])
    bound_N = weight_N * similarity_NM.clamp(min=0).sum(dim=1)
    picked_N = torch.zeros_like(bound_N, dtype=torch.bool)
    picks = []
    for _ in range(count):
        fresh_N = picked_N.clone()
        while True:
            pick = bound_N.argmax()
            if fresh_N[pick]:
                break
            top = bound_N.topk(min(block, len(bound_N))).indices
            stale = torch.cat([pick[None], top[~fresh_N[top]]])  # of equal bounds, topk may leave out the first
            bound_N[stale] = weight_N[stale] * (similarity_NM[stale] - covered_M).clamp_(min=0).sum(dim=1)
            fresh_N[stale] = True
        picks.append(pick)
        covered_M = torch.maximum(covered_M, similarity_NM[pick])
        bound_N[pick], picked_N[pick] = -torch.inf, True
    return torch.stack(picks)
