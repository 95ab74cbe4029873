"""The adaptive configuration end to end, small: what is tried, what goes on, what is written down."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_hpmkd import classifier_training, quick_validation, student_features
from hf_hpmkd import distill as distill_module
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.cli import main
from hf_hpmkd.compare_jobs import search_seconds
from hf_hpmkd.components.adaptive_configuration import DIRECT, SPACE, Configuration
from hf_hpmkd.configuration_examples import read_prior
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.quick_validation import (
    configuration_of,
    free_fields,
    is_direct,
    overrides_of,
    proof_needed,
    with_values,
)
from hf_hpmkd.recipe import read_recipe
from hf_hpmkd.run_record import AutoRecord, RunRecord

STEPS = 28  # 109 rows in batches of 16, four epochs


def tree(folder: Path, steps: float = 12, **training: object) -> dict:
    """Wine: 178 rows of 13 numbers, bundled with scikit-learn. steps: that the tries may add, one by one (a student
    whose optimizer is told more than its name is not tried at once).
    """
    one_by_one = {"optimizer_args": "eps=1e-8"}
    return {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "mlp-16", "epochs": 3}, {"model": "sklearn:LogisticRegression", "folds": 0}],
        "student": {"model": "mlp-3"},
        "auto": {"mode": steps * 0.01001 / 60},
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 0.02, "evaluations": 2, **one_by_one, **training},
        "memory": {"use": False},
        "output": {"dir": str(folder / "run")},
    }


def run(folder: Path, recipe: dict) -> RunRecord:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(path)]) == 0
    return RunRecord.load(Path(recipe["output"]["dir"]) / "run_record.json")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_of_wide_rows_fewer_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 images of 224 pixels would take eleven gigabytes."""
    rows = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False).train
    student = build_classifier("mlp-3", rows)
    whole = student_features._inputs(student, rows)
    assert whole is not None and whole.shape == (len(rows), 13)
    monkeypatch.setattr(student_features, "_FEATURE_VALUES", 13 * 5 + 1)
    few = student_features._inputs(student, rows)
    assert few is not None and np.array_equal(few, whole[np.linspace(0, len(rows) - 1, 5).astype(int)])


@pytest.fixture
def without_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried then does not depend on which prior is shipped."""
    monkeypatch.setattr("hf_hpmkd.configuration_examples.shipped_prior", lambda: tmp_path / "none.parquet")


def believe(monkeypatch: pytest.MonkeyPatch, margin: float) -> None:
    """What a candidate must be better by, at its try and at the end: very negative for any, very large for none."""
    monkeypatch.setattr(quick_validation, "HOPE", margin)
    monkeypatch.setattr(quick_validation, "MARGIN", margin)
    monkeypatch.setattr(quick_validation, "PROOF", margin)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Folder name, first and last step of every training."""
    found: list[tuple[str, int, int]] = []
    original = classifier_training.HPMKDTrainer.train

    def train(self, *args, **kwargs):
        checkpoint = kwargs["resume_from_checkpoint"]
        first = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
        result = original(self, *args, **kwargs)
        found.append((Path(self.args.output_dir).parent.name, first, self.state.global_step))
        return result

    monkeypatch.setattr(classifier_training.HPMKDTrainer, "train", train)
    return found


def test_the_winner_goes_on_and_ends_as_if_it_had_been_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_prior: None, trainings: list[tuple[str, int, int]]
) -> None:
    """Bitwise the student, and the direct baseline, of the run whose recipe says what was chosen. Test rows are not at
    hand while it is chosen."""
    believe(monkeypatch, -1e9)
    original = distill_module.configure
    monkeypatch.setattr(
        distill_module,
        "configure",
        lambda run, parts, *rest: original(run, dataclasses.replace(parts, test=None), *rest),
    )
    record = run(tmp_path, tree(tmp_path))
    auto = record.auto
    assert [trial.steps for trial in auto.trials] == [1] * 5 + [2] * 3 + [4] * 2
    assert auto.total_steps == STEPS and auto.extra_steps <= auto.budget_steps == 12
    assert 0 < auto.extra_seconds < auto.seconds and auto.configuration["alpha"]
    assert auto.extra_steps == 5 * 1 + 3 * 1 + 2 * 2 - 4  # direct training, and the winner's four steps, go on
    at_landmark = [
        row["eval_accuracy"] for row in record.curves["direct"] if row["step"] == 7 and "eval_accuracy" in row
    ]
    assert [auto.features["landmark_accuracy"]] == at_landmark  # of the weights as they were, not of their mean
    assert ("student", 4, STEPS) in trainings and max(first for name, first, _ in trainings if name == "direct") == 7
    chosen = str(Configuration(**auto.configuration))
    assert chosen in {trial.name for trial in auto.trials[-2:]}  # the better of the last two
    assert not (tmp_path / "run" / "auto").exists()
    for text in ((tmp_path / "run" / "README.md").read_text(), auto.reason):
        assert chosen in text and "over direct training" in text.replace("Gains are over", "over")
    assert record.seconds["auto"] > auto.seconds > 0
    assert record.kept.kept == "distilled" and record.kept.needed < -1e6  # as the margin says
    asked = tree(tmp_path / "asked")
    asked["auto"] = "off"
    for section, values in auto.overrides.items():
        asked[section] = {**asked.get(section, {}), **values}
    other = run(tmp_path, asked)
    assert other.auto is None and "auto" not in other.seconds
    assert same(weights(tmp_path / "run" / "student"), weights(tmp_path / "asked" / "run" / "student"))
    asked_directly = tree(tmp_path / "plain")
    asked_directly["auto"] = "off"
    run(tmp_path, asked_directly)
    assert same(weights(tmp_path / "run" / "direct"), weights(tmp_path / "plain" / "run" / "direct"))


def test_those_that_are_furthest_ahead_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_prior: None
) -> None:
    leads = iter([1.0, 5.0, 2.0, 4.0, 3.0, 0.5, 3.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(
        quick_validation, "estimate_gain", lambda *_: SimpleNamespace(gain=next(leads), standard_error=1)
    )
    auto = run(tmp_path, tree(tmp_path)).auto
    tried = [trial.name for trial in auto.trials]
    assert tried[5:] == [tried[1], tried[3], tried[4], tried[3], tried[4]]
    assert str(Configuration(**auto.configuration)) == tried[4]


def test_a_training_of_one_step_is_tried_too(tmp_path: Path, without_prior: None) -> None:
    auto = run(tmp_path, tree(tmp_path, max_steps=1)).auto
    assert auto.total_steps == 1 and auto.budget_steps <= 8  # more than the last step of eight is of no use


def test_tries_are_judged_by_the_mean_of_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of nothing but zeros answer all alike, so no try is ahead of another."""
    original = classifier_training.put_average

    def put_zeros(classifier, average, rows):
        original(classifier, {name: torch.zeros_like(one) for name, one in average.items()}, rows)

    assert any(trial.gain for trial in run(tmp_path / "as-it-is", tree(tmp_path / "as-it-is")).auto.trials)
    monkeypatch.setattr(classifier_training, "put_average", put_zeros)
    assert not any(trial.gain for trial in run(tmp_path / "zeros", tree(tmp_path / "zeros")).auto.trials)


def test_what_promises_is_trained_and_given_up_without_a_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[tuple[str, int, int]]
) -> None:
    believe(monkeypatch, -1e9)
    monkeypatch.setattr(quick_validation, "PROOF", 1e9)
    record = run(tmp_path, tree(tmp_path))
    assert record.kept.rows == record.num_rows("validation") + record.num_rows("guide")
    assert Configuration(**record.auto.configuration) != DIRECT
    assert STEPS in {last for name, _, last in trainings if name == "student"}
    assert record.kept.kept == "direct" and record.kept.needed > 1e6
    assert same(weights(tmp_path / "run" / "student"), weights(tmp_path / "run" / "direct"))
    recipe = read_recipe({**tree(tmp_path), "distillation": {"alpha": 0.5}}, "test")
    assert proof_needed(recipe, record.auto) is None  # the recipe itself asks to distil


def test_direct_training_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[tuple[str, int, int]], capsys
) -> None:
    believe(monkeypatch, 1e9)
    record = run(tmp_path, tree(tmp_path))
    assert Configuration(**record.auto.configuration) == DIRECT
    told = (
        f"a regression over {len(read_prior()):,} runs of a prior; candidates from a portfolio learned on 33 data sets"
    )
    assert record.auto.knowledge == f"{told} of it"
    assert "student" not in {name for name, _, _ in trainings}
    assert same(weights(tmp_path / "run" / "student"), weights(tmp_path / "run" / "direct"))
    assert record.models["student"].metrics == record.models["direct"].metrics
    assert "Configuration: direct training, because no candidate is surely better" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_chooses_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    believe(monkeypatch, -1e9)
    whole = run(tmp_path, tree(tmp_path / "whole", keep="best"))
    write = quick_validation.write_json

    def stop(path: Path, value: object) -> None:
        if path.match("candidate-*-2.json"):  # trained, and not written down
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(quick_validation, "write_json", stop)
    recipe = tree(tmp_path / "stopped", keep="best")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 130
    monkeypatch.setattr(quick_validation, "write_json", write)
    # What the memory has learned meanwhile would lead to other candidates.
    monkeypatch.setattr(
        quick_validation, "propose", lambda prediction, found, count, *rest: list(range(1, 1 + count))[::-1]
    )
    stopped = run(tmp_path, recipe)
    for one, two in zip(whole.auto.trials, stopped.auto.trials, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(two, seconds=0)
    assert same(weights(tmp_path / "whole" / "run" / "student"), weights(tmp_path / "stopped" / "run" / "student"))


@pytest.mark.parametrize("rungs", [[[3, 1]], [[1, 5], [2, 3], [4, 2]]])
def test_tries_of_a_version_that_stopped_or_judged_otherwise_are_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_prior: None, rungs: list[list[int]]
) -> None:
    """Their students stand where no rung is, or were judged by their last weights."""
    write = quick_validation.write_json

    def stop(path: Path, value: object) -> None:
        write(path, value)
        if path.match("candidate-1-1.json"):
            raise KeyboardInterrupt

    recipe = tree(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with monkeypatch.context() as patched:
        patched.setattr(quick_validation, "write_json", stop)
        assert main(["distill", str(tmp_path / "recipe.yaml")]) == 130
    folder = tmp_path / "run" / "auto"
    write(folder / "rungs.json", rungs)
    write(folder / "candidates.json", [])
    assert len(run(tmp_path, recipe).auto.trials) == 5 + 3 + 2


def test_what_a_careful_recipe_says_is_offered_and_a_start_only_where_a_teacher_can_give_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_prior: None
) -> None:
    believe(monkeypatch, 1e9)
    seen: list[tuple[list[Configuration], int | None]] = []
    original = quick_validation.propose

    def propose(prediction: object, found: list[Configuration], count: int, own: int | None, known: Any) -> list[int]:
        seen.append((found, own))
        assert known == []  # there is no prior
        return original(prediction, found, count, own, known)

    monkeypatch.setattr(quick_validation, "propose", propose)
    careful = tree(tmp_path / "careful")
    careful["distillation"] = {"alpha": 0.7, "temperature": 5.0, "gate": "joint"}  # none of SPACE's values
    careful["auto"]["choose"] = list(SPACE)
    run(tmp_path, careful)
    unlike = tree(tmp_path / "unlike")
    unlike["teachers"] = unlike["teachers"][1:]  # no network
    run(tmp_path, unlike)
    (found, own), (others, none) = seen
    assert found[own] == Configuration(alpha=0.7, temperature=5.0, gate="joint") and none is None
    assert any(one.warm_start for one in found) and not any(one.warm_start for one in others)


def test_tries_that_went_on_are_not_counted_twice() -> None:
    about = {"configuration": {}, "overrides": {}, "features": {}, "trials": [], "alike": []}
    sums = {"total_steps": 8, "budget_steps": 8, "extra_steps": 8, "seconds": 9.0, "deciding_seconds": 0.1}
    auto = AutoRecord(reason="so", knowledge="nothing", **about, **sums, extra_seconds=2.5)
    assert search_seconds(auto) == 2.5 and search_seconds(None) == 0
    auto.extra_seconds = None  # of an earlier version, which did not tell
    assert search_seconds(auto) == 9.0


# ---- what may be chosen ----------------------------------------------------------------------------------------------


def recipe_with(**sections: dict) -> object:
    return read_recipe({**tree(Path("x")), **sections}, "a test")


def test_what_a_recipe_leaves_at_its_default_may_be_chosen() -> None:
    assert "learning_rate" not in free_fields(recipe_with())  # 0.02 was set
    recipe = recipe_with(training={"epochs": 3}, distillation={"temperature": 3.0, "gate": "label"})
    others = ["alpha", "temperature_schedule", "kd_kind", "learning_rate", "weight_decay"]
    assert free_fields(recipe) == [*others, "warm_start"]
    cold = dataclasses.replace(recipe, chain=dataclasses.replace(recipe.chain, warm_start=False))
    assert free_fields(cold) == others
    assert configuration_of(recipe) == Configuration(alpha=0.9, temperature=3.0, gate="label")
    asked = recipe_with(distillation={"temperature": 3.0}, auto={"mode": "fast", "choose": ["temperature"]})
    assert free_fields(asked) == ["temperature"]


def test_a_configuration_becomes_values_of_the_recipe() -> None:
    recipe = recipe_with(distillation={"temperature_min": 5.0, "temperature_max": 9.0})
    taught = Configuration(alpha=0.5, temperature_schedule="learned", learning_rate=2.0, weight_decay=0.1)
    chosen = with_values(recipe, overrides_of(taught, recipe))
    assert chosen.training.learning_rate == pytest.approx(0.04)
    assert chosen.training.weight_decay == pytest.approx(0.001)
    assert chosen.distillation.temperature == 5.0  # the learned schedule starts within its range
    assert configuration_of(chosen).alpha == 0.5 and not is_direct(recipe, chosen)
    read = dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, feature_weight=0.5))
    assert is_direct(read, with_values(read, overrides_of(DIRECT, read)))
    plain = with_values(recipe, overrides_of(DIRECT, recipe))
    assert plain.training == recipe.training and is_direct(recipe, plain)
    assert not is_direct(recipe, with_values(recipe, overrides_of(Configuration(learning_rate=2.0), recipe)))
    factors = {"learning_rate", "weight_decay", "warm_start"}
    assert set(overrides_of(taught, recipe)["distillation"]) | factors == set(SPACE)
    warm = with_values(recipe, overrides_of(Configuration(warm_start=True), recipe))
    assert warm.chain.warm_start and warm.distillation.alpha == 0 and not is_direct(recipe, warm)
    assert not plain.chain.warm_start


@pytest.mark.slow
def test_a_comparison_counts_what_was_tried(tmp_path: Path) -> None:
    from hf_hpmkd.compare import Settings, compare
    from hf_hpmkd.methods import choose_methods

    recipe = read_recipe(tree(tmp_path), "a test")
    methods = choose_methods(["direct", "hpmkd"])
    record = compare(recipe, Settings(methods, [0], tmp_path / "compared"), say=lambda line: None)
    direct, chosen = (next(one for one in record.results if one.method == name) for name in ("direct", "hpmkd"))
    assert direct.overrides[-1] == "auto.mode=off" and direct.steps == chosen.steps == STEPS
    auto = RunRecord.load(tmp_path / "compared" / "seed-0" / "hpmkd.run" / "run_record.json").auto
    assert auto.trials and chosen.seconds > auto.extra_seconds > 0
    assert auto.extra_steps <= auto.budget_steps  # direct training is tried, and paid for
