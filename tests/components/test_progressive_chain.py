"""The chain's arithmetic against a second implementation, and its limits."""

import math

import pytest
import torch

from hf_hpmkd.components.progressive_chain import (
    GainEstimate,
    estimate_gain,
    from_bits,
    is_confirmed,
    is_promising,
    required_gain,
    taught_by,
    to_bits,
)


def answers(seeds: int, rows: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(seeds, rows, generator=torch.Generator().manual_seed(seed)) < share


def test_the_gain_is_the_difference_of_accuracies() -> None:
    better, worse = answers(3, 400, 0.8, 0), answers(3, 400, 0.7, 1)
    expected = 100 * (better.double().mean() - worse.double().mean())
    assert estimate_gain(better, worse).gain == pytest.approx(float(expected))
    assert estimate_gain(worse, better).gain == pytest.approx(-float(expected))
    assert estimate_gain(worse, better).standard_error == pytest.approx(estimate_gain(better, worse).standard_error)


def test_the_error_is_that_of_the_formula() -> None:
    """Written out with loops over rows and seeds."""
    first, second = answers(3, 50, 0.8, 0), answers(3, 50, 0.6, 1)
    table = [[int(a) - int(b) for a, b in zip(r, s, strict=True)] for r, s in zip(first, second, strict=True)]
    of_rows = [sum(column) / 3 for column in zip(*table, strict=True)]
    of_seeds = [sum(line) / 50 for line in table]

    def variance_of_mean(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)

    expected = 100 * math.sqrt(variance_of_mean(of_rows) + variance_of_mean(of_seeds))
    assert estimate_gain(first, second).standard_error == pytest.approx(expected)


def test_with_one_seed_the_error_is_that_of_paired_rows() -> None:
    first, second = answers(1, 2000, 0.8, 0), answers(1, 2000, 0.7, 1)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    share = (only_first + only_second) / 2000 - ((only_first - only_second) / 2000) ** 2  # McNemar's variance
    assert estimate_gain(first, second).standard_error == pytest.approx(100 * math.sqrt(share / 1999), rel=1e-6)


def test_the_error_falls_with_the_root_of_the_rows() -> None:
    few = estimate_gain(answers(1, 500, 0.8, 0), answers(1, 500, 0.7, 1)).standard_error
    many = estimate_gain(answers(1, 50_000, 0.8, 2), answers(1, 50_000, 0.7, 3)).standard_error
    assert few / many == pytest.approx(10, rel=0.1)


def test_the_error_covers_the_truth_about_as_often_as_it_says() -> None:
    """Same accuracy on both sides, many times over: two standard errors must hold nearly always."""
    beyond = 0
    for trial in range(200):
        estimate = estimate_gain(answers(2, 300, 0.75, 2 * trial), answers(2, 300, 0.75, 2 * trial + 1))
        beyond += abs(estimate.gain) > 2 * estimate.standard_error
    assert beyond <= 16


def test_no_difference_is_no_gain_and_no_doubt() -> None:
    same = answers(2, 100, 0.5, 0)
    assert estimate_gain(same, same) == GainEstimate(0.0, 0.0)


@pytest.mark.parametrize("shapes", [((2, 5), (3, 5)), ((5,), (5,)), ((0, 5), (0, 5))])
def test_answers_of_unlike_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"must be \(seeds, rows\)"):
        estimate_gain(torch.zeros(shapes[0], dtype=torch.bool), torch.zeros(shapes[1], dtype=torch.bool))


def test_a_stage_must_earn_what_it_costs() -> None:
    assert required_gain(0.1, 0) == 0
    assert required_gain(0.1, 4) == pytest.approx(2 * required_gain(0.1, 2))
    with pytest.raises(ValueError, match="0 or more student trainings"):
        required_gain(0.1, -1)


def test_a_probe_is_judged_leniently_and_a_finished_stage_strictly() -> None:
    doubtful = GainEstimate(0.2, 0.5)
    assert is_promising(doubtful, required=0.6) and not is_confirmed(doubtful, required=0.6)
    assert not is_promising(doubtful, required=0.8)
    assert is_confirmed(doubtful, required=0.2)


def test_who_teaches_whom() -> None:
    teachers, stages = ["a", "b"], ["s1", "s2"]
    assert taught_by(teachers, stages, "dense") == ["a", "b", "s1", "s2"]
    assert taught_by(teachers, stages, "previous") == ["s2"]
    assert taught_by(teachers, [], "previous") == taught_by(teachers, [], "dense") == teachers


def test_answers_survive_being_written_down() -> None:
    right = answers(1, 77, 0.5, 0)[0]
    assert from_bits(to_bits(right)).equal(right)
