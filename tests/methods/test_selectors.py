"""What every selector does: its budget, its plan, and what depends on what."""

from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods import Plan, Selector, Signals, registry
from laco.methods.greedy import coverage, determinantal, farthest_points
from laco.methods.selector import cosines

SELECTORS = {name: cls for name, cls in registry().items() if issubclass(cls, Selector)}
BUDGETED = {name: cls for name, cls in SELECTORS.items() if cls.static_count}
every = pytest.mark.parametrize("cls", SELECTORS.values(), ids=SELECTORS)
budgeted = pytest.mark.parametrize("cls", BUDGETED.values(), ids=BUDGETED)
# Those that take their budget apart by frames and keep at least a token, or the first frame, of each.
BY_FRAME = {"evs", "vidcom2", "v_cast"}


def signals(grid: Grid = Grid(1, 6, 8), seed: int = 0, prefix: int = 1, heads: int = 3) -> Signals:  # noqa: B008
    """Random signals of one picture, with CLS."""
    torch.manual_seed(seed)
    n = grid.tokens
    return Signals(
        grid=grid,
        tokens=torch.randn(n, 12),
        features=torch.randn(prefix + n, 10),
        keys=torch.randn(prefix + n, heads, 4),
        queries=torch.randn(prefix + n, heads, 4),
        cls_attention=torch.rand(heads, n).softmax(dim=1),
        text=torch.randn(5, 12),
        text_attention=torch.rand(heads, 5, n),
    )


def chosen(cls: type[Selector], given: Signals, **settings: object) -> Tensor:
    """Indices of the patches that a plan keeps, prefix tokens left out."""
    kept = cls(**settings)(given).kept
    if cls.applies_to == "features":
        kept = kept[kept >= given.prefix] - given.prefix
    return kept


@every
def test_plans_are_matrices_of_existing_tokens(cls):
    given = signals(Grid(4, 5, 6))
    plan = cls()(given)
    rows = given.tokens if cls.applies_to == "tokens" else given.features
    assert plan.kept.dtype == torch.long
    assert plan.kept.min() >= 0
    assert plan.kept.max() < len(rows)
    if plan.weights is None:
        assert torch.equal(plan(rows), rows[plan.kept])
        assert len(plan.kept.unique()) == len(plan.kept)
    else:
        assert plan.weights.shape == (len(plan.kept), len(rows))
        torch.testing.assert_close(plan(rows), plan.weights @ rows)
    assert plan(rows.bfloat16()).dtype == torch.bfloat16


@budgeted
@pytest.mark.parametrize("keep", [1, 7, 20, 47, 0.25, 0.5])
def test_the_budget_is_kept(cls, keep):
    grid = Grid(1, 6, 8)
    method = cls(keep=keep)
    count = len(method(signals(grid)).kept)
    wanted = method.budget(grid.tokens) + (cls.name == "visionzip")  # its CLS token comes on top
    if cls.name == "evs":  # one frame stays whole
        wanted = grid.tokens
    assert count == wanted


@budgeted
def test_the_whole_budget_changes_nothing(cls):
    given = signals(Grid(3, 4, 4))
    plan = cls(keep=1.0, **({"contextual": 0.0} if cls.name == "visionzip" else {}))(given)
    rows = given.tokens if cls.applies_to == "tokens" else given.features
    assert torch.equal(plan.kept.sort().values, torch.arange(len(rows))[-len(plan.kept) :])
    torch.testing.assert_close(plan(rows), rows[plan.kept])


@every
def test_one_token(cls):
    for prefix in (0, 1):
        given = signals(Grid(1, 1, 1), prefix=prefix)
        if prefix == 0:
            given = replace(given, cls_attention=None, received=torch.ones(1))
        assert len(cls()(given).kept) >= (0 if cls.name == "prumerge" else 1)


@every
def test_a_constant_picture_and_duplicates_give_numbers(cls):
    given = signals(Grid(2, 4, 4))
    flat = {field.name: getattr(given, field.name) for field in fields(given) if field.name != "grid"}
    constant = {name: torch.ones_like(value) if value is not None else None for name, value in flat.items()}
    plan = cls()(Signals(grid=given.grid, **constant))
    rows = constant["tokens"] if cls.applies_to == "tokens" else constant["features"]
    assert plan(rows).isfinite().all()
    if plan.weights is None:
        assert len(plan.kept.unique()) == len(plan.kept)


@every
def test_the_order_of_tokens_does_not_matter_where_it_should_not(cls):
    if not cls.equivariant:
        pytest.skip("depends on where tokens stand, as its paper has it")
    given = signals(Grid(1, 1, 40))
    order = torch.randperm(40)
    with_prefix = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    moved = Signals(
        grid=given.grid,
        tokens=given.tokens[order],
        features=given.features[with_prefix],
        keys=given.keys[with_prefix],
        queries=given.queries[with_prefix],
        cls_attention=given.cls_attention[:, order],
        text=given.text,
        text_attention=given.text_attention[..., order],
    )
    assert set(order[chosen(cls, moved)].tolist()) == set(chosen(cls, given).tolist())


@every
def test_signals_that_are_missing_are_named(cls):
    for name in cls.needs:
        without = {name: None} | ({"received": None} if name == "cls_attention" else {})
        with pytest.raises(LacoError, match=f"{cls.name} needs {name}"):
            cls()(replace(signals(), **without))


@budgeted
def test_impossible_budgets(cls):
    for keep in (0, -3, 0.0, 1.5):
        with pytest.raises(LacoError, match="keep is a count of visual tokens"):
            cls(keep=keep)
    with pytest.raises(LacoError, match="cannot keep 49 of 48 visual tokens"):
        cls(keep=49).budget(48)


def test_attention_received_stands_in_for_cls():
    given = signals()
    mean = given.cls_attention.mean(dim=0)
    without = replace(given, cls_attention=None, received=mean)
    for name in ("vispruner", "holov"):
        assert torch.equal(chosen(SELECTORS[name], given), chosen(SELECTORS[name], without))


def test_farthest_points_by_hand():
    torch.manual_seed(1)
    distance = 1 - cosines(torch.randn(12, 3))
    picks = [max(range(12), key=lambda j: min(float(distance[i, j]) for i in range(12) if i != j))]
    while len(picks) < 7:
        rest = [j for j in range(12) if j not in picks]
        picks.append(max(rest, key=lambda j: min(float(distance[i, j]) for i in picks)))
    assert farthest_points(distance, 7).tolist() == picks


def test_determinants_by_hand():
    torch.manual_seed(2)
    x = torch.randn(9, 6, dtype=torch.double)
    kernel, picks = x @ x.T + torch.eye(9), []
    while len(picks) < 5:
        rest = [j for j in range(9) if j not in picks]
        picks.append(max(rest, key=lambda j: float(torch.det(kernel[[*picks, j]][:, [*picks, j]]))))
    assert determinantal(kernel, 5).tolist() == picks


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 9, 40])
def test_lazy_coverage_is_plain_coverage(weighted, count):
    torch.manual_seed(3)
    similarity, weight = torch.randn(30, 40), torch.rand(40) if weighted else torch.ones(40)
    covered, picks = torch.zeros(30), []
    for _ in range(count):
        gains = weight * (similarity - covered[:, None]).clamp(min=0).sum(dim=0)
        gains[picks] = -torch.inf
        picks.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarity[:, picks[-1]])
    before = weight.clone()
    found = coverage(similarity, count, weight, block=3).tolist()
    assert torch.equal(weight, before)
    gained = next((i for i in range(count) if i >= 1 and covered_by(similarity, picks[:i])), count)
    assert found[:gained] == picks[:gained]  # then nothing is left to gain, and any order is right
    assert len(set(found)) == count


def covered_by(similarity: Tensor, picks: list[int]) -> bool:
    best = similarity[:, picks].amax(dim=1).clamp(min=0)
    return bool((similarity - best[:, None]).amax() <= 0)


def test_scissor_by_hand():
    torch.manual_seed(4)
    grid, threshold = Grid(3, 2, 3), 0.4
    x = torch.randn(grid.tokens, 3, dtype=torch.double)
    given = Signals(grid=grid, tokens=x.float())

    def groups(rows: Tensor) -> list[list[int]]:
        linked = [[float(torch.cosine_similarity(a, b, dim=0)) > threshold for b in rows] for a in rows]
        parent = list(range(len(rows)))
        for i, j in combinations(range(len(rows)), 2):
            if linked[i][j]:
                old, new = parent[j], parent[i]
                parent = [new if value == old else value for value in parent]
        found = [[i for i in range(len(rows)) if parent[i] == label] for label in dict.fromkeys(parent)]
        return sorted(found, key=lambda g: max(g, key=lambda i: (sum(linked[i]) + (not linked[i][i]), -i)))

    frames = torch.stack([f[g].mean(dim=0) for f in x.view(3, 6, 3) for g in groups(f)])
    centres = torch.stack([frames[g].mean(dim=0) for g in groups(frames)])
    nearest = torch.stack([torch.cosine_similarity(row[None], centres, dim=1).argmax() for row in x])
    wanted = [
        (centre + x[nearest == c].sum(dim=0)) / (1 + int((nearest == c).sum())) for c, centre in enumerate(centres)
    ]
    plan = SELECTORS["scissor"](threshold=threshold)(given)
    torch.testing.assert_close(plan(x), torch.stack(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [1.0, 0.2, -1.0])
def test_dyntok_by_hand(threshold):
    grid = Grid(2, 3, 5)
    given = signals(grid)
    method = SELECTORS["dyntok"](threshold=threshold)
    x, h, wanted = given.features[1:], given.tokens, []
    for row in range(6):
        group: list[int] = []
        for i in range(5 * row, 5 * row + 5):
            if group and float(torch.cosine_similarity(x[i], x[i - 1], dim=0)) <= threshold:
                wanted.append(h[group].mean(dim=0))
                group = []
            group.append(i)
        wanted.append(h[group].mean(dim=0))
    plan = method(given)
    torch.testing.assert_close(plan(h), torch.stack(wanted), rtol=0, atol=1e-6)
    assert len(plan.kept) == {1.0: 30, -1.0: 6}.get(threshold, len(wanted))
    sizes = 1 / plan.weights.amax(dim=1)
    torch.testing.assert_close((plan(h) * sizes[:, None]).sum(dim=0), h.sum(dim=0))


def test_a_plan_of_weights_merges():
    plan = Plan(torch.tensor([0, 2]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert plan(torch.tensor([[2.0], [4.0], [8.0]])).tolist() == [[3.0], [8.0]]
