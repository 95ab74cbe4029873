"""The statistics against closed forms, tables and second implementations."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hf_hpmkd.paired_tests import holm, mcnemar, mean_of, paired_t, surely_better

A = [0.712, 0.705, 0.721, 0.699, 0.730]
B = [0.701, 0.699, 0.712, 0.704, 0.711]


def test_surely_better_is_beyond_a_standard_error():
    one, other = [1] * 60 + [0] * 40, [0] * 12 + [1] * 48 + [1] * 8 + [0] * 32
    better, difference, error = surely_better(one, other)
    assert not better and difference == pytest.approx(0.04)
    assert error == pytest.approx(np.std([1] * 12 + [-1] * 8 + [0] * 80) / 10)
    assert surely_better(one, [0] * 16 + [1] * 44 + [1] * 8 + [0] * 32)[0]
    assert not surely_better(one, one)[0] and surely_better([1, 1], [0, 0]) == (True, 1.0, 0.5)
    for first, second in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match="the same rows of both, at least one"):
            surely_better(first, second)


@pytest.mark.parametrize("count", [1, 15, 10_000])
def test_one_row_makes_nothing_surely_better(count):
    """Nor does it where the others differ in pairs, one each way."""
    one, other = np.ones(count), np.ones(count)
    other[0] = 0
    assert surely_better(one, other) == (False, 1 / count, 1 / count)
    if count > 4:
        one[1] = other[2] = 0
        assert not surely_better(one, other)[0]
        other[3:6] = 0
        assert surely_better(one, other)[0]


def test_mean_and_interval_by_the_table_of_t():
    """2.776 is the 97.5 % point of t with 4 degrees of freedom in every printed table."""
    found = mean_of(A)
    sd = math.sqrt(sum((value - sum(A) / 5) ** 2 for value in A) / 4)
    assert found.mean == pytest.approx(sum(A) / 5)
    assert found.sd == pytest.approx(sd)
    assert found.high - found.mean == pytest.approx(2.776445 * sd / math.sqrt(5), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_value_has_no_spread_and_none_no_mean():
    assert mean_of([0.5]) == mean_of([0.5]).__class__(0.5, None, None, None, 1)
    with pytest.raises(ValueError, match="at least one value"):
        mean_of([])


def test_paired_t_is_the_t_of_the_differences():
    d = np.subtract(A, B)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
    assert paired_t(A, B) == pytest.approx(2 * stats.t.sf(abs(t), len(d) - 1))
    assert paired_t(A, B) == pytest.approx(paired_t(B, A))


def test_pairing_matters():
    """A constant gain under a large spread of seeds is seen only by a paired test."""
    noise = [0.60, 0.65, 0.70, 0.75, 0.80]
    better = [value + gain for value, gain in zip(noise, [0.010, 0.011, 0.009, 0.010, 0.012], strict=True)]
    assert paired_t(better, noise) < 1e-4 < 0.5 < stats.ttest_ind(better, noise).pvalue


def test_tests_that_cannot_be_made():
    assert paired_t([0.5], [0.4]) is None
    assert paired_t([0.5, 0.6], [0.4, 0.5]) is None  # the same difference twice: no spread to measure it by
    assert paired_t([0.5, 0.6], [0.5, 0.6]) == 1.0
    with pytest.raises(ValueError, match="come in pairs"):
        paired_t([0.5], [0.4, 0.3])


def test_p_values_of_noise_are_uniform():
    random = np.random.default_rng(0)
    found = [paired_t(random.normal(size=6).tolist(), random.normal(size=6).tolist()) for _ in range(500)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_mcnemar_by_counting_coins():
    """Eight rows right by the first alone, two by the second: 10 coins with 2 or fewer on one side."""
    first = [True] * 8 + [False] * 2 + [True] * 30 + [False] * 5
    second = [False] * 8 + [True] * 2 + [True] * 30 + [False] * 5
    expected = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(first, first) == 1.0
    with pytest.raises(ValueError, match="same rows"):
        mcnemar(first, second[1:])


def closed_test(p_values):
    """Holm's method by its definition: a hypothesis is corrected to the largest Bonferroni p of all sets it is in."""
    count = len(p_values)
    sets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    return [max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets if k in s) for k in range(count)]


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03], [0.5, 0.001, 0.2, 0.013], [0.9, 0.8], [0.02]])
def test_holm_is_the_closed_bonferroni_test(p_values):
    assert holm(p_values) == pytest.approx(closed_test(p_values))


def test_holm_leaves_out_what_was_not_tested():
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([None]) == [None]
