"""Selectors that look at nothing: what the others have to beat."""

import pytest
import torch

from laco.errors import LacoError
from laco.grid import Grid, pool_map
from laco.methods import GridPool, RandomTokens, Signals, UniformStride


def test_uniform_stride_by_hand():
    assert UniformStride(keep=4)(Signals(grid=Grid(1, 3, 4))).kept.tolist() == [1, 4, 7, 10]
    assert UniformStride(keep=3)(Signals(grid=Grid(2, 1, 5))).kept.tolist() == [1, 5, 8]
    assert UniformStride(keep=1)(Signals(grid=Grid(1, 1, 9))).kept.tolist() == [4]


@pytest.mark.parametrize("tokens", [1, 7, 144, 577])
def test_uniform_stride_is_even(tokens):
    for count in {1, min(2, tokens), tokens // 3 + 1, tokens}:
        kept = UniformStride(keep=count)(Signals(grid=Grid(1, 1, tokens))).kept
        assert len(kept.unique()) == count
        steps = kept.diff()
        assert not len(steps) or steps.max() - steps.min() <= 1
        assert abs(int(kept[0]) - (tokens - 1 - int(kept[-1]))) <= 1


def test_random_tokens_depend_on_the_seed_and_on_nothing_else():
    grid = Grid(1, 24, 24)
    kept = RandomTokens(keep=100)(Signals(grid=grid)).kept
    assert torch.equal(kept, kept.unique())
    torch.manual_seed(9)
    seen = Signals(grid=Grid(1, 16, 36), tokens=torch.randn(576, 4))
    assert torch.equal(RandomTokens(keep=100)(seen).kept, kept)
    others = [RandomTokens(keep=100, seed=seed)(seen).kept for seed in range(1, 40)]
    share = torch.tensor([float(torch.isin(other, kept).float().mean()) for other in others])
    assert abs(float(share.mean()) - 100 / 576) < 0.02
    chosen = torch.bincount(torch.cat(others), minlength=576).float() / len(others)
    assert chosen.max() < 0.5  # no token is a favourite
    assert abs(float(chosen[:288].mean() - chosen[288:].mean())) < 0.03


def test_a_larger_budget_keeps_what_a_smaller_one_does():
    given = Signals(grid=Grid(3, 5, 5))
    few, many = (RandomTokens(keep=count)(given).kept for count in (9, 30))
    assert set(few.tolist()) < set(many.tolist())


def regions(keep: float, grid: Grid) -> torch.Tensor:
    """(frames, height, width): which token each one becomes."""
    plan = GridPool(keep=keep)(Signals(grid=grid))
    assert plan.weights is not None
    return plan.weights.argmax(dim=0).view(grid)


def test_grid_pool_by_hand():
    assert regions(5, Grid(1, 4, 4)).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 4], [2, 2, 3, 4]]]
    assert regions(2, Grid(4, 1, 2)).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # fewer tokens than frames
    assert regions(3, Grid(2, 1, 4)).flatten().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert torch.equal(regions(1.0, Grid(2, 3, 5)).flatten(), torch.arange(30))


@pytest.mark.parametrize(("keep", "factor"), [(36, 2), (16, 3), (9, 4), (1, 12)])
def test_grid_pool_is_window_pooling_where_that_comes_to_the_budget(keep, factor):
    x_NC = torch.randn(144, 3)
    wanted = pool_map(x_NC.view(1, 12, 12, 3), factor).view(keep, 3)
    torch.testing.assert_close(GridPool(keep=keep)(Signals(grid=Grid(1, 12, 12)))(x_NC), wanted)


@pytest.mark.parametrize("grid", [Grid(1, 12, 12), Grid(1, 5, 16), Grid(1, 16, 5), Grid(3, 3, 4), Grid(1, 1, 9)])
def test_grid_pool_keeps_any_budget_and_leaves_no_token_out(grid):
    for keep in range(1, grid.tokens + 1):
        plan = GridPool(keep=keep)(Signals(grid=grid))
        assert plan.weights is not None
        assert len(plan.kept) == keep
        assert (plan.kept.diff() > 0).all()
        assert ((plan.weights > 0).sum(dim=0) == 1).all()
        torch.testing.assert_close(plan.weights.sum(dim=1), torch.ones(keep))


@pytest.mark.parametrize("cls", [UniformStride, RandomTokens, GridPool])
def test_impossible_budgets(cls):
    with pytest.raises(LacoError, match="cannot keep 10 of 9 visual tokens"):
        cls(keep=10)(Signals(grid=Grid(1, 3, 3)))
