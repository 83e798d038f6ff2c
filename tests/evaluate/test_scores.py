"""Scores against figures worked out elsewhere."""

import pytest

from laco.evaluate.scores import character_error_rate, edit_distance, same, wilson


def test_same_ignores_case_and_outer_space_only():
    assert same(" Red\n", "red")
    assert not same("red.", "red")
    assert not same("r ed", "red")


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 25.525, 36.619), (0, 10, 0.0, 27.753), (10, 10, 72.247, 100.0), (1, 1, 20.655, 100.0)],
)
def test_wilson(hits, n, low, high):
    """81 of 263: Newcombe 1998, table I, method 3 (0.2553, 0.3662); 0 of 10: z^2 / (n + z^2)."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
        ("ab", "ba", 2),
        ("flaw", "lawn", 2),
    ],
)
def test_edit_distance(a, b, edits):
    assert edit_distance(a, b) == edits


def test_character_error_rate_counts_all_characters_together():
    assert character_error_rate(["AB", "xyz"], ["ab", "x"]) == pytest.approx(100 * 2 / 3)
    assert character_error_rate(["", "ab"], ["abcdefgh", "ab"]) == pytest.approx(80)
