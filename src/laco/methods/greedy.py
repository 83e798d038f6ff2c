"""Greedy choices of K among N tokens that several methods share. Of equally good tokens the first is taken.

A pick a step, and nothing in a step waits for the device or looks at tokens one by one. Where a step needs a row of a
matrix of products, `Product` makes the row and not the matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

# A row of a product costs about as much alone as this many rows of the whole product at once: memory against cores.
ROW_COST = 8


@dataclass(frozen=True)
class Product:
    """The matrix left @ right.T + identity * I, which is symmetric, not written out.

    Args:
        left_ND, right_ND: the factors.
        identity: what is added on the diagonal.
    """

    left_ND: Tensor
    right_ND: Tensor
    identity: float = 0.0

    def diagonal(self) -> Tensor:
        return torch.linalg.vecdot(self.left_ND, self.right_ND) + self.identity

    def row(self, pick_1: Tensor) -> Tensor:
        row_N = self.right_ND @ self.left_ND.index_select(0, pick_1)[0]
        return row_N.index_add_(0, pick_1, row_N.new_full((1,), self.identity)) if self.identity else row_N

    def matrix(self) -> Tensor:
        whole_NN = self.left_ND @ self.right_ND.T
        whole_NN.diagonal().add_(self.identity)
        return whole_NN


def gram(x_ND: Tensor) -> Product:
    """Products of all tokens with one another; cosines, if they have length 1."""
    return Product(x_ND, x_ND)


def reader(matrix: Tensor | Product, rows: int) -> Callable[[Tensor], Tensor]:
    """What gives the row of a pick (1,), where so many rows will be asked for."""
    if isinstance(matrix, Product):
        if ROW_COST * rows < len(matrix.left_ND):
            return matrix.row
        matrix = matrix.matrix()
    return lambda pick_1: matrix.index_select(0, pick_1)[0]


def farthest_points(distance_NN: Tensor, count: int) -> Tensor:
    """Max-min diversity: the token farthest from its nearest neighbour, then each time the one farthest from all picks.

    Args:
        distance_NN: (..., N, N), distance of token j (column) from token i (row).

    Returns:
        (..., count) indices in the order of picking, none twice.
    """
    alone = distance_NN.clone()
    alone.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    first = alone.amin(dim=-2).argmax(dim=-1, keepdim=True)
    return spread_out(first, lambda pick: distance_NN.take_along_dim(pick[..., None], dim=-2)[..., 0, :], count)


def farthest_tokens(x_NC: Tensor, count: int) -> Tensor:
    """(count,) `farthest_points` by distances 1 - cosine, without the (N, N) matrix where few are picked."""
    unit_NC = normalize(x_NC.float(), dim=-1)
    cosines = reader(gram(unit_NC), count)
    return spread_out(loneliest(unit_NC), lambda pick: 1 - cosines(pick), count)


def spread_out(first: Tensor, distances: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """(..., count) picks from (..., 1) the first; `distances` gives (..., N) of all tokens from a pick."""
    picks, nearest = [first], torch.full_like(distance := distances(first), torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distance).scatter_(-1, picks[-1], -torch.inf)
        picks.append(nearest.argmax(dim=-1, keepdim=True))
        distance = distances(picks[-1])
    return torch.cat(picks, dim=-1)


def loneliest(unit_NC: Tensor, block: int = 256, candidates: int = 16) -> Tensor:
    """(1,) the token whose nearest other token is farther than that of any other, by cosine.

    Others come a block at a time. Of the tokens that seem loneliest so far the nearest one is found among all, and who
    has already met a nearer one than that leaves the race; so most of the (N, N) cosines are never computed.
    """
    tokens = racers_R = torch.arange(len(unit_NC), device=unit_NC.device)
    nearest_R = torch.full_like(unit_NC[:, 0], -torch.inf)
    for others in tokens.split(block):
        nearest_R = torch.maximum(nearest_R, nearest_cosine(unit_NC, racers_R, others))
        seeming = racers_R[nearest_R.topk(min(candidates, len(racers_R)), largest=False).indices]
        limit = nearest_cosine(unit_NC, seeming, tokens).min()
        stay_R = nearest_R <= limit + 1e-5  # the same cosine may come out a little different in another product
        racers_R, nearest_R = racers_R[stay_R], nearest_R[stay_R]
    return racers_R[(1 - nearest_R).argmax()][None]


def nearest_cosine(unit_NC: Tensor, tokens_R: Tensor, others_M: Tensor) -> Tensor:
    """(R,) the largest cosine of some tokens with any of others, themselves left out."""
    cosines_RM = unit_NC[tokens_R] @ unit_NC[others_M].T
    return cosines_RM.masked_fill_(tokens_R[:, None] == others_M, -torch.inf).amax(dim=1)


def determinantal(kernel_NN: Tensor | Product, count: int, exhausted: float = 1e-6) -> Tensor:
    """Greedy MAP of a determinantal point process: each time the token that adds most to log det of the kernel.

    Fast form with an incremental Cholesky factor (Chen et al. 2018, arXiv 1709.05135). A token of whose diagonal entry
    no more than the fraction `exhausted` is left depends on the picks up to rounding noise (and roots of negative
    numbers); where that are all, the kernel's rank is used up, and the largest diagonal entries fill up.

    Returns:
        (count,) indices in the order of picking, none twice.
    """
    row = reader(kernel_NN, count)
    rest_N = kernel_NN.diagonal().clone()  # -inf once it is picked, as in `gain_N`
    gain_N, noise_N = rest_N.clone(), exhausted * rest_N
    factor_KN = rest_N.new_zeros(count, len(rest_N))
    picks: list[Tensor] = []
    for step in range(count):
        best_1, pick_1 = gain_N.where(gain_N > noise_N, -torch.inf).max(dim=0, keepdim=True)
        pick_1 = torch.where(best_1.isinf(), rest_N.argmax(dim=0, keepdim=True), pick_1)
        picks.append(pick_1)
        projected_N = factor_KN[:step].index_select(1, pick_1)[:, 0] @ factor_KN[:step]
        factor_KN[step] = (row(pick_1) - projected_N) / gain_N.index_select(0, pick_1).sqrt()
        gain_N -= factor_KN[step].square()
        gain_N.index_fill_(0, pick_1, -torch.inf)
        rest_N.index_fill_(0, pick_1, -torch.inf)
    return torch.cat(picks)


def coverage(
    similarity_MN: Tensor,
    count: int,
    weight_N: Tensor | None = None,
    bonus_N: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """Facility location: each time the token j with the largest weight_j * sum_i max(0, s_ij - what already covers i).

    A pick changes the gains only through the rows that it covers better than all picks before, and these become few:
    of random tokens 1 / k of all rows at pick k. What they lose is subtracted. Sums are in float64, so the picks are
    those of the plain rule computed there; what is left of a gain by rounding counts as nothing.

    Args:
        similarity_MN: how well token j covers what row i stands for.
        count: picks.
        weight_N: factor of each token's gain, not negative; 1 if left out.
        bonus_N: what comes on top of it; 0 if left out.
        block: rows looked at at once, for the processor's cache.

    Returns:
        (count,) indices in the order of picking, none twice.
    """
    covered_M = torch.zeros_like(similarity_MN[:, 0])
    gain_N = torch.zeros_like(similarity_MN[0], dtype=torch.double)
    # Once: taking memory anew, as a sum in another dtype does, too, costs more than what is done in it.
    space_RN = torch.empty_like(similarity_MN[:block])
    exact_RN = torch.empty_like(space_RN, dtype=torch.double)
    for part_RN in similarity_MN.split(block):
        gain_N += exact_RN[: len(part_RN)].copy_(part_RN).clamp_(min=0).sum(dim=0)
    weight_N = torch.ones_like(gain_N) if weight_N is None else weight_N.double()
    free_N = torch.zeros_like(gain_N) if bonus_N is None else bonus_N.to(gain_N)  # -inf once it is picked
    picks: list[Tensor] = []
    noise = 1e-12 * gain_N.max()
    for _ in range(count):
        pick_1 = (weight_N * gain_N.where(gain_N > noise, 0) + free_N).argmax(dim=0, keepdim=True)
        picks.append(pick_1)
        free_N.index_fill_(0, pick_1, -torch.inf)
        seen_M = similarity_MN.index_select(1, pick_1)[:, 0]
        for rows_R in (seen_M > covered_M).nonzero()[:, 0].split(block):
            old_R1, new_R1 = covered_M[rows_R, None], seen_M[rows_R, None]
            part_RN = torch.index_select(similarity_MN, 0, rows_R, out=space_RN[: len(rows_R)])
            torch.minimum(part_RN, new_R1, out=part_RN)
            torch.maximum(part_RN, old_R1, out=part_RN)
            gain_N -= exact_RN[: len(rows_R)].copy_(part_RN).sum(dim=0)
            gain_N += old_R1.sum(dtype=torch.double)
        covered_M = torch.maximum(covered_M, seen_M)
    return torch.cat(picks)


def independent_set(
    weight_N: Tensor, similarity_NN: Tensor | Product, threshold: float, count: int
) -> tuple[Tensor, int]:
    """Each time the heaviest token that is not more like any pick than `threshold`.

    Returns:
        (count,) picks in order, and how many of them keep the threshold; the others fill up by weight.
    """
    order_N = weight_N.argsort(descending=True, stable=True)
    row = reader(similarity_NN, count)
    # By weight: 2 free, 1 too like a pick, 0 picked; so the first of the largest is what comes next.
    state_N = torch.full_like(order_N, 2, dtype=torch.int8)
    picks, states = [], []
    for _ in range(count):
        state_1, place_1 = state_N.max(dim=0, keepdim=True)
        picks.append(order_N.index_select(0, place_1))
        states.append(state_1)
        alike_N = row(picks[-1]).index_select(0, order_N) > threshold
        state_N = torch.minimum(state_N, 2 - alike_N.to(state_N.dtype)).index_fill_(0, place_1, 0)
    return torch.cat(picks), int((torch.cat(states) == 2).sum())
