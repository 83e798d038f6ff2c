"""Grids and windows: counts, the four odd rules by their values, and the order of tokens in a window."""

import pytest
import torch
import torch.nn.functional as F

from laco.errors import LacoError
from laco.grid import (
    Grid,
    fit_map,
    from_windows,
    merge_map,
    merged_grid,
    merged_side,
    pool_map,
    split_prefix,
    to_windows,
)
from laco.methods import LDPv2, PixelShuffle


@pytest.mark.parametrize(
    ("side", "factor", "odd", "merged"),
    [
        (27, 2, "pad", 14),
        (27, 2, "resize", 14),
        (27, 2, "crop", 13),
        (27, 3, "error", 9),
        (28, 2, "crop", 14),
        (5, 1, "error", 5),
        (1, 2, "pad", 1),
    ],
)
def test_merged_side(side: int, factor: int, odd: str, merged: int) -> None:
    assert merged_side(side, factor, odd) == merged


def test_merged_side_refuses_what_cannot_be() -> None:
    with pytest.raises(LacoError, match="factor 2 does not divide a grid side of 27"):
        merged_side(27, 2, "error")
    with pytest.raises(LacoError, match="leave nothing"):
        merged_side(1, 2, "crop")


def test_time_is_never_merged() -> None:
    merged = merged_grid(Grid(3, 4, 6), 2, "error")
    assert merged == Grid(3, 2, 3)
    assert merged.tokens == 18


def test_pad_repeats_the_last_row_and_column() -> None:
    x = torch.randn(2, 3, 5, 4)
    padded = fit_map(x, 2, "pad")
    assert padded.shape == (2, 4, 6, 4)
    for row in range(4):
        for column in range(6):
            assert torch.equal(padded[:, row, column], x[:, min(row, 2), min(column, 4)])


def test_pad_sends_gradient_to_the_repeated_tokens() -> None:
    x = torch.zeros(1, 3, 3, 1, requires_grad=True)
    fit_map(x, 2, "pad").sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, :, 0].tolist() == [[1, 1, 2], [1, 1, 2], [2, 2, 4]]


def test_crop_drops_the_last_row_and_column() -> None:
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(fit_map(x, 2, "crop"), x[:, :2, :4])


def test_resize_interpolates_both_sides() -> None:
    # Bilinear resizing of a map that is linear in both coordinates stays linear within the borders.
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    resized = fit_map((2 * rows + columns)[None, ..., None], 2, "resize")[0, ..., 0]
    wanted_rows = ((torch.arange(10) + 0.5) * 9 / 10 - 0.5).clamp(0, 8)
    wanted_columns = ((torch.arange(8) + 0.5) * 7 / 8 - 0.5).clamp(0, 6)
    torch.testing.assert_close(resized, 2 * wanted_rows[:, None] + wanted_columns[None])


def test_fitting_map_is_left_alone_and_error_refuses() -> None:
    x = torch.randn(1, 4, 6, 3)
    for odd in ("pad", "resize", "crop", "error"):
        assert fit_map(x, 2, odd) is x
    with pytest.raises(LacoError, match="does not divide"):
        fit_map(x, 4, "error")


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_windows_are_neighbours_in_row_major_order(factor: int) -> None:
    x = torch.randn(2, 6, 12, 3)
    windows = to_windows(x, factor)
    assert windows.shape == (2, 6 // factor, 12 // factor, factor**2, 3)
    for row in range(6):
        for column in range(12):
            place = (row % factor) * factor + column % factor
            assert torch.equal(windows[:, row // factor, column // factor, place], x[:, row, column])
    assert torch.equal(from_windows(windows, factor), x)


def test_pool_map_is_average_pooling() -> None:
    x = torch.randn(2, 4, 6, 3)
    wanted = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_map(x, 2), wanted)


def test_merge_map_feeds_windows_and_maps() -> None:
    x = torch.randn(2, 5, 6, 8)
    padded = torch.cat([x, x[:, -1:]], dim=1)
    by_window, by_map = PixelShuffle().build(8), LDPv2().build(8)
    torch.testing.assert_close(merge_map(by_window, x, 2, "pad"), by_window(to_windows(padded, 2)))
    torch.testing.assert_close(merge_map(by_map, x, 2, "pad"), by_map(padded))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_split_prefix(prefix: int) -> None:
    x = torch.randn(2, 9, 3)
    first, rest = split_prefix(x, prefix)
    assert first.shape[1] == prefix
    assert torch.equal(torch.cat([first, rest], dim=1), x)
