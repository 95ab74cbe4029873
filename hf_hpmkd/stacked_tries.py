"""Tries of the adaptive configuration to the very end of a training, many at once and each several times, for students
that can be stacked.

Some of the run's own training is left out, which hardly matters for a choice: the gate sees what the teachers say and
not what the student makes of it, and is not taught on after its warm-up; rows come in another order. So a try does not
go on as the student.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD
from transformers import get_scheduler

from hf_hpmkd.chain_probes import StudentBuilder
from hf_hpmkd.chain_stages import WarmBuild
from hf_hpmkd.classifier_training import batches_per_step, student_schedule, total_steps
from hf_hpmkd.components.adaptive_configuration import Configuration
from hf_hpmkd.components.attention_ensemble import AttentionEnsemble
from hf_hpmkd.data import DataParts
from hf_hpmkd.distiller import GATE_WARMUP_BATCH
from hf_hpmkd.evaluation import taught_logits, teacher_logits
from hf_hpmkd.losses import log_mixture
from hf_hpmkd.progress import progress_bar
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.run_context import Run
from hf_hpmkd.stacked_students import StackedStudent, can_stack, columns, stack_answers, train_stack
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher
from hf_hpmkd.training_args import HPMKDTrainingArguments

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Whose rate depends on the step alone.
_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_MOST_VALUES = 20_000_000  # of what the teachers say of all rows, and of what students see of them
_ROWS_AT_ONCE = 4096  # of the gate, which takes kilobytes for each


def can_try_at_once(recipe: Recipe, parts: DataParts, student: object) -> bool:
    """Whether tries of this student (a model, or one on the meta device) can be stacked: an MLP, trained as usual, on
    so many rows that all they need fits into memory.
    """
    training, distillation = recipe.training, recipe.distillation
    usual = (
        training.optimizer in _OPTIMIZERS
        and training.lr_scheduler in _SCHEDULERS
        and training.optimizer_args is None
        and training.gradient_accumulation_steps == 1
        and training.precision == "fp32"
        and training.keep == "last"
    )
    teachers_usual = (
        distillation.teacher_outputs in ("full", "topk")
        and distillation.feature_weight == 0
        and distillation.hint_weight == 0
    )
    if not (can_stack(student) and usual and teachers_usual) or parts.num_views:
        return False
    said = len(recipe.teachers) * len(parts.class_names)
    return len(parts.train) * max(said, columns(student)) <= _MOST_VALUES


def can_stand(configuration: Configuration) -> bool:
    """Whether a configuration can be tried so: its targets do not change while the student is trained."""
    return not configuration.distils or (
        configuration.temperature_schedule == "constant" and configuration.gate != "joint"
    )


def answers_at_once(
    run: Run,
    parts: DataParts,
    teachers: Sequence[Teacher],
    build_student: StudentBuilder,
    above: Sequence[TorchTeacher],
    configurations: Sequence[Configuration],
    seeds: int,
    judged: Sequence[Rows],
) -> list[Tensor]:
    """Which rows the fully trained student of each configuration answers right, for each of the parts that are to be
    judged by: bool `(configurations, seeds, rows)`. above: what students that hear the teachers, and those with a
    `warm_start`, may start from where the recipe says so. Students of the same seed see the same rows at the same time;
    the seeds are those after the recipe's own, by which the run's students are trained.
    """
    recipe, training = run.recipe, run.recipe.training
    steps = total_steps(recipe, student_schedule(recipe), len(parts.train))
    targets = _Targets(run, parts, teachers)
    stack = []
    for number in range(seeds):
        seed = training.seed + 1 + number
        starts = {warm: _start(build_student, above if warm else [], parts.train, seed) for warm in (False, True)}
        for one in configurations:
            warm = one.warm_start or (one.distils and recipe.chain.warm_start)
            stack.append(
                StackedStudent(
                    start=starts[warm],
                    learning_rate=training.learning_rate * one.learning_rate,
                    weight_decay=training.weight_decay * one.weight_decay,
                    seed=seed,
                    alpha=one.alpha,
                    temperature=one.temperature,
                    kd_kind=one.kd_kind,
                    target=targets.of(one) if one.distils else 0,
                )
            )
    feed = build_student(meta=True).feed
    device = run.device

    def fed(rows: Rows) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in feed(rows.raw(torch.arange(len(rows)))).items()}

    with progress_bar(total=steps, desc=f"{len(stack)} tries at once", unit="step", shown=run.is_main) as bar:
        weights = train_stack(
            stack,
            fed(parts.train),
            parts.train.labels.to(device),
            [target.to(device) for target in targets.found],
            rates=_rates(recipe, steps),
            batch_size=training.batch_size * batches_per_step(recipe),
            max_grad_norm=training.max_grad_norm,
            tell=bar.update,
        )
    right = [stack_answers(weights, fed(rows)).cpu() == rows.labels for rows in judged]
    return [one.view(seeds, len(configurations), -1).transpose(0, 1) for one in right]


def _start(build: StudentBuilder, above: Sequence[TorchTeacher], rows: Rows, seed: int) -> dict[str, Tensor]:
    model = WarmBuild(partial(build, seed=seed), above, rows)().model
    return {name: weight.detach().cpu() for name, weight in model.named_parameters()}


def _rates(recipe: Recipe, steps: int) -> list[float]:
    """Share of the learning rate at each step, as the trainer has it."""
    asked = recipe.training.warmup_steps
    warmup = int(asked) if asked >= 1 else math.ceil(asked * steps)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(recipe.training.lr_scheduler, optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


class _Targets:
    """What the teachers say of the training rows, once for all configurations that hear it alike."""

    def __init__(self, run: Run, parts: DataParts, teachers: Sequence[Teacher]) -> None:
        self.run, self.parts, self.teachers = run, parts, list(teachers)
        self.found: list[Tensor] = []
        self._places: dict[tuple[str, float, bool], int] = {}
        self._mixtures: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, one: Configuration) -> int:
        """Where in `found` the log-probabilities `(rows, classes)` are that a configuration hears."""
        key = (one.gate, one.temperature, one.kd_kind == "standardized_kl")
        if key not in self._places:
            taught, weights = self._mixture(one.gate)
            self._places[key] = len(self.found)
            self.found.append(log_mixture(taught, weights, one.temperature, standardized=key[2]))
        return self._places[key]

    def _mixture(self, gate: str) -> tuple[Tensor, Tensor]:
        """What a gate has the student taught of each teacher `(teachers, rows, classes)`, and how much each counts."""
        if gate not in self._mixtures:
            run, recipe, guide = self.run, self.run.recipe, self.parts.guide
            about = (recipe, run.memory.cache, run.say)
            logits, asked = taught_logits(self.teachers, self.parts.train, *about), HPMKDTrainingArguments
            ensemble = AttentionEnsemble(
                gate,
                len(self.teachers),
                logits.shape[-1],
                1,
                entropy_weight=recipe.distillation.entropy_weight,
                hidden_size=asked.gate_hidden_size,
                dropout=asked.gate_dropout,
                learning_rate=asked.gate_learning_rate,
                seed=recipe.training.seed,
            )
            of_guide = teacher_logits(self.teachers, guide, *about)
            if recipe.distillation.calibrate_teachers:
                ensemble.calibrate(of_guide, guide.labels)
            if ensemble.is_trained_on_guide:
                updates = (asked.gate_warmup_steps, GATE_WARMUP_BATCH)
                ensemble.warm_up(_no_features(len(guide)), ensemble.calibrated(of_guide), guide.labels, *updates)
            taught, weights = [], []
            for rows in torch.arange(len(self.parts.train)).split(_ROWS_AT_ONCE):
                calibrated = ensemble.calibrated(logits[:, rows])
                taught.append(ensemble.taught(calibrated))
                weights.append(ensemble.weights(_no_features(len(rows)), calibrated, self.parts.train.labels[rows]))
            self._mixtures[gate] = torch.cat(taught, dim=1), torch.cat(weights)
        return self._mixtures[gate]


def _no_features(rows: int) -> Tensor:
    return torch.zeros(rows, 1)
