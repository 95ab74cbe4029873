"""Gives every method of a comparison the same tuning budget: so many full trainings, judged on validation rows.

One training each tells little where validation rows are few and trainings end apart by chance, and the more versions
there are, the more the best of them owes to luck. So a third of the budget trains the best of them again, with other
seeds. Pure choice of what to try; `compare` trains it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from hf_hpmkd.methods import Method, method_recipe, with_overrides
from hf_hpmkd.recipe import Recipe, RecipeError
from hf_hpmkd.recipe_rules import uses_teachers

TUNING_SEED = 2_000_003
"""Seed of the students that are tried, and from which those of further trainings count, so that no compared one is
chosen by its own luck."""

_REPEAT_FROM = 6  # trainings; with fewer all go to different versions

_ALPHAS = (0.0, 0.5, 0.9, 1.0)  # 0: the labels alone, from where the method's student starts
_ALONE = "distillation.alpha=0"
_NEED_LABELS = ("at", "dml", "fitnets")  # whose term alone leaves the student's classifier untrained
_OWN_TEMPERATURE = ("at", "ctkd", "dml", "fitnets")  # or none
_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
_LEARNING_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the recipe's; with fewer the best was often the largest


def num_versions(budget: int) -> int:
    """How many of a method's trainings go to different versions; the others are `again`'s."""
    return budget if budget < _REPEAT_FROM else math.ceil(2 * budget / 3)


def again(accuracies: Sequence[float], budget: int) -> dict[int, int]:
    """Which versions are trained again, and how often: those that were best in their first training. Position ->
    further trainings.

    budget: trainings that are left; half as many versions share all of them, but at least two. {} where that is not
    possible.
    """
    if budget < 2 or len(accuracies) < 2:
        return {}
    count = min(max(2, budget // 2), len(accuracies))
    best = sorted(range(len(accuracies)), key=lambda place: -accuracies[place])[:count]
    each, more = divmod(budget, count)
    return {place: each + (rank < more) for rank, place in enumerate(best)}


def trials(recipe: Recipe, method: Method, count: int) -> list[Method]:
    """`count` versions of a method, the first of them the method itself, the others drawn from its grid.

    The grid is alpha x temperature x learning rate for what listens to teachers, the learning rate for what does not;
    values that do not go together are left out, and so is the temperature where it means nothing: at alpha 0, which is
    drawn as often as any other, where a schedule moves it, and with losses that have one of their own or none. A grid
    with no more than `count` is tried whole. A method that configures itself (`auto`) has its own tries, which its
    seconds count, and gets no others: there is one version of it. The same recipe and method give the same trials.
    """
    base = method_recipe(recipe, method, TUNING_SEED)
    if base.auto.mode != "off":
        return [method]
    rates = [f"training.learning_rate={factor * base.training.learning_rate:g}" for factor in _LEARNING_RATES]
    grid = [[rate] for rate in rates]
    others = [name for name in ("feature_weight", "hint_weight") if getattr(base.distillation, name)]
    alone = [_ALONE, *(f"distillation.{name}=0" for name in others)]
    if uses_teachers(base):
        alphas = [alpha for alpha in _ALPHAS if alpha < 1 or method.loss not in _NEED_LABELS]
        grid = [
            [f"distillation.alpha={alpha:g}", f"distillation.temperature={temperature:g}", rate]
            if alpha
            else [*alone, rate]
            for alpha, temperature, rate in product(alphas, _TEMPERATURES, rates)
        ]
        if not _reads_temperature(base, method):
            grid = [[word for word in words if not word.startswith("distillation.temperature=")] for words in grid]
    versions = [replace(method, name=f"{method.name}--0")]
    known = {_values(recipe, versions[0])}
    seed = int.from_bytes(hashlib.sha256(method.name.encode()).digest()[:4])
    for place in np.random.default_rng(seed).permutation(len(grid)):
        if len(versions) == count:
            break
        version = replace(with_overrides(method, grid[int(place)]), name=f"{method.name}--{len(versions)}")
        try:
            values = _values(recipe, version)
        except RecipeError:  # alpha 0 with a chain, which nobody would listen to; T out of a learned one's range
            continue
        if values not in known:
            known.add(values)
            versions.append(version)
    return versions


def _values(recipe: Recipe, method: Method) -> tuple[float, ...]:
    made = method_recipe(recipe, method, TUNING_SEED)
    temperature = made.distillation.temperature if _reads_temperature(made, method) else 0.0
    return made.distillation.alpha, temperature, made.training.learning_rate


def _reads_temperature(recipe: Recipe, method: Method) -> bool:
    """Whether another T makes another training."""
    return method.loss not in _OWN_TEMPERATURE and recipe.distillation.temperature_schedule in ("constant", "learned")
