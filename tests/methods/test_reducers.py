"""Reducers against slow versions written token by token in float64, and one contract for all in a small encoder."""

import json
import math
from dataclasses import replace

import pytest
import torch
from cases.reducers import Layer
from torch import Tensor

from laco.errors import LacoError
from laco.methods.evit import EViT, keep_rate
from laco.methods.folder import Folder, most
from laco.methods.ipcv import IPCV
from laco.methods.reducer import LayerSignals, Merge, Reducer, State
from laco.methods.spvit import (
    MultiheadSelector,
    SPViT,
    distillation,
    likeliest,
    policy_softmax,
    straight_through,
    training_loss,
)
from laco.methods.tome import ToMe, match

WIDTH, HEADS, LAYERS = 16, 2, 6
same = {"rtol": 1e-10, "atol": 1e-10}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder(layers: int = LAYERS) -> list[Layer]:
    names = ["norm1", "norm2", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_fc1", "mlp_fc2"]
    built = []
    for layer in range(layers):
        weights = {}
        for index, name in enumerate(names):
            shape = (WIDTH,) if name.startswith("norm") else (WIDTH, WIDTH)
            weights[f"{name}_weight"] = rand(*shape, seed=100 * layer + index) / (1 if len(shape) == 1 else 3)
            weights[f"{name}_bias"] = rand(WIDTH, seed=100 * layer + index + 50) / 4
        built.append(Layer(weights, HEADS))
    return built


def through(
    method: Reducer, x: Tensor, prefix: int = 1, module: MultiheadSelector | None = None, layers: int = LAYERS
) -> tuple[Tensor, State, list[tuple[int, int]]]:
    """(tokens, state) behind the encoder, and how many visual tokens each layer's attention and MLP had."""
    state, counts = method.start(x, layers, prefix=prefix), []
    for index, layer in enumerate(encoder(layers)):
        x, state = method.before_layer(x, state, index, module)
        before = x.shape[1] - prefix
        x, state = layer(x, method, state, index)
        counts.append((before, x.shape[1] - prefix))
    return *method.after_layers(x, state), counts


def plain(x: Tensor, layers: int = LAYERS) -> Tensor:
    return through(ToMe(r=0), x, layers=layers)[0]


# Matching and merging.


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def slow_match(metric: Tensor, amount: int, prefix: int, penalty: Tensor | None = None) -> list[list[int]]:
    """The groups of one picture's tokens in the order [prefix, unmerged even, odd]; the first of each is its place."""
    tokens = len(metric)
    odd = [b for b in range(1, tokens, 2) if b >= prefix]
    partner = {
        a: max(((cosine(metric[a], metric[b]), b) for b in odd), default=None)
        for a in range(0, tokens, 2)
        if a >= prefix and odd
    }
    scores = {a: best[0] - (0 if penalty is None else float(penalty[a])) for a, best in partner.items()}
    joining = sorted(scores, key=scores.get, reverse=True)[: min(amount, (tokens - prefix) // 2)]
    order = list(range(prefix)) + [n for n in range(0, tokens, 2) if n >= prefix and n not in joining] + odd
    return [[n, *(a for a in joining if partner[a][1] == n)] for n in order]


def slow_mean(x: Tensor, groups: list[list[int]], size: Tensor) -> Tensor:
    return torch.stack([sum(x[n] * size[n] for n in g) / sum(size[n] for n in g) for g in groups])


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("amount", [0, 1, 3, 99])
@pytest.mark.parametrize("batch", [1, 2])
def test_match(prefix: int, tokens: int, amount: int, batch: int) -> None:
    tokens += prefix
    metric, x, size = rand(batch, tokens, 3), rand(batch, tokens, 4, seed=1), rand(batch, tokens, seed=2).abs() + 1
    merge = match(metric, amount, prefix)
    y = merge.mean(x, size)
    for b in range(batch):
        groups = slow_match(metric[b], amount, prefix)
        assert merge.kept_BK[b].tolist() == (
            [g[0] for g in groups] if amount and tokens - prefix > 1 else [*range(tokens)]
        )
        if amount and tokens - prefix > 1:
            torch.testing.assert_close(y[b], slow_mean(x[b], groups, size[b]), **same)
            for slot, group in enumerate(groups):
                torch.testing.assert_close(merge.sum(size)[b, slot], size[b, group].sum(), **same)
                assert all(torch.equal(merge.unmerge(y)[b, n], y[b, slot]) for n in group)
    assert torch.equal(match(metric, amount, prefix, order="index").kept_BK, merge.kept_BK.sort().values)
    assert torch.equal(merge.kept_BK[:, :prefix], torch.arange(prefix).expand(batch, -1))


def test_autocast_changes_no_match() -> None:
    """Cosines that bfloat16 cannot tell apart."""
    metric = (rand(1, 1, 64) + 0.3 * rand(2, 101, 64, seed=1)).float()
    wanted = match(metric, 40, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(match(metric, 40, 1).slot_BN, wanted.slot_BN)


def test_autocast_changes_no_package() -> None:
    method, x = SPViT(layer=1, strict_reference=True), rand(2, 20, WIDTH).float()
    module = method.build(WIDTH).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, packed = method.mask(x, method.start(x, LAYERS), module)
    dropped = (packed.slot_BS == 20).float()
    assert dropped.sum() > 0
    assert y.dtype == torch.float32
    assert torch.equal(y[:, :-1], x)
    assert (y[:, -1] != y[:, -1].bfloat16()).any()


def test_match_with_penalty_and_by_score() -> None:
    metric, penalty = rand(1, 12, 3), rand(1, 12, seed=3).abs()
    groups = slow_match(metric[0], 3, 1, penalty[0])
    assert groups != slow_match(metric[0], 3, 1)
    assert match(metric, 3, 1, penalty).kept_BK[0].tolist() == [g[0] for g in groups]
    scores = [max(cosine(metric[0, a], metric[0, b]) for b in range(1, 12, 2)) for a in range(0, 12, 2)]
    ranked = sorted(range(6), key=lambda a: -scores[a])[2:]
    assert match(metric, 2, 0, order="score").kept_BK[0].tolist() == [2 * a for a in ranked] + list(range(1, 12, 2))


def test_dropped_tokens_are_in_no_sum_and_come_back_as_zero() -> None:
    x = rand(2, 5, 3)
    merge = Merge(5, torch.tensor([[3, 1], [0, 4]]))
    kept = merge.sum(x)
    assert torch.equal(kept, torch.stack([x[0, [3, 1]], x[1, [0, 4]]]))
    assert merge.unmerge(kept)[0].count_nonzero(dim=1).tolist() == [0, 3, 0, 3, 0]
    later = Merge(2, torch.tensor([[1], [0]]))
    assert later.follow(merge.slot_BN).tolist() == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_two_steps_as_one() -> None:
    x, size = rand(2, 13, 3), rand(2, 13, seed=2).abs() + 1
    nothing = Merge(13, torch.arange(13).expand(2, -1))
    first = match(x, 5, 1)
    for one, two in ((first, match(rand(2, 8, 3, seed=1), 3, 1)), (nothing, first), (first, match(x[:, :8], 0, 1))):
        both = one.then(two)
        assert torch.equal(both.slot_BN, two.follow(one.slot_BN))
        torch.testing.assert_close(both.sum(size), two.sum(one.sum(size)), **same)
        in_turn = two.mean(one.mean(x, size), one.sum(size))
        torch.testing.assert_close(both.mean(x, size), in_turn, **same)


# ToMe.


def test_sources_and_sizes_follow_every_step() -> None:
    x, method = rand(2, 21, WIDTH), ToMe(r=5)
    state, y = method.start(x, 3, prefix=1), x
    for index in range(3):
        y, state = method.before_mlp(y, state, index, LayerSignals(keys=rand(2, 2, y.shape[1], 4, seed=index)))
    assert y.shape[1] == 1 + 20 - 3 * 5
    assert torch.equal(state.sources_BNS.sum(2).double(), state.size_BN.double())
    assert state.sources_BNS.sum(1).unique().tolist() == [1]
    of_sources = torch.einsum("bns,bsc->bnc", state.sources_BNS.double(), x) / state.size_BN[..., None]
    torch.testing.assert_close(y, of_sources, **same)


def test_proportional_attention_counts_sources() -> None:
    """Attention to merged duplicates is that to the duplicates."""
    x = rand(1, 4, WIDTH).repeat_interleave(2, dim=1)
    merge = match(x, 4)
    method = ToMe()
    state = method.start(x, 1).after(merge)
    logits, values = rand(1, 1, 3, 4), rand(1, 1, 4, 5, seed=1)
    merged = method.attention_weights(logits, state) @ values
    torch.testing.assert_close(merged, logits.repeat_interleave(2, -1).softmax(-1) @ values.repeat_interleave(2, -2))
    assert ToMe(proportional=False).attention_bias(state) is None
    assert method.attention_bias(method.start(x, 1)) is None


def test_tome_schedules() -> None:
    assert ToMe(r=13).schedule(4) == [13] * 4
    assert ToMe(r=13, inflection=-1.0).schedule(12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert ToMe(r=(5, 0, 7)).schedule(5) == [5, 0, 7, 0, 0]
    assert ToMe(r=(5, 0, 7)).schedule(2) == [5, 0]
    assert ToMe(r=(5, 0, 7)).layers(5) == (0, 2)
    assert ToMe(r=4, layer=2).schedule(5) == [0, 0, 4, 4, 4]
    assert ToMe(r=4, inflection=1.0).schedule(1) == [4]
    # 10 * (1 - 0.9) is a little less than 1.
    assert ToMe(r=10, inflection=0.9).schedule(2) == [1, 19]
    assert ToMe(r=10, inflection=0.9, strict_reference=True).schedule(2) == [0, 20]
    assert ToMe(r=4).num_tokens(7, 3) == 1
    exact, binary = ToMe(r=49, inflection=-1.0), ToMe(r=49, inflection=-1.0, strict_reference=True)
    assert all(exact.schedule(n)[-1] == 0 for n in range(2, 60))
    assert any(exact.schedule(n) != binary.schedule(n) for n in range(2, 60))


# EViT.


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_evit(fuse: bool, prefix: int) -> None:
    tokens, method = 11, EViT(keep=0.4, fuse=fuse, layer=1)
    x, attention = rand(2, prefix + tokens, WIDTH), rand(2, 3, prefix + tokens, seed=1).softmax(-1)
    signals = LayerSignals(cls_attention=attention) if prefix else LayerSignals(received=attention.mean(1))
    y, state = method.before_mlp(x, method.start(x, 3, prefix=prefix), 1, signals)
    left = math.ceil(0.4 * tokens)
    assert y.shape[1] - prefix == left + fuse == method.left(tokens)
    for b in range(2):
        score = [sum(float(attention[b, h, n]) for h in range(3)) / 3 for n in range(prefix + tokens)]
        ranked = sorted(range(prefix, prefix + tokens), key=lambda n: -score[n])
        rows = [x[b, n] for n in [*range(prefix), *ranked[:left]]]
        rows += [sum(score[n] * x[b, n] for n in ranked[left:])] * fuse
        torch.testing.assert_close(y[b], torch.stack(rows), **same)
        assert state.place_BN[b].tolist() == [*range(prefix), *ranked[: left + fuse]]
        assert state.size_BN[b].tolist() == [1] * (prefix + left) + [tokens - left] * fuse
        if fuse:
            assert state.sources_BNS[b, -1].nonzero().flatten().tolist() == sorted(ranked[left:])


def test_evit_counts() -> None:
    assert [n.mlp for n in EViT().layer_tokens(196, 12)] == [196] * 3 + [139] * 3 + [99] * 3 + [71] * 3
    assert [n.attention for n in EViT().layer_tokens(196, 12)] == [196] * 4 + [139] * 3 + [99] * 3 + [71] * 2
    assert EViT(keep=0.55).kept(100) == 55
    assert EViT(keep=0.55, strict_reference=True).kept(100) == 56
    assert EViT(keep=1.0).num_tokens(196, 12) == 196


def test_evit_keep_rate() -> None:
    rates = [keep_rate(step, 10, 0.6, 2, 7) for step in range(100)]
    assert rates[:20] == [1] * 20
    assert rates[70:] == [0.6] * 30
    assert rates == sorted(rates, reverse=True)
    assert rates[45] == pytest.approx(0.8)


def test_evit_fused_token_has_a_gradient_to_its_weights() -> None:
    x, attention = rand(1, 9, WIDTH), rand(1, 2, 9, seed=1).softmax(-1).requires_grad_()
    method = EViT(layer=1)
    y, _ = method.before_mlp(x, method.start(x, 2, prefix=1), 1, LayerSignals(cls_attention=attention))
    y.sum().backward()
    assert attention.grad is not None
    assert attention.grad.count_nonzero() == 2 * (8 - method.kept(8))


# FOLDER.


def slow_fold(
    metric: Tensor, attention: Tensor | None, amount: int, prefix: int, alpha: float, by_index: bool
) -> list[list[int]]:
    """Original tokens of every row of the result."""
    size = torch.ones(len(metric), dtype=metric.dtype)
    members = [[n] for n in range(len(metric))]
    while amount:
        step = min(amount, max((len(metric) - max(prefix, 1)) // 2, 1))
        groups = slow_match(metric, step, prefix, None if attention is None else 100 * alpha * attention)
        if by_index:
            groups.sort()
        metric = slow_mean(metric, groups, size)
        if attention is not None:
            attention = torch.stack([sum(attention[n] for n in g) / len(g) for g in groups])
        size = torch.stack([sum(size[n] for n in g) for g in groups])
        members, amount = [[m for n in g for m in members[n]] for g in groups], amount - step
    return members


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("keep", [1, 2, 9, 20, 22])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_folder_block(prefix: int, keep: int, alpha: float) -> None:
    tokens = prefix + 22
    x, keys, attention = rand(2, tokens, 5), rand(2, 3, tokens, 4, seed=1), rand(2, 3, tokens, seed=2).softmax(-1)
    method = Folder(keep=keep, alpha=alpha, minimum=0)
    signals = LayerSignals(keys=keys, cls_attention=attention)
    y, state = method.before_mlp(x, method.start(x, 4, last=3, prefix=prefix), 2, signals)
    assert y.shape[1] == prefix + keep
    for b in range(2):
        groups = slow_fold(keys[b].mean(0), attention[b].mean(0), 22 - keep, prefix, alpha, by_index=False)
        torch.testing.assert_close(y[b], torch.stack([x[b, g].mean(0) for g in groups]), **same)
        assert [row.nonzero().flatten().tolist() for row in state.sources_BNS[b]] == [sorted(g) for g in groups]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("keep", [1, 5, 13, 17, 23])
def test_folder_features(prefix: int, keep: int) -> None:
    x = rand(2, prefix + 23, 5)
    method = Folder(keep=keep, form="features")
    y, state = method.after_layers(x, method.start(x, 4, prefix=prefix))
    assert state.place_BN.diff(dim=1).gt(0).all()
    for b in range(2):
        groups = slow_fold(x[b], None, 23 - keep, prefix, 0, by_index=True)
        rows = [x[b, g].mean(0) * (1 + math.log(len(g))) for g in groups]
        torch.testing.assert_close(y[b], torch.stack(rows), rtol=1e-6, atol=1e-6)  # log of float32 sizes


def test_folder_log_size() -> None:
    x = rand(1, 576, 4)
    for removed, factor in ((0, True), (191, True), (192, False), (287, False), (288, True), (400, True)):
        strict = Folder(keep=576 - removed, form="features", strict_reference=True)
        bare = replace(strict, log_size=False)
        default = replace(strict, strict_reference=False)
        (y, _), (means, _), (usual, _) = (m.after_layers(x, m.start(x, 2)) for m in (strict, bare, default))
        assert torch.equal(y, usual if factor else means)
    assert most(577, 1) == 288


def test_folder_settings() -> None:
    with pytest.raises(LacoError, match="alpha is a weight, 0 or more; got nan"):
        Folder(alpha=math.nan)
    with pytest.raises(LacoError, match="takes neither depth nor layer"):
        Folder(form="features", layer=2)


def test_folder_counts() -> None:
    assert Folder().layer_tokens(576, 24, 23)[-2:] == [(576, 576), (576, 192)]
    assert Folder(keep=0.25).num_tokens(576, 24) == 144
    assert Folder(form="features").num_tokens(576, 24) == 192
    assert Folder().num_tokens(39, 4) == 39
    assert Folder(layer=2).layers(4) == (2,)


# SPViT.


def selector(width: int = WIDTH, heads: int | None = 2) -> MultiheadSelector:
    torch.manual_seed(0)
    module = MultiheadSelector(width, heads).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1.0)
        log, _ = module(rand(1, 64, width), torch.ones(1, 64))
        module.score[-1].bias[0] -= (log[..., 0] - log[..., 1]).quantile(0.3)  # keeps most
    return module


def test_selector() -> None:
    module, x, policy = selector(), rand(2, 7, WIDTH), (rand(2, 7, seed=5) > -0.5).double()
    policy[:, 0] = 1
    log, soft = module(x, policy)
    size = WIDTH // 2
    for b in range(2):
        heads = [[x[b, n, h * size : (h + 1) * size] for n in range(7)] for h in range(2)]
        embedded = [[module.embed(token) for token in head] for head in heads]
        alive = [n for n in range(7) if policy[b, n]]
        means = [sum(head[n][size // 2 :] for n in alive) / len(alive) for head in embedded]
        for n in range(7):
            weight = module.head_weight(torch.stack([head[n].mean() for head in heads]))
            logits = [module.score(torch.cat([embedded[h][n][: size // 2], means[h]])) for h in range(2)]
            wanted = (
                sum(weight[h] * torch.log(logits[h].exp() / logits[h].exp().sum()) for h in range(2)) / weight.sum()
            )
            torch.testing.assert_close(log[b, n], wanted, **same)
            wanted = sum(weight[h] * logits[h].exp() / logits[h].exp().sum() for h in range(2)) / weight.sum()
            torch.testing.assert_close(soft[b, n], wanted, **same)
    assert sum(p.numel() for p in MultiheadSelector(384).parameters()) == 6975


def test_spvit_decides_packs_and_never_takes_back() -> None:
    module, x = selector(), rand(2, 2 + 12, WIDTH)
    for strict in (False, True):
        method, y = SPViT(strict_reference=strict), x
        state = method.start(x, 12, prefix=2)
        before = torch.ones(2, 12)
        for point in range(3):
            policy = torch.ones(2, y.shape[1] - 2, dtype=x.dtype)
            policy[:, :12] = before
            noise = 2 * rand(2, y.shape[1] - 2, 2, seed=point + 7)
            log, soft = module(y[:, 2:], policy)
            keep = before * ((log + noise)[:, :12, 0] >= (log + noise)[:, :12, 1])
            y, state = method.mask(y, state, module, noise)
            assert torch.equal(state.policy_BN, torch.cat([torch.ones(2, 2), keep, torch.ones(2, point + 1)], dim=1))
            for b in range(2):
                dropped = [n for n in range(12) if before[b, n] and not keep[b, n]]
                assert dropped or point
                total = sum((soft[b, n, 0] * x[b, 2 + n] for n in dropped), torch.zeros_like(x[0, 0]))
                wanted = total / (1 if strict or not dropped else sum(soft[b, n, 0] for n in dropped))
                torch.testing.assert_close(y[b, -1], wanted, **same)
                assert state.sources_BNS[b, -1].nonzero().flatten().tolist() == [2 + n for n in dropped]
            before = keep
        assert torch.equal(y[:, :14], x)
        assert state.size_BN.sum(1).tolist() == [14, 14]


@pytest.mark.parametrize("batch", [1, 3])
def test_gathering_is_masking(batch: int) -> None:
    """Tokens that are gone do what masked ones do: nothing; pictures of a batch do not see one another's padding."""
    module, x, method = selector(), rand(batch, 1 + 14, WIDTH), SPViT()
    y, state, _ = through(method, x, module=module)
    z, masked = x, method.start(x, LAYERS, prefix=1)
    for index, layer in enumerate(encoder()):
        if method.reduces(masked, index):
            z, masked = method.mask(z, masked, module)
        z, masked = layer(z, method, masked, index)
    z, masked = method.after_layers(z, masked)
    assert state.policy_BN is None or batch > 1
    for b in range(batch):
        mine = y[b] if state.policy_BN is None else y[b, state.policy_BN[b] > 0]
        assert 4 < len(mine) < 1 + 14 + 3
        torch.testing.assert_close(mine, z[b, masked.policy_BN[b] > 0], **same)


def test_spvit_trains() -> None:
    torch.manual_seed(1)
    module, x, method = selector().train(), rand(2, 1 + 14, WIDTH), SPViT(targets=(0.6, 0.3))
    y, state, counts = through(method, x, module=module)
    assert counts[-1] == (16, 16)
    policy = state.policy_BN
    assert set(policy.unique().tolist()) == {0, 1}
    (y * policy[..., None]).sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in module.parameters())


def test_spvit_at_fewer_points_than_targets() -> None:
    """With `layer` it is one, in short encoders two; the targets are those of the first points."""
    for method, layers in ((SPViT(layer=2), 12), (SPViT(), 3)):
        points = len(method.layers(layers))
        assert points < 3
        keeps = [torch.full((2, 5), 0.5)] * points
        wanted = 2 * sum((0.5 - target) ** 2 for target in method.targets[:points]) / points
        assert float(method.loss(keeps, None, None)) == pytest.approx(wanted)


def test_spvit_packs_nothing_without_a_large_gradient() -> None:
    """Where no token is dropped the package is empty, and so is what it teaches."""
    method = SPViT(targets=(0.7,), heads=2)
    torch.manual_seed(0)
    module = method.build(16).train()
    with torch.no_grad():
        module.score[-1].bias.copy_(torch.tensor([9.0, 0.0]))
    x = torch.randn(1, 8, 16)
    y, state = method.before_layer(x, method.start(x, 4), method.layers(4)[0], module)
    assert torch.equal(y[:, -1], torch.zeros(1, 16))
    assert state.policy_BN is not None
    gradients = torch.autograd.grad(y.sum(), list(module.parameters()), allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 10


def test_spvit_keeps_as_many_after_training_as_in_it() -> None:
    """Nothing is drawn any more, but all or none would stay by the odds alone of a network that is unsure."""
    torch.manual_seed(0)
    module, method = selector().float(), SPViT(targets=(0.7,), layer=1)
    with torch.no_grad():
        module.score[-1].weight.mul_(0.05)
        module.score[-1].bias.copy_(torch.tensor([0.85, 0.0]))  # a probability of 0.7, or nearly, for every token

    def kept(x: Tensor) -> float:
        _, state = method.before_layer(x, method.start(x, 2, prefix=1), 1, module)
        alive = state.policy_BN if state.policy_BN is not None else torch.ones_like(state.size_BN)
        return float((alive.detach().sum() - 2 * len(x)) / (len(x) * 64))  # without prefix and package

    pictures = [rand(16, 1 + 64, WIDTH, seed=seed).float() for seed in range(40)]
    later = [kept(x) for x in pictures]
    assert later == [kept(x) for x in pictures]
    module.train()
    drawn = [kept(x) for x in pictures]
    assert sum(drawn) / 40 == pytest.approx(0.7, abs=0.05)
    assert sum(later) / 40 == pytest.approx(sum(drawn) / 40, abs=0.01)


def test_spvit_keeps_the_likeliest() -> None:
    probability = torch.tensor(
        [[0.9, 0.4, 0.6, 0.4, 0.5], [1.0, 0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.1, 0.0, 0.0]]
    ).double()
    open_ = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert likeliest(probability.logit(eps=1e-9), open_).tolist() == [  # 2.2, 2 and 0.4 tokens
        [1, 0, 0, 0, 1],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]


def test_decisions_are_exact_and_have_the_gradient_of_their_probability() -> None:
    logits = rand(2, 9, 2).requires_grad_()
    decided = straight_through(logits[..., 0] - logits[..., 1])
    assert torch.equal(decided, (logits[..., 0] >= logits[..., 1]).double())
    (gradient,) = torch.autograd.grad(decided.square().sum() + decided.sum(), logits)
    (wanted,) = torch.autograd.grad(((2 * decided.detach() + 1) * logits.softmax(-1)[..., 0]).sum(), logits)
    torch.testing.assert_close(gradient, wanted, **same)


def test_policy_softmax() -> None:
    logits, policy = rand(2, 3, 5, 5), torch.tensor([[1.0, 0, 1, 0, 1], [1, 1, 1, 1, 1]]).double()
    for eps, strict in ((0, False), (0, True), (1e-2, True)):
        got = policy_softmax(logits, policy, eps, strict)
        for b, h, i in ((0, 0, 0), (0, 1, 1), (0, 2, 4), (1, 1, 3)):
            row = [float(a) for a in logits[b, h, i]]
            weights = [math.exp(a - max(row)) * (1 if j == i else float(policy[b, j])) for j, a in enumerate(row)]
            wanted = [(w + eps / 5) / (sum(weights) + eps) for w in weights]
            torch.testing.assert_close(got[b, h, i], torch.tensor(wanted, dtype=torch.double), **same)
    loud = torch.zeros(1, 1, 3, 3)
    loud[..., 2] = 1000.0
    got = policy_softmax(loud, torch.tensor([[1.0, 1, 0]]))
    assert got[0, 0, 0].tolist() == [0.5, 0.5, 0]


def test_spvit_loss() -> None:
    keeps = [torch.tensor([[1.0, 1, 0, 1]]), torch.tensor([[1.0, 0, 0, 1]])]
    mine, teacher = rand(1, 3), rand(1, 3, seed=1)
    features, wanted = rand(1, 4, 5), rand(1, 4, 5, seed=1)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return sum(b.softmax(0)[i] * (b.log_softmax(0)[i] - a.log_softmax(0)[i]) for i in range(len(a)))

    torch.testing.assert_close(distillation(mine, teacher), divergence(mine[0], teacher[0]), **same)
    pairs = {"logits": (mine, teacher), "features_BMC": (features, wanted)}
    ratio = ((0.75 - 0.7) ** 2 + (0.5 - 0.4) ** 2) / 2
    near = sum(divergence(features[0, n], wanted[0, n]) for n in (0, 3)) / 2
    loss = training_loss(torch.tensor(1.5).double(), keeps, (0.7, 0.4), **pairs)
    torch.testing.assert_close(
        loss, 1.5 + 2 * ratio + 0.5 * divergence(mine[0], teacher[0]) + 0.5 * near, rtol=1e-6, atol=0
    )
    square = training_loss(torch.tensor(1.5).double(), keeps, (0.7, 0.4), **pairs, features_by="square")
    near_square = (features - wanted)[0, [0, 3]].square().mean()
    torch.testing.assert_close(square - loss, 0.5 * (near_square - near), rtol=1e-9, atol=0)


# IPCV.


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("stabilise", [0, 1, 2, 9])
def test_ipcv(prefix: int, stabilise: int) -> None:
    """The whole encoder by hand, each picture alone."""
    tokens, first, count = 15, 2, 3
    method = IPCV(layer=first, keep=0.5, stabilise=stabilise, neighbours=count)
    x = rand(2, prefix + tokens, WIDTH)
    y, state, counts = through(method, x, prefix)
    assert counts == method.layer_tokens(tokens, LAYERS)
    assert method.num_tokens(tokens, LAYERS) == tokens == y.shape[1] - prefix
    assert torch.equal(state.size_BN, torch.ones(2, prefix + tokens))
    layers, idle = encoder(), ToMe(r=0)
    for b in range(2):
        h = [x[b : b + 1]]
        for layer in layers[:first]:
            h.append(layer(h[-1], idle, idle.start(h[-1], 1), 0)[0])
        then = h[first][0]
        change = [float((then[n] - h[first - 1][0, n]).norm()) for n in range(len(then))]
        kept = [*range(prefix), *sorted(sorted(range(prefix, len(then)), key=lambda n: -change[n])[: tokens // 2])]
        near = {
            n: sorted(kept, key=lambda k: float((then[n] - then[k]).norm()))[:count]
            for n in range(len(then))
            if n not in kept
        }
        now = {k: then[k] for k in kept}

        def whole(now: dict[int, Tensor], then: Tensor = then, near: dict[int, list[int]] = near) -> Tensor:
            rows = [
                now[n] if n in now else then[n] + sum(now[k] - then[k] for k in near[n]) / count
                for n in range(len(then))
            ]
            return torch.stack(rows)[None]

        for index, layer in enumerate(layers[first:], start=first):
            z = whole(now) if index < first + stabilise else torch.stack([now[k] for k in kept])[None]
            z = z + layer.attention(layer.norm("norm1", z), lambda logits: logits.softmax(-1))[0]
            z = z[:, kept] if index < first + stabilise else z
            z = z + layer.linear("mlp_fc2", layer.act(layer.linear("mlp_fc1", layer.norm("norm2", z))))
            now = dict(zip(kept, z[0], strict=True))
        torch.testing.assert_close(y[b : b + 1], whole(now), **same)


def test_ipcv_neighbours_of_other_pictures() -> None:
    """Twice the same picture, a little changed: the reference finds half of the neighbours in the other one."""
    x = rand(1, 12, WIDTH)
    x = torch.cat([x, x + 1e-3 * rand(1, 12, WIDTH, seed=1)])
    for strict in (False, True):
        method = IPCV(layer=1, keep=0.5, neighbours=4, strict_reference=strict)
        memory = method.choose(x, torch.zeros_like(x), method.start(x, 2))
        picture = memory.neighbours_BRT // memory.kept_BK.shape[1]
        own = picture == torch.arange(2)[:, None, None]
        assert own.all() if not strict else 0 < own.sum() < own.numel()


def test_ipcv_counts() -> None:
    """0.35 * 180 is 62.99... in binary fractions."""
    assert IPCV().left(180) == 63
    assert IPCV(strict_reference=True).left(180) == 62
    assert IPCV(keep=0.5).left(7) == 3


def test_ipcv_frames() -> None:
    kept, lengths = torch.tensor([0, 3, 4, 5, 8, 11]), torch.tensor([4, 4, 4])
    assert IPCV().lengths_left(kept, lengths).tolist() == [2, 2, 2]
    assert IPCV(strict_reference=True).lengths_left(kept, lengths).tolist() == [3, 2, 1]
    assert IPCV().lengths_left(kept[:2], lengths).tolist() == [2, 0, 0]


# One contract.

REDUCERS = [
    ToMe(r=3),
    ToMe(r=4, inflection=-0.5, proportional=False),
    ToMe(r=2, layer=3),
    EViT(),
    EViT(fuse=False, keep=0.5, depth=1 / 2),
    Folder(minimum=0),
    Folder(form="features", log_size=False),
    SPViT(),
    IPCV(layer=2, keep=0.4, stabilise=2, neighbours=3),
]
every = pytest.mark.parametrize("method", REDUCERS, ids=lambda m: f"{m.name}-{REDUCERS.index(m)}")


@every
@pytest.mark.parametrize("prefix", [1, 2])
def test_counts_are_known_before(method: Reducer, prefix: int) -> None:
    y, state, counts = through(method, rand(1, prefix + 20, WIDTH), prefix, selector())
    assert state.slot_BS.shape == (1, prefix + 20)
    assert state.place_BN.shape == state.size_BN.shape == y.shape[:2]
    assert state.place_BN[:, : y.shape[1] - state.packages].diff(dim=1).gt(0).all()  # raster order
    assert state.place_BN[0, :prefix].tolist() == list(range(prefix))
    if method.static_count:
        assert counts == method.layer_tokens(20, LAYERS)
        assert y.shape[1] - prefix == method.num_tokens(20, LAYERS)
    assert len(method.layer_tokens(20, LAYERS, 5)) == 5


@every
def test_reducing_happens_in_the_named_layers(method: Reducer) -> None:
    _, _, counts = through(method, rand(1, 1 + 20, WIDTH), module=selector())
    now = 20
    for index, (attention, mlp) in enumerate(counts):
        if (attention, mlp) != (now, now):
            assert index in method.layers(LAYERS) or isinstance(method, IPCV)
        assert method.moment == "mlp" or attention == mlp
        now = mlp


@every
def test_pictures_of_a_batch_are_independent(method: Reducer) -> None:
    x = rand(3, 1 + 20, WIDTH)
    together, state, _ = through(method, x, module=selector())
    for b in range(3):
        alone, _, _ = through(method, x[b : b + 1], module=selector())
        mine = together[b] if state.policy_BN is None else together[b, state.policy_BN[b] > 0]
        torch.testing.assert_close(mine, alone[0], **same)


@pytest.mark.parametrize(
    "method",
    [ToMe(r=0), EViT(keep=1.0), Folder(keep=1.0), Folder(keep=1.0, form="features"), IPCV(keep=1.0)],
    ids=lambda m: m.name,
)
def test_full_budget_changes_nothing(method: Reducer) -> None:
    x = rand(2, 1 + 11, WIDTH)
    y, _, counts = through(method, x)
    torch.testing.assert_close(y, plain(x), rtol=0, atol=0)
    assert counts == [(11, 11)] * LAYERS


@every
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_constant_pictures_and_single_tokens(method: Reducer, tokens: int) -> None:
    x = rand(1, 1, WIDTH).repeat(2, 1 + tokens, 1)
    y, _, _ = through(method, x, module=selector())
    assert y.isfinite().all()
    assert y.shape[1] >= 2
    if method.static_count:
        assert y.shape[1] - 1 == method.num_tokens(tokens, LAYERS)


def test_merged_duplicates_leave_a_constant_picture_alone() -> None:
    """Merging what is equal, with proportional attention, changes no token."""
    x = torch.cat([rand(1, 1, WIDTH), rand(1, 1, WIDTH, seed=1).repeat(1, 16, 1)], dim=1)
    y, _, _ = through(ToMe(r=4), x)
    torch.testing.assert_close(
        y, plain(x)[:, :2].repeat_interleave(torch.tensor([1, y.shape[1] - 1]), 1), rtol=1e-5, atol=1e-5
    )
    with_wrong_weights, _, _ = through(ToMe(r=4, proportional=False), x)
    assert not torch.allclose(with_wrong_weights, y, atol=1e-3)


@every
def test_half_precision_keeps_its_dtype(method: Reducer) -> None:
    x = rand(1, 1 + 20, WIDTH).bfloat16()
    state, y = method.start(x, LAYERS, prefix=1), x
    for index in range(LAYERS):
        y, state = method.before_layer(y, state, index, selector().bfloat16())
        n = y.shape[1]
        signals = LayerSignals(keys=rand(1, 2, n, 4).bfloat16(), cls_attention=rand(1, 2, n).softmax(-1).bfloat16())
        y, state = method.before_mlp(y, state, index, signals)
    assert method.after_layers(y, state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("method", [ToMe(), EViT(layer=1), Folder(minimum=0)], ids=lambda m: m.name)
def test_missing_signals(method: Reducer) -> None:
    x = rand(1, 9, WIDTH)
    with pytest.raises(LacoError, match=f"{method.name} needs {min(method.needs)}, which is not there"):
        method.before_mlp(x, method.start(x, 2, prefix=1), 1, LayerSignals())


@every
def test_settings_survive_json(method: Reducer) -> None:
    data = json.loads(json.dumps(method.to_dict()))
    assert data.pop("method") == method.name
    again = type(method).from_fields(data)
    assert again == method
    assert hash(again) == hash(method)


def test_settings_survive_json_with_lists() -> None:
    assert ToMe(r=[3, 2]) == ToMe(r=(3, 2))  # type: ignore[arg-type]
    assert SPViT(targets=[0.5]) == SPViT(targets=(0.5,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (ToMe, {"r": -1}, "r counts tokens"),
        (ToMe, {"r": (3, -1)}, "r counts tokens"),
        (ToMe, {"inflection": 1.5}, "inflection lies in"),
        (ToMe, {"r": (3, 1), "inflection": 0.5}, "bends a single r"),
        (EViT, {"keep": 0.0}, "fraction"),
        (EViT, {"keep": 1.5}, "fraction"),
        (Folder, {"keep": 0}, "count"),
        (Folder, {"keep": 1.5}, "count"),
        (SPViT, {"targets": ()}, "targets"),
        (SPViT, {"targets": (0.5, 2.0)}, "targets"),
        (IPCV, {"keep": 0.0}, "fraction"),
        (IPCV, {"neighbours": 0}, "neighbours"),
        (IPCV, {"stabilise": -1}, "stabilise"),
    ],
)
def test_wrong_settings(cls: type[Reducer], settings: dict, words: str) -> None:
    with pytest.raises(LacoError, match=words):
        cls(**settings)


def test_wrong_use() -> None:
    with pytest.raises(LacoError, match="layer must be below 6"):
        EViT(depth=1.0).layers(6)
    with pytest.raises(LacoError, match="cannot keep 5 of 4"):
        Folder(keep=5, minimum=0).num_tokens(4, 2)
    with pytest.raises(LacoError, match="an even number"):
        MultiheadSelector(6, 2)
    with pytest.raises(LacoError, match="needs the selector"):
        through(SPViT(), rand(1, 5, WIDTH))
    with pytest.raises(LacoError, match="two layers"):
        IPCV().layers(1)
