"""What every selector does: its budget, its plan, and what depends on what."""

from dataclasses import fields, replace
from itertools import combinations
from math import ceil, log

import numpy as np
import pytest
import torch
from torch import Tensor

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods import Plan, Selector, Signals, registry
from laco.methods.cdpruner import conditional_kernel, scaled
from laco.methods.evs import media_positions
from laco.methods.greedy import coverage, determinantal, farthest_points
from laco.methods.scissor import merge
from laco.methods.selector import cosines

SELECTORS = {name: cls for name, cls in registry().items() if issubclass(cls, Selector)}
BUDGETED = {name: cls for name, cls in SELECTORS.items() if cls.static_count or name == "vidcom2"}  # of one frame
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


@every
def test_autocast_changes_no_choice(cls):
    """Tokens in clusters, whose cosines bfloat16 cannot tell apart."""
    given = signals(Grid(4, 5, 6))
    alike = {name: getattr(given, name) for name in ("tokens", "features")}
    alike = {name: 0.1 * x + x[torch.arange(len(x)) // 8 * 8] for name, x in alike.items()}
    given = replace(given, **alike)
    rows = given.tokens if cls.applies_to == "tokens" else given.features
    wanted = cls()(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = cls()(given)
        out = plan(rows)
    assert torch.equal(plan.kept, wanted.kept)
    assert torch.equal(out, wanted(rows))


@every
@pytest.mark.parametrize("keep", [4, 0.1, 0.25, 0.6, 1.0])
def test_counts_are_known_before(cls, keep):
    """Where a method says so: of videos, too."""
    if not cls.static_count:
        pytest.skip("depends on content")
    grid, prefix = Grid(8, 6, 6), 1
    variants = [{}, {"whole_frames": True}, {"max_frames": 3, "strict_reference": True}]
    for settings in variants if cls.name == "flexselect" else [{}]:
        method = cls(keep=keep, **settings)
        count = len(method(signals(grid, prefix=prefix)).kept)
        if count > grid.tokens:  # with CLS, for which a model has no place beside all patches
            count -= prefix
        assert count == method.left(grid.tokens, prefix, grid.frames)


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


def test_determinants_of_tokens_that_hardly_matter():
    """One token matters a thousand times as much as the others; among these the rule is the same."""
    torch.manual_seed(5)
    x = torch.nn.functional.normalize(torch.randn(30, 16, dtype=torch.double), dim=-1)
    weight = 5e-4 + 5e-4 * torch.rand(30, dtype=torch.double)
    weight[7] = 1
    kernel = (weight[:, None] * x) @ (weight[:, None] * x).T
    picks: list[int] = []
    while len(picks) < 10:
        rest = [j for j in range(30) if j not in picks]
        picks.append(max(rest, key=lambda j: float(torch.logdet(kernel[[*picks, j]][:, [*picks, j]]))))
    assert determinantal(kernel.float(), 10).tolist() == picks


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


def test_equal_tokens_stay_apart_where_nothing_may_join():
    """The cosine of a vector with itself may come out above 1."""
    for seed in range(20):
        token = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        given = Signals(grid=Grid(1, 3, 4), tokens=token.repeat(12, 1), features=token.repeat(12, 1))
        assert len(SELECTORS["dyntok"](threshold=1.0)(given).kept) == 12
        assert len(SELECTORS["scissor"](threshold=1.0)(given).kept) == 12
        opposite = replace(given, features=given.features * torch.tensor([1.0, -1.0]).repeat(6)[:, None])
        assert len(SELECTORS["dyntok"](threshold=-1.5)(opposite).kept) == 3
    with pytest.raises(LacoError, match=r"dyntok: threshold is a cosine, at most 1; got 1.5"):
        SELECTORS["dyntok"](threshold=1.5)


def test_scissor_samples_as_its_reference():
    """`numpy.random.choice` without replacement, of a generator with this seed, graph by graph."""
    torch.manual_seed(6)
    x = torch.randn(2, 40, 3)
    rng = np.random.RandomState(3)
    drawn: list[Tensor] = []

    def sample(nodes: int) -> Tensor:
        drawn.append(torch.from_numpy(rng.choice(nodes, min(nodes, ceil(log(nodes) / 0.6**2)), replace=False)))
        return drawn[-1]

    wanted = merge(x, 0.9, sample)[0]
    assert all(len(nodes) < 40 for nodes in drawn[:2])
    plan = SELECTORS["scissor"](threshold=0.9, error=0.6, seed=3)(Signals(grid=Grid(2, 5, 8), tokens=x.flatten(0, 1)))
    assert torch.equal(plan.kept, wanted.kept)
    assert torch.equal(plan.weights, wanted.weights)


def test_prumerge_counts_as_its_reference():
    """8 outliers of 49 tokens are 8 / 49 of them, and its int(49 * (8 / 49)) is 7; a budget of 8 keeps 8."""
    q, k = torch.zeros(50, 1, 4), torch.zeros(50, 1, 4)
    q[0] = 4
    k[[3, 9, 11, 17, 25, 31, 40, 44], 0, 0] = 2 + torch.arange(8.0)
    given = Signals(grid=Grid(1, 7, 7), features=torch.randn(50, 5), queries=q, keys=k)
    assert len(SELECTORS["prumerge"](strict_reference=True)(given).kept) == 7 + 1
    assert len(SELECTORS["prumerge"]()(given).kept) == 8 + 1
    assert len(SELECTORS["prumerge"](keep=8)(given).kept) == 8 + 1


@pytest.mark.parametrize(("side", "outliers"), [(7, 1), (27, 3), (27, 16), (28, 55)])
def test_prumerge_keeps_every_outlier(side, outliers):
    """The share of 16 of 729, times 729, is less than 16 in binary fractions."""
    keys, queries = 0.01 * torch.rand(side**2 + 1, 1, 8), torch.zeros(side**2 + 1, 1, 8)
    keys[1 : outliers + 1, 0, 0], queries[0, 0, 0] = 5, 2
    given = Signals(grid=Grid(1, side, side), features=torch.randn(side**2 + 1, 8), keys=keys, queries=queries)
    assert len(SELECTORS["prumerge"]()(given).kept) == outliers + 1
    spaced = torch.arange(0, side**2 - 1, max(side**2 // outliers // 3, 1))
    assert len(SELECTORS["prumerge"](grid=True)(given).kept) == outliers + (spaced >= outliers).sum() + 1


def test_prumerge_of_a_fixed_ratio_as_its_reference():
    """A list with repetitions, and a complement that is as many tokens shorter, as the authors' training has them."""
    torch.manual_seed(8)
    count, channels = 64, 6
    x, q, k = (torch.randn(1 + count, channels) for _ in range(3))
    given = Signals(grid=Grid(1, 8, 8), features=x, queries=2 * q[:, None], keys=k[:, None])
    attention = (2 * q[0] @ k.T / channels**0.5).softmax(dim=0)[1:]
    kept = [*attention.topk(8).indices.tolist(), *range(4, 63, 8)]
    repeated = len(kept) - len(set(kept))
    rest = [token for token in range(count) if token not in kept][repeated:]
    assert repeated
    rows = []
    for place, token in enumerate(kept):
        pool = kept[:place] + kept[place + 1 :] + rest
        nearest = torch.tensor(pool)[cosines(k[1:])[token, pool].topk(32).indices]
        rows.append(x[1 + token] + attention[nearest] @ x[1 + nearest])
    rows.append(attention[rest] @ x[1:][rest])
    plan = SELECTORS["prumerge"](keep=1 / 8, grid=True, strict_reference=True)(given)
    assert (plan.kept[:-1] - 1).tolist() == kept
    torch.testing.assert_close(plan(x), torch.stack(rows))
    once = SELECTORS["prumerge"](keep=1 / 8, grid=True)(given)
    assert len(once.kept.unique()) == len(once.kept)


def test_prumerge_without_cls_takes_the_attention_from_all():
    torch.manual_seed(7)
    q, k = torch.randn(12, 2, 4), torch.randn(12, 2, 4)
    given = Signals(grid=Grid(1, 3, 4), features=torch.randn(12, 5), queries=q, keys=k)
    received = (q.flatten(1) @ k.flatten(1).T / 8**0.5).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(SELECTORS["prumerge"]().attention(given), received)


def test_prumerge_of_all_tokens_changes_nothing():
    given = signals()
    for settings in ({"keep": 1.0}, {"keep": 48}, {"keep": 1.0, "grid": True}):
        plan = SELECTORS["prumerge"](**settings)(given)
        assert torch.equal(plan(given.features), given.features[1:])


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_scope_adds(alpha):
    given = signals()
    saliency, similarity = given.cls_attention.sum(dim=0) ** alpha, cosines(given.features[1:])
    saliency = 40 * saliency  # as much as the coverage
    given = replace(given, cls_attention=(saliency ** (1 / alpha))[None])
    picks: list[int] = []
    for _ in range(12):
        covered = similarity[:, picks].amax(dim=1).clamp(min=0) if picks else torch.zeros(48)
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=0) + saliency
        picks.append(max((token for token in range(48) if token not in picks), key=gain.tolist().__getitem__))
    for settings, equal in (({"combine": "add"}, True), ({}, False)):
        found = chosen(SELECTORS["scope"], given, keep=12, alpha=alpha, **settings)
        assert (found.tolist() == sorted(picks)) is equal


@pytest.mark.parametrize(("count", "keep"), [(60, 20), (60, 9), (300, 160), (20, 6)])
def test_prunesid_by_loadings(count, keep):
    """The authors' rule for Qwen2-VL, token by token: components, suppression, quotas."""
    torch.manual_seed(count)
    x = torch.randn(count, 70) + torch.randn(4, 70)[torch.randint(4, (count,))]
    samples = x.sigmoid().T.double()
    loading = torch.linalg.svd(samples - samples.mean(dim=0))[2][: max(keep // 4, 4)].abs()
    group, similarity = loading.argmax(dim=0).tolist(), cosines(x)
    limit = max(18 * keep / count, 1) * float(similarity.triu().sum()) / count**2
    ordered, alive = [], []
    for number, weight in enumerate(loading):
        members = sorted((t for t in range(count) if group[t] == number), key=lambda t: -weight[t])
        won: list[int] = []
        for token in members:
            if all(similarity[token, other] <= limit for other in won):
                won.append(token)
        ordered.append(won + [token for token in members if token not in won])
        alive.append(len(won))
    high = [min(5 * ceil(keep / 64), survivors) for survivors in alive]
    while sum(high) < keep:
        high = [min(most + 1, len(members)) for most, members in zip(high, ordered, strict=True)]
    low = [min(1, len(members)) for members in ordered]
    ends = [round(sum(alive[: n + 1]) / sum(alive) * (keep - sum(low))) for n in range(len(alive))]
    quota = [min(low[n] + ends[n] - (ends[n - 1] if n else 0), high[n]) for n in range(len(alive))]
    for n in sorted(range(len(alive)), key=lambda n: -alive[n]):
        quota[n] += min(high[n] - quota[n], keep - sum(quota))
    wanted = [token for members, number in zip(ordered, quota, strict=True) for token in members[:number]]
    assert len(wanted) == keep
    method = SELECTORS["prunesid"](keep=keep, saliency="loading")
    assert method.applies_to == "tokens"
    found = method(Signals(grid=Grid(1, 1, count), tokens=x)).kept.tolist()
    assert found == (sorted(wanted) if keep > 150 else wanted)


@pytest.mark.parametrize(("keep", "crops"), [(0.25, 7), (12, 7), (0.75, 2), (1.0, 1)])
def test_crops_of_holov_by_the_budget(keep, crops):
    given, holov = signals(), SELECTORS["holov"]
    found = holov(keep=keep, crops=None)(given).kept
    assert torch.equal(found, holov(keep=keep, crops=crops)(given).kept)
    assert keep == 1.0 or not torch.equal(found, holov(keep=keep)(given).kept)


def test_vidcom2_at_the_full_rate():
    """All tokens stay; in the authors' code frames that are like the video lose some."""
    given = signals(Grid(4, 3, 4), prefix=0)
    given = replace(given, tokens=given.tokens * 0.02 + torch.randn(4, 12).repeat_interleave(12, dim=0))
    assert len(SELECTORS["vidcom2"](keep=1.0)(given).kept) == 48
    assert len(SELECTORS["vidcom2"](keep=1.0, strict_reference=True)(given).kept) < 48


def test_theta_of_cdpruner():
    given = signals()
    relevance = scaled(cosines(given.tokens, given.text).mean(dim=1))
    for theta in (0.0, 0.5, 0.9):
        kernel = conditional_kernel(given.tokens, (theta / (2 * (1 - theta)) * relevance).exp())
        wanted = determinantal(kernel, 8).sort().values
        assert torch.equal(SELECTORS["cdpruner"](keep=8, theta=theta)(given).kept, wanted)
    with pytest.raises(LacoError, match="theta lies in 0"):
        SELECTORS["cdpruner"](theta=1.0)


def test_theta_of_cdpruner_close_to_one():
    """The relevance alone decides; its exponential is beyond float32."""
    given = signals()
    relevance = cosines(given.tokens, given.text).mean(dim=1)
    relevant = relevance.argsort(descending=True, stable=True)[:4].sort().values
    assert torch.equal(SELECTORS["cdpruner"](keep=4, theta=0.999)(given).kept, relevant)


@pytest.mark.parametrize("count", [6, 9])
def test_of_equal_tokens_greedy_prune_drops_none_for_being_too_like(count):
    torch.manual_seed(0)
    x, query = torch.randn(6, 33).repeat_interleave(3, dim=0), torch.randn(1, 33)
    for _ in range(20):
        given = Signals(grid=Grid(1, 1, 18), tokens=x, text=query)
        groups = SELECTORS["greedy_prune"](keep=count, threshold=1.0)(given).kept // 3
        best = cosines(x[::3].double(), query)[:, 0].topk(count // 3).indices
        assert groups.tolist() == best.sort().values.repeat_interleave(3).tolist()
        x, query = x.roll(1, dims=1), query * 1.3


def test_of_equal_attention_visionzip_takes_the_first():
    given = replace(signals(Grid(1, 8, 8)), cls_attention=torch.full((3, 64), 1 / 64))
    assert SELECTORS["visionzip"](keep=8, contextual=0.0)(given).kept.tolist() == list(range(9))


def test_a_plan_is_as_exact_as_its_tokens():
    weights, x = torch.tensor([[0.5, 0.25, 0.25]]), torch.randn(3, 4, dtype=torch.double)
    assert torch.equal(Plan(torch.tensor([0]), weights)(x), weights.double() @ x)
    assert Plan(torch.tensor([0]), weights)(x.bfloat16()).dtype == torch.bfloat16


def test_times_of_frames_in_evs_as_vllm_rounds_them():
    assert media_positions(Grid(16, 1, 1), 25, 1 / 3)[15, 0] == 124


def test_cdpruner_in_the_space_of_clip_needs_it():
    method = SELECTORS["cdpruner"](keep=8, relevance="clip")
    with pytest.raises(LacoError, match="cdpruner needs clip_text, which is not there"):
        method(signals())
    assert "text" in SELECTORS["cdpruner"].needs
    torch.manual_seed(8)
    given = replace(signals(), text=None, clip_tokens=torch.randn(48, 6), clip_text=torch.randn(2, 6))
    assert len(method(given).kept) == 8


def test_v_cast_of_frames_that_may_lose_all():
    given = signals(Grid(4, 3, 4), prefix=0)
    for least in (0, 1, 3):
        counts = (SELECTORS["v_cast"](keep=12, at_least=least)(given).kept // 12).bincount(minlength=4)
        assert counts.sum() == 12
        assert counts.min() >= least
    assert counts.tolist() == [3, 3, 3, 3]


def test_a_plan_of_weights_merges():
    plan = Plan(torch.tensor([0, 2]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert plan(torch.tensor([[2.0], [4.0], [8.0]])).tolist() == [[3.0], [8.0]]
