"""Methods inside the language model, or scored by it: slow obvious versions in loops, and what must hold for all."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laco.errors import LacoError
from laco.grid import Grid
from laco.methods.dart import DART
from laco.methods.decoder import DecoderMethod, DecoderSignals, Step, attention_rows
from laco.methods.dpc_knn import density_peaks
from laco.methods.fastv import FastV
from laco.methods.flashvid import FlashVID, FlashVIDLate, merge_over_time, segments, select
from laco.methods.flexselect import FlexSelect
from laco.methods.glimpse_prune import GlimpsePrune, box_mask, localisation_loss
from laco.methods.pyramid_drop import PyramidDrop
from laco.methods.selector import Plan, Signals
from laco.methods.sparsevlm import SparseVLM, as_settings, gravity, recycling
from laco.methods.transprune import TransPrune, transition

N, L, D, HEADS, WIDTH = 30, 45, 12, 4, 8
GRIDS = (Grid(1, 3, 6), Grid(1, 4, 3))


def rotary(length: int, base: float = 1e4, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * base ** -(torch.arange(0, width, 2) / width)
    return angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin()


def sample(seed: int = 0, start: int = 6) -> DecoderSignals:
    """Everything that any method may want: text, 30 visual tokens of two pictures, text; twelve rows of attention."""
    torch.manual_seed(seed)
    return DecoderSignals(
        visual=torch.arange(start, start + N),
        length=L,
        hidden=torch.randn(L, D),
        keys=torch.randn(2, L, WIDTH),
        attention=torch.randn(HEADS, 4, L).softmax(dim=-1),
        logits=torch.randn(HEADS, 1, L),
        rotary=rotary(L),
        maps=tuple(torch.randn(N, 10) for _ in GlimpsePrune.maps),
        grids=GRIDS,
    )


def ready(method: DecoderMethod, signals: DecoderSignals) -> DecoderSignals:
    """With the memory that the method has at its first point."""
    torch.manual_seed(7)
    if isinstance(method, SparseVLM):
        return replace(signals, memory=torch.tensor([0, 2, 3, 5]))
    if isinstance(method, TransPrune):
        return replace(signals, memory=torch.rand(signals.length))
    return signals


def module(method: DecoderMethod):
    torch.manual_seed(5)
    return method.build(layers=3, channels=D, heads=HEADS, encoder_channels=10) if method.trained else None


ONE = {"depths": (0.5,), "keep": 0.4}
METHODS = {
    "fastv": FastV(**ONE),
    "flashvid_late": FlashVIDLate(**ONE),
    "pyramid_drop": PyramidDrop(**ONE),
    "transprune": TransPrune(**ONE),
    "sparsevlm": SparseVLM(**ONE),
    "sparsevlm_plus": SparseVLM(**ONE, version="plus"),
    "dart": DART(**ONE),
    "dart_authors": DART(**ONE, rule="authors"),
    "glimpse_prune": GlimpsePrune(**ONE, width=16, condition=16),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
counted = pytest.mark.parametrize("method", [m for m in METHODS.values() if m.static_count], ids=lambda m: m.name)


@every
def test_plans_are_of_visual_tokens_that_exist(method):
    signals = ready(method, sample())
    plan = method(signals, 0, module(method))
    assert plan.kept.dtype == torch.long
    assert set(plan.kept.tolist()) <= set(range(N))
    assert len(plan.kept.unique()) == len(plan.kept) < N
    assert torch.equal(plan.kept, method(signals, 0, module(method)).kept)
    rows = signals.rows(plan)
    assert torch.equal(rows[~torch.isin(rows, signals.visual)], signals.text)
    assert torch.equal(rows[signals.visual_after(plan)], signals.visual[plan.kept])
    x = torch.randn(L, D)
    after = signals.apply(plan, x)
    assert torch.equal(after[signals.visual_after(plan)], plan(x[signals.visual]))
    assert torch.equal(after[~torch.isin(rows, signals.visual)], x[signals.text])


@counted
@pytest.mark.parametrize("keep", [1, 7, 17, 29, 0.1, 0.35, 0.9])
def test_counts_are_known_before(method, keep):
    method = replace(method, keep=keep)
    assert len(method(ready(method, sample())).kept) == method.left(N, N) == method.layer_tokens(N, 2)[1]
    assert method.layer_tokens(N, 4)[:2] == [N, N]


@counted
def test_the_whole_budget_changes_nothing(method):
    for keep in (1.0, N):
        method = replace(method, keep=keep)
        signals = ready(method, sample())
        plan = method(signals)
        assert torch.equal(signals.rows(plan), torch.arange(L))
        assert torch.equal(signals.apply(plan, signals.hidden), signals.hidden)


@every
def test_more_than_all_tokens_cannot_stay(method):
    if method.name == "glimpse_prune":
        pytest.skip("its keep is a limit")
    method = replace(method, keep=N + 5)
    with pytest.raises(LacoError, match=f"{method.name} cannot keep {N + 5} of {N} visual tokens"):
        method(ready(method, sample()))


@every
def test_the_order_of_visual_tokens_does_not_matter(method):
    """Up to what position contributes: the rotary correction, and the rotary positions of the glimpse's head."""
    if method.name == "glimpse_prune" or getattr(method, "version", "") == "plus":
        pytest.skip("depends on where tokens stand, as its paper has it")
    signals, order = ready(method, sample()), torch.randperm(N)
    whole = torch.arange(L)
    whole[signals.visual] = signals.visual[order]
    moved = replace(
        signals,
        hidden=signals.hidden[whole],
        keys=signals.keys[:, whole],
        attention=signals.attention[..., whole],
        memory=signals.memory[whole] if method.name == "transprune" else signals.memory,
    )
    plan, other = method(signals), method(moved)
    assert set(order[other.kept].tolist()) == set(plan.kept.tolist())
    ours, theirs = (s.apply(p, s.hidden)[s.visual_after(p)] for s, p in ((signals, plan), (moved, other)))
    torch.testing.assert_close(ours.sum(dim=0), theirs.sum(dim=0), rtol=0, atol=1e-5)


@every
def test_equal_tokens_one_token_and_none(method):
    flat = {"hidden": torch.ones(L, D), "keys": torch.ones(2, L, WIDTH), "attention": torch.full((HEADS, 4, L), 1 / L)}
    signals = ready(method, replace(sample(), **flat))
    plan = method(signals, 0, module(method))
    assert len(plan.kept.unique()) == len(plan.kept)
    assert signals.apply(plan, signals.hidden).isfinite().all()
    maps = tuple(rows[:1] for rows in signals.maps)
    one = replace(signals, visual=torch.tensor([8]), maps=maps, grids=(Grid(1, 1, 1),))
    assert method(one, 0, module(method)).kept.tolist() == [0]
    assert method(replace(signals, visual=torch.tensor([], dtype=torch.long))).kept.tolist() == []


@every
def test_missing_signals_and_wrong_settings(method):
    signals = ready(method, sample())
    for name in method.needs:
        with pytest.raises(LacoError, match=f"{method.name} needs {name}, which is not there"):
            method(replace(signals, **{name: None}), 0, module(method))
    for keep in (0, -1, 1.5, 0.0):
        with pytest.raises(LacoError, match="keep has counts"):
            replace(method, keep=keep)
    with pytest.raises(LacoError, match="2 values for 1 points"):
        replace(method, keep=(0.5, 0.25))
    with pytest.raises(LacoError, match="not both"):
        replace(method, layer=3)
    with pytest.raises(LacoError, match="between 0 and 1"):
        replace(method, depths=(1.0,))
    with pytest.raises(LacoError, match=f"{method.name} drops tokens between layers .* can be 3; got 4"):
        replace(method, depths=None, layer=4).points(4)
    staged = replace(method, keep=(0.5,))
    assert type(method).from_fields(_fields(staged)) == staged


def _fields(method: DecoderMethod) -> dict:
    return {name: value for name, value in json.loads(json.dumps(method.to_dict())).items() if name != "method"}


def test_points_and_budgets():
    assert FastV().points(32) == (2,)
    assert FastV(layer=5).points(32) == (5,)
    assert FlashVIDLate().points(28) == (20,)
    assert PyramidDrop().points(32) == (8, 16, 24)
    assert TransPrune().points(32) == (7, 9, 12)
    assert TransPrune().observed(32) == (6, 7, 8, 9, 10, 11)
    assert SparseVLM().points(32) == (3, 7, 16)
    assert SparseVLM().points(4) == (1, 2, 3)
    assert GlimpsePrune().points(28) == (19,)
    assert sum(PyramidDrop().layer_tokens(576, 32)) / 32 == 270
    assert sum(TransPrune().layer_tokens(576, 32)) / 32 == 236.25
    for budget in (192, 128, 96, 64):
        method = SparseVLM(**as_settings(budget, "plus"), depths=(2 / 32, 6 / 32, 15 / 32))
        assert abs(sum(method.layer_tokens(576, 32)) / 32 - budget) < 1
    assert SparseVLM(**as_settings(64)).kept(576, 576, 1) == 30
    with pytest.raises(LacoError, match="budgets for 192, 128, 96, 64 tokens"):
        as_settings(100)
    with pytest.raises(LacoError, match="depends on the picture"):
        GlimpsePrune().layer_tokens(576, 28)


def test_rounding():
    assert [FastV().count(0.5, n) for n in (63, 64, 65)] == [32, 32, 32]
    assert [FastV(count_by="floor").count(0.5, n) for n in (63, 64, 65)] == [31, 32, 32]
    assert FlashVIDLate(keep=0.55).count(0.55, 100) == 55
    assert FlashVIDLate(keep=0.55, strict_reference=True).count(0.55, 100) == 56
    assert FlashVIDLate().count(0.3, 51) == 16
    assert PyramidDrop().count(1 / 8, 5) == 1


def test_rows_of_attention_are_those_of_the_whole_map():
    torch.manual_seed(0)
    q, k = torch.randn(6, 20, 8, dtype=torch.double), torch.randn(2, 20, 8, dtype=torch.double)
    logits = q @ k.repeat_interleave(3, dim=0).mT / 8**0.5
    whole = logits.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(dim=-1)
    rows = torch.tensor([3, 19, 0])
    found = attention_rows(q[:, rows], k, rows)
    assert found.shape == (6, 3, 20)
    torch.testing.assert_close(found.double(), whole[:, rows], rtol=0, atol=1e-6)
    sees = torch.arange(20) % 2 == 0
    found = attention_rows(q[:, rows], k, rows, scaling=0.1, visible_ML=sees.expand(3, 20))
    wanted = (logits[:, rows] * 8**0.5 * 0.1).masked_fill(~sees, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


def test_autocast_changes_no_row_of_attention():
    torch.manual_seed(0)
    q, k, rows = torch.randn(6, 3, 8), torch.randn(2, 20, 8), torch.tensor([3, 19, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_rows(q, k, rows)
    assert torch.equal(found, attention_rows(q, k, rows))


@every
def test_autocast_changes_no_choice(method):
    signals, built = ready(method, sample()), module(method)
    if built is None:  # a head runs as the model around it does
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plan = method(signals)
        assert torch.equal(plan.kept, method(signals).kept)


def test_sequences_with_text_between_pictures():
    signals = DecoderSignals(visual=torch.tensor([1, 2, 5, 6, 7]), length=10, trailing=1)
    assert signals.text.tolist() == [0, 3, 4, 8]
    assert signals.text_behind.tolist() == [8]
    assert signals.rows(Plan(torch.tensor([1, 3]))).tolist() == [0, 2, 3, 4, 6, 8]
    merged = Plan(torch.tensor([0, 3, 1]), torch.eye(5)[[0, 3, 1]] * 2)  # the last one stands behind what is before it
    assert signals.rows(merged).tolist() == [0, 1, 3, 4, 6, 2, 8]
    x = torch.arange(10.0)[:, None]
    assert signals.apply(merged, x).flatten().tolist() == [0, 2, 3, 4, 12, 4, 8]
    assert signals.visual_after(merged).tolist() == [1, 4, 5]


def test_fastv_and_pyramid_drop_by_hand():
    signals = sample()
    score = [sum(float(signals.attention[h, m, 6 + j]) for h in range(4) for m in range(4)) for j in range(N)]
    best = sorted(sorted(range(N), key=lambda j: -score[j])[:12])
    assert FastV(keep=0.4)(signals).kept.tolist() == best
    method = PyramidDrop()
    assert [len(method(replace(signals, original=64), stage).kept) for stage in range(3)] == [30, 16, 8]
    assert method.queries(signals).tolist() == [L - 1]
    assert method.queries(replace(signals, answers=torch.tensor([40, 43]))).tolist() == [39, 42]
    assert TransPrune().queries(signals).tolist() == list(range(36, L))


def test_transprune_by_hand():
    torch.manual_seed(0)
    steps = [Step(*(torch.randn(L, D, dtype=torch.double) for _ in range(2))) for _ in range(4)]

    def by_hand(step: Step) -> Tensor:
        turned = [1 - float(u @ v / u.norm() / v.norm()) for u, v in zip(*step, strict=True)]
        total = sum(math.exp(t) for t in turned)
        return torch.tensor(
            [float(v.norm() / u.norm()) * math.exp(t) / total for u, v, t in zip(*step, turned, strict=True)]
        )

    torch.testing.assert_close(transition(steps[0]), by_hand(steps[0]), rtol=0, atol=1e-6)
    method, signals = TransPrune(keep=0.4, depths=(0.5,)), sample()
    memory = method.observe(method.observe(method.start(signals), *steps[:2]), *steps[2:])
    moved = sum(by_hand(step) for step in steps)[signals.visual]
    attended = signals.attention.mean(dim=(0, 1))[signals.visual]
    wanted = moved / moved.sum() + attended / attended.sum()
    found = method.score(replace(signals, memory=memory))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    plan = method(replace(signals, memory=memory))
    assert plan.kept.tolist() == sorted(sorted(range(N), key=lambda j: -float(wanted[j]))[:12])
    rows = signals.rows(plan)
    assert torch.equal(method.after(memory, rows)[signals.visual_after(plan)], memory[signals.visual[plan.kept]])


def test_density_peaks_by_hand():
    torch.manual_seed(3)
    x, clusters, k = torch.randn(17, 5, dtype=torch.double), 4, 6
    distance = [[float((a - b).norm()) / 5**0.5 for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in distance]
    largest = max(map(max, distance))
    delta = [min((distance[i][j] for j in range(17) if density[j] > density[i]), default=largest) for i in range(17)]
    wanted = sorted(range(17), key=lambda i: -density[i] * delta[i])[:clusters]
    centres, joined = density_peaks(x, clusters, k)
    assert centres.tolist() == wanted
    nearest = [min(range(clusters), key=lambda c: distance[i][wanted[c]]) for i in range(17)]
    assert joined.tolist() == nearest
    centres, joined = density_peaks(torch.ones(5, 3), 2, 2)
    assert centres.tolist() == [0, 1]
    assert joined[centres].tolist() == [0, 1]  # a centre is its own, also among equals


def test_sparsevlm_by_hand():
    torch.manual_seed(1)
    method, signals = SparseVLM(keep=9, depths=(0.5,)), sample()
    embeddings = torch.randn(L, D)
    v, t = embeddings[6:36].double(), embeddings[36:].double()
    rating = torch.stack([(t @ row).exp() / (t @ row).exp().sum() for row in v]).mean(dim=0)
    raters = [j for j in range(9) if rating[j] > rating.mean()]
    assert method.start(replace(signals, embeddings=embeddings)).tolist() == raters
    signals = replace(signals, memory=torch.tensor(raters), attention=torch.rand(HEADS, len(raters), L))
    assert method.queries(signals).tolist() == [36 + j for j in raters]
    score = signals.attention.mean(dim=(0, 1))[6:36]
    ranked = sorted(range(N), key=lambda j: -float(score[j]))
    plan = method(signals)
    assert plan.kept[:9].tolist() == sorted(ranked[:9])
    recycled, clusters = ranked[9 : 9 + 7], 1  # int(.3 * 21) + 1 tokens, int(.1 * 7) + 1 clusters
    assert recycling(21) == (7, 1)
    assert len(plan.kept) == 9 + clusters == method.left(N, N)
    y = signals.apply(plan, signals.hidden)
    torch.testing.assert_close(y[6 + 9], signals.hidden[6:36][recycled].mean(dim=0))
    assert torch.equal(y[16:], signals.hidden[36:])  # the merged one stands between picture and question
    # several clusters
    wide = replace(signals, visual=torch.arange(36), length=45)
    plan = replace(method, keep=2)(wide)
    assert recycling(34) == (11, 2)
    assert plan.weights.shape == (4, 36)
    torch.testing.assert_close(plan.weights.sum(dim=1), torch.ones(4))
    assert int((plan.weights[2:] > 0).sum()) == 11
    assert plan.weights[2:].gather(1, plan.kept[2:, None]).gt(0).all()
    # of equal words all rate
    assert len(method.start(replace(signals, embeddings=torch.ones(L, D)))) == 9
    with pytest.raises(LacoError, match="needs embeddings and, behind the visual tokens, text"):
        method.start(replace(signals, visual=torch.arange(15, 45), embeddings=embeddings))


def test_the_authors_numbers_of_sparsevlm_by_version():
    for version, counts in (("1", [300, 200, 110]), ("plus", [300, 200, 118])):
        method = SparseVLM(version=version)
        assert [method.kept(576, 576, stage) for stage in range(3)] == counts
        assert method == SparseVLM(**as_settings(192, version))


def test_autocast_changes_no_rater_of_sparsevlm():
    for seed in range(40):
        torch.manual_seed(seed)
        embeddings = (0.3 * torch.randn(90, 64)).requires_grad_()
        given = DecoderSignals(visual=torch.arange(5, 69), length=90, embeddings=embeddings)
        raters = SparseVLM().start(given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(SparseVLM().start(given), raters)


def test_sparsevlm_plus_by_hand():
    method, signals = SparseVLM(keep=9, depths=(0.5,), version="plus", heads=2), sample()
    signals = replace(signals, memory=torch.tensor([0, 2, 3, 8]))

    def between(q: int, k: int) -> float:
        return 2 * sum(math.cos((q - k) * 1e4 ** (-2 * i / WIDTH)) for i in range(WIDTH // 2)) / WIDTH**0.5

    corrected = torch.tensor(
        [
            [
                [float(signals.attention[h, m, j]) / max(between(36 + r, j), WIDTH**0.5 / 10) for j in range(6, 36)]
                for m, r in enumerate([0, 2, 3, 8])
            ]
            for h in range(HEADS)
        ]
    )
    best = corrected.sum(dim=(1, 2)).argsort(descending=True)[:2]
    torch.testing.assert_close(method.score(signals), corrected[best].mean(dim=(0, 1)))
    # far away, rotary embedding gives vectors of ones a negative product; the bound is out of reach before
    tables = rotary(1800, width=128)
    far = gravity(tables, torch.tensor([1799]), torch.arange(1800))[0].flip(0)
    assert far[:701].min() > 1.19 > 128**0.5 / 10
    assert int((far < 0).nonzero()[0]) == 1707
    with pytest.raises(LacoError, match="needs attention and rotary"):
        method(replace(signals, rotary=None))
    with pytest.raises(LacoError, match="heads is a count"):
        SparseVLM(heads=0)


@pytest.mark.parametrize("rule", ["exact", "authors"])
@pytest.mark.parametrize("strict", [False, True])
def test_dart_by_hand(rule, strict):
    method = DART(keep=0.6, depths=(0.5,), visual_pivots=2, text_pivots=3, rule=rule, strict_reference=strict)
    signals = sample(seed=4)
    signals.keys[:, 2] *= 9  # in front of the visual tokens: a pivot of one rule only
    norm = [float(signals.keys[:, i].abs().sum()) for i in range(L)]
    text = [*range(6), *range(36, L)] if rule == "exact" else list(range(36, L))
    visual = sorted(range(6, 36), key=lambda i: -norm[i])[:2]
    pivots = visual + sorted(text, key=lambda i: -norm[i])[:3]
    if strict and rule == "authors":
        pivots = list(set(pivots))
    share, most = (4, 18) if rule == "exact" else (3, N)  # ceil((18 - 2) / 5), int(18 / 5)
    kept = set(visual)
    for pivot in pivots:
        rest = sorted(
            (j for j in range(6, 36) if j not in kept),
            key=lambda j: float(F.cosine_similarity(signals.hidden[j].double(), signals.hidden[pivot].double(), dim=0)),
        )
        kept |= set(rest[: min(share, most - len(kept))])
    assert {6 + j for j in method(signals).kept.tolist()} == kept
    assert len(kept) == method.left(N, N) == (18 if rule == "exact" else 2 + 5 * 3)
    with pytest.raises(LacoError, match="needs pivots"):
        DART(visual_pivots=0, text_pivots=0)


def test_flexselect_by_hand():
    torch.manual_seed(0)
    grid = Grid(7, 1, 4)
    given = Signals(grid=grid, text_attention=torch.rand(3, 5, 28))
    score = given.text_attention.amax(dim=(0, 1))
    assert torch.equal(FlexSelect().scores(given), score)
    torch.testing.assert_close(FlexSelect(score="mean").scores(given), given.text_attention.mean(dim=(0, 1)))
    method = FlexSelect(keep=11, max_frames=3)
    assert [list(group) for group in method.groups(7)] == [[0, 3, 6], [1, 4], [2, 5]]
    kept = method(given).kept
    assert len(kept) == 11
    for group, count in zip(method.groups(7), (4, 4, 3), strict=True):
        places = [4 * f + i for f in group for i in range(4)]
        best = sorted(sorted(places, key=lambda j: -float(score[j]))[:count])
        assert [j for j in kept.tolist() if j in places] == best
    assert len(FlexSelect(keep=11, max_frames=3, strict_reference=True)(given).kept) == 9
    assert len(FlexSelect(keep=11, max_frames=3, whole_frames=True)(given).kept) == 12
    for keep in range(1, 29):
        assert len(FlexSelect(keep=keep, max_frames=3)(given).kept) == keep
    with pytest.raises(LacoError, match="scoring_depth lies between"):
        FlexSelect(scoring_depth=1.0)


def video(frames: int = 5, size: int = 12, seed: int = 0, noise: float = 0.5) -> Tensor:
    torch.manual_seed(seed)
    scene = torch.randn(size, 6)
    return (scene + noise * torch.randn(frames, size, 6)).double() + 0.3


def test_segments():
    x = video(6)
    x[3:] = -x[3:]
    assert segments(x, 0.5, 1) == [3, 3]
    assert segments(x, -1.0, 1) == [6]
    assert segments(x, -1.0, 9) == [1] * 6
    assert segments(x, 1.1, 1) == [1] * 6
    mean = F.normalize(x.mean(dim=1), dim=-1)
    alike = [float(mean[i] @ mean[i + 1]) for i in range(5)]
    cuts = sorted(sorted(range(5), key=lambda i: alike[i])[:3])
    ends = [*(i + 1 for i in cuts), 6]
    assert segments(x, 0.5, 4) == [b - a for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("relevance", [False, True])
def test_attended_and_diverse_tokens_by_hand(relevance):
    x, attention = video(), torch.rand(5, 12, dtype=torch.double)
    for f, found in enumerate(select(x, attention, 5, relevance)):
        means = x.mean(dim=1)
        weight = [
            float(attention[f, j]) * (sum(float(x[f, j] @ m) for m in means) / 5 if relevance else 1) for j in range(12)
        ]
        distance = [
            [(1 - float(F.cosine_similarity(x[f, i], x[f, j], dim=0))) * weight[j] for j in range(12)]
            for i in range(12)
        ]
        picks = [max(range(12), key=lambda j: min(distance[i][j] for i in range(12) if i != j))]
        while len(picks) < 5:
            rest = [j for j in range(12) if j not in picks]
            picks.append(max(rest, key=lambda j: min(distance[i][j] for i in picks)))
        assert found.tolist() == sorted(picks)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("per_frame", [0, 9])
def test_trees_over_time_by_hand(direct, per_frame):
    x, threshold = video(noise=0.35), 0.8
    free = torch.rand(5, 12) > 0.2
    best, parent = {}, {}
    for f in range(1, 5):
        for i in range(12):
            similarity = [
                float(F.cosine_similarity(x[f, i], x[f - 1, j], dim=0)) if free[f, i] and free[f - 1, j] else -1.0
                for j in range(12)
            ]
            parent[f, i] = (f - 1, max(range(12), key=lambda j: similarity[j]))
            best[f, i] = max(similarity)
    joins = {token for token in best if best[token] > threshold}
    if 60 - len(joins) < 5 * per_frame:
        ranked = sorted([*best.values(), *[-1.0] * 12], reverse=True)
        joins = {token for token in joins if best[token] > ranked[60 - 5 * per_frame - 1]}
        assert 0 < len(joins) < 60 - 5 * per_frame
    trees: dict = {}
    depth = 0
    for f in range(5):
        for i in range(12):
            token, steps = (f, i), 0
            while token in joins:
                token, steps = parent[token], steps + 1
            depth = max(depth, steps)
            trees.setdefault(token, []).append((f, i))
    assert depth > 1 or per_frame
    roots = sorted(root for root in trees if free[root])
    plan = merge_over_time(x, free, threshold, per_frame, direct)
    assert plan.kept.tolist() == [12 * f + i for f, i in roots]
    for root, row in zip(roots, plan(x.flatten(0, 1)), strict=True):
        children = sum(parent[token] == root for token in joins)
        size = 1 + children if direct else len(trees[root])
        torch.testing.assert_close(row, sum(x[token] for token in trees[root]) / size, rtol=0, atol=1e-6)


def test_equal_frames_do_not_merge_over_time_where_nothing_may():
    x = torch.randn(1, 20, 33).expand(4, -1, -1)
    assert len(merge_over_time(x, torch.ones(4, 20, dtype=torch.bool), 1.0, per_frame=1).kept) == 80


def test_flashvid():
    x = video(frames=9, size=20, noise=0.3)
    x[4:] *= -1
    given = Signals(grid=Grid(9, 4, 5), tokens=x.flatten(0, 1).float(), received=torch.rand(180))
    method = FlashVID(min_segments=1)
    assert method.per_frame(20, 9) == (5, 2)  # ceil(.7 * 7), 7 = ceil(20 * .25 * 1.25)
    plan = method(given)
    assert torch.equal(plan.kept, plan.kept.unique())
    torch.testing.assert_close(plan.weights.sum(dim=1), torch.ones(len(plan.kept)))
    assert plan.weights.sum(dim=0).max() <= 1 + 1e-6
    assert int((plan.weights == 1).sum()) >= 9 * 5
    assert plan.weights.gather(1, plan.kept[:, None]).gt(0).all()  # a token of the cluster stands for it
    assert 9 * 5 < len(plan.kept) <= 9 * 7 + 9  # every frame's clusters are rounded up
    # every segment by itself
    first = method(Signals(grid=Grid(4, 4, 5), tokens=given.tokens[:80], received=given.received[:80]))
    assert torch.equal(first.kept, plan.kept[plan.kept < 80])
    # frames alone: nothing is chosen twice
    alone = FlashVID(min_segments=9)(given)
    assert torch.equal(alone.kept, alone.kept.unique())
    assert len(alone.kept) == 9 * 7
    strict = FlashVID(min_segments=9, strict_reference=True)(given)
    assert (strict.weights > 0).sum(dim=0).max() == 2
    whole = FlashVID(keep=1.0, min_segments=1)(given)
    assert torch.equal(whole(given.tokens), given.tokens)
    for settings in ({"attended": 1.0}, {"attended": 0.0}, {"keep": 30}):
        few = FlashVID(min_segments=1, **settings)(given)
        assert few(given.tokens).isfinite().all()
        assert len(few.kept) > 0
    flat = FlashVID()(replace(given, tokens=torch.ones(180, 6), received=torch.ones(180)))
    assert torch.equal(flat.kept, flat.kept.unique())
    torch.testing.assert_close(flat(torch.ones(180, 6)), torch.ones(len(flat.kept), 6))
    with pytest.raises(LacoError, match="flashvid: attended is a share"):
        FlashVID(attended=1.5)


def test_empty_segments_of_flashvid():
    """Of fewer frames than segments the authors' code cuts some places again, which changes no token."""
    x = video(frames=4, size=6, noise=0.01)
    x[2:] *= -1
    assert segments(x, 0.9, 4) == segments(x, 0.9, 9) == [1, 1, 1, 1]
    assert segments(x, 0.9, 9, strict_reference=True) == [1, 1, 0, 1, 1]
    assert segments(x, 0.9, 3, strict_reference=True) == segments(x, 0.9, 3)
    assert segments(x[:1], 0.9, 9, strict_reference=True) == [1]
    given = Signals(grid=Grid(4, 2, 3), tokens=x.flatten(0, 1).float(), received=torch.rand(24))
    few, many = (FlashVID(min_segments=count, strict_reference=True)(given) for count in (4, 9))
    assert torch.equal(few.kept, many.kept)
    assert torch.equal(few.weights, many.weights)


def test_a_single_cluster_of_flashvid():
    """The distance of a token to itself, which is its only neighbour, comes of products and is not quite 0."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    own = torch.cdist(x, x).amin(dim=1) / 8**0.5
    density = (-own.square()).exp()
    assert len(density.unique()) > 1
    lowest = density.max()  # all others are as far as any two tokens
    centre = density_peaks(x, 1, 1, strict_reference=True, by_products=True)[0]
    assert density[centre] == lowest
    assert density_peaks(x, 1, 1)[0].tolist() == [0]


def glimpse(**settings) -> tuple[GlimpsePrune, torch.nn.Module]:
    method = GlimpsePrune(width=16, condition=16, **settings)
    return method, module(method)


def test_the_head_of_glimpse_prune_by_hand():
    method, built = glimpse()
    signals, built = sample(), built.double()
    maps = [m.double() for m in signals.maps]
    features = method.features(signals).double()
    assert torch.equal(features, signals.logits[:, -1, 6:36].T.double())
    found = built.head(features, maps, GRIDS)

    def rms(norm, x: Tensor) -> Tensor:
        return torch.stack([row / (row.square().mean() + 1e-6).sqrt() for row in x]) * norm.weight

    def turned(x: Tensor, row: int, column: int) -> Tensor:
        turns = [10000 ** (-i / (len(x) // 4)) for i in range(len(x) // 4)]
        angles = [row * t for t in turns] + [column * t for t in turns]
        half = len(x) // 2
        y = x.clone()
        for i, a in enumerate(angles):
            y[i] = x[i] * math.cos(a) - x[i + half] * math.sin(a)
            y[i + half] = x[i + half] * math.cos(a) + x[i] * math.sin(a)
        return y

    start, wanted = 0, []
    for grid in GRIDS:
        part = slice(start, start + grid.tokens)
        start += grid.tokens
        z = built.head.inward(features[part])
        for block, seen in zip(built.head.blocks, maps, strict=True):
            normed = rms(block.norm1, z)
            both = torch.cat([normed, block.condition(seen[part])], dim=1)
            mixed = []
            for h in range(4):
                q, k = (layer(both)[:, 8 * h : 8 * h + 8] for layer in (block.q, block.k))
                q, k = ([turned(row, i // grid.width, i % grid.width) for i, row in enumerate(x)] for x in (q, k))
                weights = (torch.stack(q) @ torch.stack(k).T / 8**0.5).softmax(dim=1)
                mixed.append(weights @ block.v(normed)[:, 4 * h : 4 * h + 4])
            z = z + block.out(torch.cat(mixed, dim=1))
            normed = rms(block.norm2, z)
            gate = block.gate(normed)
            z = z + block.down(gate * gate.sigmoid() * block.up(normed))
        wanted.append(built.head.outward(z)[:, 0])
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)
    alone = built.head(features[18:], [m[18:] for m in maps], GRIDS[1:])
    torch.testing.assert_close(found[18:], alone)


def test_what_glimpse_prune_keeps():
    importance = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0, 0.1, -2.0, -3.0])
    stays = lambda **settings: GlimpsePrune(**settings).stays(importance).nonzero().flatten().tolist()  # noqa: E731
    assert stays() == [0, 2, 4, 5]  # whatever picture they are of, as in the authors' code
    assert stays(at_least=5) == [0, 2, 3, 4, 5]
    assert stays(keep=0.25) == [0, 4]
    assert stays(keep=1, at_least=2) == [0, 4]
    assert stays(threshold=0.99) == [0]
    assert stays(keep=0.1, at_least=0) == []
    many = torch.ones(100).index_fill(0, torch.arange(29, 100), -1.0)  # 29 of 100 are no more than 0.29 of them
    assert int(GlimpsePrune(keep=0.29).stays(many).sum()) == 29
    signals = sample()
    log = GlimpsePrune(attention="log_softmax").features(signals)
    torch.testing.assert_close(log, signals.logits[:, -1].log_softmax(dim=-1)[:, 6:36].T)
    with pytest.raises(LacoError, match="needs the module that its build gives"):
        GlimpsePrune()(signals)
    _, built = glimpse()
    with pytest.raises(LacoError, match="reads 4 maps of the vision encoder; got 1"):
        built.head(torch.zeros(N, HEADS), signals.maps[:1], GRIDS)
    with pytest.raises(LacoError, match="grids of 18 tokens for 30 visual tokens"):
        built.head(torch.zeros(N, HEADS), signals.maps, GRIDS[:1])
    with pytest.raises(LacoError, match="drops tokens once"):
        GlimpsePrune(depths=(0.5, 0.6), keep=(0.5, 0.5))
    with pytest.raises(LacoError, match="must divide width"):
        GlimpsePrune(width=10)
    with pytest.raises(LacoError, match="threshold is a probability"):
        GlimpsePrune(threshold=2.0)


def test_the_glimpse_token():
    _, built = glimpse()
    token = built.token
    mixed = token.linear.weight @ token.vectors[2, 0] + token.linear.bias
    torch.testing.assert_close(token(2)[0], mixed / (mixed.square().mean() + 1e-6).sqrt())
    assert token(0).shape == (1, D)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(torch.nan)
    built.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in built.parameters())
    assert not token.linear.bias.any()
    assert 0.01 < token.vectors.std() < 0.03


def test_boxes_and_the_loss():
    grid = Grid(1, 4, 5)
    mask = box_mask(grid, [(0.2, 0.3, 0.59, 0.5), (0.9, 0.9, 1.0, 1.0)]).view(4, 5)
    assert mask.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [3, 4]]
    assert box_mask(grid, [(0, 0, 1, 1)]).sum() == 20
    assert box_mask(grid, []).sum() == 0
    with pytest.raises(LacoError, match="a box is x1, y1, x2, y2"):
        box_mask(grid, [(0, 0, 30, 20)])
    torch.manual_seed(0)
    logits, grids = torch.randn(26, requires_grad=True), (grid, Grid(1, 2, 3))
    mask = torch.cat([mask.flatten(), torch.tensor([0.0, 1, 0, 0, 0, 0])])
    wanted = 0.0
    for part in (slice(0, 20), slice(20, 26)):
        p, m = logits[part].detach().sigmoid().double(), mask[part].double()
        dice = 1 - (2 * float((p * m).sum()) + 1e-6) / (float(p.sum() + m.sum()) + 1e-6)
        entropy = -float((m * p.log() + (1 - m) * (1 - p).log()).mean())
        wanted += (dice + 0.1 * entropy) / 2
    loss = localisation_loss(logits, mask, grids)
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    loss.backward()
    assert logits.grad[mask.bool()].max() < 0
