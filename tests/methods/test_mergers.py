"""One contract, tested on every registered merger: counts, gradient, batches, precision, initialisation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from laco.errors import LacoError
from laco.grid import ODD_RULES, Grid, merge_map, pool_map, to_windows
from laco.methods import WTC, LaCo, Merger, PixelShuffle, RandomKeep, WindowMerger, registry
from laco.methods.base import LayerParts

WIDTH = 16
SETTINGS: dict[str, list[dict]] = {
    "laco": [
        {},
        {"shortcut": "saliency", "norm": "rmsnorm"},
        {"shortcut": "none", "norm": "layernorm", "hidden": 5},
    ],
    "pixel_shuffle": [{"form": "internvl"}, {"form": "smolvlm"}, {"form": "qwen"}],
    "window_merger": [{}, {"attention": False, "zero_init": False}],
}
MERGERS = [
    (cls, settings)
    for cls in registry().values()
    if issubclass(cls, Merger)
    for settings in SETTINGS.get(cls.name, [{}])
]
every_merger = pytest.mark.parametrize(
    ("cls", "settings"),
    MERGERS,
    ids=["-".join([cls.name, *map(str, settings.values())]) for cls, settings in MERGERS],
)
every_factor = pytest.mark.parametrize("factor", [1, 2, 3])


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial value, so that no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


@every_merger
@every_factor
@pytest.mark.parametrize("odd", ODD_RULES)
def test_shapes_are_num_tokens(cls: type[Merger], settings: dict, factor: int, odd: str) -> None:
    method = cls(factor=factor, odd=odd, **settings)
    grid = Grid(2, 6, 12) if odd == "error" else Grid(2, 5, 7)
    merged = method.num_tokens(grid)
    x = torch.randn(*grid, WIDTH)
    assert merge_map(method.build(WIDTH), x, factor, odd).shape == (*merged, WIDTH)
    if method.is_projector:
        levels = len(method.projector_levels) + 1
        projector = method.build_projector(WIDTH, 10)
        assert merge_map(projector, torch.cat([x] * levels, dim=-1), factor, odd).shape == (*merged, 10)
    else:
        with pytest.raises(LacoError, match="no projector"):
            method.build_projector(WIDTH, 10)


@every_merger
@every_factor
def test_gradient_reaches_input_and_every_parameter(cls: type[Merger], settings: dict, factor: int) -> None:
    method = cls(factor=factor, **settings)
    module = filled(method.build(WIDTH))
    x = torch.randn(2, 5, 7, WIDTH, requires_grad=True)
    y = merge_map(module, x, factor, "pad")
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    counts = x.grad.abs().sum(-1) > 0
    expected = y[..., 0].numel() if cls is RandomKeep else counts.numel()  # one of each window, or every token
    assert counts.sum() == expected
    silent = [name for name, parameter in module.named_parameters() if not parameter.grad.abs().sum() > 0]
    # Logits over the one token of a 1 x 1 window change nothing, nor does a bias that all keys share.
    logits = ("q.", "k.", "attention.q.", "attention.k.", "saliency") if factor == 1 else ("attention.k.bias",)
    if cls is WTC and factor == 1:  # a softmax over one token
        assert len(silent) == 4
        return
    assert [name for name in silent if not name.startswith(logits)] == []


@every_merger
def test_a_new_module_learns(cls: type[Merger], settings: dict) -> None:
    """From its own beginning, where zeros in two places would keep each other zero."""
    torch.manual_seed(0)
    module = cls(**settings).build(WIDTH)
    before = copy.deepcopy(module.state_dict())
    x, wanted = torch.randn(2, 4, 6, WIDTH), torch.randn(2, 2, 3, WIDTH)
    for _ in range(4):
        loss = (merge_map(module, x, 2, "pad") - wanted).square().sum()
        gradients = torch.autograd.grad(loss, parameters := list(module.parameters())) if before else []
        with torch.no_grad():
            for parameter, gradient in zip(parameters if before else [], gradients, strict=True):
                parameter -= 0.01 * gradient
    # A bias that all keys share, or all tokens of a window, changes nothing.
    free = {name for name in before if not name.endswith(("attention.k.bias", "saliency.bias"))}
    free -= {"fc2.bias"} if cls is WTC else set()
    assert [name for name in sorted(free) if torch.equal(module.state_dict()[name], before[name])] == []


@every_merger
def test_batch_equals_each_picture_alone(cls: type[Merger], settings: dict) -> None:
    method = cls(**settings)
    module = filled(method.build(WIDTH))
    x = torch.randn(3, 5, 7, WIDTH)
    together = merge_map(module, x, 2, "pad")
    alone = torch.cat([merge_map(module, picture[None], 2, "pad") for picture in x])
    torch.testing.assert_close(together, alone)


@every_merger
def test_windows_may_have_any_batch_shape(cls: type[Merger], settings: dict) -> None:
    module = filled(cls(**settings).build(WIDTH))
    if module.sees == "map":
        pytest.skip("sees maps, which have one shape")
    windows = torch.randn(2, 3, 5, 4, WIDTH)
    wanted = module(windows)
    torch.testing.assert_close(module(windows.flatten(0, 2)), wanted.flatten(0, 2))
    torch.testing.assert_close(module(windows[0, 1, 2]), wanted[0, 1, 2])


@every_merger
def test_bf16_is_close_to_fp32(cls: type[Merger], settings: dict) -> None:
    module = filled(cls(**settings).build(WIDTH))
    x = torch.randn(2, 4, 6, WIDTH)
    wanted = merge_map(module, x, 2, "pad")
    got = merge_map(copy.deepcopy(module).bfloat16(), x.bfloat16(), 2, "pad")
    assert got.dtype == torch.bfloat16
    assert (got - wanted).norm() / wanted.norm() < 0.02


@every_merger
def test_one_graph_without_host_syncs(cls: type[Merger], settings: dict) -> None:
    module = filled(cls(**settings).build(WIDTH))
    x = torch.randn(2, 4, 6, WIDTH)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: merge_map(module, x, 2, "pad"), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), merge_map(module, x, 2, "pad"))
    meta = copy.deepcopy(module).to("meta")
    assert merge_map(meta, x.to("meta"), 2, "pad").shape == (2, 2, 3, WIDTH)


@every_merger
def test_reset_parameters_initialises_everything(cls: type[Merger], settings: dict) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            module = cls(**settings).build(WIDTH)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(seed)
        module.reset_parameters()
        return module.state_dict()

    torch.manual_seed(1)
    built, first, second = cls(**settings).build(WIDTH).state_dict(), fresh(1), fresh(2)
    assert first.keys() == built.keys()
    for name, value in first.items():
        assert value.isfinite().all(), name
        constant = (value == value.flatten()[0]).all()
        assert torch.equal(value, second[name]) == constant, f"{name} does not depend on the seed"
        assert (built[name] == 0).all() == (value == 0).all(), f"{name} is zero only in one of both"


@pytest.mark.parametrize(
    "method",
    [
        LaCo(),
        LaCo(shortcut="saliency"),
        LaCo(norm="layernorm"),
        WindowMerger(),
        WindowMerger(attention=False),
    ],
)
def test_starts_as_average_pooling(method: Merger) -> None:
    x = torch.randn(2, 5, 7, WIDTH)
    torch.testing.assert_close(merge_map(method.build(WIDTH), x, 2, "pad"), pool_map(x, 2))
    moved = merge_map(filled(method.build(WIDTH)), x, 2, "pad")
    assert (moved - pool_map(x, 2)).abs().max() > 0.1


def test_laco_of_single_tokens_with_a_zero_mlp_is_the_identity() -> None:
    x = torch.randn(2, 3, 4, WIDTH)
    assert torch.equal(merge_map(LaCo(factor=1).build(WIDTH), x, 1, "error"), x)


def test_order_in_the_window_matters_to_the_mlp_and_not_to_the_mean() -> None:
    windows = torch.randn(6, 4, WIDTH)
    shuffled = windows[:, [2, 0, 3, 1]]
    start = LaCo().build(WIDTH)
    torch.testing.assert_close(start(windows), start(shuffled))
    assert not torch.allclose(filled(start)(windows), start(shuffled))


def test_zero_init_can_be_turned_off() -> None:
    module = LaCo(zero_init=False).build(WIDTH)
    assert module.fc2.weight.abs().sum() > 0
    assert LaCo(shortcut="none").build(WIDTH).fc2.weight.abs().sum() > 0


def test_window_merger_reuses_the_encoder_layer() -> None:
    """On windows of equal tokens the encoder layer itself comes out."""
    norm1, norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
    q, k, v, out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
    fc1, fc2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
    for part in (norm1, norm2):
        filled(part)
    layer = LayerParts(2, norm1, q, k, v, out, norm2, fc1, fc2)
    method = WindowMerger(reuse=True).like(layer)
    assert (method.heads, method.ffn) == (2, 24)
    module = method.build(WIDTH)
    module.start_from(layer)
    token = torch.randn(5, 1, WIDTH)
    attended = token + out(v(norm1(token)))  # attention over equal tokens is the value of one
    wanted = attended + fc2(nn.functional.gelu(fc1(norm2(attended)), approximate="tanh"))
    torch.testing.assert_close(module(token.expand(-1, 4, -1)), wanted.squeeze(1))
    assert module.attention.heads == 2
    mlp = replace(method, attention=False).build(WIDTH)
    mlp.start_from(layer)
    wanted = token + fc2(nn.functional.gelu(fc1(norm2(token)), approximate="tanh"))
    torch.testing.assert_close(mlp(token.expand(-1, 4, -1)), wanted.squeeze(1))
    with pytest.raises(LacoError, match="an encoder layer with ffn=24; leave ffn out, or reuse"):
        WindowMerger(reuse=True, ffn=48).like(layer)
    with pytest.raises(LacoError, match="with heads=2"):
        WindowMerger(reuse=True, heads=4).like(layer)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_papers() -> None:
    from laco.methods import AveragePool, LDPv2, TokenPacker

    with torch.device("meta"):
        assert count(LaCo().build(1152)) == 5 * 1152**2 + 2 * 1152
        assert count(AveragePool().build(1152)) == 0
        assert count(LDPv2().build_projector(1024, 2048)) == 6_316_032
        packer = TokenPacker().build_projector(1024, 4096)
        assert count(packer) - count(packer.mlp) == 15_742_976
        assert packer.attention.heads == 8
        internvl = PixelShuffle().build_projector(1024, 896)
        assert count(internvl) == 8192 + 4096 * 896 + 896 + 896**2 + 896
        qwen = PixelShuffle(form="qwen").build_projector(1280, 3584)
        assert count(qwen) == 1280 + 5120**2 + 5120 + 5120 * 3584 + 3584
        uhd4 = WindowMerger(ffn=4304).build(1152)
        assert count(uhd4.attention) == 5_313_024
        assert uhd4.attention.heads == 16
        assert count(uhd4.fc1) == 4608 * 17216 + 17216
        assert round(count(uhd4) / 1e6, 1) == 104.5


def test_to_windows_feeds_the_first_linear_without_another_copy() -> None:
    """The one copy of LaCo's layer is the grouping of windows: their concatenation is a view of it."""
    windows = to_windows(torch.randn(2, 4, 6, WIDTH), 2)
    assert windows.flatten(-2).data_ptr() == windows.data_ptr()


def test_random_keep_copies_one_token_of_each_window() -> None:
    x = torch.randn(3, 16, 16, 4)
    y = merge_map(RandomKeep(seed=1).build(4), x, 2, "pad")
    same = (to_windows(x, 2) == y[..., None, :]).all(-1)  # (B, h, w, R)
    assert (same.sum(-1) == 1).all()
    assert torch.equal(same[0], same[1])  # the same places in every picture
    assert (same[0].sum((0, 1)) > 8).all()  # no corner is preferred: about 16 of 64 windows each
    assert not torch.equal(y, merge_map(RandomKeep(seed=2).build(4), x, 2, "pad"))
