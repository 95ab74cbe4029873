"""The main job end to end, small: outputs, resume, refusal, and students that predict names from raw input."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.datasets import load_wine
from tiny import full_runs

from hf_hpmkd import classifier_training, distill
from hf_hpmkd.cli import main
from hf_hpmkd.models.tabular import TabularForClassification
from hf_hpmkd.run_folder import REPLACED, alone_in
from hf_hpmkd.run_record import RunRecord

ROOT = Path(__file__).parents[1]


def table_recipe(folder, **training):
    """Wine: 178 rows of 13 numbers, bundled with scikit-learn."""
    recipe = {
        "data": {"path": "sklearn:wine"},
        "teachers": [
            {"model": "mlp-32", "epochs": 4},
            {"model": "sklearn:LogisticRegression"},
            {"model": "sklearn:RandomForestClassifier", "params": {"n_estimators": 10}, "folds": 0},
        ],
        "student": {"model": "mlp-2"},
        "chain": {"length": 0},
        "distillation": {"temperature_schedule": "learned", "guide_every": 2},
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "evaluations": 4, **training},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run on a table."""
    folder = tmp_path_factory.mktemp("finished")
    with full_runs(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPMKD_CACHE", str(folder / "cache"))
        assert main(["distill", str(table_recipe(folder))]) == 0
    return folder


def test_everything_is_left_in_the_output_folder(finished):
    run = finished / "run"
    record = RunRecord.load(run / "run_record.json")
    assert record.status == "completed"
    assert set(record.models) == {"direct", "student"}
    assert [teacher.name for teacher in record.teachers] == ["mlp-32", "LogisticRegression", "RandomForestClassifier"]
    for part in ("train", "guide", "validation", "test"):
        assert all(0 <= teacher.accuracy[part] <= 1 for teacher in record.teachers)
    for model in record.models.values():
        assert model.metrics["test"].keys() >= {"accuracy", "macro_f1", "calibration_error", "teacher_agreement"}
        assert model.latency_ms > 0 and model.seconds > 0 and model.compression > 10
    assert {"temperature", "kd_loss", "weight/mlp-32"} <= set(record.curves["student"][0])
    assert "kd_loss" not in record.curves["direct"][0]
    assert sum(row[0] for row in record.class_weights) == pytest.approx(1, abs=1e-4)
    for name in ("learning_curves", "temperature", "teacher_weights", "class_weights"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 5000
    assert (run / "README.md").read_text().startswith("---")
    assert {path.name for path in (run / "student").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tabular.py",
    }


def test_test_metrics_are_those_of_the_saved_student(finished):
    """Recomputed from the folder alone, on the test rows that the record's seed draws."""
    from hf_hpmkd.data import load_parts
    from hf_hpmkd.data_config import DataConfig

    record = RunRecord.load(finished / "run" / "run_record.json")
    test = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False).test
    student = TabularForClassification.from_pretrained(finished / "run" / "student")
    predicted = student.predict(test.raw(range(len(test)))["table"])
    names = [test.class_names[label] for label in test.labels.tolist()]
    accuracy = sum(a == b for a, b in zip(predicted, names, strict=True)) / len(test)
    assert accuracy == pytest.approx(record.models["student"].accuracy())


def test_a_finished_run_is_shown_again_and_not_touched(finished, capsys):
    before = (finished / "run" / "run_record.json").read_bytes()
    assert main(["distill", str(finished / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "finished run" in shown and "retention" in shown
    assert (finished / "run" / "run_record.json").read_bytes() == before


def test_a_folder_of_another_recipe_is_refused_and_kept(finished, capsys):
    assert main(["distill", str(finished / "recipe.yaml"), "training.seed=5"]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
    assert RunRecord.load(finished / "run" / "run_record.json").seed == 0


def test_a_folder_is_for_one_run_at_a_time(finished, capsys):
    with alone_in(finished / "run"):
        assert main(["distill", str(finished / "recipe.yaml")]) == 2
    assert "another is running in" in " ".join(capsys.readouterr().err.split())


def test_a_folder_with_other_things_is_refused(tmp_path, capsys):
    recipe = table_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert main(["distill", str(recipe), "--overwrite"]) == 2
    assert "holds thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_told_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["distill", str(table_recipe(tmp_path)), f"output.dir={tmp_path / 'file' / 'run'}"]) == 2
    assert "must be one that can be made" in capsys.readouterr().err


class _Killed(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, finished):
    """Stopped in the middle of the student's training; the resumed student is bitwise that of the run never stopped."""
    monkeypatch.setenv("HPMKD_CACHE", str(tmp_path / "cache"))
    recipe = table_recipe(tmp_path)
    keep_curve = classifier_training._Curve.on_evaluate

    def stop_at_third(self, args, state, control, **kwargs):
        keep_curve(self, args, state, control, **kwargs)
        if "student" in args.output_dir and state.global_step >= 14:
            raise KeyboardInterrupt

    monkeypatch.setattr(classifier_training._Curve, "on_evaluate", stop_at_third)
    with full_runs():  # as the finished one was
        assert main(["distill", str(recipe)]) == 130
    assert RunRecord.load(tmp_path / "run" / "run_record.json").status == "interrupted"
    assert any((tmp_path / "run" / "student" / "checkpoints").glob("checkpoint-*"))
    direct = (tmp_path / "run" / "direct" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(classifier_training._Curve, "on_evaluate", keep_curve)
    with full_runs():
        assert main(["distill", str(recipe)]) == 0
    assert (tmp_path / "run" / "direct" / "model.safetensors").stat().st_mtime_ns == direct
    one, two = (load_file(path / "run" / "student" / "model.safetensors") for path in (tmp_path, finished))
    assert all(torch.equal(one[name], two[name]) for name in one)
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert record.status == "completed" and record.error is None


def test_neither_a_finished_nor_an_interrupted_run_goes_on_with_other_rows(tmp_path, capsys):
    table = load_wine(as_frame=True).frame.rename(columns={"target": "label"})
    table.to_csv(tmp_path / "rows.csv", index=False)
    path = table_recipe(tmp_path, max_steps=2)
    words = ["distill", str(path), f"data.path={tmp_path / 'rows.csv'}", "teachers=[{model: 'sklearn:GaussianNB'}]"]
    assert main(words) == 0
    file = tmp_path / "run" / "run_record.json"
    record = RunRecord.load(file)
    assert set(record.rows) == {"train", "guide", "validation", "test"}
    capsys.readouterr()
    table.assign(alcohol=-table["alcohol"]).to_csv(tmp_path / "rows.csv", index=False)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "replace the run with `output.overwrite=true`" in " ".join(err.split()) and "test accuracy" not in out
    (tmp_path / "rows.csv").write_text("other\n1\n")
    assert main(words) == 0  # what the run left is there all the same
    out = capsys.readouterr().out
    assert "Whether its data are still the same cannot be told" in out and "test accuracy" in out
    table.assign(alcohol=-table["alcohol"]).to_csv(tmp_path / "rows.csv", index=False)
    record.status = "interrupted"
    record.save(file)
    student = (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    for more in ([], ["output.overwrite=true"]):
        assert main([*words, *more]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "the data have changed since" in told and "or remove this one" in told
    table.to_csv(tmp_path / "rows.csv", index=False)
    assert main([*words, "output.overwrite=true"]) == 0
    assert RunRecord.load(file).status == "completed"
    assert (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns == student


def test_a_folder_below_the_home_is_written_with_a_tilde(tmp_path, monkeypatch, capsys):
    """The teachers' outputs, which lie in it where there is no memory, included."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HPMKD_CACHE")
    monkeypatch.chdir(tmp_path)
    words = ["distill", str(table_recipe(tmp_path, max_steps=2)), "teachers=[{model: 'sklearn:GaussianNB'}]"]
    words += ["output.dir=~/runs/one", "memory.use=false"]
    assert main(words) == 0
    run = tmp_path / "home" / "runs" / "one"
    assert RunRecord.load(run / "run_record.json").status == "completed"
    assert list((run / "teacher_outputs").glob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"home", "recipe.yaml"}
    capsys.readouterr()
    assert main(words) == 0
    assert "holds the finished run" in capsys.readouterr().out


def test_a_distilled_student_of_nan_costs_the_run_nothing(tmp_path):
    """T is out of all bounds here to provoke it; direct training is as ever, and kept."""
    path = table_recipe(tmp_path)
    words = ["distillation.temperature=1e25", "distillation.temperature_schedule=constant"]
    assert main(["distill", str(path), *words]) == 0
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert record.status == "completed" and record.kept.kept == "direct"
    assert record.models["student"].accuracy() > 0.5 and record.models["distilled"].accuracy() is None
    assert any("distilled student answers validation rows with NaN" in warning for warning in record.warnings)


def test_the_record_of_a_failed_run_says_what_failed(tmp_path, capsys):
    recipe = table_recipe(tmp_path)
    assert main(["distill", str(recipe), "teachers.2.params={n_estimators: -3}"]) == 2
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert record.status == "failed" and "n_estimators" in record.error


def test_a_mended_recipe_may_use_the_folder_of_a_run_that_made_nothing(tmp_path):
    recipe = table_recipe(tmp_path, metrics=["acuracy"])
    assert main(["distill", str(recipe)]) == 2
    assert RunRecord.load(tmp_path / "run" / "run_record.json").status == "failed"
    words = ["training.metrics=[accuracy]", "training.epochs=1", "teachers=[{model: mlp-4, epochs: 1}]"]
    assert main(["distill", str(recipe), *words]) == 0


def test_a_student_larger_than_its_teachers_is_warned_of(tmp_path):
    recipe = table_recipe(tmp_path)
    words = ["student.model=mlp-64x64", "training.epochs=1", "teachers=[{model: mlp-2, epochs: 1}]"]
    assert main(["distill", str(recipe), *words]) == 0
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert any("larger than every teacher" in warning for warning in record.warnings)


@pytest.mark.slow
def test_two_launched_processes_share_one_run(tmp_path):
    """Rows are shared out: half the steps of one process, one record, one table."""
    recipe = table_recipe(tmp_path, batch_size=8)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # `--cpu --num_processes 2` would silently start one process.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command = [*launch, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m", "hf_hpmkd", "distill"]
    done = subprocess.run([*command, str(recipe)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("teacher LogisticRegression ") == 1
    rows = len(RunRecord.load(tmp_path / "run" / "run_record.json").curves["student"])
    steps = json.loads((tmp_path / "run" / "student.trained.json").read_text())["steps"]
    assert rows > 0 and steps == 4 * -(-109 // 16)


@pytest.mark.slow
def test_a_run_killed_without_warning_goes_on_and_ends_the_same(tmp_path, finished):
    """Killed (-9) several times, wherever it is by then; the same command ends with bitwise the same student."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HPMKD_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "hf_hpmkd", "distill", str(table_recipe(tmp_path))]
    seen = [
        tmp_path / "run" / "teachers" / "mlp-32.trained.json",
        tmp_path / "run" / "direct" / "checkpoints",
        tmp_path / "run" / "student" / "checkpoints" / "checkpoint-7",
    ]
    for reached in seen:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while not reached.exists() and process.poll() is None:
                time.sleep(0.01)
            assert process.poll() is None, f"ended before {reached.name} was there"
            process.kill()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert RunRecord.load(tmp_path / "run" / "run_record.json").status == "completed"
    killed, whole = (load_file(folder / "run" / "student" / "model.safetensors") for folder in (tmp_path, finished))
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


@pytest.fixture(scope="module")
def fresh_predictions(tmp_path_factory):
    """What a fresh process makes of raw input, with a student of images and one of texts: the labels, by task."""
    folder = tmp_path_factory.mktemp("fresh")
    rows = [{"text": f"{word} number {i}", "label": word} for i in range(20) for word in ("cat", "dog")]
    pd.DataFrame(rows).to_csv(folder / "texts.csv", index=False)
    pairs = [
        {"premise": f"number {i // 2}", "hypothesis": row["label"], "label": row["label"]} for i, row in enumerate(rows)
    ]
    pd.DataFrame(pairs).to_csv(folder / "pairs.csv", index=False)
    for kind in ("text", "pair"):
        recipe = {"data": {"path": str(folder / f"{kind}s.csv")}, "student": {"model": "bert-1x16"}}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({**recipe, "teachers": [{"model": "bert-1x32"}]}))
    words = {
        "image": ["quickstart", "data.max_train_rows=100", "student.model=cifar-resnet-8x4"],
        "text": [str(folder / "text.yaml")],
        "pair": [str(folder / "pair.yaml")],
    }
    more = ["teachers=[{model: sklearn:LogisticRegression, folds: 2}]", "distillation.direct=false"]
    for task, start in words.items():
        epochs = 80 if task == "pair" else 1  # whose class is in the second text alone, and is to be learned
        line = [
            "distill",
            *start,
            *more,
            f"output.dir={folder / task}",
            f"training.epochs={epochs}",
            "training.learning_rate=0.01",
        ]
        assert main(line) == 0
    code = (
        "import sys, json, hf_hpmkd, PIL.Image\n"
        "from transformers import pipeline\n"
        "raw = {'image': PIL.Image.new('RGB', (40, 30)), 'text': 'a dog and a cat'}\n"
        "raw['pair'] = [{'text': 'number 3', 'text_pair': word} for word in ('cat', 'dog')]\n"
        "kinds = {'image': 'image', 'text': 'text', 'pair': 'text'}\n"
        "found = {task: pipeline(f'{kinds[task]}-classification', model=f'{sys.argv[1]}/{task}/student')(raw[task])"
        " for task in raw}\n"
        "assert [one['label'] for one in found['pair']] == ['cat', 'dog'], found\n"
        "print(json.dumps({task: [one['label'] for one in answers] for task, answers in found.items()}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    call = 'classify({"text": "The premise.", "text_pair": "The hypothesis."}, truncation=True)'
    assert call in (folder / "pair" / "README.md").read_text(encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("task", "names"),
    [("image", {str(digit) for digit in range(10)}), ("text", {"cat", "dog"}), ("pair", {"cat", "dog"})],
    ids=["image", "text", "pair"],
)
def test_the_student_predicts_names_from_raw_input_in_a_fresh_process(fresh_predictions, task, names):
    assert fresh_predictions[task] and set(fresh_predictions[task]) <= names


def test_a_fault_of_a_run_that_was_to_replace_another_leaves_the_other(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    words = ["distill", str(finished / "recipe.yaml"), f"output.dir={folder}", "--overwrite"]
    assert main([*words, "data.label_column=none"]) == 2
    assert main([*words, "teachers.0.model=" + str(finished)]) == 2  # a folder without a model
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPMKD_MEMORY", "hf://me/x")
        assert main([*words, "training.max_steps=1"]) == 2
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    capsys.readouterr()
    assert main([*words, "training.max_steps=2"]) == 0
    assert not (folder / REPLACED).exists()
    assert RunRecord.load(folder / "run_record.json").recipe["training"]["max_steps"] == 2


def test_the_licence_of_a_finished_run_may_be_named_later(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    assert "No licence has been chosen" in (folder / "README.md").read_text()
    assert main(["distill", str(finished / "recipe.yaml"), f"output.dir={folder}", "hub.license=mit"]) == 0
    assert "license: mit" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    assert main(["distill", str(finished / "recipe.yaml"), f"output.dir={folder}"]) == 0
    assert (folder / "README.md").read_text() == "mine"
    assert RunRecord.load(folder / "run_record.json").recipe["hub"]["license"] == "mit"


def test_a_chain_that_cannot_be_built_is_told_before_a_student_is_trained(tmp_path, capsys):
    words = ['teachers=[{model: "sklearn:LogisticRegression"}]', "chain.length=1"]
    assert main(["distill", str(table_recipe(tmp_path)), *words]) == 2
    assert "can be built where the size of a teacher is known" in capsys.readouterr().err
    assert not (tmp_path / "run" / "direct").exists()


def test_a_tracker_that_is_not_installed_is_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "find_spec", lambda name: None)
    assert main(["distill", str(table_recipe(tmp_path)), "training.report_to=[trackio]"]) == 2
    assert "trackio is not installed" in capsys.readouterr().err and not (tmp_path / "run").exists()
