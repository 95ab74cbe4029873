"""Trains a recipe's teachers on the spot, networks and scikit-learn estimators, and finds them again when resumed.

They see the training rows alone. Their answers to these rows come out of fold where the recipe asks for it.
"""

import json
import time
from functools import partial
from pathlib import Path

import torch

from hf_hpmkd.classifier_training import Schedule, done_file, train_or_load, write_json
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import DataParts
from hf_hpmkd.recipe import Recipe, TeacherConfig
from hf_hpmkd.recipe_rules import is_sklearn
from hf_hpmkd.sklearn_teachers import SAVED_TYPES, load_skops, stratified_folds, train_sklearn
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_kinds import FoldedTeacher, Teacher, TorchTeacher

SKLEARN_FOLDS = 5
_DONE = "trained.json"


def train_teacher(
    config: TeacherConfig, name: str, schedule: Schedule, recipe: Recipe, parts: DataParts, folder: Path
) -> tuple[Teacher, float]:
    """The teacher, trained into `folder` or loaded from there, and the seconds its training took, folds included."""
    if is_sklearn(config.model):
        folds = SKLEARN_FOLDS if config.folds is None else config.folds
        return _sklearn(config, name, folds, schedule.seed, parts.train, folder)
    return _network(config, name, config.folds or 0, schedule, recipe, parts, folder)


def folders_done(config: TeacherConfig, folder: Path) -> bool:
    """Whether the teacher lies finished in `folder`, its folds included."""
    if is_sklearn(config.model):
        return (folder / _DONE).is_file()
    return all(
        done_file(one).is_file() for one in (folder, *(folder / f"fold{fold}" for fold in range(config.folds or 0)))
    )


def _sklearn(
    config: TeacherConfig, name: str, folds: int, seed: int, rows: Rows, folder: Path
) -> tuple[Teacher, float]:
    done = folder / _DONE
    if not done.is_file():
        started = time.perf_counter()
        full, folded = train_sklearn(config.model, config.params, rows, seed, folds)
        seconds = time.perf_counter() - started
        full.save(folder / "model.skops")
        for index, fold in enumerate(folded.folds if folded else []):
            fold.save(folder / f"fold{index}.skops")  # type: ignore[attr-defined]
        write_json(done, {"seconds": seconds, "folds": folds})
    about = json.loads(done.read_text(encoding="utf-8"))
    load = partial(load_skops, rows=rows, name=name, trusted_types=SAVED_TYPES)  # files that this run wrote
    teacher: Teacher = load(folder / "model.skops")
    if folds:
        parts = [load(folder / f"fold{index}.skops") for index in range(folds)]
        teacher = FoldedTeacher(teacher, parts, _fold_of_row(rows, folds, seed), rows)
    teacher.source = config.model
    return teacher, about["seconds"]


def _network(
    config: TeacherConfig, name: str, folds: int, schedule: Schedule, recipe: Recipe, parts: DataParts, folder: Path
) -> tuple[Teacher, float]:
    def train(part_name: str, rows: Rows, into: Path) -> tuple[TorchTeacher, float]:
        trained = train_or_load(
            part_name,
            lambda: build_classifier(config.model, rows, seed=schedule.seed),
            recipe,
            schedule,
            into,
            rows,
            parts.validation,
            num_views=parts.num_views,
        )
        model, feed = trained.classifier.model, trained.classifier.feed
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


def _fold_of_row(rows: Rows, folds: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(stratified_folds(rows.labels.numpy(), folds, seed))
