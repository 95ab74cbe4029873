"""Tries at once: which students they are for, and that a stack is taught what the run's own trainings are."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_hpmkd import quick_validation, stacked_tries
from hf_hpmkd.cli import main
from hf_hpmkd.components.adaptive_configuration import DIRECT, Configuration
from hf_hpmkd.components.attention_ensemble import label_weights
from hf_hpmkd.kept_student import Proof, distilled_folder
from hf_hpmkd.losses import log_mixture
from hf_hpmkd.planned_tries import plan_tries
from hf_hpmkd.recipe import read_recipe
from hf_hpmkd.run_record import AutoRecord, RunRecord, TrialRecord
from hf_hpmkd.run_steps import student_builder
from hf_hpmkd.stacked_tries import answers_at_once, can_stand, can_try_at_once
from hf_hpmkd.table_runs import TableRuns
from hf_hpmkd.tasks.base import UNAUGMENTED


def tree(folder: Path, **sections: Any) -> dict[str, Any]:
    """Wine: 178 rows of 13 numbers, bundled with scikit-learn."""
    whole: dict[str, Any] = {
        "data": {"path": "sklearn:wine", "validation_size": 40},
        "teachers": [{"model": "mlp-16", "epochs": 8}, {"model": "sklearn:LogisticRegression", "folds": 3}],
        "student": {"model": "mlp-3"},
        "auto": "fast",
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 0.02, "evaluations": 2},
        "memory": {"use": False},
        "output": {"dir": str(folder / "run")},
    }
    for name, values in sections.items():
        whole[name] = {**whole.get(name, {}), **values} if isinstance(values, dict) else values
    return whole


def run(folder: Path, recipe: dict[str, Any]) -> RunRecord:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(path)]) == 0
    return RunRecord.load(folder / "run" / "run_record.json")


@pytest.fixture
def small(tmp_path: Path) -> SimpleNamespace:
    """Rows, teachers and a student without a run."""

    class Wine(TableRuns):
        def __init__(self, recipe: dict[str, Any]) -> None:
            self.place, self.kind = tmp_path, "table"
            self.run = self.make_run(read_recipe(recipe, "a test"), tmp_path)

    runs = Wine(tree(tmp_path))
    build = student_builder(runs.recipe, runs.parts)
    return SimpleNamespace(runs=runs, run=runs.run, parts=runs.parts, teachers=runs.teachers, build=build)


def test_a_stack_answers_as_the_runs_own_students_do(small: SimpleNamespace) -> None:
    """Another order of the rows and a gate that sees less make it no other training: mean over four seeds each."""
    ways = [DIRECT, Configuration(alpha=0.9, temperature=1.0), Configuration(warm_start=True, learning_rate=0.5)]
    above = small.runs._above([0, 1])
    found = answers_at_once(
        small.run, small.parts, small.teachers, small.build, above, ways, 4, [small.parts.validation]
    )[0]
    assert found.shape == (3, 4, 40) and found.dtype == torch.bool
    again = answers_at_once(
        small.run, small.parts, small.teachers, small.build, above, ways[::-1], 4, [small.parts.validation]
    )[0]
    assert torch.equal(found, again.flip(0))  # who else is in the stack does not matter
    for way, right in zip(ways, found.float().mean((1, 2)), strict=True):
        own = []
        for seed in range(4):
            training = dataclasses.replace(small.run.recipe.training, seed=seed)
            recipe = dataclasses.replace(small.run.recipe, training=training)
            own.append(small.runs.teach(recipe, way, [0, 1], small.parts.validation).accuracy)
        assert abs(float(right) - sum(own) / 4) < 0.08, way  # three rows of forty
    assert found[2].float().mean() > found[0].float().mean() + 0.05  # it did begin with a teacher's weights


def test_its_students_are_others_than_those_of_the_run(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the pair that is proven in the end would be half one of those that chose."""
    stacks, train = [], stacked_tries.train_stack

    def listen(stack: Any, *args: Any, **kwargs: Any) -> Any:
        stacks.append(stack)
        return train(stack, *args, **kwargs)

    monkeypatch.setattr(stacked_tries, "train_stack", listen)
    answers_at_once(small.run, small.parts, small.teachers, small.build, [], [DIRECT], 2, [small.parts.validation])
    assert small.run.recipe.training.seed == 0
    own = dict(small.build(seed=0).model.named_parameters())
    (stack,) = stacks
    assert [one.seed for one in stack] == [1, 2]
    assert not any(torch.equal(one.start["classifier.weight"], own["classifier.weight"]) for one in stack)


def test_a_stack_hears_what_the_teachers_say_of_the_training_rows(small: SimpleNamespace) -> None:
    """Of one teacher there is nothing to weigh; out of fold, as a student hears it; CA-MKD's weights in closed form."""
    train = small.parts.train
    everything = torch.arange(len(train))
    logits = torch.stack(
        [one.logits(train, everything, torch.full_like(everything, UNAUGMENTED)) for one in small.teachers]
    ).float()
    recipe = small.run.recipe
    plain = dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, calibrate_teachers=False))
    small.run.recipe = plain
    alone = stacked_tries._Targets(small.run, small.parts, small.teachers[1:])
    place = alone.of(Configuration(alpha=0.5, temperature=2.0))
    torch.testing.assert_close(alone.found[place], (logits[1] / 2).log_softmax(-1), atol=5e-3, rtol=0)  # of float16
    both = stacked_tries._Targets(small.run, small.parts, small.teachers)
    place = both.of(Configuration(alpha=0.5, temperature=3.0, gate="label"))
    expected = log_mixture(logits, label_weights(logits, train.labels), 3.0)
    torch.testing.assert_close(both.found[place], expected, atol=5e-3, rtol=0)
    assert both.of(Configuration(alpha=0.9, temperature=3.0, gate="label", learning_rate=4.0)) == place
    assert both.of(Configuration(alpha=0.9, temperature=3.0, gate="mixture")) != place


def test_rates_are_those_of_the_trainer(small: SimpleNamespace) -> None:
    curve = small.runs.teach(small.run.recipe, DIRECT, [0, 1], small.parts.validation).trained.curve
    logged = {int(row["step"]): row["learning_rate"] for row in curve if "learning_rate" in row}
    assert len(logged) > 20
    rates = stacked_tries._rates(small.run.recipe, max(logged))
    for step, rate in logged.items():
        assert 0.02 * rates[step - 1] == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("training", {"optimizer": "sgd"}),
        ("training", {"optimizer_args": "betas=(0.8,0.9)"}),
        ("training", {"gradient_accumulation_steps": 2}),
        ("training", {"precision": "bf16"}),
        ("training", {"keep": "best"}),
        ("training", {"lr_scheduler": "reduce_lr_on_plateau"}),
        ("distillation", {"teacher_outputs": "live"}),
    ],
    ids=str,
)
def test_students_that_are_trained_otherwise_are_tried_one_by_one(
    small: SimpleNamespace, tmp_path: Path, section: str, values: dict[str, Any]
) -> None:
    student = small.build(meta=True).model
    assert can_try_at_once(small.run.recipe, small.parts, student)
    assert not can_try_at_once(small.run.recipe, small.parts, torch.nn.Linear(2, 2))
    recipe = read_recipe(tree(tmp_path, **{section: values}), "a test")
    assert not can_try_at_once(recipe, small.parts, student)


def test_what_would_not_fit_into_memory_is_tried_one_by_one(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, rows = small.build(meta=True).model, len(small.parts.train)
    monkeypatch.setattr(stacked_tries, "_MOST_VALUES", 13 * rows)  # 13 numbers a row, two teachers of three classes
    assert can_try_at_once(small.run.recipe, small.parts, student)
    monkeypatch.setattr(stacked_tries, "_MOST_VALUES", 13 * rows - 1)
    assert not can_try_at_once(small.run.recipe, small.parts, student)


def test_the_gate_weighs_rows_in_pieces(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Configuration(alpha=0.5, temperature=2.0)
    found = []
    for pieces in (4096, 7):
        monkeypatch.setattr(stacked_tries, "_ROWS_AT_ONCE", pieces)
        targets = stacked_tries._Targets(small.run, small.parts, small.teachers)
        found.append(targets.found[targets.of(one)])
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("choose", "at_once"), [(["temperature_schedule"], False), (["alpha", "temperature"], True), (["alpha"], False)]
)
def test_few_candidates_are_tried_one_by_one(
    small: SimpleNamespace, tmp_path: Path, choose: list[str], at_once: bool
) -> None:
    """So a schedule that is asked for is tried, though no stack can."""
    recipe = read_recipe({**tree(tmp_path), "auto": {"mode": "fast", "choose": choose}}, "a test")
    planned = plan_tries(recipe, small.parts, small.build(meta=True), direct=True)
    assert bool(planned.seeds) == at_once == (not planned.rungs)


def test_students_of_a_chain_have_no_other_pairs(tmp_path: Path) -> None:
    """A stage teaches them too, or lends its weights; what hears no teacher is trained as in its tries."""
    about = {"reason": "", "knowledge": "", "alike": [], "overrides": {}, "features": {}, "total_steps": 9}
    numbers = {"budget_steps": 9, "extra_steps": 9, "seconds": 1.0, "deciding_seconds": 1.0, "seeds": 3}
    for one, chain, counted in (
        (Configuration(alpha=0.5), {}, True),
        (Configuration(alpha=0.5), {"length": 1}, False),
        (Configuration(alpha=0.5), {"models": ["mlp-8"]}, False),
        (Configuration(learning_rate=2.0), {"models": ["mlp-8"]}, True),
    ):
        trial = TrialRecord(str(one), 9, 2.0, 0.5, (0.0, 1.0))
        auto = AutoRecord(**about, **numbers, configuration=dataclasses.asdict(one), trials=[trial])
        recipe = read_recipe(tree(tmp_path, chain=chain), "a test")
        expected = Proof(1.5, 3, 2.0, 0.5) if counted else Proof(1.5)
        assert quick_validation.proof_needed(recipe, auto) == expected


def test_targets_that_move_cannot_stand() -> None:
    assert can_stand(DIRECT) and can_stand(Configuration(alpha=0.5))
    assert not can_stand(Configuration(alpha=0.5, temperature_schedule="cosine"))
    assert not can_stand(Configuration(alpha=0.5, gate="joint"))


def test_a_run_tries_at_once_and_trains_what_is_furthest_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student is bitwise that of the run whose recipe says what was chosen, and the direct one that of any run."""
    monkeypatch.setattr(quick_validation, "HOPE", -1e9)
    monkeypatch.setattr(quick_validation, "PROOF", -1e9)
    record = run(tmp_path, tree(tmp_path))
    auto = record.auto
    assert auto is not None and auto.seeds == 4 and len(auto.trials) > 8
    assert {trial.steps for trial in auto.trials} == {auto.total_steps}
    best = max(auto.trials, key=lambda trial: trial.gain)
    chosen = str(Configuration(**auto.configuration))
    assert next(trial.gain for trial in auto.trials if trial.name == chosen) == best.gain
    assert 0 < auto.extra_steps < auto.budget_steps and auto.extra_seconds == pytest.approx(auto.seconds, rel=0.5)
    said = capsys.readouterr().out
    assert f"Tried {len(auto.trials)} ways at once, each 4 times, to the end" in said
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "asked for after what its tries showed" in card
    assert [trial.gain for trial in auto.trials] == sorted((trial.gain for trial in auto.trials), reverse=True)
    assert "on the same validation and guide rows" in card and "4 of each at once" in card
    asked = tree(tmp_path / "asked", auto="off")
    for section, values in auto.overrides.items():
        asked[section] = {**asked.get(section, {}), **values}
    run(tmp_path / "asked", asked)
    runs = [folder / "run" for folder in (tmp_path, tmp_path / "asked")]
    for places in ([distilled_folder(one) for one in runs], [one / "direct" for one in runs]):
        one, two = (load_file(place / "model.safetensors") for place in places)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_proven_joins_the_tries_of_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_validation, "HOPE", -1e9)
    recipe = tree(tmp_path)
    record = run(tmp_path, recipe)
    auto, asked = record.auto, read_recipe(recipe, "a test")
    (tried,) = [one for one in auto.trials if one.name == str(Configuration(**auto.configuration))]
    proof = quick_validation.proof_needed(asked, auto)
    assert proof == Proof(1.5, 4, tried.gain, tried.standard_error)
    expected = max(1.5 * (4 * tried.standard_error + record.kept.standard_error) - 4 * tried.gain, 0)
    assert record.kept.needed == pytest.approx(expected, abs=2e-3)
    rows = record.num_rows("validation") + record.num_rows("guide")
    assert tried.gain * 4 * rows / 100 == pytest.approx(round(tried.gain * 4 * rows / 100), abs=1e-6)  # of all of them
    assert quick_validation.proof_needed(asked, dataclasses.replace(auto, seeds=0)) == Proof(1.5)
    assert quick_validation.proof_needed(asked, None) is None


def test_an_interrupted_run_keeps_what_it_has_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, stack = tree(tmp_path), quick_validation.answers_at_once
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    def once(*args: Any) -> torch.Tensor:
        monkeypatch.setattr(quick_validation, "answers_at_once", stop)
        return stack(*args)

    monkeypatch.setattr(quick_validation, "answers_at_once", once)
    choose = quick_validation.choose
    monkeypatch.setattr(quick_validation, "choose", stop)
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 130
    monkeypatch.setattr(quick_validation, "choose", choose)
    record = run(tmp_path, recipe)  # would stop if it trained the stack again
    assert record.status == "completed" and record.auto is not None and record.auto.seeds > 0


def test_what_the_recipe_says_itself_must_be_among_them(tmp_path: Path) -> None:
    """A temperature that is learned cannot be stacked, so all are tried one by one."""
    record = run(tmp_path, tree(tmp_path, distillation={"temperature_schedule": "learned"}, auto=0.01))
    assert record.auto is not None and record.auto.seeds == 0 and record.auto.trials
