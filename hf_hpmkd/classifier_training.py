"""Trains one classifier inside a run: a teacher on the spot, the student directly, or the student from its teachers.

One function for all three, so that they differ in nothing but the teachers: same loop, checkpoints, progress bar and
curves. A finished classifier is loaded instead of trained again; an interrupted one goes on from its last checkpoint.
"""

import dataclasses
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.distiller import Distiller
from hf_hpmkd.layer_hints import LayerHints
from hf_hpmkd.losses import labels_loss
from hf_hpmkd.progress import progress_bar
from hf_hpmkd.recipe import Recipe, TeacherConfig
from hf_hpmkd.recipe_rules import usual_learning_rate
from hf_hpmkd.stopped_training import AveragedWeights, StopAt, put_average, saved_average
from hf_hpmkd.tasks.base import FedDataset, Rows
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_kinds import Teacher
from hf_hpmkd.trainer import HPMKDTrainer
from hf_hpmkd.training_args import HPMKDTrainingArguments
from hf_hpmkd.training_folder import clear_checkpoints, done_file, last_complete_checkpoint, step_of, write_json

_SECONDS_FILE = "seconds.json"  # in a checkpoint


@dataclass
class Trained:
    """A trained classifier and what its training was."""

    classifier: Classifier
    seconds: float
    steps: int
    curve: list[dict[str, float]] = field(default_factory=list)
    calibration: list[float] | None = None
    class_weights: list[list[float]] | None = None
    resumed: bool = False  # nothing was trained now


@dataclass(frozen=True)
class Schedule:
    """What may differ between the classifiers of one run; the rest comes from the recipe's training section.

    max_steps: -1 lets epochs decide, but for at least min_steps.
    """

    epochs: int
    max_steps: int
    learning_rate: float
    batch_size: int
    seed: int
    keep: str = "last"  # teachers never choose by validation rows, which must stay unseen by them
    min_steps: int = 0

    def key(self) -> dict[str, Any]:
        """What of it decides a result; without min_steps where there is none, as in keys from before there was."""
        fields = dataclasses.asdict(self)
        return fields if self.min_steps else {name: value for name, value in fields.items() if name != "min_steps"}


def student_schedule(recipe: Recipe) -> Schedule:
    """The student's schedule; the direct baseline has the same."""
    training = recipe.training
    return Schedule(
        epochs=training.epochs,
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        seed=training.seed,
        keep=training.keep,
        min_steps=training.min_steps,
    )


def teacher_schedule(recipe: Recipe, config: TeacherConfig) -> Schedule:
    """The schedule of a teacher that is trained on the spot: its own values, else the student's."""
    training = recipe.training
    return Schedule(
        epochs=config.epochs or training.epochs,
        max_steps=-1,
        learning_rate=config.learning_rate or _rate_from_nothing(recipe, config.model),
        batch_size=config.batch_size or training.batch_size,
        seed=training.seed,
        min_steps=0 if config.epochs or training.max_steps > 0 else training.min_steps,
    )


def stage_schedule(recipe: Recipe) -> Schedule:
    """The schedule of a chain's stage: the student's, with the chain's own epochs and learning rate where given."""
    schedule, config = student_schedule(recipe), recipe.chain
    return dataclasses.replace(
        schedule,
        epochs=config.epochs or schedule.epochs,
        learning_rate=config.learning_rate or _rate_from_nothing(recipe, recipe.student.model),
        min_steps=0 if config.epochs else schedule.min_steps,
    )


def _rate_from_nothing(recipe: Recipe, model: str) -> float:
    """The student's rate; where that is for fine-tuning, or the student's usual one, the one usual for the model."""
    own, rate = recipe.student, recipe.training.learning_rate
    return usual_learning_rate(model) if own.pretrained or rate == usual_learning_rate(own.model) else rate


def batches_per_step(recipe: Recipe) -> int:
    """Batches of the schedule in a step: one per process; those of a job (`pipeline.processes`) share one."""
    processes = PartialState().num_processes
    return 1 if processes == recipe.pipeline.processes else processes


def total_steps(recipe: Recipe, schedule: Schedule, num_rows: int) -> int:
    """Optimizer steps of a training on so many rows."""
    rows_per_step = schedule.batch_size * recipe.training.gradient_accumulation_steps * batches_per_step(recipe)
    if schedule.max_steps > 0:
        return schedule.max_steps
    return max(math.ceil(num_rows / rows_per_step) * schedule.epochs, schedule.min_steps)


def training_arguments(
    recipe: Recipe, schedule: Schedule, folder: Path, num_rows: int, distills: bool, resumable: bool = True
) -> HPMKDTrainingArguments:
    """The recipe's sections `training` and `distillation` as arguments. distills: False leaves the teachers out.
    resumable: False writes no checkpoints.
    """
    training, distillation = recipe.training, recipe.distillation
    total = total_steps(recipe, schedule, num_rows)
    every = max(1, math.ceil(total / training.evaluations))
    return HPMKDTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=schedule.epochs,
        max_steps=schedule.max_steps if total != schedule.min_steps else total,
        per_device_train_batch_size=schedule.batch_size * batches_per_step(recipe) // PartialState().num_processes,
        per_device_eval_batch_size=training.eval_batch_size,
        learning_rate=schedule.learning_rate,
        weight_decay=training.weight_decay,
        optim=training.optimizer,
        optim_args=training.optimizer_args,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_steps,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_grad_norm=training.max_grad_norm,
        seed=schedule.seed,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        dataloader_num_workers=training.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_persistent_workers=training.num_workers > 0,
        report_to=training.report_to or "none",
        logging_steps=training.log_every or max(1, total // 100),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps" if resumable else "no",
        save_steps=every,
        save_total_limit=training.save_total_limit,
        load_best_model_at_end=schedule.keep == "best",
        metric_for_best_model="accuracy",
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),  # see `distill`
        disable_tqdm=True,  # upstream's bar prints every log line; `_Bar` replaces it
        alpha=distillation.alpha if distills else 0.0,
        kd_kind=distillation.kd_kind,
        temperature=distillation.temperature,
        temperature_schedule=distillation.temperature_schedule,
        temperature_min=distillation.temperature_min,
        temperature_max=distillation.temperature_max,
        gate=distillation.gate,
        gate_entropy_weight=distillation.entropy_weight,
        calibrate_teachers=distillation.calibrate_teachers,
        guide_every=distillation.guide_every,
        guide_batch_size=distillation.guide_batch_size,
        feature_weight=distillation.feature_weight if distills else 0.0,
        teacher_outputs=distillation.teacher_outputs,
        teacher_outputs_topk=distillation.topk or 16,
        teacher_cache_dir=distillation.cache_dir,
    )


def train_or_load(
    name: str,
    build: Callable[[], Classifier],
    recipe: Recipe,
    schedule: Schedule,
    folder: Path,
    train: Rows,
    validation: Rows,
    *,
    num_views: int = 0,
    teachers: Sequence[Teacher] = (),
    guide: Rows | None = None,
    cache: TeacherCache | None = None,
    distiller_class: type[Distiller] = Distiller,
    on_log: Callable[[list[dict[str, float]]], None] = lambda history: None,
    stop_at: int | None = None,
    resumable: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """The classifier called `name`, trained into `folder` or loaded from there.

    build: makes it with its initial weights. num_views: augmented views per training row, 0 for none; without teachers
    rows are taken as they are where a view may change their class. teachers: none trains on labels alone. cache: of
    their outputs, None makes one in the recipe's folder. distiller_class: what it learns from them. on_log: gets the
    log history at every evaluation.
    stop_at: stops after that many steps of the whole schedule, with a checkpoint that the next call goes on from; the
    classifier then has the mean of its weights until there (where processes share a model out, its last ones).
    callbacks: further ones for the trainer.
    resumable: False writes no checkpoints, which take a tenth of the time of a training of seconds.
    """
    classifier = build()
    num_views = num_views if teachers or train.keeps_labels else 0
    done = done_file(folder)
    if done.is_file():
        if PartialState().is_main_process:
            with suppress(OSError):  # a stop between the last two steps of saving leaves them; they do no harm
                clear_checkpoints(folder)
        saved = json.loads(done.read_text(encoding="utf-8"))
        classifier.model = type(classifier.model).from_pretrained(folder)
        return Trained(classifier, **saved, resumed=True)
    checkpoint = last_complete_checkpoint(folder / "checkpoints", distills=bool(teachers))
    if stop_at is not None and checkpoint is not None and step_of(checkpoint) >= stop_at:
        classifier.model = type(classifier.model).from_pretrained(checkpoint)
        put_average(classifier, saved_average(checkpoint)[1], train)
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        return Trained(classifier, 0.0, step_of(checkpoint), _numbers(state["log_history"]), resumed=True)
    args = training_arguments(recipe, schedule, folder, len(train), bool(teachers), resumable)
    args._n_gpu = min(args.n_gpu, 1)  # of several that are visible, too: upstream would train on all of them
    if stop_at is not None:  # with one alone upstream keeps the best, and not the one to go on from
        args.save_total_limit = max(2, args.save_total_limit or 2)
    clock, family = _Clock(checkpoint), type(classifier.model)
    trainer = HPMKDTrainer(
        classifier.model,
        list(teachers) or None,
        args,
        train_dataset=FedDataset(train, classifier.feed, num_views),
        eval_dataset=FedDataset(validation, classifier.feed),
        guide_dataset=FedDataset(guide, classifier.feed) if guide is not None else None,
        data_collator=FedDataset.collate,
        compute_metrics=_accuracy,
        compute_loss_func=None if teachers else labels_loss,
        callbacks=[_Bar(name), clock, _Curve(on_log), *([StopAt(stop_at)] if stop_at is not None else []), *callbacks],
    )
    trainer.distiller_class = distiller_class
    if cache is not None:
        trainer.teacher_cache = cache
    asked, above = recipe.distillation, classifier.origin
    if asked.hint_weight and above is not None:
        trainer.hints = LayerHints(classifier.model, above, train, classifier.feed, asked.hint_weight, asked.hint_share)
    in_pieces = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    averaged = AveragedWeights(checkpoint) if stop_at is not None and not in_pieces else None
    if averaged is not None:
        trainer.add_callback(averaged)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.end_hints()
    history, steps = trainer.state.log_history, trainer.state.global_step
    seconds = result.metrics["train_runtime"]
    if clock.before is not None:
        seconds += clock.before
    elif checkpoint and steps > step_of(checkpoint):  # the steps before are counted at the same speed
        seconds *= steps / (steps - step_of(checkpoint))
    trained = Trained(classifier, seconds, steps, _numbers(history))
    if trainer.distiller is not None:
        trained.calibration = trainer.distiller.ensemble.calibration.tolist()
        trained.class_weights = trainer.distiller.class_weights()
        trainer.distiller.close()  # teachers outlive it
    if steps < trainer.state.max_steps:  # stopped on the way
        if in_pieces and (stopped := last_complete_checkpoint(folder / "checkpoints", bool(teachers))):
            classifier.model = family.from_pretrained(stopped)
        if averaged is not None:
            put_average(classifier, averaged.average, train)
        return trained
    place = folder.with_name(f"{folder.name}.pieces") if in_pieces else folder
    trainer.save_model(str(place))  # in all processes: a model that is cut over them is put together first
    if trainer.is_world_process_zero():
        if in_pieces:  # FSDP has made it one of a class of its own, which no other process could load
            family.from_pretrained(place).save_pretrained(folder)
            shutil.rmtree(place)
        # A pickle with this machine's paths; the run record says it all.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if classifier.feed.processor is not None:
            classifier.feed.processor.save_pretrained(folder)
        saved = {key: getattr(trained, key) for key in ("seconds", "steps", "curve", "calibration", "class_weights")}
        write_json(done, saved)
        clear_checkpoints(folder)
    trainer.accelerator.wait_for_everyone()
    if in_pieces:
        classifier.model = family.from_pretrained(folder)
    return trained


@contextmanager
def old_garbage_left() -> Iterator[None]:
    """What is alive now is not searched for garbage meanwhile: the trainer searches at every start, which takes a third
    of a second among all that torch and transformers have imported.
    """
    if gc.get_freeze_count():  # somebody has frozen it already, and may want it to stay so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def _numbers(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in row.items() if isinstance(value, (int, float))} for row in history]


class _Clock(TrainerCallback):
    """Writes into every checkpoint how long the training took until then, so that a resumed one counts on from there.

    before: seconds until the checkpoint that is gone on from; None without one, and where it does not say: a kill right
    after it was written may leave it without.
    """

    def __init__(self, checkpoint: str | None) -> None:
        file = None if checkpoint is None else Path(checkpoint) / _SECONDS_FILE
        self.before = float(json.loads(file.read_text(encoding="utf-8"))) if file and file.is_file() else None
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _SECONDS_FILE, (self.before or 0.0) + time.perf_counter() - self.started)


class _Curve(TrainerCallback):
    """Hands the log history on at every evaluation, so that a run record grows while the run does."""

    def __init__(self, keep: Callable[[list[dict[str, float]]], None]) -> None:
        self.keep = keep

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.keep(_numbers(state.log_history))


class _Bar(TrainerCallback):
    """A progress bar per classifier (steps, loss, temperature, validation accuracy), one more while it is evaluated."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None
        self.evaluation: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = progress_bar(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "temperature": "T", "eval_accuracy": "validation"}
        for key, shown in names.items():
            if logs and key in logs:
                self.shown[shown] = f"{logs[key]:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.bar is None:
            return
        if self.evaluation is None:
            about = f"{self.name}: validation"
            self.evaluation = progress_bar(total=len(eval_dataloader), desc=about, unit="batch", passing=True)
        self.evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
