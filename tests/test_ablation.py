"""What is switched when a recipe is ablated."""

import pytest

from hf_hpmkd.ablation import COMPONENTS, FULL, ablation_methods
from hf_hpmkd.methods import method_recipe
from hf_hpmkd.recipe import load_recipe

ALL_ON = ["chain.length=1", "distillation.temperature_schedule=learned", "auto.mode=fast"]
COLD = "chain.warm_start=false"


def names(*words: str) -> set[str]:
    return {method.name for method in ablation_methods(load_recipe("quickstart", words))}


def test_what_is_used_goes_alone_and_in_pairs():
    assert names(*ALL_ON[:2], COLD) == {
        FULL,
        "no-chain",
        "no-attention",
        "no-temperature",
        "no-chain-no-attention",
        "no-chain-no-temperature",
        "no-attention-no-temperature",
        "with-warm-starts",
        "with-adaptive",
    }
    assert len(names(*ALL_ON)) == 1 + 5 + 5 * 4 // 2


def test_what_is_left_off_comes_alone():
    assert names(COLD) == {FULL, "no-attention", "with-chain", "with-temperature", "with-warm-starts", "with-adaptive"}


@pytest.mark.parametrize("words", [[], [COLD], ALL_ON])
def test_a_switched_component_is_really_switched_and_no_other(words):
    recipe = load_recipe("quickstart", words)
    for method in ablation_methods(recipe):
        made = method_recipe(recipe, method, recipe.training.seed)
        for component in COMPONENTS:
            named = component.name in method.name
            assert component.is_on(made) == (component.is_on(recipe) != named), (method.name, component.name)


def test_the_full_recipe_is_untouched():
    recipe = load_recipe("quickstart", ALL_ON)
    assert method_recipe(recipe, ablation_methods(recipe)[0], recipe.training.seed) == recipe
