"""Weights that balance classes; every expected number worked out by hand from w_d * n_d / (w_u * n_u) in [1, 4/3]."""

import pytest

from nemo_kto.algorithms.class_weights import balanced_weights, is_balanced, weighted_ratio


@pytest.mark.parametrize(
    ("counts", "given", "expected"),
    [
        ((100, 100), {}, (1.0, 1.0)),
        ((120, 100), {}, (1.0, 1.0)),  # 1.2 is in the range
        ((200, 100), {}, (1.0, 1.5)),  # 200 / 150 = 4/3
        ((1000, 100), {}, (1.0, 7.5)),  # the rarer class is raised: 1000 / 750 = 4/3
        ((100, 1000), {}, (10.0, 1.0)),  # the paper's example: 10 to 13.33
        ((100, 1000), {"undesirable": 0.5}, (5.0, 0.5)),
        ((100, 1000), {"desirable": 1.0}, (1.0, 0.1)),  # 100 / 100 = 1, nearer to 1 than 0.075
        ((1000, 100), {"undesirable": 1.0}, (2 / 15, 1.0)),  # 133.3 / 100 = 4/3
        ((100, 100), {"desirable": 1.0}, (1.0, 1.0)),
        ((100, 100), {"desirable": 2.0}, (2.0, 1.5)),
        ((300, 100), {"desirable": 0.4, "undesirable": 1.0}, (0.4, 1.0)),  # both given: kept
    ],
)
def test_balanced_weights(counts, given, expected):
    weights = balanced_weights(*counts, **given)
    assert weights == pytest.approx(expected)


@pytest.mark.parametrize("counts", [(1, 1), (7, 3), (3, 7), (1, 999), (999, 1), (4, 3), (3, 4)])
def test_the_ratio_is_in_the_papers_range(counts):
    assert 1 - 1e-12 <= weighted_ratio(*counts, *balanced_weights(*counts)) <= 4 / 3 + 1e-12


def test_weighted_ratio():
    assert weighted_ratio(30, 20, 2.0, 1.0) == 3.0
    assert weighted_ratio(30, 20, 1.0, 0.0) == float("inf")


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, True), (4 / 3, True), (1.2, True), (0.96, True), (0.9, False), (1.39, True), (1.5, False)],
)
def test_data_that_is_meant_to_be_even_is_balanced(ratio, expected):
    assert is_balanced(ratio) is expected
