"""Budgets in words and in steps, and the recipe's section."""

from itertools import pairwise

import numpy as np
import pytest

from hf_hpmkd.recipe import RecipeError, fingerprint, read_recipe, recipe_tree
from hf_hpmkd.search_budget import at_once, budget_steps, halving, lookup_operations, most_candidates, stacked_steps

TREE = {
    "data": {"path": "sklearn:wine"},
    "teachers": [{"model": "sklearn:LogisticRegression"}],
    "student": {"model": "mlp-4"},
}


def test_fast_is_a_share_of_a_long_training_and_seconds_of_a_short_one() -> None:
    assert budget_steps("fast", 100_000, 0.0) == 35_000
    assert budget_steps("fast", 100, 0.0) == 2_000  # 20 s of steps of 10 ms
    assert budget_steps("fast", 100, 1e9) == 95  # a fifth of a second more each
    assert budget_steps("thorough", 100_000, 0.0) == 200_000
    assert budget_steps(1.5, 10, 0.0) == 9_000
    assert most_candidates("fast") < most_candidates("thorough")
    with pytest.raises(ValueError, match="off has no budget"):
        budget_steps("off", 100, 0.0)


@pytest.mark.parametrize(
    ("given", "mode"), [("fast", "fast"), (False, "off"), (2, 2.0), ({"mode": False}, "off"), ({"mode": 0.5}, 0.5)]
)
def test_the_section_may_be_one_word(given: object, mode: object) -> None:
    recipe = read_recipe({**TREE, "auto": given}, "a test")
    assert recipe.auto.mode == mode
    assert read_recipe(recipe_tree(recipe), "again") == recipe


def test_a_word_behind_the_recipe_counts() -> None:
    assert read_recipe(TREE, "a test", ["auto=thorough"]).auto.mode == "thorough"
    assert read_recipe({**TREE, "auto": "fast"}, "a test", ["auto=off"]).auto.mode == "off"
    recipe = read_recipe({**TREE, "auto": "fast"}, "a test", ["auto.choose=[alpha]"])
    assert recipe.auto.mode == "fast" and recipe.auto.choose == ["alpha"]


@pytest.mark.parametrize("given", ["slow", 0, -1, True, {"choose": ["colour"]}])
def test_other_values_are_faults(given: object) -> None:
    with pytest.raises(RecipeError, match="auto"):
        read_recipe({**TREE, "auto": given}, "a test")


def test_a_prior_that_is_not_there_is_told() -> None:
    with pytest.raises(RecipeError, match="auto.prior: there is no 'mine.parquet' here"):
        read_recipe({**TREE, "auto": {"prior": "mine.parquet"}}, "a test", check_files=True)


def test_off_leaves_the_fingerprint_alone() -> None:
    """Runs and comparisons of recipes without the section go on."""
    off, fast = (read_recipe({**TREE, "auto": mode}, "a test") for mode in ("off", "fast"))
    assert fingerprint(off) == fingerprint(read_recipe({**TREE, "auto": {"choose": ["alpha"]}}, "a test"))
    assert fingerprint(off) != fingerprint(fast)


@pytest.mark.parametrize("total", [4, 10, 97, 640, 20_000])
@pytest.mark.parametrize("share", [0.05, 0.35, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("most", [1, 3, 4, 8])
def test_halving_stays_within_its_budget(total: int, share: float, most: int) -> None:
    budget = int(share * total)
    rungs = halving(total, budget, most)
    steps = np.diff([0, *(rung.step for rung in rungs)])
    cost = sum(rung.candidates * more for rung, more in zip(rungs, steps, strict=True))
    assert cost <= budget
    assert all(0 < rung.step <= total and 1 <= rung.candidates <= most for rung in rungs)
    assert all(a.step < b.step and a.candidates > b.candidates for a, b in pairwise(rungs))
    assert len(rungs) <= 1 or rungs[-1].candidates == 2  # one alone would choose nothing
    if budget >= 1:
        assert rungs
    if budget >= most * total:
        assert rungs[-1].step == total and rungs[0].candidates == most


def test_a_budget_for_everything_tries_everything_to_the_end() -> None:
    assert [(rung.step, rung.candidates) for rung in halving(100, 400, 4)] == [(100, 4)]
    assert [(rung.step, rung.candidates) for rung in halving(1000, 350, 4)] == [(70, 3), (140, 2)]
    assert [(rung.step, rung.candidates) for rung in halving(1000, 2000, 8)] == [(125, 8), (250, 4), (500, 2)]
    assert halving(100, 0, 4) == []


@pytest.mark.parametrize("mode", ["fast", "thorough", 1.0, 10.0])
@pytest.mark.parametrize("total", [1, 30, 1_000, 5_000, 100_000])
@pytest.mark.parametrize("operations", [0.0, 3e5, 1e8])
def test_what_is_tried_at_once_stays_within_the_budget(mode: str | float, total: int, operations: float) -> None:
    budget = budget_steps(mode, total, operations)
    candidates, seeds = at_once(mode, total, budget, operations)
    if seeds == 0:
        assert candidates == 0 and stacked_steps(total, 9, operations) > budget
        return
    assert 8 <= candidates <= (18 if mode == "fast" else 36) and 1 <= seeds <= 4
    assert stacked_steps(total, seeds * (candidates + 1), operations) <= budget
    more = (candidates + 1) * (seeds + 1) if candidates in (18, 36) else candidates + 2
    assert seeds == 4 or stacked_steps(total, more, operations) > budget  # and nothing of it is left over


def test_large_students_are_not_tried_at_once_and_small_ones_are() -> None:
    assert at_once("fast", 1_000, budget_steps("fast", 1_000, 1e5), 1e5) == (18, 4)
    few, many = (
        lookup_operations(22, 300),
        lookup_operations(1, 50_000),
    )  # the codes of a column with thousands of values
    assert at_once("fast", 1_000, budget_steps("fast", 1_000, 1e5), 1e5, few) == (18, 2)
    assert at_once("fast", 1_000, budget_steps("fast", 1_000, 1e5), 1e5, many) == (18, 1)
    assert at_once("fast", 1_000, budget_steps("fast", 1_000, 1e5), 1e5, 10 * many) == (0, 0)
    assert at_once("fast", 1_000, budget_steps("fast", 1_000, 1e9), 1e9) == (0, 0)
    assert at_once("fast", 50_000, budget_steps("fast", 50_000, 3e5), 3e5) == (0, 0)
