"""What is switched when a recipe is ablated."""

import pytest

from hf_hpmkd.ablation import COMPONENTS, FULL, ablation_methods
from hf_hpmkd.methods import method_recipe
from hf_hpmkd.recipe import bundled_recipes, load_recipe
from hf_hpmkd.recipe_configuration import free_fields

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


@pytest.mark.parametrize("words", [[], [COLD], ALL_ON, ["distillation.hint_weight=4"]])
def test_a_switched_component_is_really_switched_and_no_other(words):
    recipe = load_recipe("quickstart", words)
    for method in ablation_methods(recipe):
        made = method_recipe(recipe, method, recipe.training.seed)
        for component in COMPONENTS:
            named = component.name in method.name
            assert component.is_on(made) == (component.is_on(recipe) != named), (method.name, component.name)


def test_what_is_switched_is_not_given_back_by_the_adaptive_configuration():
    """Off is the default of some, which it would take for a value left to it."""
    free = {"no-temperature": {"temperature_schedule"}, "no-attention": {"gate"}, "with-warm-starts": {"warm_start"}}
    for words in (ALL_ON, [*ALL_ON, COLD]):
        recipe = load_recipe("quickstart", words)
        for method in ablation_methods(recipe):
            made = method_recipe(recipe, method, 0)
            if "adaptive" not in method.name:
                switched = set().union(*(free[part] for part in free if part in method.name))
                assert set(free_fields(made)) - set(free_fields(recipe)) == set(), method.name
                assert not switched & set(free_fields(made)), method.name
    recipe = load_recipe("quickstart", [*ALL_ON, "auto.choose=[temperature_schedule]"])
    made = {method.name: method_recipe(recipe, method, 0).auto.mode for method in ablation_methods(recipe)}
    assert made["no-temperature"] == "off" and made["no-attention"] == "fast"  # there is nothing left to choose


def test_the_full_recipe_is_untouched():
    recipe = load_recipe("quickstart", ALL_ON)
    assert method_recipe(recipe, ablation_methods(recipe)[0], recipe.training.seed) == recipe


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_bundled_recipe_can_be_ablated(name):
    recipe = load_recipe(name)
    methods = ablation_methods(recipe)
    made = {method.name: method_recipe(recipe, method, 0).distillation for method in methods}
    assert made["with-temperature"].temperature_schedule != "constant"


def with_temperature(*words):
    """(T, its range, how it moves) where the ablation lets T move; None where it does not."""
    recipe = load_recipe("quickstart", words)
    method = next((one for one in ablation_methods(recipe) if one.name == "with-temperature"), None)
    if method is None:
        return None
    it = method_recipe(recipe, method, 0).distillation
    return it.temperature, (it.temperature_min, it.temperature_max), it.temperature_schedule


def test_a_learned_temperature_begins_at_the_recipes():
    """Its range reaches there, and is otherwise the recipe's."""
    assert with_temperature("distillation.temperature=1") == (1, (1, 6), "learned")
    assert with_temperature("distillation.temperature=4") == (4, (2, 6), "learned")
    assert with_temperature("distillation.temperature=8") == (8, (2, 8), "learned")
    assert with_temperature("distillation.temperature=7.1234549") == (7.1234549, (2, 7.1234549), "learned")
    ends = (
        "distillation.temperature_min=6",
        "distillation.temperature_max=2",
    )  # which nobody reads where T is constant
    assert with_temperature(*ends) == (4, (2, 6), "learned")


def test_the_temperature_moves_as_its_loss_allows():
    for kind in ("dkd", "standardized_kl"):
        assert with_temperature(f"distillation.kd_kind={kind}", "distillation.temperature=1") == (1, (2, 6), "auto")
    assert with_temperature("distillation.kd_kind=dist") is None
