"""Methods: what they set, what they may not touch, and how one of your own is written."""

import dataclasses

import pytest

from hf_hpmkd.methods import METHODS, Method, choose_methods, known_methods, method_recipe, parse_method
from hf_hpmkd.recipe import DistillationConfig, RecipeError, load_recipe, read_recipe, recipe_tree

# What a plain method may take from the recipe as it stands: it weighs KD, or says how outputs are kept and computed.
SHARED = {
    "alpha",
    "temperature",
    "temperature_min",  # only where the schedule moves
    "temperature_max",
    "entropy_weight",  # only where a gate is trained
    "guide_every",
    "guide_batch_size",
    "hint_share",  # only where there are hints
    "teacher_outputs",
    "topk",
    "cache_dir",
    "direct",  # the comparison trains that by itself
    "keep",  # and it judges both students
}
OTHERWISE = {
    "kd_kind": "standardized_kl",
    "temperature_schedule": "cosine",
    "gate": "mixture",
    "calibrate_teachers": True,
    "feature_weight": 0.5,
    "hint_weight": 4,
    "teacher_outputs": "live",
}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("quickstart")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_is_a_sound_recipe(recipe, method):
    made = method_recipe(recipe, method, 7)
    assert made.training.seed == 7
    assert (made.data, made.teachers, made.student) == (recipe.data, recipe.teachers, recipe.student)


def test_what_needs_all_logits_does_not_keep_the_largest_alone(recipe):
    largest = read_recipe(recipe_tree(recipe), "a test", ["distillation.teacher_outputs=topk", "distillation.topk=3"])
    for method in METHODS:
        made = method_recipe(largest, method, 0).distillation  # sound
        assert made.kd_kind != "standardized_kl" or (made.teacher_outputs, made.topk) == ("full", None)


@pytest.mark.parametrize("name", ["kd-best", "kd-mean"])
def test_plain_methods_stay_plain_whatever_the_recipe_sets(recipe, name):
    """A new field of the section has to be switched off for them, or named as shared above."""
    fields = {field.name for field in dataclasses.fields(DistillationConfig)}
    assert fields == SHARED | set(OTHERWISE)
    teachers = [{"model": "cifar-resnet-20"}]
    words = [f"distillation.{key}={str(value).lower()}" for key, value in OTHERWISE.items()]
    rich = read_recipe({**recipe_tree(recipe), "teachers": teachers}, "rich", words)
    made = method_recipe(rich, known_methods()[name], 0).distillation
    assert {key: getattr(made, key) for key in OTHERWISE} == {
        "kd_kind": "forward_kl",
        "temperature_schedule": "constant",
        "gate": "uniform",
        "calibrate_teachers": False,
        "feature_weight": 0,
        "hint_weight": 0,
        "teacher_outputs": "live",
    }
    assert (made.alpha, made.temperature) == (recipe.distillation.alpha, recipe.distillation.temperature)


def test_direct_hears_no_teacher(recipe):
    hinted = read_recipe(recipe_tree(recipe), "a test", ["distillation.hint_weight=4"])
    made = method_recipe(hinted, known_methods()["direct"], 0).distillation
    assert made.alpha == 0 and made.feature_weight == 0 and made.hint_weight == 0


def test_direct_warm_is_direct_from_a_teachers_weights(recipe):
    cold = read_recipe(recipe_tree(recipe), "a test", ["chain.warm_start=false"])
    direct, warm = (method_recipe(cold, known_methods()[name], 0) for name in ("direct", "direct-warm"))
    assert warm.chain.warm_start and not direct.chain.warm_start
    assert dataclasses.replace(warm, chain=direct.chain) == direct


def test_hpmkd_is_the_recipe(recipe):
    assert method_recipe(recipe, known_methods()["hpmkd"], recipe.training.seed) == recipe


def test_a_method_of_ones_own():
    assert parse_method("soft: distillation.temperature=8 'training.metrics=[accuracy]'").overrides == (
        "distillation.temperature=8",
        "training.metrics=[accuracy]",
    )
    built = parse_method("soft: kd-best distillation.temperature=8")
    base = known_methods()["kd-best"]
    assert built.teachers == "best" and built.overrides == (*base.overrides, "distillation.temperature=8")
    assert (
        parse_method("own: direct-fresh").fresh_views and parse_method("own: at training.weight_decay=0").loss == "at"
    )
    assert parse_method("again: kd-mean").overrides == known_methods()["kd-mean"].overrides


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distillation.temperature=8", "has the form 'name: section.key=value"),
        ("a b: distillation.temperature=8", "has the form"),
        ("../x: distillation.temperature=8", "has the form"),
        ("direct: distillation.temperature=8", "comes with the package"),
        ("kept: kd-mean", "'kept'.*Give yours another name"),
        ("x.run: kd-mean", "'x.run'.*end in .run or .runs"),
        ("x.result.json: kd-mean", "'x.result.json'.*end in .run or"),
        ("teachers: kd-mean", "'teachers'.*what a comparison calls other things"),
        ("soft: kd-meen", "Did you mean `kd-mean`"),
        ("soft: kd-mean kd-best", "one method at most"),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_methods_are_chosen_by_name():
    assert [one.name for one in choose_methods(None, ["x: kd-mean"])] == ["direct", "kd-best", "kd-mean", "hpmkd", "x"]
    with pytest.raises(ValueError, match="no method 'hpmk'. Did you mean `hpmkd`"):
        choose_methods(["hpmk"])
    with pytest.raises(ValueError, match="named once, got direct"):
        choose_methods(["direct", "direct"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.batch_size=50", "must be the same for all methods"),
        ("training.seed=3", "must be the same for all methods"),
        ("training={batch_size: 50}", "training.batch_size: must be the same for all methods"),
        ("training={max_steps: 50}", "training.max_steps: must be the same for all methods"),
        ("data.views=9", "a method may set distillation"),
        ("teachers.0.epochs=9", "a method may set distillation"),
        ("student.model=cifar-resnet-20", "a method may set distillation"),
        ("distillation.temprature=9", "Did you mean `temperature`"),
    ],
)
def test_a_method_may_not_make_the_terms_unequal(recipe, word, message):
    with pytest.raises(RecipeError, match=message):
        method_recipe(recipe, Method("x", "", (word,)), 0)
