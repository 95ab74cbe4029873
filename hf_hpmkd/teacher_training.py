"""Trains a recipe's teachers on the spot, networks and scikit-learn estimators, and finds them again: when resumed in
the run's folder, networks of other runs in the memory.

They see the training rows alone. Their answers to these rows come out of fold where the recipe asks for it.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from hf_hpmkd.classifier_training import Schedule, batches_per_step, train_or_load
from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.data import DataParts
from hf_hpmkd.kept_classifiers import NOT_IN_KEY, About, Training, making, measure, take
from hf_hpmkd.recipe import Recipe, TeacherConfig
from hf_hpmkd.recipe_rules import is_sklearn
from hf_hpmkd.run_memory import RunMemory
from hf_hpmkd.sklearn_teachers import SAVED_TYPES, load_skops, stratified_folds, train_sklearn
from hf_hpmkd.tasks.base import Rows, json_digest
from hf_hpmkd.teacher_kinds import FoldedTeacher, Teacher, TorchTeacher
from hf_hpmkd.training_folder import done_file, write_json
from hf_hpmkd.vocabulary import SKLEARN_FOLDS

_DONE = "trained.json"
_ABOUT = "training.json"


def train_teacher(
    config: TeacherConfig, name: str, schedule: Schedule, memory: RunMemory, parts: DataParts, folder: Path
) -> tuple[Teacher, float]:
    """The teacher, trained into `folder`, loaded from there or found in the memory, and the seconds its training took,
    folds included."""
    if is_sklearn(config.model):
        return _sklearn(config, name, schedule.seed, parts.train, folder)
    return _network(config, name, config.folds or 0, schedule, memory, parts, folder)


def folders_done(config: TeacherConfig, folder: Path) -> bool:
    """Whether the teacher lies finished in `folder`, its folds included."""
    if is_sklearn(config.model):
        return (folder / _DONE).is_file()
    return all(
        done_file(one).is_file() for one in (folder, *(folder / f"fold{fold}" for fold in range(config.folds or 0)))
    )


def fit_sklearn(config: TeacherConfig, name: str, seed: int, rows: Rows) -> Teacher:
    """A scikit-learn teacher of a recipe, trained and in memory alone. Raises as `train_sklearn` does."""
    full, folded = train_sklearn(config.model, config.params, rows, seed, _sklearn_folds(config))
    teacher = folded or full
    teacher.name = name
    return teacher


def _sklearn_folds(config: TeacherConfig) -> int:
    return SKLEARN_FOLDS if config.folds is None else config.folds


def _sklearn(config: TeacherConfig, name: str, seed: int, rows: Rows, folder: Path) -> tuple[Teacher, float]:
    done, folds = folder / _DONE, _sklearn_folds(config)
    if not done.is_file():
        started = time.perf_counter()
        fitted = fit_sklearn(config, name, seed, rows)
        seconds = time.perf_counter() - started
        models = {"model": fitted}
        if isinstance(fitted, FoldedTeacher):
            models = {"model": fitted.full} | {f"fold{index}": fold for index, fold in enumerate(fitted.folds)}
        for part, model in models.items():
            model.save(folder / f"{part}.skops")  # type: ignore[attr-defined]
        write_json(done, {"seconds": seconds})
    about = json.loads(done.read_text(encoding="utf-8"))
    load = partial(load_skops, rows=rows, name=name, trusted_types=SAVED_TYPES)  # files that this run wrote
    teacher: Teacher = load(folder / "model.skops")
    if folds:
        parts = [load(folder / f"fold{index}.skops") for index in range(folds)]
        teacher = FoldedTeacher(teacher, parts, _fold_of_row(rows, folds, seed), rows)
    teacher.source = config.model
    return teacher, about["seconds"]


def _network(
    config: TeacherConfig, name: str, folds: int, schedule: Schedule, memory: RunMemory, parts: DataParts, folder: Path
) -> tuple[Teacher, float]:
    recipe, store = memory.recipe, memory.store

    def train(part_name: str, rows: Rows, into: Path) -> tuple[TorchTeacher, float]:
        def build(meta: bool = False) -> Classifier:
            return build_classifier(config.model, rows, seed=schedule.seed, meta=meta)

        key, batch_size = network_key(config.model, schedule, recipe, rows, parts), recipe.training.eval_batch_size
        with making(store, key):
            with PartialState().main_process_first():
                asked = store if memory.is_main and not done_file(into).is_file() else None
                if asked is not None and take(
                    asked, key, _ABOUT, partial(build, meta=True), parts.validation, batch_size, into
                ):
                    memory.say(f"Teacher {part_name} was trained before and is in the memory.")
            trained = train_or_load(
                part_name, build, recipe, schedule, into, rows, parts.validation, num_views=parts.num_views
            )
            if store is not None and memory.is_main:
                if not (into / _ABOUT).is_file():
                    accuracy = measure(trained.classifier, parts.validation, batch_size)
                    About(key, Training.of(trained), accuracy).save(into / _ABOUT)
                store.keep_model(key, into)  # also what a worker or a run before an interruption has trained
        # The saved weights, which are the same in every process; of batch statistics each process has its own.
        model, feed = type(trained.classifier.model).from_pretrained(into), trained.classifier.feed
        names = parts.class_names
        return TorchTeacher(model, feed, name=name, data_names=names, source=config.model), trained.seconds

    full, seconds = train(name, parts.train, folder)
    if not folds:
        return full, seconds
    fold_of_row = _fold_of_row(parts.train, folds, schedule.seed)
    teachers: list[Teacher] = []
    for fold in range(folds):
        rows = parts.train.subset((fold_of_row != fold).nonzero()[:, 0])
        teacher, more = train(f"{name} without fold {fold + 1} of {folds}", rows, folder / f"fold{fold}")
        teachers.append(teacher)
        seconds += more
    return FoldedTeacher(full, teachers, fold_of_row, parts.train), seconds


def network_key(model: str, schedule: Schedule, recipe: Recipe, rows: Rows, parts: DataParts) -> str:
    """Of all that decides a network's weights."""
    left_out = {*NOT_IN_KEY, *(field.name for field in dataclasses.fields(Schedule))}
    settings = dataclasses.asdict(recipe.training)
    views = parts.num_views if rows.keeps_labels else 0
    return json_digest(
        {
            "teacher": model,
            "settings": {name: value for name, value in settings.items() if name not in left_out},
            "schedule": schedule.key(),
            "processes": batches_per_step(recipe),
            "train": rows.training_key(views),
            "labels": rows.labels.tolist(),
            "validation": parts.validation.fingerprint,
        }
    )


def _fold_of_row(rows: Rows, folds: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(stratified_folds(rows.labels.numpy(), folds, seed))
