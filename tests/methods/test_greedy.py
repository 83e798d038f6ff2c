"""Greedy choices against slow and obvious ones, and what they never write out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from laco.grid import Grid
from laco.methods import CDPruner, DivPrune, GreedyPrune, OTPrune, Signals
from laco.methods.cdpruner import conditional_kernel
from laco.methods.greedy import (
    Product,
    coverage,
    determinantal,
    farthest_points,
    farthest_tokens,
    gram,
    independent_set,
    loneliest,
    reader,
)
from laco.methods.selector import cosines
from laco.methods.vispruner import NEAR, without_duplicates


def clustered(tokens: int = 300, width: int = 12, clusters: int = 9) -> Tensor:
    """Tokens around a few centres, as in a picture."""
    torch.manual_seed(1)
    return torch.randn(clusters, width)[torch.randint(clusters, (tokens,))] + 0.4 * torch.randn(tokens, width)


KINDS = {"random": lambda: torch.randn(300, 12), "clustered": clustered}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def test_a_product_is_its_matrix():
    left, right = torch.randn(40, 5), torch.randn(40, 5)
    for identity in (0.0, 2.0):
        lazy, matrix = Product(left, right, identity), left @ right.T + identity * torch.eye(40)
        torch.testing.assert_close(lazy.diagonal(), matrix.diagonal())
        for rows in (1, 40):
            torch.testing.assert_close(reader(lazy, rows)(torch.tensor([7])), matrix[7])
        torch.testing.assert_close(lazy.matrix(), matrix)


@both_kinds
@pytest.mark.parametrize("count", [1, 5, 30, 300])
def test_farthest_tokens_are_farthest_points(kind, count):
    x = KINDS[kind]()
    picks = farthest_tokens(x, count)
    assert torch.equal(picks, farthest_points(1 - cosines(x), count))
    assert len(picks.unique()) == count


@both_kinds
def test_the_loneliest_token(kind):
    for seed in range(5):
        x = normalize(KINDS[kind]() + 0.1 * torch.randn(300, 12, generator=torch.Generator().manual_seed(seed)), dim=-1)
        distance = (1 - x.double() @ x.double().T).fill_diagonal_(torch.inf)
        for block, candidates in ((32, 3), (299, 16), (1000, 400)):
            assert loneliest(x, block, candidates).tolist() == [int(distance.amin(dim=1).argmax())]
    assert loneliest(normalize(torch.ones(50, 4), dim=-1), 7).tolist() == [0]
    assert loneliest(torch.ones(1, 1)).tolist() == [0]


def test_most_tokens_leave_the_race_for_the_loneliest_early():
    x = normalize(clustered(2000), dim=-1)
    with FlopCounterMode(display=False) as counter:
        loneliest(x)
    assert counter.get_total_flops() < 0.3 * 2 * 2000 * 2000 * 12


def slow_determinantal(kernel: Tensor, count: int) -> list[int]:
    picks: list[int] = []
    for _ in range(count):
        rest = [j for j in range(len(kernel)) if j not in picks]
        picks.append(max(rest, key=lambda j: float(torch.det(kernel[[*picks, j]][:, [*picks, j]]))))
    return picks


def test_determinants_of_a_product():
    x = torch.randn(60, 8)
    relevance = torch.rand(60) + 0.1
    kernel = conditional_kernel(x, relevance)
    matrix = relevance[:, None] * cosines(x) * relevance
    torch.testing.assert_close(kernel.matrix(), matrix)
    assert determinantal(kernel, 6).tolist() == slow_determinantal(matrix.double(), 6)
    assert torch.equal(determinantal(kernel, 8), determinantal(matrix, 8))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_kernel_whose_rank_is_used_up(lazy):
    x = torch.randn(90, 3) * torch.linspace(1, 2, 90)[:, None]
    product = gram(x)
    picks = determinantal(product if lazy else product.matrix(), 10).tolist()
    assert picks[:3] == slow_determinantal(product.matrix().double(), 3)
    longest = product.diagonal().argsort(descending=True).tolist()
    assert picks[3:] == [token for token in longest if token not in picks[:3]][:7]
    assert determinantal(gram(torch.ones(40, 4)), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("rows", "tokens"), [(300, 300), (350, 300), (40, 300), (1, 20)])
@pytest.mark.parametrize("weighted", [False, True])
@both_kinds
def test_coverage_is_the_plain_rule(kind, weighted, rows, tokens):
    x = KINDS[kind]()
    similarity = cosines(torch.cat([x, torch.randn(50, 12)])[-rows:], x[:tokens])
    weight = torch.rand(tokens) + 0.1 if weighted else torch.ones(tokens)
    covered, picks = torch.zeros(rows, dtype=torch.double), []
    for _ in range(min(60, tokens)):
        gains = weight.double() * (similarity.double() - covered[:, None]).clamp(min=0).sum(dim=0)
        if not gains.any():
            break
        gains[picks] = -torch.inf
        picks.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarity[:, picks[-1]].double())
    found = coverage(similarity, min(60, tokens), weight)
    assert found[: len(picks)].tolist() == picks
    assert len(found.unique()) == min(60, tokens)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(300, 64, generator=torch.manual_seed(0)) + 5,  # gains are small beside what is covered at first
        torch.randn(5, 64, generator=torch.manual_seed(1)).repeat(20, 1),  # after five picks nothing is to gain
    ],
    ids=["much alike", "equal"],
)
def test_coverage_is_the_plain_rule_to_the_last_gain(x):
    similarity = cosines(x).double().round(decimals=6).float()  # so those of equal tokens are equal
    covered, picks = torch.zeros(len(similarity), dtype=torch.double), []
    for _ in range(80):
        gains = (similarity.double() - covered[:, None]).clamp(min=0).sum(dim=0)
        gains[picks] = -torch.inf
        picks.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarity[:, picks[-1]].double())
    assert coverage(similarity, 80).tolist() == picks


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("count", [1, 8, 50])
def test_an_independent_set_by_hand(threshold, count):
    x = clustered(50)
    weight, similarity = torch.rand(50), cosines(x)
    weight[10:14] = weight[20]  # of equal weights the first
    order = sorted(range(50), key=lambda i: (-float(weight[i]), i))
    picks: list[int] = []
    for token in order:
        if len(picks) < count and all(float(similarity[pick, token]) <= threshold for pick in picks):
            picks.append(token)
    filled = picks + [token for token in order if token not in picks][: count - len(picks)]
    for given in (similarity, gram(normalize(x, dim=-1))):
        found, kept = independent_set(weight, given, threshold, count)
        assert found.tolist() == filled
        assert kept == len(picks)


@pytest.mark.parametrize(("count", "step"), [(5, 8), (80, 3), (150, 1), (0, 8)])
def test_twins_are_looked_for_in_the_whole_list_where_they_must(count, step):
    similarity, order = cosines(clustered(150)), torch.randperm(150)
    assert NEAR < 75
    rest = order.tolist()
    while len(rest) > count:
        dropped = min(step, len(rest) - count, (len(rest) + 1) // 2)
        even, odd = rest[::2], rest[1::2]
        twin = {i: max((float(similarity[i, j]) for j in odd), default=1.0) for i in even}
        rest = sorted(even, key=lambda i: -twin[i])[dropped:] + odd
    assert without_duplicates(similarity, order, count, step).tolist() == rest


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation puts out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("method", [DivPrune(keep=20), CDPruner(keep=20), OTPrune(keep=20), GreedyPrune(keep=20)])
def test_no_matrix_of_all_pairs_is_written_out(method):
    tokens = clustered(1200)
    given = Signals(grid=Grid(1, 30, 40), tokens=tokens, text=torch.randn(6, 12))
    with Largest() as seen:
        method(given)
    assert tokens.numel() <= seen.numel <= 1200 * 1200 / 4
