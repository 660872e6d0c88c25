"""Tests against scipy called directly and numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nnunetv2_hiendmae.evaluation import statistics
from nnunetv2_hiendmae.evaluation.statistics import holm, mean_ranks, summary

NAN = math.nan


def paired_test(*arguments, **options):
    return SimpleNamespace(**statistics.paired_test(*arguments, **options))


def test_wilcoxon_and_interval_are_scipys():
    rng = np.random.default_rng(0)
    second = rng.uniform(0.3, 0.9, 20)
    first = second + rng.normal(0.03, 0.05, 20)
    test = paired_test(first, second, seed=3)
    assert test.pairs == 20 and test.reason == ""
    assert test.mean_difference == pytest.approx(np.mean(first) - np.mean(second), abs=1e-12)
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(first, second).pvalue, rel=1e-12)
    # percentile bootstrap: near the normal interval of the mean, and inside its own seed exact
    half = 1.96 * np.std(first - second) / math.sqrt(20)
    low, high = test.interval_95
    assert low == pytest.approx(test.mean_difference - half, abs=0.1 * half)
    assert high == pytest.approx(test.mean_difference + half, abs=0.1 * half)
    assert paired_test(first, second, seed=3) == test
    assert paired_test(first, second, seed=4).interval_95[0] != low
    turned = paired_test(second, first, seed=3)
    assert turned.p_wilcoxon == pytest.approx(test.p_wilcoxon) and turned.mean_difference == pytest.approx(
        -test.mean_difference
    )


def test_smallest_exact_p():
    """Six differences of one sign: 2 of the 2^6 sign patterns are as extreme."""
    test = paired_test(np.linspace(0.5, 0.6, 6) ** 2, np.zeros(6))
    assert test.p_wilcoxon == pytest.approx(2 / 64)


def test_equal_pairs_are_dropped_before_ranking():
    difference = np.array([0.0, 0.0, 0.01, 0.02, -0.03, 0.04, 0.05, 0.06, 0.07])
    test = paired_test(difference, np.zeros(9))
    # of seven, the third is negative: on each side 5 of 2^7 sign patterns have a rank sum of at most 3
    assert test.pairs == 9 and test.p_wilcoxon == pytest.approx(10 / 128)
    assert test.mean_difference == pytest.approx(0.22 / 9)


@pytest.mark.parametrize(
    "first, second, pairs, reason",
    [
        ([0.5] * 7, [0.5] * 7, 7, "all 7 pairs are equal"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 5, 5, "only 5 pairs that differ, needed 6"),
        ([0.5] * 9 + [0.6], [0.5] * 10, 10, "only 1 pairs that differ, needed 6"),
        ([NAN, 0.5], [0.5, NAN], 0, "no case in common"),
        ([], [], 0, "no case in common"),
        ([0.5], [0.4], 1, "only 1 pairs that differ, needed 6"),
    ],
)
def test_where_there_is_no_p(first, second, pairs, reason):
    test = paired_test(np.array(first), np.array(second))
    assert test.pairs == pairs and test.reason == reason
    assert math.isnan(test.p_wilcoxon) and math.isnan(test.p_holm)
    assert math.isnan(test.mean_difference) == (pairs == 0)
    low, high = test.interval_95
    assert math.isnan(low) == math.isnan(high) == (pairs < 2)


def test_cases_without_a_value_are_left_out():
    first, second = np.arange(8) / 10, np.arange(8) ** 2 / 100
    first[2] = second[5] = NAN
    known = [0, 1, 3, 4, 6, 7]
    test = paired_test(first, second)
    assert test.pairs == 6
    assert test.mean_difference == pytest.approx(np.mean(first[known] - second[known]))


def test_holm_by_hand():
    # sorted: .01×4, .03×3, .04×2 -> .08 raised to .09, .2×1
    assert holm([0.04, 0.01, 0.2, 0.03]) == pytest.approx([0.09, 0.04, 0.2, 0.09])
    # a comparison without p is no test
    assert holm([NAN, 0.04, 0.01]) == pytest.approx([NAN, 0.04, 0.02], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_only_raises_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= min(1, len(p_values) * p) for p, c in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


def test_rounding_breaks_no_ties():
    """Distances on a grid of .7 mm: seven differences of one voxel, which subtraction tells apart, one of them
    negative: each has rank 4, so that 2 · 8 of 2^7 sign patterns are as extreme."""
    steps = np.array([2, 3, 4, 5, 6, 7, 8])
    first, second = 0.7 * steps, 0.7 * (steps - 1)
    first[0], second[0] = second[0], first[0]
    assert len({*np.abs(first - second)}) > 1
    assert paired_test(first, second).p_wilcoxon == pytest.approx(16 / 128)
    # spacings of oblique images are the same but for what a 32-bit float holds
    for scale in (1, 30):
        noise = scale * (1 + 1e-7 * np.array([1, -1, 0.5, -0.5, 0.2, -0.2, 0]))
        assert paired_test(noise * first, noise * second).p_wilcoxon == pytest.approx(16 / 128)
    # as sums in another order are
    noisy = np.array([0.1 + 0.2, *second[1:]])
    test = paired_test(noisy, np.array([0.3, *second[1:]]))
    assert noisy[0] != 0.3 and test.reason == "all 7 pairs are equal"
    assert mean_ranks(np.array([[0.1 + 0.2], [0.3], [0.2]])).tolist() == [1.5, 1.5, 3]


def test_mean_ranks():
    values = np.array([[0.9, 0.5, NAN], [0.8, 0.5, 1.0], [0.1, 0.7, 1.0]])
    # case 0: 1 2 3; case 1: 2.5 2.5 1; case 2 is not complete
    assert mean_ranks(values).tolist() == [1.75, 2.25, 2.0]
    assert np.isnan(mean_ranks(np.full((2, 3), NAN))).all()


def test_spread():
    assert summary([1.0, 2.0, 3.0, NAN], "cases")["std_over_cases"] == 1.0
    assert math.isnan(summary([1.0, NAN], "cases")["std_over_cases"])
