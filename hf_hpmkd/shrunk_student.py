"""The student of a user who names none, but how many times smaller than the teachers it shall be. Trains nothing."""

from typing import Any

from hf_hpmkd.intermediate_models import find_smaller
from hf_hpmkd.model_names import split_variant
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import family
from hf_hpmkd.vocabulary import NO_NETWORKS


def shrunk_student(recipe: Recipe, times: float) -> tuple[dict[str, Any], str]:
    """A student like the largest network among the recipe's teachers with about `times` fewer parameters: the fields of
    `StudentConfig` that make it, and what it is in words. The recipe's own student is not looked at.

    The same recipe gives the same student. Raises ValueError where there is none of that size, or a teacher cannot be
    built, and what `recipe_parts` raises.
    """
    networks = [one for one in recipe.teachers if family(one.model) not in NO_NETWORKS]
    origins = [{"revision": one.revision, "trust_remote_code": one.trust_remote_code} for one in networks]
    names = [one.model for one in networks]
    found, index = find_smaller(list(zip(names, origins, strict=True)), recipe_parts(recipe).train, times)
    # A teacher in other sizes comes from where the teacher does, a named relative from its own place.
    same = split_variant(found.name)[0] == split_variant(names[index])[0]
    fewer = times * found.target / found.num_params
    told = f"The student is {found.name}: {found.num_params:,} parameters, {fewer:.1f} times fewer than {names[index]}."
    return {"model": found.name, **(origins[index] if same else {})}, told
