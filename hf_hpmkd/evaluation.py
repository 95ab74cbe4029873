"""Measures teachers and students on the parts of the data and writes the figures into the run record.

Teachers are checked before the student's training starts; the test part is opened by `evaluate_test` alone, once.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from accelerate import PartialState

from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.data import DataParts
from hf_hpmkd.metrics import compute_metrics
from hf_hpmkd.progress import progress_bar
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.run_record import RunRecord
from hf_hpmkd.tasks.base import UNAUGMENTED, Rows
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher, check_teacher
from hf_hpmkd.teacher_outputs import CachedOutputs

_LATENCY_ROUNDS = 30
_CHUNK = 8192


def evaluate_teachers(
    record: RunRecord,
    teachers: Sequence[Teacher],
    parts: DataParts,
    recipe: Recipe,
    cache: TeacherCache,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Computes the teachers' outputs on train, guide and validation (or finds them in the cache) and checks them.

    Raises ValueError on a teacher that gives NaN or the wrong number of classes, before any student is trained.
    """
    guide_logits = teacher_logits(teachers, parts.guide, recipe, cache, say)
    validation_logits = teacher_logits(teachers, parts.validation, recipe, cache, say)
    train_accuracies = None
    if recipe.distillation.teacher_outputs != "live":
        train_accuracies = _train_accuracies(teachers, parts, recipe, cache, say)
    for index, teacher in enumerate(teachers):
        known = record.teachers[index]
        known.accuracy["guide"] = _accuracy(guide_logits[index], parts.guide)
        known.accuracy["validation"] = _accuracy(validation_logits[index], parts.validation)
        train_accuracy = None
        if train_accuracies is not None:
            train_accuracy = known.accuracy["train"] = train_accuracies[index]
        known.warnings = check_teacher(teacher, guide_logits[index], parts.guide.labels, train_accuracy)
        for warning in known.warnings:
            warn(warning)


def evaluate_test(
    record: RunRecord,
    teachers: Sequence[Teacher],
    classifiers: Mapping[str, Classifier],
    parts: DataParts,
    recipe: Recipe,
    cache: TeacherCache,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Opens the test part: metrics of teachers and students on it (students on validation too), latency, retention.

    Raises ValueError where the student that the run kept answers with NaN; of another model that does it is warned.
    """
    test_logits = teacher_logits(teachers, parts.test, recipe, cache, say)
    validation_logits = teacher_logits(teachers, parts.validation, recipe, cache, say)
    for index, known in enumerate(record.teachers):
        known.accuracy["test"] = _accuracy(test_logits[index], parts.test)
    device = PartialState().device
    students = {
        name: TorchTeacher(one.model, one.feed, name=name, data_names=parts.class_names, device=device)
        for name, one in classifiers.items()
    }
    for name, student in students.items():
        known_student = record.models[name]
        for part, rows, of_teachers in (
            ("validation", parts.validation, validation_logits),
            ("test", parts.test, test_logits),
        ):
            logits = student_logits(student, rows, recipe.training.eval_batch_size)
            if name != "student" and not torch.isfinite(logits).all():
                warn(f"The {name} student answers {part} rows with NaN or infinite logits: nothing of it is told.")
                known_student.metrics.clear()
                break
            known_student.metrics[part] = compute_metrics(
                recipe.training.metrics,
                logits.numpy(),
                rows.labels.numpy(),
                teacher_logits=of_teachers.softmax(-1).mean(0).log().numpy(),  # agreement is with their plain mean
            )
        known_student.retention = record.retention(known_student.accuracy())
        known_student.compression = record.compression(known_student.num_params)
    everyone = {**{f"teacher {known.name}": t for known, t in zip(record.teachers, teachers, strict=True)}, **students}
    latencies = measure_latency(everyone, parts.test)
    for known in record.teachers:
        known.latency_ms = latencies[f"teacher {known.name}"]
    for name in students:
        record.models[name].latency_ms = latencies[name]


def teacher_logits(
    teachers: Sequence[Teacher], rows: Rows, recipe: Recipe, cache: TeacherCache, say: Callable[[str], None]
) -> torch.Tensor:
    """Logits `(teachers, rows, classes)` of unaugmented rows, from the cache or computed now. Not for training rows."""
    return _unaugmented(teachers, rows, recipe, cache, say, "full")


def taught_logits(
    teachers: Sequence[Teacher], rows: Rows, recipe: Recipe, cache: TeacherCache, say: Callable[[str], None]
) -> torch.Tensor:
    """The same of training rows without views, as a student hears them: in the recipe's mode."""
    return _unaugmented(teachers, rows, recipe, cache, say, recipe.distillation.teacher_outputs)


def _unaugmented(
    teachers: Sequence[Teacher], rows: Rows, recipe: Recipe, cache: TeacherCache, say: Callable[[str], None], mode: str
) -> torch.Tensor:
    everything = torch.arange(len(rows))
    for teacher in teachers:  # a training leaves them on the CPU
        teacher.to(PartialState().device)
    stored = _outputs(teachers, rows, recipe, cache, say, mode, 0)
    return stored.lookup(everything, torch.full_like(everything, UNAUGMENTED))


def capture(
    teacher: Teacher, part: str, view: int | None, parts: DataParts, recipe: Recipe, cache: TeacherCache
) -> None:
    """Computes one file of teacher outputs into the cache, if it is not there. view: of the training rows."""
    mode, num_views = "full", 0
    if part == "train":
        mode, num_views = recipe.distillation.teacher_outputs, parts.num_views
    _outputs([teacher], getattr(parts, part), recipe, cache, print, mode, num_views, only=view)


def _train_accuracies(
    teachers: Sequence[Teacher], parts: DataParts, recipe: Recipe, cache: TeacherCache, say: Callable[[str], None]
) -> list[float]:
    """Computes the outputs that the student will learn from, in the recipe's mode; each teacher's share of hits."""
    mode, view = recipe.distillation.teacher_outputs, 0 if parts.num_views else UNAUGMENTED
    stored = _outputs(teachers, parts.train, recipe, cache, say, mode, parts.num_views)
    if parts.num_views and not parts.train.keeps_labels:  # whose views tell nothing of what was learned by heart
        stored, view = _outputs(teachers, parts.train, recipe, cache, say, mode, 0), UNAUGMENTED
    hits = torch.zeros(len(teachers))
    for part in torch.arange(len(parts.train)).split(_CHUNK):  # decoded at once they would fill the memory
        hits += (stored.lookup(part, torch.full_like(part, view)).argmax(-1) == parts.train.labels[part]).sum(1)
    return (hits / len(parts.train)).tolist()


def _outputs(
    teachers: Sequence[Teacher],
    rows: Rows,
    recipe: Recipe,
    cache: TeacherCache,
    say: Callable[[str], None],
    mode: str,
    num_views: int,
    only: int | None = None,
) -> CachedOutputs:
    return cache.outputs(
        teachers,
        rows,
        num_views,
        only=only,
        mode=mode,
        topk=recipe.distillation.topk or 16,
        batch_size=recipe.training.eval_batch_size,
        progress=PartialState().is_main_process,
        on_message=say,
    )


def student_logits(student: Teacher, rows: Rows, batch_size: int) -> torch.Tensor:
    """Logits `(rows, classes)` on unaugmented rows, on the CPU."""
    parts = progress_bar(
        iterable=torch.arange(len(rows)).split(batch_size),
        desc=f"{student.name}: {len(rows):,} rows",
        unit="batch",
        passing=True,
        shown=PartialState().is_main_process,
    )
    return torch.cat([student.logits(rows, part, torch.full_like(part, UNAUGMENTED)).cpu() for part in parts])


def measure_latency(models: Mapping[str, Teacher], rows: Rows) -> dict[str, float]:
    """Median milliseconds from one raw row to its logits, preprocessing included; the models take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_LATENCY_ROUNDS + 2):
        row = torch.tensor([turn % len(rows)])
        for name, model in models.items():
            started = time.perf_counter()
            model.logits(rows, row, torch.full_like(row, UNAUGMENTED)).cpu()
            if turn >= 2:  # the first turns warm up
                seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def _accuracy(logits: torch.Tensor, rows: Rows) -> float:
    return float(np.mean(logits.argmax(-1).numpy() == rows.labels.numpy()))
