"""The chain end to end, small: its stages, its decisions, its folders, and that nothing is trained twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_hpmkd import chain_probes, classifier_training
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.cli import main
from hf_hpmkd.compare_jobs import chain_seconds
from hf_hpmkd.comparison_record import Result
from hf_hpmkd.components.progressive_chain import GainEstimate
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.kept_classifiers import About
from hf_hpmkd.models.tabular import TabularForClassification
from hf_hpmkd.recipe import RecipeError, load_recipe
from hf_hpmkd.run_record import ChainDecision, ChainRecord, RunRecord, StageRecord


def recipe_file(folder: Path, **chain: object) -> Path:
    """Wine: 178 rows of 13 numbers, bundled with scikit-learn."""
    recipe = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "mlp-48x48", "epochs": 6}, {"model": "sklearn:LogisticRegression", "folds": 0}],
        "student": {"model": "mlp-3"},
        "distillation": {"direct": False},
        "chain": {"length": "auto", "warm_start": True, "probe_share": 0.5, "probe_seeds": 1, **chain},
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "evaluations": 2},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(folder: Path, *overrides: str, **chain: object) -> RunRecord:
    assert main(["distill", str(recipe_file(folder, **chain)), *overrides]) == 0
    return RunRecord.load(folder / "run" / "run_record.json")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPMKD_MEMORY", str(tmp_path / "memory"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classifiers that were really trained, not found."""
    names: list[str] = []
    original = classifier_training.HPMKDTrainer.train

    def train(self, *args, **kwargs):
        names.append(Path(self.args.output_dir).parent.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(classifier_training.HPMKDTrainer, "train", train)
    return names


def test_stages_lie_between_and_each_is_usable_alone(tmp_path: Path) -> None:
    record = run(tmp_path, length=2)
    sizes = [stage.num_params for stage in record.chain.stages]
    student = record.models["student"].num_params
    assert record.teachers[0].num_params > sizes[0] > sizes[1] > student
    for stage in record.chain.stages:
        folder = tmp_path / "run" / "chain" / stage.name
        assert {"config.json", "model.safetensors", "README.md", "stage.json"} <= {p.name for p in folder.iterdir()}
        model = TabularForClassification.from_pretrained(folder)
        assert sum(p.numel() for p in model.parameters()) == stage.num_params
        assert 0 < stage.accuracy <= 1 and stage.seconds > 0
        card = (folder / "README.md").read_text()
        assert f"{stage.num_params:,} parameters" in card and str(tmp_path) not in card
    assert record.chain.reason.startswith("2 intermediate models")
    assert "stage-1" in record.curves and record.taught_by[-1] == "stage-2"
    assert sum(row[0] for row in record.class_weights) == pytest.approx(1, abs=1e-4)
    assert "## Chain" in (tmp_path / "run" / "README.md").read_text()


def test_guidance_decides_who_teaches(tmp_path: Path) -> None:
    dense = run(tmp_path, length=2, warm_start=False)
    assert [stage.guides for stage in dense.chain.stages] == [
        ["mlp-48x48", "LogisticRegression"],
        ["mlp-48x48", "LogisticRegression", "stage-1"],
    ]
    assert dense.taught_by == ["mlp-48x48", "LogisticRegression", "stage-1", "stage-2"]
    previous = run(tmp_path, "--overwrite", length=2, warm_start=False, guidance="previous")
    assert [stage.guides for stage in previous.chain.stages] == [["mlp-48x48", "LogisticRegression"], ["stage-1"]]
    assert previous.taught_by == ["stage-2"]
    assert previous.teachers[0].mean_weight is None and previous.chain.stages[1].mean_weight == pytest.approx(1)


def test_no_stage_is_plain_distillation(tmp_path: Path) -> None:
    record = run(tmp_path, length=0, warm_start=False)
    assert record.chain.stages == [] and record.taught_by == ["mlp-48x48", "LogisticRegression"]
    assert not (tmp_path / "run" / "chain").exists()


def test_named_stages_are_taken_as_they_are(tmp_path: Path) -> None:
    record = run(tmp_path, models=["mlp-20x20", "mlp-9"])
    assert [stage.model for stage in record.chain.stages] == ["mlp-20x20", "mlp-9"]


def test_warm_starts_are_told_and_change_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    original = classifier_training.HPMKDTrainer.train

    def train(self, *args, **kwargs):
        starts.append({key: value.clone() for key, value in self.model.state_dict().items()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(classifier_training.HPMKDTrainer, "train", train)
    warm = run(tmp_path, models=["mlp-9"])
    assert 0 < warm.chain.stages[0].warm_start <= 1 and 0 < warm.chain.student_warm_start <= 1
    stage = load_file(tmp_path / "run" / "chain" / "stage-1" / "model.safetensors")
    name = next(key for key in stage if key.endswith("weight") and stage[key].shape[0] == 9)
    assert starts[-1][name].equal(stage[name][: starts[-1][name].shape[0]])
    cold = run(tmp_path, "--overwrite", models=["mlp-9"], warm_start=False)
    assert cold.chain.student_warm_start == 0
    assert not starts[-1][name].equal(stage[name][: starts[-1][name].shape[0]])


@pytest.mark.parametrize(
    ("probe", "measured", "length"),
    [pytest.param(1.0, 1.0, 2, marks=pytest.mark.slow), (-1.0, 1.0, 0), (1.0, -1.0, 0)],
)
def test_auto_follows_what_is_measured(tmp_path, monkeypatch, probe, measured, length) -> None:
    """The estimates are given; what is made of them is under test."""
    given = {"-probe": GainEstimate(probe, 0.1), "-measured": GainEstimate(measured, 0.1)}
    original, asked = chain_probes.Probes._student, []

    def student(self, name, extra, above):
        asked.append(name)
        return original(self, name, extra, above)

    def estimate(with_stage, without):
        assert with_stage.shape == without.shape == (1, 17)
        return given["-probe" if "below-probe" in asked[-2] else "-measured"]

    monkeypatch.setattr(chain_probes.Probes, "_student", student)
    monkeypatch.setattr(chain_probes, "estimate_gain", estimate)
    record = run(tmp_path, min_gain=0.05)
    assert len(record.chain.stages) == length
    assert len(record.chain.left_out) == (measured < 0)
    assert record.chain.decisions[0].accepted == (probe > 0)
    assert f"{measured if probe > 0 else probe:+.2f} ± 0.10 points" in record.chain.reason
    stages = {path.name for path in (tmp_path / "run" / "chain").glob("stage-?")}
    assert stages == {f"stage-{number}" for number in range(1, length + 1)}
    assert not (tmp_path / "run" / "chain" / "probes").exists()


def test_auto_really_measures(tmp_path: Path) -> None:
    """A chain that can never earn its cost is not built, and the figures are those of students on validation rows."""
    record = run(tmp_path, min_gain=1000, probe_seeds=2)
    assert record.chain.stages == [] and len(record.chain.decisions) == 1
    decision = record.chain.decisions[0]
    assert not decision.accepted and decision.cost > 1 and decision.seconds > 0
    hits = decision.gain * 2 * record.num_rows("validation") / 100  # two students on each side
    assert hits == pytest.approx(round(hits))
    assert record.chain.reason.startswith("no intermediate model (none of")


def test_where_nothing_fits_auto_goes_without_and_a_number_is_an_error(tmp_path: Path, capsys) -> None:
    only_sklearn = ["teachers=[{model: 'sklearn:LogisticRegression', folds: 0}]"]
    record = run(tmp_path, *only_sklearn)
    assert record.chain.stages == [] and "can be built" in record.chain.reason
    assert main(["distill", str(recipe_file(tmp_path, length=1)), *only_sklearn, "--overwrite"]) == 2
    assert "chain.models" in capsys.readouterr().err


def test_a_finished_stage_is_never_trained_twice(tmp_path: Path, trainings: list[str]) -> None:
    first = run(tmp_path, length=1)
    assert trainings == ["mlp-48x48", "stage-1", "student"]
    shutil.rmtree(tmp_path / "run" / "student")
    trainings.clear()
    named = first.chain.stages[0].model
    second = run(tmp_path, "student.model=mlp-4", "--overwrite", models=[named])  # another recipe, the same stage
    assert trainings == ["student"]  # its teacher, a network trained on the spot, is kept too
    assert second.chain.stages[0].reused and not first.chain.stages[0].reused
    assert second.chain.stages[0].accuracy == first.chain.stages[0].accuracy
    trainings.clear()
    run(tmp_path, "training.seed=1", "--overwrite", models=[named])
    assert "stage-1" in trainings  # a comparison over seeds trains its own
    trainings.clear()
    run(tmp_path, "distillation.temperature=2", "--overwrite", models=[named])
    assert "stage-1" in trainings


@pytest.mark.parametrize(
    "where",
    [
        "stage-1",
        pytest.param("below-probe-1-0", marks=pytest.mark.slow),
        pytest.param("student", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, trainings, where) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    settings = {"min_gain": 0, "max_length": 1, "warm_start": True}
    monkeypatch.setattr(chain_probes, "is_promising", lambda gain, required: True)
    monkeypatch.setattr(chain_probes, "is_confirmed", lambda gain, required: True)
    whole = run(tmp_path / "whole", **settings)
    monkeypatch.setenv("HPMKD_MEMORY", str(tmp_path / "other memory"))
    recipe = recipe_file(tmp_path / "stopped", **settings)
    with monkeypatch.context() as context:
        stop_when_it_trains(context, where)
        assert main(["distill", str(recipe)]) == 130
    trainings.clear()
    assert main(["distill", str(recipe)]) == 0
    assert "mlp-48x48" not in trainings and "probe-1" not in trainings
    stopped = RunRecord.load(tmp_path / "stopped" / "run" / "run_record.json")
    assert [one.gain for one in stopped.chain.decisions] == [one.gain for one in whole.chain.decisions]
    assert stopped.chain.stages[0].accuracy == whole.chain.stages[0].accuracy
    for part in ("student", "chain/stage-1"):
        one, two = (load_file(tmp_path / run / "run" / part / "model.safetensors") for run in ("whole", "stopped"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), part


def stop_when_it_trains(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Ctrl-C at the first evaluation of a classifier."""
    original = classifier_training._Curve.on_evaluate

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if Path(args.output_dir).parent.name == what:
            raise KeyboardInterrupt

    monkeypatch.setattr(classifier_training._Curve, "on_evaluate", stop)


@pytest.mark.parametrize("others", [False, True])
def test_what_other_settings_left_in_the_folder_is_not_taken(tmp_path, monkeypatch, trainings, others) -> None:
    recipe = str(recipe_file(tmp_path, length=1))
    with monkeypatch.context() as context:
        stop_when_it_trains(context, "student")
        assert main(["distill", recipe, "--no-memory"]) == 130
    if others:
        (tmp_path / "run" / "chain" / "stage-1.key").write_text("of other settings")
    trainings.clear()
    assert main(["distill", recipe, "--no-memory"]) == 0
    assert trainings == (["stage-1", "student"] if others else ["student"])


def test_a_stopped_comparison_keeps_what_its_chain_decided(tmp_path, monkeypatch, trainings) -> None:
    monkeypatch.setattr(chain_probes, "is_promising", lambda gain, required: True)
    monkeypatch.setattr(chain_probes, "is_confirmed", lambda gain, required: True)
    words = ["compare", str(recipe_file(tmp_path, max_length=1)), "--methods", "direct,hpmkd", "--seeds", "1"]
    words += ["--output", str(tmp_path / "out")]
    with monkeypatch.context() as context:
        stop_when_it_trains(context, "hpmkd")
        assert main(words) == 130
    trainings.clear()
    assert main(words) == 0
    assert trainings == ["hpmkd"]
    result = Result.load(tmp_path / "out" / "seed-0" / "hpmkd.result.json")
    assert 0 < result.chain.student_warm_start <= 1 and 0 < result.chain.stages[0].mean_weight < 1
    decisions = [one.seconds for one in result.chain.decisions]
    assert len(decisions) == 2 and min(decisions) > 0
    assert result.seconds > sum(decisions) + result.chain.stages[0].seconds
    kept = RunRecord.load(tmp_path / "out" / "seed-0" / "hpmkd.run" / "run_record.json")
    assert kept.status == "completed"


def test_seconds_of_a_chain_count_what_was_left_out() -> None:
    stages = [
        StageRecord(name, "mlp-9", 100, seconds=seconds) for name, seconds in (("stage-1", 2.0), ("stage-2", 4.0))
    ]
    decision = ChainDecision("probe", "mlp-9", 100, 0.0, 0.0, 0.0, 1.0, True, 8.0)
    record = ChainRecord(stages[:1], [decision], left_out=stages[1:])
    assert chain_seconds(record) == 14
    assert chain_seconds(None) == 0


def test_a_stage_says_by_which_key_it_is_found(tmp_path: Path) -> None:
    run(tmp_path, length=1)
    about = json.loads((tmp_path / "run" / "chain" / "stage-1" / "stage.json").read_text())
    assert about["format_version"] == 1
    kept = tmp_path / "memory" / "models" / about["key"]
    one, two = (load_file(folder / "model.safetensors") for folder in (kept, tmp_path / "run" / "chain" / "stage-1"))
    assert all(one[key].equal(two[key]) for key in one)


def test_what_lies_in_a_stages_folder_names_no_place_on_this_disk(tmp_path: Path) -> None:
    """A student that is a folder gives its stages its name."""
    student = tmp_path / "my models" / "small"
    rows = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False).train
    built = build_classifier("mlp-3", rows)
    built.model.save_pretrained(student)
    built.feed.processor.save_pretrained(student)
    words = [f"student.model={student}", "training.epochs=1", "teachers=[{model: mlp-48x48, epochs: 1}]"]
    record = run(tmp_path, *words, length=1)
    [stage] = record.chain.stages
    assert stage.model.startswith(f"{student}[")
    folder = tmp_path / "run" / "chain" / "stage-1"
    about = About.load(folder / "stage.json")
    assert about.stage.model == stage.model.replace(str(student), "small")
    kept = tmp_path / "memory" / "models" / about.key
    for path in [*folder.iterdir(), *kept.iterdir()]:
        assert not any(word in path.read_bytes() for word in (str(tmp_path).encode(), b"my models")), path


def test_a_student_that_brings_its_weights_keeps_them_beside_a_teacher_of_its_family(tmp_path: Path) -> None:
    """README's second example, with folders in the place of repositories."""
    rows = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=True).train
    for name, model, seed in (("teacher", "mlp-32", 0), ("small", "mlp-4", 1)):
        built = build_classifier(model, rows, seed=seed)
        built.model.save_pretrained(tmp_path / name)
        built.feed.processor.save_pretrained(tmp_path / name)
    line = ["distill", "--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "small")]
    line += ["--dataset", "sklearn:wine", "--output", str(tmp_path / "run"), "student.pretrained=true", "auto=off"]
    settings = ["distillation.keep=distilled", "distillation.direct=false", "training.max_steps=2"]
    assert main([*line, *settings, "training.learning_rate=1e-12"]) == 0
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert record.chain is None or (record.chain.student_origin, record.chain.student_warm_start) == ("", 0)
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("small", "run/student"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    drawn = record.parts["parts"]
    assert drawn["guide"]["rows"] + drawn["validation"]["rows"] + drawn["test"]["rows"] + len(rows) == 178


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"length": -1}, "auto or a number from 0 on, got -1"),
        ({"length": 3, "models": ["mlp-9"]}, r"be their number \(1\), got 3"),
        ({"models": ["sklearn:SVC"]}, "must be a network that is trained here"),
        ({"epochs": 3}, r"training.max_steps \(50\) decides the steps of stages too"),
        ({"length": "long"}, "chain.length"),
        ({"probe_share": 0}, "chain.probe_share"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_runs(tmp_path: Path, chain, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path, **chain), ["training.max_steps=50"])


def test_no_teacher_is_called_like_a_stage(tmp_path: Path) -> None:
    """Whether by its name or by that of its folder."""
    for teacher in ("{model: mlp-9, name: stage-1}", "{model: ./runs/stage-1}"):
        with pytest.raises(RecipeError, match="'stage-1' is how the chain calls its own models"):
            load_recipe(recipe_file(tmp_path), [f"teachers=[{teacher}]"])


def test_a_name_that_means_nothing_is_told_before_teachers_are_trained(tmp_path: Path, trainings, capsys) -> None:
    assert main(["distill", str(recipe_file(tmp_path, models=["USER/no-such-model"]))]) == 2
    assert "no-such-model" in capsys.readouterr().err and not trainings


def test_a_chain_that_nobody_listens_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing learns from the chain"):
        load_recipe(recipe_file(tmp_path, length=1), ["distillation.alpha=0"])
