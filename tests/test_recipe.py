"""Reading recipes: every fault at once, nothing quietly replaced, and the shipped files sound."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from hf_hpmkd import vocabulary
from hf_hpmkd.classifier_training import stage_schedule, student_schedule, teacher_schedule
from hf_hpmkd.data import load_parts
from hf_hpmkd.recipe import (
    Recipe,
    RecipeError,
    bundled_recipes,
    check_recipe,
    fingerprint,
    load_recipe,
    read_recipe,
    recipe_folder,
    recipe_from_line,
    recipe_schema,
    recipe_tree,
    section_keys,
)
from hf_hpmkd.recipe_configuration import free_fields
from hf_hpmkd.recipe_faults import parse_yaml
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import USUAL_NAMES, family, is_trained_here, start_told, teacher_names
from hf_hpmkd.recipe_text import recipe_text

SOUND = {
    "data": {"path": "sklearn:digits"},
    "teachers": [{"model": "cifar-resnet-14"}, {"model": "sklearn:RandomForestClassifier"}],
    "student": {"model": "cifar-resnet-8"},
}


def faults(*overrides: str, **sections: object) -> list[str]:
    """The faults of the sound recipe with sections replaced and overrides applied."""
    with pytest.raises(RecipeError) as caught:
        read_recipe({**SOUND, **sections}, "test", overrides, check_files=True)
    return caught.value.faults


def only_fault(*overrides: str, **sections: object) -> str:
    found = faults(*overrides, **sections)
    assert len(found) == 1, found
    return found[0]


# ---- the files that ship ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipe_is_sound_by_name_and_by_path(name: str) -> None:
    assert load_recipe(name) == load_recipe(recipe_folder() / f"{name}.yaml")


def test_the_six_recipes_ship() -> None:
    assert set(bundled_recipes()) == {
        "adult", "cifar10_resnet8", "fashion_mnist", "imagenet_timm", "quickstart", "trec6"
    }  # fmt: skip


def test_every_yaml_below_recipes_is_a_recipe() -> None:
    found = {path.stem for path in recipe_folder().rglob("*.y*ml") if path.parent.name != "accelerate"}
    assert found == set(bundled_recipes())


@pytest.mark.parametrize("name", bundled_recipes())
def test_header_says_command_hardware_minutes_and_metric(name: str) -> None:
    text = bundled_recipes()[name].read_text(encoding="utf-8")
    header = text[: text.index("\ndata:") if "\ntask:" not in text else text.index("\ntask:")]
    for word in ("Command:", "Hardware:", "Minutes:", "Expected:"):
        assert re.search(rf"^# {word} +\S", header, re.MULTILINE), word
    commands = re.findall(r"hpmkd (?:distill|plan) (\w+)", header) + re.findall(r"hpmkd (quickstart)\b", header)
    assert name in commands
    assert set(commands) <= set(bundled_recipes())


@pytest.mark.parametrize("name", bundled_recipes())
def test_overrides_in_headers_are_understood(name: str) -> None:
    header = "\n".join(
        line for line in bundled_recipes()[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    quoted = re.findall(r"'(\w+(?:\.\w+)+=[^']*)'", header)
    plain = re.findall(r"(?<!')\b[a-z]+(?:\.\w+)+=[^\s,']+", header)
    words = [word.rstrip(".") for word in quoted + plain]
    assert (load_recipe(name, words) != load_recipe(name)) == bool(words)


def test_quickstart_needs_no_files_and_no_network() -> None:
    recipe = load_recipe("quickstart", check_files=True)
    assert recipe.data.path.startswith("sklearn:")
    assert all(is_trained_here(teacher.model) for teacher in recipe.teachers)
    assert recipe.distillation.direct


def test_shipped_schema_is_current() -> None:
    shipped = json.loads((recipe_folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == recipe_schema(), "run: hpmkd recipe schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("name", bundled_recipes())
def test_schema_accepts_bundled_recipes(name: str) -> None:
    tree = yaml.safe_load(bundled_recipes()[name].read_text(encoding="utf-8"))
    assert not list(jsonschema.Draft202012Validator(recipe_schema()).iter_errors(tree))


def test_schema_refuses_what_the_reader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    validator.check_schema(recipe_schema())
    assert not list(validator.iter_errors(SOUND))
    for broken in ({**SOUND, "trainig": {}}, {**SOUND, "training": {"epochs": 0}}, {"data": {"path": "x"}}):
        assert list(validator.iter_errors(broken))


def test_every_field_has_a_description() -> None:
    schema = recipe_schema()
    for kind in [schema, *schema["$defs"].values()]:
        for key, field in kind["properties"].items():
            referred = schema["$defs"].get(field.get("$ref", "").rsplit("/", 1)[-1], {})  # may carry it instead
            assert (field.get("description") or referred.get("description") or "").strip(), key


def test_choices_are_those_of_the_losses() -> None:
    properties = recipe_schema()["$defs"]["DistillationConfig"]["properties"]
    assert tuple(properties["kd_kind"]["enum"]) == vocabulary.KD_KINDS
    assert tuple(properties["temperature_schedule"]["enum"]) == vocabulary.TEMPERATURE_SCHEDULES


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_all_faults_of_all_kinds_are_told_at_once() -> None:
    found = faults(
        "training.lr=1",
        "nonsense",
        dta={},
        data={"path": "./nowhere", "views": "6"},
        teachers=[{"modl": "mlp-4"}, {"model": "sklearn:SVC", "folds": 1}, {"model": "nowhere.skops"}],
        distillation={"alpha": 1.5, "kd_kind": "dst", "temperature_schedule": "cosine", "temperature_min": 7},
        hub={"push": True},
    )
    text = "\n".join(found)
    for part in (
        "nonsense: an override has the form",
        "training.lr: is not a known key",
        "dta: is not a known key. Did you mean `data`?",
        'data.views: must be an integer, got "6"',
        "data.path: there is no './nowhere'",
        "teachers.0.modl: is not a known key. Did you mean `model`?",
        "teachers.0.model: is missing",
        "teachers.1.folds: must be 0 (one model for all rows) or at least 2, got 1",
        "teachers.2.model: there is no 'nowhere.skops'",
        "distillation.alpha: must be less than or equal to 1, got 1.5",
        'got "dst". Did you mean `dist`?',
        "distillation.temperature_min: must be below temperature_max, got 7 and 6",
        "hub.repo_id: hub.push needs",
    ):
        assert part in text, part
    assert len(found) == 13


def test_message_counts_the_faults_and_names_the_source() -> None:
    with pytest.raises(RecipeError, match=r"(?s)^my.yaml has 2 faults:\n  - .*\n  - "):
        read_recipe({**SOUND, "task": {"type": "x"}, "data": {}}, "my.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=true", "training.epochs: must be an integer, got true"),
        ("training.epochs='3'", 'training.epochs: must be an integer, got "3"'),
        ("training.epochs=2.5", "training.epochs: must be an integer, got 2.5"),
        ("training.learning_rate=.inf", "training.learning_rate: must be a finite number"),
        ("training.batch_size=0", "training.batch_size: must be greater than or equal to 1, got 0"),
        ("training.warmup_steps=1.5", "training.warmup_steps: must be a share below 1 or a whole number"),
        ("training.max_steps=0", "training.max_steps: must be -1"),
        ("training.metrics=[]", "training.metrics: must be a list of at least one, got []"),
        ("training=3", "training: must be a mapping of keys to values, got 3"),
        ("training=", r"training: must be a mapping of keys to values, got nothing (null)"),
        ("distillation.epochs=3", "Did you mean `teachers.0.epochs` or `chain.epochs` or `training.epochs`?"),
        ("distillation.topk=5", "distillation.topk: is for teacher_outputs topk, got teacher_outputs full"),
        ("distillation.teacher_outputs=topk", "distillation.topk: teacher_outputs topk needs the number"),
        (
            "distillation={kd_kind: standardized_kl, teacher_outputs: topk, topk: 3}",
            "distillation.kd_kind: standardized_kl divides by the spread of all logits",
        ),
        ("distillation.feature_weight=1", "distillation.feature_weight: above 0 needs teacher_outputs live"),
        ("task.type=text-classification", "is for image-classification, but task.type is text-classification"),
        ("student.model=mlp-16", "all models must be for one task"),
        ("student.model=sklearn:SVC", "cannot be a student"),
        ("student.pretrained=true", "student.pretrained: 'cifar-resnet-8' is built from its name"),
        ("student.model=cifar-resnet-9", "student.model: "),
        ("teachers.0.params={a: 1}", "teachers.0.params: is for sklearn: teachers"),
        ("teachers.1.model=sklearn:RandomForest", "Did you mean `RandomForestClassifier`?"),
        ("teachers.1.epochs=3", "teachers.1.epochs: is for networks trained on the spot"),
        ("teachers.1.precision=bf16", "teachers.1.precision: is for networks that are loaded"),
        ("teachers.0.labels=[a]", "teachers.0.labels: is for teachers that are loaded"),
        ("teachers.0.labels=[No,x]", "teachers.0.labels.0: must be text, got false. YAML reads No, yes, 0"),
        ("teachers.0.name=a/b", "teachers.0.name: must be text of the form"),
        ("teachers.5.name=a", "`teachers` is a list of 2, so the next word must be a position from 0 to 1, got '5'"),
        ("student.model.width=3", "`student.model` holds one value ('cifar-resnet-8'), it has no key 'width'"),
        ("hub.repo_id=alone", "hub.repo_id: must have the form user/name, got 'alone'"),
        ("training.epochs=[1", "not valid YAML"),
        ("data.path={{DATA}}", "line 1, column 2: not valid YAML: a key is one value"),
        ("training.epochs", "an override has the form section.key=value"),
    ],
)
def test_one_bad_value_is_one_fault(override: str, message: str) -> None:
    assert message in "\n".join(faults(override))


def test_names_of_transformers_are_known_whether_it_is_asked_or_not() -> None:
    usual = {key: [*names] for key, names in USUAL_NAMES.items()}
    asked = read_recipe(SOUND, "x", [f"training.report_to={json.dumps(['comet_ml', *usual['report_to']])}"])
    assert asked.training.report_to[0] == "comet_ml"  # an unusual one: now all names are looked up
    for key in ("optimizer", "lr_scheduler"):
        for name in usual[key]:
            read_recipe(SOUND, "x", [f"training.{key}={name}", "training.report_to=[comet_ml]"])
    told = faults("training.optimizer=cosine", "training.lr_scheduler=sgd", "training.report_to=[tensorbord]")
    assert [line.partition(" transformers knows no ")[0] for line in told] == [
        "training.optimizer:",
        "training.lr_scheduler:",
        "training.report_to:",
    ]
    assert "Did you mean `tensorboard`?" in told[2]


def test_a_recipe_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("data: " + "[" * 5000)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_recipe(tmp_path / "deep.yaml")


def test_same_name_twice() -> None:
    assert "names must differ, 'a' is given 2 times" in only_fault("teachers.0.name=a", "teachers.1.name=a")


def test_schedule_that_the_kind_does_not_take() -> None:
    told = only_fault("distillation.kd_kind=dist", "distillation.temperature_schedule=cosine")
    assert "cosine does not go with kd_kind dist, which takes constant" in told
    for kind, schedules in vocabulary.LEGAL_SCHEDULES.items():
        for schedule in schedules:
            read_recipe(SOUND, "x", [f"distillation.kd_kind={kind}", f"distillation.temperature_schedule={schedule}"])


def test_moving_temperature_has_ordered_ends_and_learned_starts_between_them() -> None:
    ends = ["distillation.temperature_min=6", "distillation.temperature_max=2"]
    read_recipe(SOUND, "a constant temperature does not use them", ends)
    assert "Swap them" in only_fault("distillation.temperature_schedule=cosine", *ends)
    told = only_fault("distillation.temperature_schedule=learned", "distillation.temperature=8")
    assert "must lie between temperature_min and temperature_max (2 to 6), got 8" in told


def test_features_need_a_teacher_that_has_some() -> None:
    told = only_fault(
        "distillation.feature_weight=1", "distillation.teacher_outputs=live", teachers=[{"model": "sklearn:SVC"}]
    )
    assert "SVC has none" in told


def test_files_are_looked_for_only_when_asked(tmp_path: Path) -> None:
    tree = {**SOUND, "data": {"path": str(tmp_path / "none")}}
    recipe = read_recipe(tree, "x")
    with pytest.raises(RecipeError, match=r"data.path: there is no .*none.* here"):
        check_recipe(recipe)
    (tmp_path / "none").mkdir()
    check_recipe(recipe)


def test_sizes_in_brackets(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    student = f"student.model={tmp_path}/model[hidden_size=8]"
    read_recipe(SOUND, "x", [student], check_files=True)
    assert "nowhere[hidden_size=8]' here" in only_fault(f"student.model={tmp_path}/nowhere[hidden_size=8]")
    assert "hold distinct sizes" in only_fault("student.model=timm/resnet18[layers]")
    assert "no trained weights for sizes of your own" in only_fault(student, "student.pretrained=true")
    teacher = only_fault(f"teachers.0.model={tmp_path}/model[hidden_size=8]")
    assert teacher.startswith("teachers.0.model: there are no trained weights") and "student" not in teacher


def test_safetensors_teacher_needs_its_description(tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    weights.touch()
    override = f"teachers.0.model={weights}"
    assert "needs its description beside it, net.json" in only_fault(override)
    weights.with_suffix(".json").touch()
    read_recipe(SOUND, "x", [override], check_files=True)


def test_yaml_faults_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  path: [x\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="line 3, column 1: not valid YAML"):
        load_recipe(file)
    file.write_text("data: {path: x}\nstudent: {model: mlp-4}\ndata: {path: y}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="line 3.*key 'data' is given twice"):
        load_recipe(file)
    for text, got in (("", "nothing"), ("- a", "list")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=f"must hold sections .*got {got}"):
            load_recipe(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="has 1 fault"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data:\n  path: {{DATA}}\n", "line 2, column 10: not valid YAML: a key is one value"),
        ("? [a, b]\n: 1\n", "line 1, column 3: not valid YAML: a key is one value"),
    ],
)
def test_a_key_of_more_than_one_value_is_a_fault_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(told)):
        load_recipe(file)


def test_merged_keys_may_be_given_again(tmp_path: Path) -> None:
    text = (
        "data: {path: 'sklearn:digits'}\n"
        "teachers:\n"
        "  - &first {model: cifar-resnet-14, epochs: 7, batch_size: 32}\n"
        "  - <<: *first\n"
        "    name: other\n"
        "    epochs: 9\n"
        "  - {epochs: 3, <<: [*first, {name: third}]}\n"
        "student: {model: cifar-resnet-8}\n"
    )
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    first, second, third = load_recipe(file).teachers
    assert (first.model, first.epochs, first.batch_size, first.name) == ("cifar-resnet-14", 7, 32, None)
    assert (second.model, second.epochs, second.batch_size, second.name) == ("cifar-resnet-14", 9, 32, "other")
    assert (third.model, third.epochs, third.batch_size, third.name) == ("cifar-resnet-14", 3, 32, "third")
    file.write_text(text.replace("    epochs: 9\n", "    epochs: 9\n    epochs: 8\n"), encoding="utf-8")
    with pytest.raises(RecipeError, match="line 7.*key 'epochs' is given twice"):
        load_recipe(file)


def test_what_was_merged_may_be_merged_again() -> None:
    text = "a: &a {x: 1, y: 3}\nouter: {inner: &b {<<: *a, x: 2}}\nitems: [&c {<<: *b, y: 4}]\nlast: {<<: *c}\n"
    tree = parse_yaml(text)
    assert tree["outer"]["inner"] == {"x": 2, "y": 3}
    assert set(tree["last"]) == {"x", "y"}  # whose value wins two levels down is PyYAML's affair


def test_unknown_name_suggests_a_bundled_one() -> None:
    with pytest.raises(RecipeError, match=r"there is no such file\. Did you mean `quickstart`\?.*adult"):
        load_recipe("quikstart")


# ---- values ----------------------------------------------------------------------------------------------------------


def test_overrides_set_values_and_list_items() -> None:
    words = ["training.learning_rate=1e-3", "teachers.1.params={n_estimators: 7}", "data.max_train_rows=null"]
    recipe = read_recipe(SOUND, "x", words)
    assert recipe.training.learning_rate == 1e-3
    assert recipe.teachers[1].params == {"n_estimators": 7}
    assert "training" not in SOUND, "the tree that was given is left alone"
    with pytest.raises(RecipeError, match="`teachers.1.trusted_types` is an empty list"):
        read_recipe(recipe_tree(recipe), "x", ["teachers.1.trusted_types.0=a.B"])


@pytest.mark.parametrize("word", ["1e-3", "1.5e3", "2.0E5", ".5e3", "-1.e+3", "1e3", "1.5", "+2e-1"])
def test_numbers_are_read_as_yaml_has_them_today(word: str) -> None:
    """YAML 1.2, where an exponent needs neither a dot nor a sign."""
    assert parse_yaml(f"x: {word}") == {"x": float(word)}
    assert parse_yaml(f"x: '{word}'") == {"x": word}


def test_later_override_wins() -> None:
    assert read_recipe(SOUND, "x", ["training.epochs=1", "training.epochs=2"]).training.epochs == 2


def test_the_tree_of_a_recipe_reads_back() -> None:
    recipe = load_recipe("quickstart")
    assert read_recipe(recipe_tree(recipe), "x") == recipe
    assert read_recipe(json.loads(json.dumps(recipe_tree(recipe))), "x") == recipe


def test_a_student_that_begins_with_weights_is_fine_tuned() -> None:
    def rate(**student: object) -> float:
        return read_recipe({**SOUND, "student": student}, "x").training.learning_rate

    assert rate(model="timm/resnet18", pretrained=True) == 5e-5
    assert rate(model="timm/resnet18") == 0.001


def test_what_begins_from_nothing_beside_a_fine_tuned_student_keeps_the_usual_rate() -> None:
    tree = {**SOUND, "student": {"model": "timm/resnet18", "pretrained": True}}
    recipe = read_recipe(tree, "x")
    assert student_schedule(recipe).learning_rate == 5e-5
    assert teacher_schedule(recipe, recipe.teachers[0]).learning_rate == 0.01  # a CIFAR ResNet
    assert stage_schedule(recipe).learning_rate == 0.001  # like the student
    named = read_recipe(tree, "x", ["teachers.0.learning_rate=0.02", "chain.learning_rate=0.03"])
    assert teacher_schedule(named, named.teachers[0]).learning_rate == 0.02
    assert stage_schedule(named).learning_rate == 0.03


def test_a_teacher_of_another_family_has_its_own_usual_rate_unless_the_recipe_names_another() -> None:
    tree = {**SOUND, "student": {"model": "timm/resnet18"}}
    # 0.001 is usual for the student, and a recipe that was written out names it anyway.
    for rate, expected in ((None, 0.01), (0.001, 0.01), (0.002, 0.002)):
        recipe = read_recipe(tree, "x", [] if rate is None else [f"training.learning_rate={rate}"])
        assert teacher_schedule(recipe, recipe.teachers[0]).learning_rate == expected
        assert stage_schedule(recipe).learning_rate == student_schedule(recipe).learning_rate
    other = read_recipe(SOUND, "x", ["training.learning_rate=0.004"])
    assert teacher_schedule(other, other.teachers[0]).learning_rate == stage_schedule(other).learning_rate == 0.004


def test_it_is_told_that_an_architecture_alone_is_taken() -> None:
    told = start_told(read_recipe({**SOUND, "student": {"model": "timm/resnet18"}}, "x"))
    assert "student.pretrained=true begins with its weights (usual learning rate: 0.000050)" in told
    sized = start_told(read_recipe({**SOUND, "student": {"model": "timm/resnet18[layers=1x1x1x1]"}}, "x"))
    assert sized.endswith("the architecture alone is taken.")
    assert start_told(read_recipe(SOUND, "x")) == ""


def test_fingerprint_ignores_where_and_sees_what() -> None:
    def of(*words: str) -> str:
        return fingerprint(read_recipe(SOUND, "x", words))

    for word in (
        "output.dir=elsewhere", "output.overwrite=true", "hub.repo_id=a/b", "training.report_to=[tensorboard]",
        "training.num_workers=2", "distillation.cache_dir=cache",
    ):  # fmt: skip
        assert of(word) == of(), word
    for word in ("training.seed=1", "data.seed=1", "distillation.alpha=0.5", "teachers.0.name=a", "data.max_length=64"):
        assert of(word) != of(), word
    assert of("training.epochs=10") == of(), "a default written out is the same recipe"


def test_line_is_the_recipe_of_the_same_models() -> None:
    recipe = recipe_from_line(["cifar-resnet-14", "sklearn:RandomForestClassifier"], "cifar-resnet-8", "sklearn:digits")
    assert fingerprint(recipe) == fingerprint(
        read_recipe({**SOUND, "auto": "fast", "training": {"min_steps": 1000}}, "x")
    )
    told = [
        recipe_from_line(["mlp-4"], "mlp-2", "a/b", overrides=[word]) for word in ("training.epochs=3", "data.seed=1")
    ]
    assert [one.training.min_steps for one in told] == [0, 1000]  # who says how long is not overruled
    assert recipe_from_line(["mlp-4"], "mlp-2", "a/b", "there").output.dir == "there"
    assert recipe.auto.mode == "fast"  # nothing to tune by hand, unless it is asked for
    assert recipe_from_line(["mlp-4"], "mlp-2", "a/b", overrides=["auto=off"]).auto.mode == "off"


def test_written_recipe_reads_back_and_explains_every_key(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["training.learning_rate=1e-5", "hub.repo_id=a/b", "data.path='a: #b'"])
    text = recipe_text(recipe, "one\ntwo")
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_recipe(file) == recipe
    assert text.startswith("# one\n# two\n")
    for section, keys in section_keys().items():
        for key in keys if section not in ("", "teachers") else ():
            assert re.search(rf"^  # .*\n  {key}: ", text, re.MULTILINE), f"{section}.{key}"


def test_teacher_names_are_distinct_and_usable_as_file_names() -> None:
    models = ["a/b/net.safetensors", "mlp-4", "mlp-4", "sklearn:SVC", "column:logits", "./dir/", "mlp-4"]
    sections = {**SOUND, "teachers": [{"model": m} for m in models], "student": {"model": "mlp-2"}}
    assert teacher_names(read_recipe(sections, "x")) == ["net", "mlp-4", "mlp-4-2", "SVC", "logits", "dir", "mlp-4-3"]
    assert teacher_names(read_recipe(sections, "x", ["teachers.6.name=mlp-4-2"]))[1:3] == ["mlp-4", "mlp-4-3"]


@pytest.mark.parametrize(
    ("model", "expected", "here"),
    [
        ("cifar-resnet-20", "cifar-resnet", True), ("mlp-64x32", "mlp", True), ("bert-2x64", "bert", True),
        ("sklearn:SVC", "sklearn", True), ("bert-base-uncased", "hub", False), ("google/vit-base", "hub", False),
        ("timm/resnet18", "timm", False), ("hf-hub:timm/resnet18", "timm", False), ("mlp", "mlp", True),
        ("a.skops", "skops", False),
        ("x/a.safetensors", "safetensors", False), ("column:logits", "column", False),
    ],
)  # fmt: skip
def test_families(model: str, expected: str, here: bool) -> None:
    assert family(model) == expected
    assert is_trained_here(model) is here


def test_recipe_can_be_made_in_python() -> None:
    recipe = read_recipe(SOUND, "x")
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="alpha"):
        recipe.distillation.alpha = 2.0


@pytest.mark.parametrize(
    ("student", "said", "expected"),
    [
        ("mlp-16", {}, 0.01),
        ("mlp-16", {"learning_rate": 0.001}, 0.001),
        ("cifar-resnet-8", {}, 0.01),
        ("cifar-resnet-8", {"learning_rate": 0.001}, 0.001),
        ("bert-1x16", {}, 0.002),
        ("USER/table-student", {}, 0.001),
    ],
)
def test_small_families_are_trained_faster_where_no_learning_rate_is_named(student, said, expected):
    teacher = {"mlp": "mlp-8", "cif": "cifar-resnet-8", "ber": "bert-1x16", "USE": "USER/teacher"}[student[:3]]
    tree = {"data": {"path": "USER/DATA"}, "teachers": [{"model": teacher}], "student": {"model": student}}
    tree["training"] = said
    recipe = read_recipe(tree, "a test")
    assert recipe.training.learning_rate == expected
    assert read_recipe(recipe_tree(recipe), "the same").training.learning_rate == expected
    # It is as free to be changed by the adaptive configuration as any default.
    assert ("learning_rate" in free_fields(recipe)) == (not said)


@pytest.mark.parametrize(
    "tree", [{"student": "mlp-4"}, {"student": {"model": "mlp-4"}, "training": 3}, {"student": None}]
)
def test_what_is_no_section_is_told_as_ever(tree):
    with pytest.raises(RecipeError):
        read_recipe({"data": {"path": "x"}, "teachers": [{"model": "mlp-8"}], **tree}, "a test")


@pytest.mark.parametrize(
    ("teachers", "saw", "fixed"),
    [
        (["cifar-resnet-14"], False, False),
        (["cifar-resnet-14", "sklearn:LogisticRegression"], False, False),
        (["USER/CLASSIFIER"], True, False),
        (["cifar-resnet-14", "timm/resnet18"], True, False),
        (["column:logits"], True, True),
    ],
)
def test_rows_that_a_loaded_teacher_may_have_seen_judge_nobody(teachers: list[str], saw: bool, fixed: bool) -> None:
    recipe = read_recipe({**SOUND, "teachers": [{"model": model} for model in teachers]}, "x")
    parts = recipe_parts(recipe)
    expected = load_parts(recipe.data, teachers_saw_train=saw, fixed_answers=fixed)
    assert parts.provenance == expected.provenance and parts.num_views == expected.num_views
    assert bool(parts.num_views) == (not fixed)
    other = load_parts(recipe.data, teachers_saw_train=not saw)
    told = ["may have seen" in " ".join(one.provenance["warnings"]) for one in (parts, other)]
    assert told == [saw, not saw]
