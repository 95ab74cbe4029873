"""Statistics of methods compared on the same seeds: intervals, paired tests, correction for many of them.

Numbers in, numbers out. Knows nothing of methods, records or training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean with its spread. sd, low, high (the two-sided 95 % t interval) are None for a single value."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard deviation (n - 1) and Student's t interval. Raises ValueError for no values."""
    if not values:
        raise ValueError("A mean needs at least one value, got none.")
    numbers = np.asarray(values, dtype=float)
    mean, count = float(numbers.mean()), len(numbers)
    if count == 1:
        return Mean(mean, None, None, None, 1)
    sd = float(numbers.std(ddof=1))
    margin = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return Mean(mean, sd, mean - margin, mean + margin, count)


def surely_better(first: Sequence[bool], second: Sequence[bool]) -> tuple[bool, float, float]:
    """Of two models, by the rows that each answers right: whether the first is better by more than a standard error of
    the paired difference; that difference (first minus second) and its standard error, as shares of the rows.

    The error is at least one row: where all differences go one way it would be below the difference whatever their
    number, and a single row would decide. Raises ValueError for no rows, and for unlike numbers of them.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"Needs the same rows of both, at least one, got {len(first)} and {len(second)}.")
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    count = len(difference)
    mean, error = float(difference.mean()), max(float(difference.std()) / math.sqrt(count), 1 / count)
    return mean > error, mean, error


def paired_t(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test that `first - second` has mean 0; the pairs share a seed.

    None where the test cannot be made: fewer than two pairs, or differences that are all the same number other than 0
    (then there is no spread to measure them by). Differences that are all 0 give 1. Raises ValueError for unequal
    lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"Paired values must come in pairs, got {len(first)} and {len(second)}.")
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if len(differences) < 2:
        return None
    if float(np.ptp(differences)) <= 1e-12:  # shares of the same rows: what differs by less is rounding
        return 1.0 if abs(float(differences[0])) <= 1e-12 else None
    return float(stats.ttest_rel(first, second).pvalue)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p of McNemar's test: do two models hit the same share of the same rows?

    first, second: whether each model was right, row by row. Only rows on which one of them alone was right count; under
    the null hypothesis each is as likely to be that one. It speaks of these two trained models, not of other seeds.
    """
    hits, others = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if hits.shape != others.shape:
        raise ValueError(f"Both models must have answered the same rows, got {hits.size} and {others.size}.")
    only_first, only_second = int((hits & ~others).sum()), int((others & ~hits).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number (Holm 1979): the chance of one false claim among all of them is bounded.

    The k-th smallest of m is multiplied by m - k + 1, never falls below the one before it, and is cut at 1. None, a
    test that could not be made, stays None and is not counted.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected
