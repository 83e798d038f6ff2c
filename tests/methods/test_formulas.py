"""Every merger against its formula, written out window by window and channel by channel in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laco.grid import merge_map
from laco.methods import AveragePool, LaCo, LDPv2, Merger, PixelShuffle, TokenPacker, WindowMerger
from laco.methods.dcae import averaging_shortcut, duplicating_shortcut
from laco.methods.pixel_shuffle import pixel_shuffle

WIDTH = 8
FACTORS = pytest.mark.parametrize("factor", [2, 3])


def built(module: nn.Module) -> nn.Module:
    """In float64, with every parameter random."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def picture(factor: int, channels: int = WIDTH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 2 * factor, 3 * factor, channels, dtype=torch.float64)


def window(x: Tensor, b: int, i: int, j: int, factor: int) -> list[Tensor]:
    return [x[b, i * factor + dr, j * factor + dc] for dr in range(factor) for dc in range(factor)]


def by_window(x: Tensor, factor: int, formula) -> Tensor:
    batch, height, width = x.shape[0], x.shape[1] // factor, x.shape[2] // factor
    rows = [
        torch.stack([torch.stack([formula(window(x, b, i, j, factor)) for j in range(width)]) for i in range(height)])
        for b in range(batch)
    ]
    return torch.stack(rows)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def linear(part: nn.Linear, x: Tensor) -> Tensor:
    y = part.weight @ x
    return y if part.bias is None else y + part.bias


def layer_norm(part: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + eps) * part.weight + part.bias


def rms_norm(part: nn.RMSNorm, x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean() + eps) * part.weight


def attention(part: nn.Module, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query over a window, head by head."""
    size = query.shape[0] // part.heads
    q = linear(part.q, query)
    k, v = [linear(part.k, key) for key in keys], [linear(part.v, value) for value in values]
    heads = []
    for head in range(part.heads):
        of_head = slice(head * size, (head + 1) * size)
        scores = torch.stack([(q[of_head] * key[of_head]).sum() / math.sqrt(size) for key in k])
        weights = torch.exp(scores) / torch.exp(scores).sum()
        heads.append(sum(weight * value[of_head] for weight, value in zip(weights, v, strict=True)))
    return linear(part.out, torch.cat(heads))


def check(method: Merger, module: nn.Module, x: Tensor, formula) -> None:
    got = merge_map(module, x, method.factor, "error")
    torch.testing.assert_close(got, by_window(x, method.factor, formula), rtol=1e-10, atol=1e-10)


@FACTORS
def test_average_pool(factor: int) -> None:
    method = AveragePool(factor=factor)
    check(method, method.build(WIDTH), picture(factor), lambda tokens: sum(tokens) / len(tokens))


@FACTORS
@pytest.mark.parametrize("norm", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", gelu),
        ("gelu_tanh", gelu_tanh),
        ("silu", lambda x: x * x.sigmoid()),
        ("relu", lambda x: x.clamp(min=0)),
    ],
)
def test_laco(factor: int, norm: str, activation: str, function) -> None:
    method = LaCo(factor=factor, norm=norm, activation=activation, hidden=5)
    module = built(method.build(WIDTH))

    def formula(tokens: list[Tensor]) -> Tensor:
        concat = torch.cat(tokens)
        if norm == "layernorm":
            concat = layer_norm(module.norm, concat, 1e-6)
        if norm == "rmsnorm":
            concat = rms_norm(module.norm, concat, 1e-6)
        return linear(module.fc2, function(linear(module.fc1, concat))) + sum(tokens) / len(tokens)

    check(method, module, picture(factor), formula)


@FACTORS
def test_laco_saliency(factor: int) -> None:
    method = LaCo(factor=factor, shortcut="saliency")
    module = built(method.build(WIDTH))

    def formula(tokens: list[Tensor]) -> Tensor:
        concat = torch.cat(tokens)
        logits = linear(module.saliency, layer_norm(module.saliency_norm, concat, 1e-6)).view(-1, WIDTH)
        shortcut = torch.empty(WIDTH, dtype=torch.float64)
        for c in range(WIDTH):
            weights = torch.exp(logits[:, c]) / torch.exp(logits[:, c]).sum()
            shortcut[c] = sum(weight * token[c] for weight, token in zip(weights, tokens, strict=True))
        return linear(module.fc2, gelu(linear(module.fc1, concat))) + shortcut

    check(method, module, picture(factor), formula)


@FACTORS
@pytest.mark.parametrize("form", ["internvl", "smolvlm", "qwen"])
def test_pixel_shuffle(factor: int, form: str) -> None:
    method = PixelShuffle(factor=factor, form=form)
    module = built(method.build_projector(WIDTH, 5))

    def formula(tokens: list[Tensor]) -> Tensor:
        if form == "smolvlm":
            return linear(module.mlp[0], torch.cat(tokens))
        if form == "internvl":
            wide = layer_norm(module.norm, torch.cat(tokens), 1e-5)
        else:
            wide = torch.cat([rms_norm(module.token_norm, token, 1e-6) for token in tokens])
        return linear(module.mlp[2], gelu(linear(module.mlp[0], wide)))

    check(method, module, picture(factor), formula)


def test_pixel_shuffle_v1_is_the_transposed_grid() -> None:
    x = picture(2)
    v1, v2 = pixel_shuffle(x, 2, "v1"), pixel_shuffle(x, 2)
    assert v1.shape == (2, 3, 2, 4 * WIDTH)
    assert torch.equal(v1[1, 2, 0], torch.cat(window(x, 1, 0, 2, 2)))
    assert torch.equal(v2[1, 0, 2], v1[1, 2, 0])


@FACTORS
def test_ldpv2(factor: int) -> None:
    method = LDPv2(factor=factor)
    module = built(method.build_projector(WIDTH, 5))
    x = picture(factor)

    def pooled(tokens: list[Tensor]) -> Tensor:
        return sum(linear(module.mlp[2], gelu(linear(module.mlp[0], token))) for token in tokens) / len(tokens)

    p = by_window(x, factor, pooled)
    wanted = torch.empty_like(p)
    for b, i, j, c in torch.cartesian_prod(*map(torch.arange, p.shape)).tolist():
        wanted[b, i, j, c] = p[b, i, j, c] + module.peg.bias[c]
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                if 0 <= i + di < p.shape[1] and 0 <= j + dj < p.shape[2]:
                    wanted[b, i, j, c] += module.peg.weight[c, 0, di + 1, dj + 1] * p[b, i + di, j + dj, c]
    torch.testing.assert_close(merge_map(module, x, factor, "error"), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("levels", [1, 4])
def test_token_packer(factor: int, levels: int) -> None:
    method = TokenPacker(factor=factor, heads=2)
    module = built(method.build(WIDTH) if levels == 1 else method.build_projector(WIDTH, 5))
    x = picture(factor, levels * WIDTH)
    last = x[..., -WIDTH:].permute(0, 3, 1, 2)
    queries = F.interpolate(last, scale_factor=1 / factor, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)

    def of_levels(part: nn.Sequential, token: Tensor) -> Tensor:
        return layer_norm(part[3], linear(part[2], gelu(linear(part[0], token))), 1e-6)

    got = merge_map(module, x, factor, "error")
    for b, i, j in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        query = layer_norm(module.q[1], linear(module.q[0], queries[b, i, j]), 1e-6)
        tokens = window(x, b, i, j, factor)
        keys, values = ([of_levels(part, token) for token in tokens] for part in (module.k, module.v))
        packed = attention(module.attention, query, keys, values)
        wanted = linear(module.mlp[2], gelu(linear(module.mlp[0], packed)))
        torch.testing.assert_close(got[b, i, j], wanted, rtol=1e-10, atol=1e-10)


@FACTORS
@pytest.mark.parametrize("with_attention", [True, False])
def test_window_merger(factor: int, with_attention: bool) -> None:
    method = WindowMerger(factor=factor, attention=with_attention, heads=2, ffn=3)
    module = built(method.build(WIDTH))

    def formula(tokens: list[Tensor]) -> Tensor:
        if with_attention:
            normed = [layer_norm(module.norm1, token, 1e-6) for token in tokens]
            tokens = [
                token + attention(module.attention, query, normed, normed)
                for token, query in zip(tokens, normed, strict=True)
            ]
        wide = layer_norm(module.norm2, torch.cat(tokens), 1e-6)
        return linear(module.fc2, gelu_tanh(linear(module.fc1, wide))) + sum(tokens) / len(tokens)

    check(method, module, picture(factor), formula)


def test_laco_shortcut_is_the_dcae_shortcut_at_equal_width() -> None:
    x = picture(2)
    channel_first = x.permute(0, 3, 1, 2)
    mean = LaCo().build(WIDTH).double()
    torch.testing.assert_close(
        merge_map(mean, x, 2, "error").permute(0, 3, 1, 2), averaging_shortcut(channel_first, WIDTH, 2)
    )
    # The trap: contiguous groups of the position-major order are neighbouring channels of one token.
    wrong = pixel_shuffle(x, 2).unflatten(-1, (WIDTH, 4)).mean(-1)
    assert not torch.allclose(wrong, merge_map(mean, x, 2, "error"))


def test_dcae_shortcuts_group_contiguous_channels() -> None:
    x = picture(2).permute(0, 3, 1, 2)
    down = averaging_shortcut(x, 2 * WIDTH, 2)
    for c in range(WIDTH):
        for dr in range(2):  # groups of two: the columns of one row of one channel
            wanted = (x[:, c, dr::2, 0::2] + x[:, c, dr::2, 1::2]) / 2
            torch.testing.assert_close(down[:, 2 * c + dr], wanted)
    up = duplicating_shortcut(down, WIDTH, 2)
    assert torch.equal(averaging_shortcut(up, 2 * WIDTH, 2), down)
