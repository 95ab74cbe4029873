"""A comparison end to end, small: equal terms, resume, failures, several processes, the closed test part."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from hf_hpmkd import classifier_training, compare, compare_jobs, quick_validation, training_folder
from hf_hpmkd.cli import main
from hf_hpmkd.compare_jobs import Job, Workplace, time_left
from hf_hpmkd.comparison_record import ComparisonRecord, Result, Score
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.distill import student_builder
from hf_hpmkd.methods import METHODS as KNOWN
from hf_hpmkd.methods import Method, choose_methods, method_recipe
from hf_hpmkd.models.tabular import TabularForClassification
from hf_hpmkd.recipe import load_recipe, recipe_tree
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.run_folder import alone_in
from hf_hpmkd.run_record import RunRecord

ROOT = Path(__file__).parents[1]
METHODS = ["--methods", "direct,kd-mean,hpmkd,kd-best", "--method", "again: kd-mean"]


def write_recipe(folder):
    recipe = {
        "data": {"path": "sklearn:wine"},
        "teachers": [
            {"model": "mlp-32", "epochs": 8},
            {"model": "sklearn:DecisionTreeClassifier", "params": {"max_depth": 2}},
        ],
        "student": {"model": "mlp-4"},
        "distillation": {"guide_every": 4},
        "training": {"epochs": 10, "batch_size": 16, "learning_rate": 0.01, "evaluations": 4},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def command(folder, *words):
    return ["compare", write_recipe(folder), *METHODS, "--seeds", "2", "--output", str(folder / "out"), *words]


def result(folder, method, seed):
    return Result.load(folder / "out" / f"seed-{seed}" / f"{method}.result.json")


def record(folder):
    return ComparisonRecord.load(folder / "out" / "comparison.json")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPMKD_CACHE", str(folder / "cache"))
        assert main(command(folder)) == 0
    return folder


def test_every_method_and_seed_has_its_result(finished):
    found = record(finished)
    assert {(one.method, one.seed) for one in found.results} == {
        (method, seed) for method in ("direct", "kd-mean", "hpmkd", "kd-best", "again") for seed in (0, 1)
    }
    assert {one.steps for one in found.results} == {10 * -(-109 // 16)}
    assert all(one.curve == [] and one.seconds > 0 and set(one.scores) == {"validation"} for one in found.results)
    one = result(finished, "kd-mean", 0)
    assert any("eval_accuracy" in row for row in one.curve)
    assert one.scores["validation"].accuracy == pytest.approx(
        [row["eval_accuracy"] for row in one.curve if "eval_accuracy" in row][-1]
    )
    assert one.teachers == ["mlp-32", "DecisionTreeClassifier"] and one.commit
    assert result(finished, "direct", 0).teachers == []
    assert (finished / "out" / "table.md").read_text().startswith("| method |")
    assert {path.name for path in (finished / "out" / "plots").iterdir()} == {"accuracy.png", "accuracy_seconds.png"}


@pytest.mark.parametrize("asked", [[], ["--no-memory"], ["--memory", "other"]])
def test_the_memory_is_the_one_that_is_asked_for(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPMKD_CACHE", raising=False)
    monkeypatch.setenv("HPMKD_MEMORY", str(tmp_path / "usual"))
    words = ["--methods", "direct,kd-mean", "--seeds", "1", "--output", str(tmp_path / "out")]
    assert main(["compare", write_recipe(tmp_path), "training.epochs=1", *words, *asked]) == 0
    kept = {name for name in ("usual", "other") if any((tmp_path / name).rglob("*.safetensors"))}
    assert kept == ({"usual"} if not asked else set() if asked == ["--no-memory"] else {"other"})


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_equal_methods_give_the_same_student_and_others_do_not(finished):
    for seed in (0, 1):
        of = {m: weights(finished / "out" / f"seed-{seed}" / m) for m in ("direct", "kd-mean", "again", "hpmkd")}
        assert same(of["kd-mean"], of["again"])
        assert result(finished, "kd-mean", seed).scores == result(finished, "again", seed).scores
        assert result(finished, "kd-mean", seed).weights == result(finished, "again", seed).weights
        assert len({one.weights for one in record(finished).results if one.seed == seed} - {None}) == 4
        assert not same(of["kd-mean"], of["direct"]) and not same(of["kd-mean"], of["hpmkd"])


def test_a_student_is_that_of_distill(finished, tmp_path):
    """Same seed, same teachers: the student of the method `hpmkd` is bitwise the one that the recipe alone gives."""
    recipe = write_recipe(tmp_path)
    assert main(["distill", recipe, "training.seed=1", "distillation.keep=distilled"]) == 0
    for name, method in (("student", "hpmkd"), ("direct", "direct")):
        assert same(weights(tmp_path / "run" / name), weights(finished / "out" / "seed-1" / method))


def test_the_best_teacher_is_the_best_on_guide_rows(finished):
    for seed in (0, 1):
        teachers = record(finished).teachers[f"seed-{seed}"]
        best = max(teachers, key=lambda teacher: teacher.accuracy["guide"])
        assert result(finished, "kd-best", seed).teachers == [best.name]
        assert len({teacher.accuracy["guide"] for teacher in teachers}) == 2  # else this test shows nothing


def test_what_each_method_hears(finished):
    """Guide rows decide who is best: here they and all other parts say different things."""
    run = RunRecord.load(finished / "out" / "seed-0" / "run_record.json")
    for teacher, share in zip(run.teachers, (0.9, 0.8), strict=True):
        teacher.accuracy = {"guide": 1 - share, "train": share, "validation": share}
    folder = finished / "heard"
    (folder / "seed-0").mkdir(parents=True)
    run.save(folder / "seed-0" / "run_record.json")
    shutil.copytree(finished / "out" / "seed-0" / "teachers", folder / "seed-0" / "teachers")
    recipe = load_recipe(write_recipe(finished))
    place = compare_jobs.Workplace(recipe, folder)

    def names(**method):
        job = compare_jobs.Job(Method("m", "", **method), 0, folder)
        return [teacher.name for teacher in place.heard(job, recipe)]

    assert names() == ["mlp-32", "DecisionTreeClassifier"]
    assert names(teachers="best") == ["DecisionTreeClassifier"]
    assert names(teachers="best-network") == ["mlp-32"]
    assert names(teachers="shuffled") == ["mlp-32-shuffled", "DecisionTreeClassifier-shuffled"]
    assert names(teachers="peer") == ["peer"]


def test_a_peer_is_no_seeds_student(finished):
    recipe = load_recipe(write_recipe(finished))
    place = compare_jobs.Workplace(recipe, finished / "peers")
    made = [student_builder(method_recipe(recipe, Method("m", ""), seed), place.parts)().model for seed in (0, 1)]
    for seed in (0, 1):
        job = compare_jobs.Job(Method("m", "", teachers="peer"), seed, finished / "peers")
        made.append(place.heard(job, recipe)[0].model)
    first = [next(model.parameters()).flatten() for model in made]
    assert len({tuple(one.tolist()) for one in first}) == 4


def test_finished_students_are_not_trained_again(finished, capsys, monkeypatch):
    before = {p: t for p, t in files(finished / "out").items() if "seed-" in str(p)}
    table = (finished / "out" / "table.md").read_text()
    monkeypatch.setattr(compare_jobs, "train_or_load", None)
    assert main(command(finished)) == 0
    assert {p: t for p, t in files(finished / "out").items() if "seed-" in str(p)} == before
    capsys.readouterr()
    assert main(["compare", "--table", str(finished / "out")]) == 0
    assert capsys.readouterr().out == table


def test_a_method_and_a_seed_may_be_added_later(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "out", tmp_path / "out")
    trained = []
    train_or_load = compare_jobs.train_or_load
    monkeypatch.setattr(
        compare_jobs, "train_or_load", lambda name, *a, **k: trained.append(name) or train_or_load(name, *a, **k)
    )
    words = ["--methods", "direct,dkd", "--seeds", "1,2", "--output", str(tmp_path / "out")]
    assert main(["compare", write_recipe(finished), *words]) == 0
    assert trained == ["dkd, seed 1", "direct, seed 2", "dkd, seed 2"]
    assert [method.name for method in record(tmp_path).methods] == [
        "direct", "dkd", "kd-mean", "hpmkd", "kd-best", "again"
    ]  # fmt: skip
    assert len(record(tmp_path).results) == 13 and record(tmp_path).seeds == [0, 1, 2]


def test_a_stopped_comparison_goes_on_and_ends_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HPMKD_CACHE", str(tmp_path / "cache"))
    keep_curve = classifier_training._Curve.on_evaluate

    def stop(self, args, state, control, **kwargs):
        keep_curve(self, args, state, control, **kwargs)
        if "hpmkd/checkpoints" in args.output_dir and state.global_step >= 36:
            raise KeyboardInterrupt

    monkeypatch.setattr(classifier_training._Curve, "on_evaluate", stop)
    assert main(command(tmp_path)) == 130
    assert any((tmp_path / "out" / "seed-0" / "hpmkd" / "checkpoints").glob("checkpoint-*"))
    done = result(tmp_path, "kd-mean", 0)
    assert done.status == "completed" and result(tmp_path, "hpmkd", 0).status == "running"
    assert "kd-mean" in {one.method for one in record(tmp_path).results if one.seed == 0}
    monkeypatch.setattr(classifier_training._Curve, "on_evaluate", keep_curve)
    assert main(command(tmp_path)) == 0
    assert result(tmp_path, "kd-mean", 0) == done
    for method in ("hpmkd", "kd-best"):
        assert same(*(weights(folder / "out" / "seed-0" / method) for folder in (finished, tmp_path)))


def test_a_failed_student_is_named_and_stops_no_other(tmp_path, capsys):
    """The optimizer's library is not installed, which shows when training begins."""
    words = ["--methods", "direct,kd-mean", "--method", "broken: training.optimizer=adamw_bnb_8bit", "--seeds", "1"]
    line = ["compare", write_recipe(tmp_path), *words, "--output", str(tmp_path / "out")]
    assert main([*line, "--baseline", "direct"]) == 2
    told = capsys.readouterr()
    log = tmp_path / "out" / "seed-0" / "broken.log"
    assert "1 of 3 students failed" in told.err and "broken, seed 0: failed, ImportError" in told.err
    assert str(log) in told.err and "Traceback" in log.read_text()
    assert {one.method for one in record(tmp_path).results} == {"direct", "kd-mean"}
    assert "| kd-mean |" in told.out
    assert result(tmp_path, "broken", 0).status == "failed"


def test_a_diverged_student_has_failed_and_a_diverged_trial_is_not_chosen(tmp_path, capsys):
    words = ["--methods", "direct,kd-mean", "--method", "wild: direct training.learning_rate=1e30", "--seeds", "1"]
    line = ["compare", write_recipe(tmp_path), "training.max_steps=4", *words, "--output", str(tmp_path / "out")]
    assert main(line) == 2
    told = capsys.readouterr().err
    assert "1 of 3 students failed" in told and "wild, seed 0: failed, ValueError: A student's logits must be" in told
    assert {one.method for one in record(tmp_path).results} == {"direct", "kd-mean"}
    assert result(tmp_path, "wild", 0).scores == {}
    line[-1] = str(tmp_path / "tuned")
    assert main([*line, "--tune", "2"]) == 2  # all versions of `wild` are, and the others have theirs
    assert "1 of 3 students failed" in capsys.readouterr().err
    trials = ComparisonRecord.load(tmp_path / "tuned" / "comparison.json").trials
    assert [trial.accuracy for trial in trials if trial.method == "wild"] == [0, 0]
    assert all(trial.accuracy > 0 for trial in trials if trial.method != "wild")


class _Closed:
    def __len__(self):
        raise AssertionError("the test part was opened")

    def __getattr__(self, name):
        raise AssertionError("the test part was opened")


def test_what_is_left_is_told_at_the_pace_so_far():
    assert time_left(60, 2, 10) == time_left(120, 4, 10) == "; about 5 min for the other 10"
    assert time_left(60, 2, 2) == "" == time_left(1e6, 9, 0)
    assert time_left(3600, 1, 3) == "; about 3 h for the other 3"


def test_it_is_told_when_each_process_has_trained_one(monkeypatch):
    """Before, the time of the first counts as if the others were trained after it, and not beside it."""
    found = {name: Result(name, 0, "x") for name in "abcdef"}
    waiting = [SimpleNamespace(name=name, result=lambda name=name: found[name], log="its log") for name in found]
    said, clock = [], [0.0]
    monkeypatch.setattr(compare_jobs.time, "monotonic", lambda: clock[0])
    tell = compare_jobs._Teller(waiting, 8, 2, said.append)

    def end(seconds, *names, status="completed"):
        clock[0] = seconds
        for name in names:
            found[name].status, found[name].seconds, found[name].error = status, 1.0, "no luck"
            found[name].scores["validation"] = Score(0.5, 10, "")
        tell.news()
        return [line for line in said if line.startswith("[")][-len(names) :]

    assert end(600, "a")[0] == "[3/8] a: validation accuracy 50.00%, 1.0 s"
    assert all(line.endswith("s; about 15 min for the other 3") for line in end(900, "b", "c"))  # 5 minutes each
    assert "failed, no luck" in end(901, "d", status="failed")[0]
    assert end(1200, "e")[0].endswith("; about 5 min for the other 1")
    assert end(1500, "f")[0].endswith("1.0 s")


def test_the_test_part_stays_closed(tmp_path, monkeypatch):
    def without_test(*args, **kwargs):
        parts = recipe_parts(*args, **kwargs)
        parts.test = _Closed()
        return parts

    monkeypatch.setattr(compare_jobs, "recipe_parts", without_test)
    words = ["--methods", "direct,kd-mean", "--seeds", "1", "--output", str(tmp_path / "out")]
    line = ["compare", write_recipe(tmp_path), *words]
    assert main(line) == 0
    assert record(tmp_path).looks == []
    with pytest.raises(AssertionError, match="was opened"):
        main([*line, "--final"])
    assert len(record(tmp_path).looks) == 1  # written before the look, whatever comes of it


def test_looks_at_the_test_part_are_counted_and_its_figures_right(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), ["--seeds", "1", "--output", str(tmp_path / "out"), "--final"]
    assert main(["compare", recipe, "--methods", "direct,kd-mean", *out]) == 0
    assert main(["compare", recipe, "--methods", "direct,kd-mean", *out]) == 0
    assert [look.students for look in record(tmp_path).looks] == [{"direct": [0], "kd-mean": [0]}]
    assert main(["compare", recipe, "--methods", "direct,kd-mean,dkd", *out]) == 0
    assert [look.students for look in record(tmp_path).looks][1:] == [{"dkd": [0]}]
    assert "was opened 2 times" in capsys.readouterr().out
    test = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False).test
    names = [test.class_names[label] for label in test.labels.tolist()]
    for one in record(tmp_path).results:
        student = TabularForClassification.from_pretrained(tmp_path / "out" / "seed-0" / one.method)
        predicted = student.predict(test.raw(range(len(test)))["table"])
        assert one.scores["test"].right().tolist() == [a == b for a, b in zip(predicted, names, strict=True)]
    assert all("test" in teacher.accuracy for teacher in record(tmp_path).teachers["seed-0"])


def test_teachers_test_accuracy_that_was_lost_is_measured_again(finished, tmp_path):
    """A look that was stopped had scored the students and not written down the teachers; no other look is needed."""
    shutil.copytree(finished / "out", tmp_path / "out")
    words = ["--methods", "direct,kd-mean", "--seeds", "2", "--output", str(tmp_path / "out"), "--final"]
    assert main(["compare", write_recipe(finished), *words]) == 0
    whole = record(tmp_path)
    file = tmp_path / "out" / "comparison.json"
    tree = json.loads(file.read_text())
    for teacher in (*tree["teachers"]["seed-0"], tree["teachers"]["seed-1"][1]):
        del teacher["accuracy"]["test"]
    file.write_text(json.dumps(tree))
    assert main(["compare", write_recipe(finished), *words]) == 0
    found = record(tmp_path)
    assert found.teachers == whole.teachers and all(
        "test" in teacher.accuracy for teachers in found.teachers.values() for teacher in teachers
    )
    assert found.looks == whole.looks and len(found.looks) == 1 and found.results == whole.results


def test_one_teacher_seed_for_all(tmp_path):
    words = ["--methods", "direct,kd-mean", "--seeds", "1,2", "--teacher-seed", "5", "--output", str(tmp_path / "out")]
    assert main(["compare", write_recipe(tmp_path), *words]) == 0
    assert list(record(tmp_path).teachers) == ["seed-5"]
    assert result(tmp_path, "kd-mean", 2).taught_by == "seed-5"
    assert not (tmp_path / "out" / "seed-1" / "teachers").exists()


def test_what_adaptive_chose_proves_itself_as_in_a_run(tmp_path, monkeypatch):
    """How it fails to is below."""
    monkeypatch.setattr(quick_validation, "HOPE", -1e9)
    monkeypatch.setattr(quick_validation, "PROOF", -1e9)
    line = ["compare", write_recipe(tmp_path), "--methods", "direct,adaptive", "--seeds", "1"]
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "seed-0"
    assert not same(weights(folder / "adaptive"), weights(folder / "direct"))
    found, plain = result(tmp_path, "adaptive", 0), result(tmp_path, "direct", 0)
    run = RunRecord.load(folder / "adaptive.run" / "run_record.json")
    assert run.kept.kept == "distilled" and run.kept.rows == run.num_rows("validation") + run.num_rows("guide")
    assert found.seconds > plain.seconds
    # It knows of its teachers what a run would: how much better they are on the rows that taught them.
    accuracies = [teacher.accuracy for teacher in record(tmp_path).teachers["seed-0"]]
    beyond = [accuracy["train"] - accuracy["guide"] for accuracy in accuracies]
    assert run.auto.features["overfit"] == pytest.approx(sum(beyond) / 2) and any(beyond)


def test_an_adaptive_student_that_was_given_up_is_judged_as_before_after_a_stop(tmp_path, monkeypatch):
    """Stopped while the two change places, and again before the result is written."""
    monkeypatch.setattr(quick_validation, "HOPE", -1e9)
    monkeypatch.setattr(quick_validation, "PROOF", 1e9)
    judged, judge = [], compare_jobs.judge_students

    def listen(*args):
        judged.append(judge(*args))
        return judged[-1]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_jobs, "judge_students", listen)
    line = ["compare", write_recipe(tmp_path), "--methods", "direct,adaptive", "--seeds", "1"]
    line += ["--output", str(tmp_path / "out")]
    for place, name in ((training_folder, "copy_training"), (compare_jobs.Workplace, "score")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            assert main(line) == 130
    folder = tmp_path / "out" / "seed-0"
    both = [
        json.loads((folder / "adaptive.run" / f"{name}.trained.json").read_text()) for name in ("direct", "distilled")
    ]
    assert not same(*(weights(folder / "adaptive.run" / name) for name in ("direct", "distilled")))
    assert main(line) == 0
    assert len(judged) == 3 and judged[0] == judged[1] == judged[2] and judged[0].gain != 0
    run = RunRecord.load(folder / "adaptive.run" / "run_record.json")
    assert run.kept == judged[0] and run.kept.kept == "direct"
    found = result(tmp_path, "adaptive", 0)
    assert found.seconds == pytest.approx(sum(one["seconds"] for one in both) + run.auto.extra_seconds)
    assert same(weights(folder / "adaptive"), weights(folder / "direct"))
    assert not (folder / "adaptive.run" / "distilled").exists()


def test_every_method_trains_on_images(tmp_path):
    """One network and one estimator as teachers, augmented views; all students take the same steps."""
    teachers = "teachers=[{model: cifar-resnet-14x4, epochs: 1}, {model: 'sklearn:LogisticRegression', folds: 2}]"
    words = ["data.max_train_rows=100", "student.model=cifar-resnet-8x4", "training.epochs=2", teachers]
    names = [method.name for method in KNOWN]
    line = ["compare", "quickstart", *words, "--methods", ",".join(names), "--seeds", "1"]
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    found = {one.method: one for one in record(tmp_path).results}
    assert list(found) == names and {one.steps for one in found.values()} == {4}
    assert found["at"].teachers == found["fitnets"].teachers == ["cifar-resnet-14x4"]
    assert found["dml"].teachers == ["peer"] and len(found["ctkd"].teachers) == 2
    # `adaptive` may choose direct training; all others are students of their own.
    students = [weights(tmp_path / "out" / "seed-0" / name) for name in names if name != "adaptive"]
    assert not any(same(one, other) for i, one in enumerate(students) for other in students[:i])


def test_fresh_views_need_no_teacher(tmp_path, capsys):
    line = [
        "compare",
        "quickstart",
        "data.max_train_rows=60",
        "training.epochs=1",
        "teachers=[{model: cifar-resnet-8}]",
    ]
    line += ["--methods", "direct", "--method", "x: direct-fresh distillation.alpha=0.5", "--seeds", "1"]
    assert main([*line, "--output", str(tmp_path / "out")]) == 2
    assert "x, seed 0: new views in every epoch go with no teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "direct,at"], "Method at cannot work here. Feature maps are read after the stages"),
        (
            ["--methods", "direct,at", "teachers=[{model: mlp-32, folds: 2}]"],
            "looks inside a teacher that is one network",
        ),
        (
            ["--methods", "direct,fitnets", "teachers=[{model: 'sklearn:GaussianNB'}]"],
            "network, got GaussianNB, none of",
        ),
        (["--methods", "direct,takd", "teachers=[{model: 'sklearn:GaussianNB'}]"], "size of a teacher is known"),
        (["--methods", "direct,takd", "student.model=mlp-64"], "Method takd cannot work here. A chain leads from"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--tune", "2"]])
def test_a_method_that_cannot_work_is_refused_before_any_training(tmp_path, capsys, words, message, more):
    line = ["compare", write_recipe(tmp_path), *words, *more, "--seeds", "1", "--output", str(tmp_path / "out")]
    assert main(line) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "out").glob("*seed-*")) and not (tmp_path / "out" / "tuning").exists()


def test_an_ablation_leaves_out_what_cannot_be_switched_on(tmp_path, capsys):
    words = ["teachers=[{model: 'sklearn:GaussianNB'}]", "training.max_steps=2", "chain.warm_start=false"]
    words += ["chain.length=0", "auto.mode=off"]
    line = ["ablate", write_recipe(tmp_path), *words, "--seeds", "1", "--output", str(tmp_path / "out")]
    assert main(line) == 0
    assert "with-chain is left out, it cannot work here. Models between" in capsys.readouterr().out
    names = {one.method for one in record(tmp_path).results}
    assert "with-chain" not in names and {"full", "with-temperature"} <= names


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "x"], "--seeds must be how many"),
        (["--seeds", "0"], "--seeds must be how many"),
        (["--seeds", "1,1"], "each once"),
        (["--jobs", "0"], "`--jobs` must be at least 1"),
        (["--baseline", "kd"], "baseline must be one of the methods"),
        (["--method", "x: student.model=mlp-8"], "a method may set distillation"),
        (["--method", "again2: kd-mean distillation.alpha=7"], "less than or equal to 1"),
        (["training.epochs=11"], "holds a comparison on another recipe"),
        (["--teacher-seed", "5"], "holds a comparison on another recipe"),
    ],
)
def test_what_cannot_be_used_is_told_before_any_training(finished, capsys, words, message):
    before = files(finished / "out")
    assert main(command(finished, *words)) == 2
    assert message in capsys.readouterr().err
    assert files(finished / "out") == before


def test_another_method_of_the_same_name_is_refused(finished, capsys):
    line = ["compare", write_recipe(finished), "--seeds", "2", "--output", str(finished / "out"), "--methods", "direct"]
    known = record(finished).methods
    assert main([*line, "--method", "again: kd-mean distillation.temperature=2"]) == 2
    assert "holds a student of again, seed 0 that was trained with other values" in capsys.readouterr().err
    line[line.index("2")] = "7,"  # nor may a row hold other values for other seeds
    assert main([*line, "--method", "again: kd-mean distillation.temperature=2"]) == 2
    assert "holds a student of again, seed 0 that was trained with other values" in capsys.readouterr().err
    assert record(finished).methods == known  # it still says how its students were trained


def test_a_refused_command_leaves_seeds_and_baseline_as_they_were(finished, tmp_path, capsys):
    shutil.copytree(finished / "out", tmp_path / "out")
    known, table = record(tmp_path), (tmp_path / "out" / "table.md").read_text()
    line = ["compare", write_recipe(finished), "--methods", "direct,kd-mean", "--output", str(tmp_path / "out")]
    line += ["--baseline", "kd-mean"]
    assert main([*line, "--seeds", "3", "--method", "again: kd-mean distillation.temperature=2"]) == 2
    assert "holds a student of again, seed 0 that was trained with other values" in capsys.readouterr().err
    found = record(tmp_path)
    assert (found.seeds, found.baseline) == (known.seeds, known.baseline) == ([0, 1], "direct")
    assert (found.methods, found.results, found.teachers) == (known.methods, known.results, known.teachers)
    assert main(["compare", "--table", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == table
    assert main([*line, "--seeds", "2"]) == 0  # what is not refused has its baseline
    assert record(tmp_path).baseline == "kd-mean" and record(tmp_path).seeds == [0, 1]


def test_seeds_added_to_a_tuned_comparison_take_what_was_chosen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_accuracy", lambda jobs: float(jobs[0].method.name.endswith("--1")))
    words = ["--methods", "direct,kd-mean", "--tune", "2", "--output", str(tmp_path / "out"), "training.max_steps=4"]
    line = ["compare", write_recipe(tmp_path), *words, "--seeds"]
    assert main([*line, "3,"]) == 0
    trials = record(tmp_path).trials
    assert main([*line, "1,"]) == 0  # the tuning heard the teachers of seed 3, and is done
    found = record(tmp_path)
    assert found.trials == trials and [one.seed for one in found.results if one.method == "direct"] == [1, 3]
    line.remove("--tune"), line.remove("2")
    capsys.readouterr()
    assert all(trial.overrides for trial in trials if trial.chosen)
    assert main([*line, "2,"]) == 2
    assert "trained with other values" in capsys.readouterr().err


def test_a_folder_with_other_things_is_refused(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert main(command(tmp_path)) == 2
    assert "holds thesis.txt" in capsys.readouterr().err


def test_a_folder_is_for_one_comparison_at_a_time(finished, capsys):
    with alone_in(finished / "out"):
        assert main(command(finished)) == 2
    assert "another is running in" in " ".join(capsys.readouterr().err.split())


def test_rows_that_have_changed_are_refused(finished, tmp_path, capsys):
    shutil.copytree(finished / "out", tmp_path / "out")
    file = tmp_path / "out" / "comparison.json"
    known = json.loads(file.read_text())
    assert len(set(known["rows"].values())) == 3
    known["rows"]["guide"] = known["rows"]["train"]
    file.write_text(json.dumps(known))
    assert main(command(tmp_path)) == 2
    assert "The rows of guide are others than the run in" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="where there is a GPU, nothing is left out")
def test_what_the_cpu_would_leave_out_is_refused(tmp_path, capsys):
    words = ["--methods", "direct,kd-mean", "--output", str(tmp_path / "out")]
    assert main(["compare", "quickstart", "training.precision=fp16", *words]) == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_recipe_is_needed(capsys):
    assert main(["compare", "training.epochs=1"]) == 2
    assert "compare needs a recipe" in capsys.readouterr().err


def test_a_table_of_methods_that_are_not_there_is_refused(finished, capsys):
    assert main(["compare", "--table", str(finished / "out"), "--methods", "direct,nope"]) == 2
    assert "has a method nope. Known: again, direct" in capsys.readouterr().err


def test_methods_are_listed(capsys):
    assert main(["compare", "--list"]) == 0
    assert "kd-mean" in capsys.readouterr().out


# ---- several processes -----------------------------------------------------------------------------------------------


def start(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    line = [sys.executable, "-m", "hf_hpmkd", *command(folder, "--jobs", "2", *words)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def session(leader):
    """Processes of the session that `leader` began."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_process_takes_each_job_once_and_leaves_those_of_others(tmp_path, monkeypatch):
    """What `--jobs` starts, in this process."""
    recipe = load_recipe(write_recipe(tmp_path))
    direct = choose_methods(["direct"])[0]
    jobs = [Job(direct, seed, tmp_path / "out") for seed in range(4)]
    for job in jobs:
        job.student.parent.mkdir(parents=True)
        Result("direct", job.seed, "x").save(job.result_file)
    done = jobs[1].result()
    done.status = "completed"
    done.save(jobs[1].result_file)
    taken = []

    def train(place, job):
        taken.append(job.seed)
        if job.seed == 3:
            raise ValueError("too much")
        result = job.result()
        result.status = "completed"
        result.save(job.result_file)

    monkeypatch.setattr(Workplace, "train", train)
    monkeypatch.setattr(compare_jobs, "end_when", lambda is_over: None)
    monkeypatch.setattr(compare_jobs.signal, "signal", lambda *args: None)
    with FileLock(jobs[2].lock):  # another process is at it
        compare_jobs._work((recipe_tree(recipe), tmp_path / "out", None), jobs, torch.get_num_threads())
    assert taken == [0, 3]
    assert [job.result().status for job in jobs] == ["completed", "completed", "waiting", "failed"]
    assert jobs[3].result().error == "ValueError: too much" and "too much" in jobs[3].log.read_text()
    said = []
    told = compare_jobs._Teller([jobs[2], jobs[3]], 4, 1, said.append)
    told.news()
    told.lost([-9, 0])
    assert told.done == 4 and [line.split(":")[0] for line in told.failures] == ["direct, seed 3", "direct, seed 2"]
    assert "exit codes -9, 0; -9 is often too little memory" in told.failures[1] and len(said) == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_two_processes_are_stopped_without_a_trace_and_go_on(finished, tmp_path, how, capfd):
    """Whatever ends the first process ends the others, and the same command then gives what one process gave."""
    process = start(tmp_path)
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            done = list((tmp_path / "out").glob("seed-*/*.result.json"))
            if any(json.loads(path.read_text())["status"] == "completed" for path in done):
                break
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert len(session(process.pid)) >= 3
        process.send_signal(how)
        told = process.communicate(timeout=60)[1]
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
        assert how == signal.SIGKILL or "goes on where this one stood" in told
        deadline = time.monotonic() + 20
        while session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert session(process.pid) == []
    finally:
        for left in session(process.pid):
            os.kill(left, signal.SIGKILL)
    assert main(command(tmp_path, "--jobs", "2")) == 0
    assert "[10/10]" in capfd.readouterr().out and {one.threads for one in record(tmp_path).results} == {1}
    for one in record(finished).results:
        assert result(tmp_path, one.method, one.seed).scores == one.scores
