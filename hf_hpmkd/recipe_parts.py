"""From a recipe to its rows. Apart from `recipe`, which a command reads before it waits for torch and datasets."""

from hf_hpmkd.data import DataParts, load_parts
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_rules import family, is_trained_here


def recipe_parts(recipe: Recipe) -> DataParts:
    """The rows that a recipe asks for. Raises what `load_parts` does."""
    names = [teacher.model for teacher in recipe.teachers]
    return load_parts(
        recipe.data,
        task=recipe.task.type,
        teachers_saw_train=not all(map(is_trained_here, names)),
        fixed_answers=any(family(name) == "column" for name in names),
    )
