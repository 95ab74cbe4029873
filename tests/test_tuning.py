"""Equal budgets: how many trials, which, and that the best of them is compared."""

import pytest
import yaml

from hf_hpmkd.cli import main
from hf_hpmkd.comparison_record import ComparisonRecord, Result
from hf_hpmkd.methods import known_methods, method_recipe
from hf_hpmkd.recipe import load_recipe
from hf_hpmkd.tuning import TUNING_SEED, again, num_versions, trials


def values(recipe, method):
    made = method_recipe(recipe, method, 0)
    return made.distillation.alpha, made.distillation.temperature, made.training.learning_rate


@pytest.mark.parametrize("name", ["direct", "kd-mean", "hpmkd", "takd", "ctkd"])
def test_every_method_gets_the_budget_and_begins_with_itself(name):
    recipe, method = load_recipe("quickstart"), known_methods()[name]
    found = trials(recipe, method, 3)
    assert len(found) == 3 and found[0].overrides == method.overrides
    assert len({values(recipe, one) for one in found}) == 3
    assert all(one.overrides[: len(method.overrides)] == method.overrides for one in found)
    assert [one.overrides for one in found] == [one.overrides for one in trials(recipe, method, 3)]


def test_a_small_grid_is_tried_whole():
    recipe = load_recipe("quickstart")
    rates = [values(recipe, one)[2] for one in trials(recipe, known_methods()["direct"], 99)]
    assert sorted(rates) == pytest.approx([recipe.training.learning_rate * factor for factor in (0.25, 0.5, 1, 2, 4)])
    assert len(trials(recipe, known_methods()["kd-mean"], 99)) == (3 * 4 + 1) * 5


def test_the_labels_alone_are_among_the_trials_where_the_method_allows_it():
    recipe = load_recipe("quickstart")
    alone = [one for one in trials(recipe, known_methods()["hpmkd"], 99) if values(recipe, one)[0] == 0]
    assert len(alone) == 5 and not any("temperature" in word for one in alone for word in one.overrides)
    hinted = load_recipe("quickstart", ["distillation.hint_weight=4"])
    for one in trials(hinted, known_methods()["hpmkd"], 99):
        made = method_recipe(hinted, one, 0).distillation
        assert (made.hint_weight == 0) == (made.alpha == 0)
    chained = [values(recipe, one)[0] for one in trials(recipe, known_methods()["takd"], 99)]
    assert len(chained) == 3 * 4 * 5 and min(chained) == 0.5  # nobody would listen to the chain


@pytest.mark.parametrize(
    ("name", "alphas"),
    [
        ("paper", {0, 0.5, 0.9, 1}),
        ("ctkd", {0, 0.5, 0.9, 1}),
        ("dml", {0, 0.5, 0.9}),
        ("at", {0, 0.5, 0.9}),
        ("fitnets", {0, 0.5, 0.9}),
    ],
)
def test_no_training_goes_to_a_temperature_that_nothing_reads(name, alphas):
    """Nor to a term that leaves the student's classifier as it began."""
    recipe = load_recipe("quickstart")
    method = known_methods()[name]
    found = [values(recipe, one) for one in trials(recipe, method, 99)]
    assert {alpha for alpha, _, _ in found} == alphas
    assert len({(alpha, rate) for alpha, _, rate in found}) == len(found) == len(alphas) * 5
    assert {temperature for _, temperature, _ in found} == {method_recipe(recipe, method, 0).distillation.temperature}


def test_a_learned_temperature_begins_within_its_range():
    recipe = load_recipe("quickstart", ["distillation.temperature_schedule=learned"])
    found = [values(recipe, one) for one in trials(recipe, known_methods()["hpmkd"], 99)]
    assert {temperature for alpha, temperature, _ in found if alpha} == {2, 4}  # of 1, 2, 4 and 8 within 2 to 6
    assert len(found) == (3 * 2 + 1) * 5


def test_what_configures_itself_is_taken_as_it_is():
    recipe, adaptive = load_recipe("quickstart"), known_methods()["adaptive"]
    assert trials(recipe, adaptive, 8) == [adaptive]
    assert len(trials(recipe, known_methods()["hpmkd"], 8)) == 8


@pytest.mark.parametrize("budget", [1, 2, 5, 6, 8, 24, 99])
def test_a_third_of_a_budget_is_left_for_the_best_and_no_training_too_many(budget):
    versions = num_versions(budget)
    assert versions == budget if budget < 6 else 2 * budget / 3 <= versions < 2 * budget / 3 + 1
    accuracies = [0.5 + 0.001 * (7 * place % versions) for place in range(versions)]
    further = again(accuracies, budget - versions)
    assert (not further) == (budget < 6)
    assert sum(further.values()) == (budget - versions if further else 0)
    others = [accuracies[place] for place in range(versions) if place not in further]
    assert all(accuracies[place] >= max(others, default=0) for place in further)


def test_few_versions_share_all_that_is_left():
    assert again([0.3, 0.1, 0.2, 0.5, 0.4], 19) == {3: 4, 4: 4, 0: 4, 2: 4, 1: 3}
    assert again([0.3, 0.1, 0.2, 0.5, 0.4], 8) == {3: 2, 4: 2, 0: 2, 2: 2}
    assert again([0.3, 0.1, 0.2], 3) == {0: 2, 2: 1}
    assert again([0.3], 9) == {} and again([0.3, 0.1], 1) == {}


def wine(folder):
    recipe = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression", "folds": 0}],
        "student": {"model": "mlp-4"},
        "training": {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "evaluations": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def test_of_the_versions_trained_again_the_best_on_the_mean_is_compared(tmp_path):
    words = ["compare", wine(tmp_path), "--methods", "direct,kd-mean", "--seeds", "5,", "--tune", "6"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    record = ComparisonRecord.load(tmp_path / "out" / "comparison.json")
    tuning = tmp_path / "out" / "tuning"
    for method in record.methods:
        tried = [trial for trial in record.trials if trial.method == method.name]
        assert sorted(trial.trainings for trial in tried) == [1, 1, 2, 2]
        means = {}
        for place, trial in enumerate(tried):
            files = [tuning / f"seed-{TUNING_SEED + n}" / f"{method.name}--{place}.result.json" for n in (0, 1)]
            results = [Result.load(file) for file in files if file.is_file()]
            means[place] = sum(one.scores["validation"].accuracy for one in results) / len(results)
            assert (trial.trainings, trial.accuracy) == (len(results), pytest.approx(means[place]))
            assert trial.seconds == pytest.approx(sum(one.seconds for one in results))
        repeated = [place for place, trial in enumerate(tried) if trial.trainings == 2]
        assert [trial.chosen for trial in tried].index(True) == max(repeated, key=lambda place: means[place])
        assert sum(trial.chosen for trial in tried) == 1
    assert "Tuned on validation rows with 12 trainings" in (tmp_path / "out" / "table.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in tuning.glob("seed-*/*.result.json")}
    assert len(before) == 12
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert {path: path.stat().st_mtime_ns for path in tuning.glob("seed-*/*.result.json")} == before


def test_the_best_trial_is_what_is_compared_and_nothing_is_tried_twice(tmp_path, capsys):
    words = ["compare", wine(tmp_path), "--methods", "direct,kd-mean,adaptive", "--seeds", "5,"]
    words += ["--tune", "2", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    record = ComparisonRecord.load(tmp_path / "out" / "comparison.json")
    assert [method.name for method in record.methods] == ["direct", "kd-mean", "adaptive"]
    assert record.methods[2].overrides == list(known_methods()["adaptive"].overrides)
    assert record.of_method("adaptive").keys() == {5}
    for method in record.methods[:2]:
        own = known_methods()[method.name].overrides
        tried = [trial for trial in record.trials if trial.method == method.name]
        assert len(tried) == 2 and tried[0].overrides == []
        best = max(tried, key=lambda trial: trial.accuracy)
        assert [trial.chosen for trial in tried] == [trial is best for trial in tried]
        assert method.overrides == [*own, *best.overrides]
        (result,) = record.of_method(method.name).values()
        assert result.overrides == method.overrides and result.seed == 5
    assert "Tuned on validation rows with 4 trainings" in (tmp_path / "out" / "table.md").read_text()
    students = list((tmp_path / "out" / "tuning" / f"seed-{TUNING_SEED}").glob("*.result.json"))
    assert len(students) == 4
    before = {path: path.stat().st_mtime_ns for path in students}
    capsys.readouterr()
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in students} == before
    words[words.index("direct,kd-mean,adaptive")] = "direct,kd-best"  # tuned later, beside the trials of before
    assert main(words) == 0
    later = ComparisonRecord.load(tmp_path / "out" / "comparison.json").trials
    assert [one for one in later if one.method != "kd-best"] == record.trials
    assert len([one for one in later if one.method == "kd-best"]) == 2
