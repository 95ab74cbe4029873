"""What goes on around a training."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_hpmkd.classifier_training import (
    Trained,
    old_garbage_left,
    student_schedule,
    teacher_schedule,
    total_steps,
    train_or_load,
    training_arguments,
)
from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.data import DataParts, load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.recipe import fingerprint, read_recipe, recipe_tree
from hf_hpmkd.run_memory import run_memory
from hf_hpmkd.sklearn_teachers import train_sklearn
from hf_hpmkd.table_runs import spare_time
from hf_hpmkd.tasks.images import ImageRows
from hf_hpmkd.tasks.tables import TableRows
from hf_hpmkd.tasks.text import TextRows
from hf_hpmkd.tasks.word_dropout import WordDropout
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_training import network_key, train_teacher
from hf_hpmkd.trainer import HPMKDTrainer
from hf_hpmkd.training_args import HPMKDTrainingArguments
from hf_hpmkd.training_folder import done_file, last_complete_checkpoint, move_training


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, 20),  # two epochs of ten batches
        ({"min_steps": 100}, 100),
        ({"min_steps": 20}, 20),
        ({"min_steps": 7}, 20),
        ({"min_steps": 100, "max_steps": 5}, 5),
    ],
)
def test_few_rows_are_passed_more_often(tmp_path: Path, training: dict, steps: int) -> None:
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "mlp-4"},
        "training": {"epochs": 2, "batch_size": 10, **training},
    }
    recipe = read_recipe(tree, "a test")
    schedule = student_schedule(recipe)
    assert total_steps(recipe, schedule, 97) == steps
    arguments = training_arguments(recipe, schedule, tmp_path, 97, distills=False)
    by_epochs = 10 * int(arguments.num_train_epochs)
    assert (arguments.max_steps if arguments.max_steps > 0 else by_epochs) == steps


def test_where_there_is_no_floor_the_keys_are_those_of_before_there_was() -> None:
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "mlp-4"},
    }
    without, floored = (read_recipe({**tree, "training": {"min_steps": steps}}, "a test") for steps in (0, 9))
    assert "min_steps" not in student_schedule(without).key() and student_schedule(floored).key()["min_steps"] == 9
    known = recipe_tree(without)
    del known["auto"], known["output"], known["hub"], known["memory"], known["pipeline"]
    del known["training"]["min_steps"], known["data"]["max_length"], known["distillation"]["cache_dir"]
    del known["distillation"]["hint_weight"], known["distillation"]["hint_share"]
    for name in ("report_to", "num_workers", "save_total_limit"):
        del known["training"][name]
    assert fingerprint(without) == hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    assert fingerprint(without) != fingerprint(floored)


@pytest.mark.parametrize("model", ["bert-1x16", "mlp-4"])
def test_the_labels_count_once_however_a_batch_is_cut(tmp_path: Path, model: str) -> None:
    """BERT's own loss does not count the rows of a step, though its forward takes their number."""
    words = ["good thing", "bad thing", "a good one", "a bad one"]
    dataset = Dataset.from_dict({"text": words * 12, "label": [row % 2 for row in range(48)]})
    kind = TextRows if model.startswith("bert") else TableRows
    rows = kind.from_dataset(dataset, "text" if kind is TextRows else ["text"], "label", ["no", "yes"])

    def build() -> Classifier:
        classifier = build_classifier(model, rows)
        for module in classifier.model.modules():
            if isinstance(module, torch.nn.Dropout):  # whose draws depend on how a batch is cut
                module.p = 0.0
        return classifier

    found = []
    for batch, accumulated in ((16, 1), (8, 2)):
        tree = {
            "data": {"path": "unused"},
            "teachers": [{"model": "sklearn:LogisticRegression"}],
            "student": {"model": model},
            "training": {"epochs": 2, "batch_size": batch, "gradient_accumulation_steps": accumulated, "log_every": 1},
        }
        recipe = read_recipe(tree, "a test", check_files=False)
        folder = tmp_path / f"student-{batch}"
        trained = train_or_load("student", build, recipe, student_schedule(recipe), folder, rows, rows)
        losses = [row["loss"] for row in trained.curve if "loss" in row]
        found.append((losses, torch.cat([one.detach().flatten() for one in trained.classifier.model.parameters()])))
    assert len(found[0][0]) == 6 and found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-4)


def test_one_process_takes_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream would train on all that are visible, with as many batches a step."""
    original, seen = HPMKDTrainingArguments.__post_init__, []

    def see_two(self) -> None:
        original(self)
        self._n_gpu = 2

    def train(self, *args, **kwargs):
        seen.append((self.args.n_gpu, self.args.train_batch_size))
        raise InterruptedError

    monkeypatch.setattr(HPMKDTrainingArguments, "__post_init__", see_two)
    monkeypatch.setattr(HPMKDTrainer, "train", train)
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "mlp-4"},
        "training": {"batch_size": 16},
    }
    recipe = read_recipe(tree, "a test")
    parts = load_parts(DataConfig(path="sklearn:wine"))
    build = partial(build_classifier, "mlp-4", parts.train)
    with pytest.raises(InterruptedError):
        train_or_load("student", build, recipe, student_schedule(recipe), tmp_path / "s", parts.train, parts.validation)
    assert seen == [(1, 16)]


@pytest.mark.parametrize("hears", [False, True])
def test_views_that_may_change_a_label_are_for_teachers_answers_alone(tmp_path: Path, hears: bool) -> None:
    texts = [f"{'good' if row % 2 else 'bad'} thing number {row}" for row in range(64)]
    dataset = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(64)]})
    rows = TextRows.from_dataset(dataset, "text", "label", ["no", "yes"], WordDropout(0.5))
    tree = {
        "data": {"path": "unused"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "bert-1x16"},
        "distillation": {"gate": "uniform", "calibrate_teachers": False},
        "training": {"epochs": 2, "batch_size": 32},
        "output": {"dir": str(tmp_path)},
    }
    recipe = read_recipe(tree, "a test", check_files=False)
    teachers = [train_sklearn("LogisticRegression", None, rows, folds=0)[0]] if hears else []
    weights = []
    for num_views in (0, 2):
        trained = train_or_load(
            "student",
            partial(build_classifier, "bert-1x16", rows),
            recipe,
            student_schedule(recipe),
            tmp_path / f"student-{num_views}",
            rows,
            rows,
            num_views=num_views,
            teachers=teachers,
            guide=rows if hears else None,
            cache=TeacherCache(tmp_path / "cache"),
        )
        weights.append(torch.cat([parameter.flatten() for parameter in trained.classifier.model.parameters()]))
    assert torch.equal(*weights) != hears


def test_a_network_that_teaches_is_the_same_whatever_views_it_will_answer() -> None:
    texts = [f"thing number {row}" for row in range(8)]
    dataset = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(8)]})
    plain, varied = (
        TextRows.from_dataset(dataset, "text", "label", ["no", "yes"], augmentation)
        for augmentation in (None, WordDropout())
    )
    tree = {"data": {"path": "x"}, "teachers": [{"model": "bert-1x16"}], "student": {"model": "bert-1x16"}}
    recipe = read_recipe(tree, "a test", check_files=False)
    keys = {
        network_key(
            "bert-1x16",
            student_schedule(recipe),
            recipe,
            rows,
            DataParts("text", ["no", "yes"], *[rows] * 4, num_views=views),
        )
        for rows, views in ((plain, 0), (varied, 6))
    }
    assert len(keys) == 1


def test_old_garbage_is_left_for_a_while_and_no_longer() -> None:
    assert gc.get_freeze_count() == 0
    with old_garbage_left():
        assert gc.get_freeze_count() > 1000
        with old_garbage_left():
            pass
        assert gc.get_freeze_count() > 1000  # the outer one still holds
    assert gc.get_freeze_count() == 0


def test_time_is_spared_for_a_while_and_everything_is_then_as_before() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), spare_time():
            assert (torch.get_num_threads(), gc.get_freeze_count() > 1000) == (1, True)
            raise KeyError
        assert (torch.get_num_threads(), gc.get_freeze_count()) == (2, 0)
    finally:
        torch.set_num_threads(threads)


def begun(folder: Path, stop_at: int | None) -> Trained:
    """Direct training of 12 steps on wine, with a checkpoint every three and one kept."""
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "mlp-4"},
        "training": {"max_steps": 12, "batch_size": 16, "evaluations": 4, "save_total_limit": 1, "learning_rate": 0.1},
    }
    recipe, parts = read_recipe(tree, "a test"), load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False)
    build = partial(build_classifier, "mlp-4", parts.train)
    return train_or_load(
        "student", build, recipe, student_schedule(recipe), folder, parts.train, parts.validation, stop_at=stop_at
    )


def test_a_try_leaves_the_checkpoint_that_it_goes_on_from_and_the_seconds_until_then(tmp_path: Path) -> None:
    begun(tmp_path / "student", 7)
    last = tmp_path / "student" / "checkpoints" / "checkpoint-7"
    assert last.is_dir()
    assert 0 < json.loads((last / "seconds.json").read_text()) < 500
    (last / "seconds.json").write_text("1000")
    whole = begun(tmp_path / "student", None)
    assert whole.steps == 12 and 1000 < whole.seconds < 1500
    begun(tmp_path / "again", 7)
    (tmp_path / "again" / "checkpoints" / "checkpoint-7" / "seconds.json").unlink()
    assert 0 < begun(tmp_path / "again", None).seconds < 500


def test_checkpoints_that_a_stop_left_beside_a_finished_training_go_when_it_is_loaded(tmp_path: Path) -> None:
    whole = begun(tmp_path / "student", None)
    left = tmp_path / "student" / "checkpoints"
    assert not left.exists()
    (left / "checkpoint-9").mkdir(parents=True)
    (left / "checkpoint-9" / "optimizer.pt").write_bytes(b"x")
    (left / "runs").mkdir()
    (left / "runs" / "events").write_bytes(b"x")
    again = begun(tmp_path / "student", None)
    assert again.resumed and again.steps == whole.steps and not left.exists()
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert (tmp_path / "student.runs" / "events").is_file()  # what a tracker wrote stays


@pytest.mark.parametrize("folds", [0, 2])
def test_a_network_that_was_trained_before_an_interruption_is_kept_too(tmp_path: Path, folds: int) -> None:
    """Stopped after the training and before it was kept; or a worker had trained it, with a memory of its own."""
    parts = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False)
    places = [tmp_path / "teacher", *(tmp_path / "teacher" / f"fold{fold}" for fold in range(folds))]
    written = []
    for memory_folder in ("one", "two"):
        tree = {
            "data": {"path": "sklearn:wine"},
            "teachers": [{"model": "mlp-4", "epochs": 1, "folds": folds}],
            "student": {"model": "mlp-2"},
            "memory": {"path": str(tmp_path / memory_folder)},
        }
        recipe = read_recipe(tree, "a test")
        schedule = teacher_schedule(recipe, recipe.teachers[0])
        with run_memory(recipe, is_main=True) as memory:
            train_teacher(recipe.teachers[0], "mlp-4", schedule, memory, parts, tmp_path / "teacher")
            keys = [json.loads((place / "training.json").read_text())["key"] for place in places]
            assert len(set(keys)) == 1 + folds
            assert keys[0] == network_key("mlp-4", schedule, recipe, parts.train, parts)
            for key, place in zip(keys, places, strict=True):
                kept = memory.store.find_model(key)
                assert kept is not None, place
                assert (kept / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()
        written.append([(place / "model.safetensors").stat().st_mtime_ns for place in places])
    assert written[0] == written[1]  # nothing was trained again


def test_a_move_that_was_stopped_half_way_is_finished(tmp_path: Path) -> None:
    begun(tmp_path / "try", None)
    (tmp_path / "try").rename(tmp_path / "student")  # stopped here: the note beside it is left behind
    move_training(tmp_path / "try", tmp_path / "student")
    assert done_file(tmp_path / "student").is_file() and not done_file(tmp_path / "try").exists()


def test_an_incomplete_checkpoint_may_be_removed_by_another_process(tmp_path: Path, monkeypatch) -> None:
    begun(tmp_path / "student", 7)
    last = tmp_path / "student" / "checkpoints" / "checkpoint-7"
    (last / "trainer_state.json").unlink()
    remove = shutil.rmtree

    def outrun(path: str, **kwargs: bool) -> None:
        remove(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr("hf_hpmkd.classifier_training.shutil.rmtree", outrun)
    assert last_complete_checkpoint(last.parent, distills=False) != str(last)
    assert not last.exists()


_CUT_OVER_TWO = """
import dataclasses, sys
from pathlib import Path
import torch
from accelerate import PartialState
import hf_hpmkd.classifier_training as training
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.recipe import read_recipe
from hf_hpmkd.recipe_parts import recipe_parts
sys.path.insert(0, sys.argv[2])
from two_ranks import in_two_ranks
torch.set_num_threads(1)

def train():
    tree = {"data": {"path": "sklearn:wine"}, "teachers": [{"model": "sklearn:LogisticRegression"}],
            "student": {"model": "mlp-4"}, "training": {"epochs": 1, "batch_size": 16, "evaluations": 1}}
    recipe = read_recipe(tree, "a test")
    parts = recipe_parts(recipe)
    PartialState(cpu=True)
    usual = training.training_arguments

    def cut(*words):
        made = usual(*words)
        fields = {one.name: getattr(made, one.name) for one in dataclasses.fields(made) if one.init}
        fields |= {"fsdp": "full_shard", "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}}
        made = type(made)(**fields)
        assert made.device.type == "cpu"
        made.use_cpu = False  # accelerate has it for GPUs alone, though gloo does as well
        PartialState._shared_state["distributed_type"] = "MULTI_GPU"
        return made

    training.training_arguments = cut
    build = lambda: build_classifier("mlp-4", parts.train, seed=0)
    trained = training.train_or_load("student", build, recipe, training.student_schedule(recipe), Path(sys.argv[1]),
                                     parts.train, parts.validation)
    torch.save(trained.classifier.model.state_dict(), sys.argv[1] + f".{PartialState().process_index}.pt")

in_two_ranks(train)
"""


def test_a_model_that_is_cut_over_two_processes_is_saved_and_whole_again(tmp_path: Path) -> None:
    """FSDP puts a model together in all processes at once: one that saves alone waits for ever."""
    (tmp_path / "cut.py").write_text(_CUT_OVER_TWO)
    command = [sys.executable, tmp_path / "cut.py", tmp_path / "student", Path(__file__).parent]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"student.{rank}.pt") for rank in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {type(value) for value in one.values()} == {torch.Tensor}
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "tabular.py"}
    auto_map = json.loads((tmp_path / "student" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "tabular.TabularForClassification"


def test_a_number_of_steps_rules_out_the_least_number_for_networks_that_teach() -> None:
    tree = {"data": {"path": "sklearn:wine"}, "teachers": [{"model": "mlp-8"}], "student": {"model": "mlp-4"}}
    tree["training"] = {"min_steps": 1000, "epochs": 2, "batch_size": 16}
    recipe = read_recipe(tree, "a test")
    assert total_steps(recipe, teacher_schedule(recipe, recipe.teachers[0]), 96) == 1000
    short = read_recipe(tree, "a test", ["training.max_steps=20"])
    assert total_steps(short, teacher_schedule(short, short.teachers[0]), 96) == 12


def test_a_last_batch_of_one_row_does_not_stop_batch_normalisation(tmp_path: Path) -> None:
    """Of 4 x 4 images the last maps are one pixel, so that one row has one value per channel."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [PIL.Image.fromarray(one) for one in pixels], "label": [0, 1] * 15}
    rows = ImageRows.from_dataset(Dataset.from_dict(columns, features=features), "image", "label", ["a", "b"])
    tree = {
        "data": {"path": "unused"},
        "teachers": [{"model": "cifar-resnet-14"}],
        "student": {"model": "cifar-resnet-8x4"},
        "training": {"epochs": 2, "batch_size": 8},
    }
    recipe = read_recipe(tree, "a test")
    train, validation = rows.subset(torch.arange(17)), rows.subset(torch.arange(17, 30))
    build = partial(build_classifier, "cifar-resnet-8x4", train)
    trained = train_or_load("s", build, recipe, student_schedule(recipe), tmp_path / "s", train, validation)
    assert trained.steps == total_steps(recipe, student_schedule(recipe), 17) == 6
