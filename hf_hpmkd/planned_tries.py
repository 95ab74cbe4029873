"""What the adaptive configuration is going to try of a student, as far as its size, its rows and its recipe tell."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_hpmkd.classifier_training import student_schedule, total_steps
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.components.adaptive_configuration import DIRECT, Configuration
from hf_hpmkd.data import DataParts
from hf_hpmkd.meta_features import LANDMARK
from hf_hpmkd.model_cost import training_flops
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_configuration import possible_configurations
from hf_hpmkd.search_budget import (
    LEAST_AT_ONCE,
    Rung,
    at_once,
    budget_steps,
    halving,
    lookup_operations,
    most_candidates,
    stacked_steps,
)
from hf_hpmkd.stacked_students import embedded
from hf_hpmkd.stacked_tries import can_stand, can_try_at_once


@dataclass(frozen=True)
class PlannedTries:
    """total: steps of one training. budget: steps that tries may add. rungs: of those tried one by one; [] where they
    are tried at once, `seeds` times each and to their end. most: candidates at most, beside direct training.
    operations: of a step of one student; lookups: as of `stacked_steps`.
    """

    total: int
    budget: int
    rungs: Sequence[Rung]
    most: int
    seeds: int
    operations: float
    lookups: float

    def at_once_steps(self, candidates: int) -> int:
        """Steps of one student alone that take as long as all tries at once of so many candidates."""
        return stacked_steps(self.total, (candidates + 1) * self.seeds, self.operations, self.lookups)

    def will_try(self, one: Configuration) -> bool:
        """Whether a configuration can be tried as planned."""
        return not self.seeds or can_stand(one)


def plan_tries(recipe: Recipe, parts: DataParts, student: Classifier, direct: bool) -> PlannedTries:
    """student: may be on the meta device. direct: whether the run trains the student directly anyway: then that costs
    the tries nothing; else the landmark is paid for.
    """
    mode, training = recipe.auto.mode, recipe.training
    total = total_steps(recipe, student_schedule(recipe), len(parts.train))
    operations = training_flops(student, parts.train) * training.batch_size * training.gradient_accumulation_steps
    budget = budget_steps(mode, total, operations)
    spare = max(budget if direct else budget - round(LANDMARK * total), 0)
    lookups = lookup_operations(*embedded(student.model))
    possible, own = possible_configurations(recipe)
    own_stands = own is None or can_stand(possible[own])
    enough = sum(one != DIRECT and can_stand(one) for one in possible) >= LEAST_AT_ONCE
    if can_try_at_once(recipe, parts, student.model) and own_stands and enough:
        most, seeds = at_once(mode, total, spare, operations, lookups)
        if seeds:
            return PlannedTries(total, budget, [], most, seeds, operations, lookups)
    rungs = halving(total, spare, most_candidates(mode))
    most = rungs[0].candidates if rungs else 0
    within = min(budget, most_candidates(mode) * total)  # more is of no use: each is trained to its end at most
    return PlannedTries(total, within, rungs, most, 0, operations, lookups)
