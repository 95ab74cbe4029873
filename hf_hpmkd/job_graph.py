"""The jobs of a run, what they need of each other, and how long they are estimated to take. Runs nothing.

train T        a teacher that is trained on the spot
outputs T P    its answers to a part of the data; to training rows one job per augmented view
direct         the student trained on labels alone
chain          intermediate models, as they decide on each other one job
student        the student trained on the outputs of all of them
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hf_hpmkd.classifier_training import stage_schedule, student_schedule, teacher_schedule, total_steps
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.components.parallel_pipeline import Estimates, Graph, Job
from hf_hpmkd.data import DataParts
from hf_hpmkd.intermediate_models import buildable
from hf_hpmkd.memory_records import Row
from hf_hpmkd.model_cost import estimated_seconds, operations_per_second, training_flops
from hf_hpmkd.recipe import Recipe, StudentConfig, TeacherConfig, fingerprint
from hf_hpmkd.recipe_rules import family, is_sklearn, is_trained_here, teacher_names, uses_teachers
from hf_hpmkd.tasks.base import json_digest
from hf_hpmkd.vocabulary import NO_NETWORKS, SKLEARN_FOLDS

# Of what cannot be counted: scikit-learn estimators, logits in a column, models whose config is not at hand.
_SKLEARN_SECONDS = 5.0
_SECONDS_PER_ROW = 1e-4
_FORWARD_SHARE = 1 / 3  # of a training step's operations
_CHECKED_PARTS = ("guide", "validation")


@dataclass(frozen=True)
class Task:
    """What a job of a run does. view: of the training rows; None where they have none, and for other parts."""

    what: Literal["train", "outputs", "direct", "chain", "student"]
    teacher: str = ""
    part: str = ""
    view: int | None = None

    @property
    def name(self) -> str:
        """The job's name."""
        words = [self.what, self.teacher, self.part, "" if self.view is None else f"view {self.view}"]
        return " ".join(word for word in words if word)


def run_tasks(recipe: Recipe, num_views: int) -> list[Task]:
    """All long jobs of a run. num_views: augmented views of a training row, 0 for none.

    How the student is trained is not known yet where tries decide on it (`auto`): those jobs are the run's own then.
    """
    tasks = []
    names = teacher_names(recipe)
    for name, teacher in zip(names, recipe.teachers, strict=True):
        if is_trained_here(teacher.model):
            tasks.append(Task("train", name))
    views: Iterable[int | None] = range(num_views) if num_views else [None]
    for name in names:
        if recipe.distillation.teacher_outputs != "live":
            tasks += [Task("outputs", name, "train", view) for view in views]
        tasks += [Task("outputs", name, part) for part in _CHECKED_PARTS]
    if recipe.auto.mode != "off":
        return tasks
    if recipe.distillation.direct:
        tasks.append(Task("direct"))
    if has_chain(recipe):
        tasks.append(Task("chain"))
    tasks.append(Task("student"))
    return tasks + [Task("outputs", name, "test") for name in names]


def has_chain(recipe: Recipe) -> bool:
    """Whether there may be intermediate models."""
    return uses_teachers(recipe) and (recipe.chain.length != 0 or bool(recipe.chain.models))


def run_graph(recipe: Recipe, parts: DataParts) -> Graph:
    """The jobs of a run from its beginning. Seconds are those of this process's threads, from counted operations."""
    costs = _Costs(recipe, parts)
    teachers = dict(zip(teacher_names(recipe), recipe.teachers, strict=True))
    tasks = run_tasks(recipe, parts.num_views)
    trained = {task.teacher: task.name for task in tasks if task.what == "train"}
    heard = [task.name for task in tasks if task.part in ("train", "guide")]
    if recipe.distillation.teacher_outputs == "live":
        heard += trained.values()
    if not uses_teachers(recipe):
        heard = list(trained.values())  # it may start from their weights
    jobs = []
    for task in tasks:
        needs: list[str] = []
        if task.what == "outputs":
            needs = [trained[task.teacher]] if task.teacher in trained else []
            # Nobody looks at the test part before everything is trained.
            needs += [other.name for other in tasks if other.what in ("direct", "student")] * (task.part == "test")
        elif task.what == "chain" or (task.what == "student" and not has_chain(recipe)):
            needs = heard
        elif task.what == "student":
            needs = ["chain"]
        model = teachers[task.teacher].model if task.teacher else recipe.student.model
        key = json_digest({"recipe": fingerprint(recipe), "job": task.name})
        kind = f"{task.what} {Path(model).name}"
        processes = recipe.pipeline.processes if task.what != "outputs" and not is_sklearn(model) else 1
        seconds = costs.seconds(task, teachers)
        jobs.append(Job(task.name, seconds, tuple(needs), key=key, kind=kind, processes=processes))
    return Graph(jobs)


def corrected(graph: Graph, past: Sequence[Row], hardware: dict[str, Any]) -> Graph:
    """The graph with the seconds that earlier runs on like hardware suggest: those estimated, times what jobs of the
    kind took over what they were estimated. past: rows of the memory.
    """
    estimates = Estimates(graph)
    for row in past:
        # Somebody else's may be of another form.
        with suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
            if json.loads(row["hardware"] or "{}") != hardware:
                continue
            for one in json.loads(row["details"] or "{}").get("jobs", []):
                if not one.get("estimated"):
                    continue
                known, took = Job(one["name"], one["estimated"], kind=one["kind"]), one["ended"] - one["started"]
                if 1e-6 <= known.seconds < 1e9 and 0 <= took < 1e9:  # a clock may have been set back
                    estimates.ended(known, took)
    return Graph(dataclasses.replace(job, seconds=estimates.seconds(job)) for job in graph.jobs.values())


class _Costs:
    """Estimated seconds of the jobs of one run."""

    def __init__(self, recipe: Recipe, parts: DataParts) -> None:
        self.recipe, self.parts = recipe, parts
        self._flops: dict[str, int | None] = {}

    def seconds(self, task: Task, teachers: dict[str, TeacherConfig]) -> float:
        if task.what == "train":
            return self._training_of_teacher(teachers[task.teacher])
        if task.what == "outputs":
            return self._outputs(teachers[task.teacher], len(getattr(self.parts, task.part)))
        return self._student if task.what != "chain" else self._chain

    @cached_property
    def _student(self) -> float:
        steps = total_steps(self.recipe, student_schedule(self.recipe), len(self.parts.train))
        return self._training(self.recipe.student, self.recipe.training.batch_size, steps)

    @cached_property
    def _chain(self) -> float:
        """Per stage a training about twice the student's; auto also tries students shortly, before it and after."""
        config = self.recipe.chain
        stages = len(config.models) or (1 if config.length == "auto" else config.length)
        schedules = stage_schedule(self.recipe), student_schedule(self.recipe)
        of_stage, of_student = (total_steps(self.recipe, one, len(self.parts.train)) for one in schedules)
        share = of_stage / of_student
        tried = 4 * config.probe_share * config.probe_seeds if config.length == "auto" and not config.models else 0.0
        return (2 * share * stages + tried) * self._student

    def _training_of_teacher(self, teacher: TeacherConfig) -> float:
        if is_sklearn(teacher.model):
            return _SKLEARN_SECONDS * (1 + (SKLEARN_FOLDS if teacher.folds is None else teacher.folds))
        schedule = teacher_schedule(self.recipe, teacher)
        steps = total_steps(self.recipe, schedule, len(self.parts.train))
        return self._training(teacher, schedule.batch_size, steps) * (1 + (teacher.folds or 0))

    def _training(self, model: TeacherConfig | StudentConfig, batch: int, steps: int) -> float:
        accumulated = self.recipe.training.gradient_accumulation_steps
        return estimated_seconds(self._flops_of(model) or 0, batch * accumulated, steps)

    def _outputs(self, teacher: TeacherConfig, rows: int) -> float:
        flops = self._flops_of(teacher) or 0
        return rows * (_SECONDS_PER_ROW + _FORWARD_SHARE * flops / operations_per_second())

    def _flops_of(self, model: TeacherConfig | StudentConfig) -> int | None:
        """Operations of a training step per row; None where they cannot be counted."""
        if model.model not in self._flops:
            self._flops[model.model] = self._count(model)
        return self._flops[model.model]

    def _count(self, model: TeacherConfig | StudentConfig) -> int | None:
        rows = self.parts.train
        if family(model.model) in NO_NETWORKS:
            return None
        try:
            trusted = model.trust_remote_code
            name = buildable(model.model)
            built = build_classifier(name, rows, meta=True, revision=model.revision, trust_remote_code=trusted)
            return training_flops(built, rows)
        except (OSError, ValueError):  # a teacher whose config is not at hand, or that is no model of such rows
            return None
