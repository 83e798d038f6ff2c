"""WTC and the convolutional compressor against slow versions of their formulas."""

import pytest
import torch
from torch import nn

from laco.errors import LacoError
from laco.grid import merge_map
from laco.methods import WTC, ConvCompressor
from laco.methods.conv_compressor import prime_factors
from laco.methods.dcae import averaging_shortcut, down_block


def test_wtc_by_hand():
    torch.manual_seed(0)
    merger = WTC(factor=2).build(6).double()
    for parameter in merger.parameters():
        nn.init.normal_(parameter)
    window = torch.randn(4, 6, dtype=torch.double)
    mean = sum(window) / 4
    logits = torch.stack([merger.fc2(nn.functional.gelu(merger.fc1(torch.cat([x, mean])))) for x in window])
    wanted = [
        sum((logits[i, c].exp() / logits[:, c].exp().sum() * window[i, c]).item() for i in range(4)) for c in range(6)
    ]
    torch.testing.assert_close(merger(window), torch.tensor(wanted, dtype=torch.double))


def test_wtc_starts_as_the_mean():
    window = torch.randn(5, 9, 8)
    torch.testing.assert_close(WTC(factor=3).build(8)(window), window.mean(dim=1))


@pytest.mark.parametrize(("factor", "strides"), [(1, []), (2, [2]), (4, [2, 2]), (6, [2, 3]), (15, [3, 5])])
def test_strides_multiply_to_the_factor(factor, strides):
    assert prime_factors(factor) == strides
    compressor = ConvCompressor(factor=factor).build(12)
    assert [conv.stride[0] for conv in compressor.down] == (strides or [1])
    assert merge_map(compressor, torch.randn(1, 2 * factor, 3 * factor, 12), factor, "error").shape == (1, 2, 3, 12)


def test_conv_compressor_by_hand():
    torch.manual_seed(1)
    compressor = ConvCompressor(factor=4, hidden=3).build(8).double()
    x = torch.randn(2, 8, 8, 8, dtype=torch.double)

    def norm(y, layer):
        mean, variance = y.mean(dim=1, keepdim=True), y.var(dim=1, keepdim=True, correction=0)
        return layer.weight[:, None, None] * (y - mean) / (variance + 1e-6).sqrt() + layer.bias[:, None, None]

    y = x.permute(0, 3, 1, 2)
    y = norm(torch.einsum("bchw,dc->bdhw", y, compressor.neck1.weight[:, :, 0, 0]), compressor.norm1)
    y = norm(nn.functional.conv2d(y, compressor.neck2.weight, padding=1), compressor.norm2)
    for conv in compressor.down:
        y = nn.functional.conv2d(y, conv.weight, stride=2, padding=1)
    torch.testing.assert_close(compressor(x), y.permute(0, 2, 3, 1))
    assert all(conv.bias is None for conv in (compressor.neck1, compressor.neck2, *compressor.down))


def test_dcae_block_is_convolution_and_shortcut():
    conv, x = nn.Conv2d(4, 2, 3, padding=1), torch.randn(1, 4, 6, 6)
    y = down_block(x, conv, 8)
    torch.testing.assert_close(y - averaging_shortcut(x, 8, 2), nn.functional.pixel_unshuffle(conv(x), 2))


def test_hidden_must_be_positive():
    with pytest.raises(LacoError, match="hidden must be 1 or more"):
        ConvCompressor(hidden=0)
