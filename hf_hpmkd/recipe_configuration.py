"""How a recipe says its configuration: which part of it may be chosen, and a chosen one written back."""

import dataclasses
from typing import Any

from hf_hpmkd.components.adaptive_configuration import SPACE, Configuration, configurations
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_rules import usual_learning_rate

_FACTORS = ("learning_rate", "weight_decay")
_SECTION = {name: "training" if name in _FACTORS else "distillation" for name in SPACE} | {"warm_start": "chain"}
_TAUGHT = tuple(name for name, section in _SECTION.items() if section == "distillation")


def with_values(recipe: Recipe, overrides: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with these values, by section."""
    sections = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in overrides.items()}
    return dataclasses.replace(recipe, **sections)


def free_fields(recipe: Recipe) -> list[str]:
    """What may be chosen: what `auto.choose` lists, else what the recipe leaves at its default."""
    return _left_at_default(recipe) if recipe.auto.choose is None else list(recipe.auto.choose)


def _left_at_default(recipe: Recipe) -> list[str]:
    sections = {"distillation": recipe.distillation, "training": recipe.training, "chain": recipe.chain}
    defaults = {name: vars(type(section)()) for name, section in sections.items()}
    usual = usual_learning_rate(recipe.student.model, recipe.student.pretrained)
    defaults["training"] = {**defaults["training"], "learning_rate": usual}
    return [name for name in SPACE if getattr(sections[_SECTION[name]], name) == defaults[_SECTION[name]][name]]


def possible_configurations(recipe: Recipe) -> tuple[list[Configuration], int | None]:
    """All that may be tried, and the position among them of the recipe's own, where its author has thought about it:
    something of how it teaches is not left at its default.
    """
    own = configuration_of(recipe)
    possible = configurations(free_fields(recipe), own)
    if set(_TAUGHT) <= set(_left_at_default(recipe)):
        return possible, None
    found = list(dict.fromkeys([*possible, own]))
    return found, found.index(own)


def configuration_of(recipe: Recipe) -> Configuration:
    """The recipe's own way to train the student."""
    return Configuration(**{name: getattr(recipe.distillation, name) for name in _TAUGHT})


def overrides_of(configuration: Configuration, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Section -> key -> value: what a configuration changes in a recipe."""
    one, now = configuration, recipe.distillation
    training = {name: getattr(one, name) * getattr(recipe.training, name) for name in _FACTORS}
    if not one.distils:
        silent = {"alpha": 0.0, "feature_weight": 0.0, "hint_weight": 0.0}
        return {"distillation": silent, "training": training, "chain": {"warm_start": one.warm_start}}
    taught = {name: getattr(one, name) for name in _TAUGHT}
    if one.temperature_schedule == "learned":
        taught["temperature"] = min(max(one.temperature, now.temperature_min), now.temperature_max)
    return {"distillation": taught, "training": training}
