"""The stages of one run's chain: what there is, and how another is made, kept and found again. Decides nothing."""

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from hf_hpmkd.classifier_training import Schedule, Trained, batches_per_step, stage_schedule, train_or_load
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.components.progressive_chain import from_bits, taught_by, to_bits
from hf_hpmkd.data import DataParts
from hf_hpmkd.fitted_start import MOST_ROWS, can_fit, fit_start
from hf_hpmkd.intermediate_models import Intermediate, build_intermediate, find_intermediates
from hf_hpmkd.kept_classifiers import NOT_IN_KEY, About, Training, answers_right, making, take
from hf_hpmkd.layer_hints import required_points
from hf_hpmkd.model_identity import architecture
from hf_hpmkd.models import TabularProcessor
from hf_hpmkd.recipe import Recipe, drop_unset, recipe_tree
from hf_hpmkd.run_context import Run
from hf_hpmkd.run_record import StageRecord, last_name
from hf_hpmkd.stage_card import write_stage_card
from hf_hpmkd.tasks.base import Feed, Rows, json_digest
from hf_hpmkd.teacher_kinds import FoldedTeacher, Teacher, TorchTeacher
from hf_hpmkd.training_folder import done_file
from hf_hpmkd.warm_start import can_warm_start, same_vocabulary, warm_start

STAGE_FILE = "stage.json"
# What a recipe says that changes nothing in a stage's weights; epochs and seed are in its schedule.
_NOT_IN_KEY = {
    "training": (*NOT_IN_KEY, "epochs", "min_steps", "seed"),
    "distillation": ("cache_dir", "direct", "keep"),
}

# What decides which input of a table stands where.
_PLACES = ("numeric_columns", "indicator_columns", "categorical_columns", "categories")


class Builder(Protocol):
    """Makes a classifier with its initial weights, or on the meta device."""

    def __call__(self, *, meta: bool = False) -> Classifier: ...


class WarmBuild:
    """Builds a classifier and gives it what the first fitting model of `above` has to give. rows: training rows that an
    MLP is fitted to (`fitted_start`).

    After the first call: share, of its parameters that came from there, 0 to 1; origin, the name of the model that gave
    them, "" for none.
    """

    def __init__(self, build: Builder, above: Sequence[TorchTeacher], rows: Rows) -> None:
        self.build, self.above, self.rows, self.share, self.origin = build, above, rows, 0.0, ""

    def __call__(self) -> Classifier:
        classifier = self.build()
        source = self.source(classifier)
        if source is not None and isinstance(source.model, PreTrainedModel):
            started = warm_start(classifier.model, source.model, same_vocabulary(classifier.feed, source.feed))
            self.share, self.origin = started.fraction, source.name
            classifier.origin = source
            if can_fit(classifier.model, source.model):
                chosen = torch.linspace(0, len(self.rows) - 1, min(len(self.rows), MOST_ROWS)).long()
                fit_start(classifier.model, source.model, classifier.feed(self.rows.raw(chosen)))
        return classifier

    def source(self, classifier: Classifier) -> TorchTeacher | None:
        """What such a model would start from: of an MLP one that reads the same columns in the same order."""
        for one in self.above:
            alike = isinstance(one.model, PreTrainedModel) and can_warm_start(classifier.model, one.model)
            if alike and _same_columns(classifier.feed, one.feed):
                return one
        return None

    @property
    def can_start(self) -> bool:
        """Whether the model has one to start from."""
        return self.source(self.build(meta=True)) is not None

    def describe(self) -> dict[str, Any]:
        """All that decides the initial weights but the seed."""
        classifier = self.build(meta=True)
        start = self.source(classifier)
        known = {**architecture(classifier.model), "start": start.fingerprint if start else None}
        if start is None:
            return known
        fitted = {"fitted": True} if can_fit(classifier.model, start.model) else {}
        return known | fitted | ({} if same_vocabulary(classifier.feed, start.feed) else {"other_vocabulary": True})


def require_hints(recipe: Recipe, build: WarmBuild) -> None:
    """Raises ValueError where the recipe asks for layer hints and the student begins with no layers that have any."""
    if recipe.distillation.hint_weight == 0:
        return
    student = build.build(meta=True)
    source = build.source(student)
    if source is None:
        raise ValueError(
            "`distillation.hint_weight` above 0 needs a teacher of the student's family, whose layers it begins with, "
            f"got {', '.join(one.name for one in build.above) or 'no network'} for {recipe.student.model}. Add such a "
            "teacher, or set it to 0."
        )
    required_points(student.model, student.feed, source)


def _same_columns(feed: Feed, above: Feed) -> bool:
    """Whether two feeds of tables give the same inputs at the same places, up to mean and spread; other feeds: yes."""
    ours, theirs = feed.processor, above.processor
    if not (isinstance(ours, TabularProcessor) and isinstance(theirs, TabularProcessor)):
        return True
    return all(getattr(ours, name) == getattr(theirs, name) for name in _PLACES)


class Stages:
    """The stages of one run, largest first: those that teach the student, and the means to train another."""

    def __init__(self, run: Run, parts: DataParts, teachers: list[Teacher], folder: Path) -> None:
        self.run, self.parts, self.teachers, self.folder = run, parts, teachers, folder
        self.store = run.memory.store
        self.finished: list[TorchTeacher] = []
        self.records: list[StageRecord] = []

    def find(self, count: int) -> list[Intermediate]:
        """Models between the lowest stage, else the teachers, and the student. Raises ValueError if there are none."""
        sized = [(one.source, one.num_params) for one in self.teachers if one.num_params is not None]
        student = self.run.recipe.student
        return find_intermediates(
            student.model,
            [(one.model, one.num_params) for one in self.records[-1:]] or sized,
            self.parts.train,
            count,
            revision=student.revision,
            trust_remote_code=student.trust_remote_code,
        )

    def keep(self, stage: TorchTeacher, record: StageRecord) -> None:
        """Lets what comes below learn from it."""
        self.finished.append(stage)
        self.records.append(record)

    def drop(self, record: StageRecord) -> None:
        """Takes a stage out of the run's folder. It stays in the memory, for whom it may still serve."""
        if self.run.is_main:
            clear_training(self.folder / record.name)

    def guides(self, stages: Sequence[TorchTeacher]) -> list[Teacher]:
        """What the next model learns from."""
        return taught_by(self.teachers, list(stages), self.run.recipe.chain.guidance)

    def above(self, stages: Sequence[TorchTeacher]) -> list[TorchTeacher]:
        """What the next model may start from: the lowest stage first, then the teachers, the smallest first."""
        whole = [one.full if isinstance(one, FoldedTeacher) else one for one in self.teachers]
        networks = [one for one in whole if isinstance(one, TorchTeacher)]
        return [*reversed(stages), *sorted(networks, key=lambda one: one.num_params or 0)]

    def blueprint(self, wanted: Intermediate) -> Classifier:
        """The stage on the meta device."""
        return build_intermediate(wanted.name, self.parts.train, self.run.recipe.student, meta=True)

    def builder(self, wanted: Intermediate) -> WarmBuild:
        """Makes the next stage with its initial weights."""
        recipe = self.run.recipe
        build = partial(build_intermediate, wanted.name, self.parts.train, recipe.student, seed=recipe.training.seed)
        above = self.above(self.finished) if recipe.chain.warm_start else []
        return WarmBuild(build, above, self.parts.train)

    def train(self, wanted: Intermediate) -> tuple[TorchTeacher, StageRecord]:
        """The next stage: trained, or found finished in this run's folder or in the memory."""
        name = f"stage-{len(self.finished) + 1}"
        folder, build, schedule = self.folder / name, self.builder(wanted), stage_schedule(self.run.recipe)
        key = self.key(build, schedule, self.finished)
        with making(self.store, key):
            self._claim(folder, key)
            with PartialState().main_process_first():
                reused = self._fetch(wanted, key, folder)
            trained = self.fit(name, build, schedule, folder, self.finished)
            record = StageRecord(
                name=name,
                model=wanted.name,
                num_params=wanted.num_params,
                target=wanted.target,
                guides=[guide.name for guide in self.guides(self.finished)],
                warm_start=build.share,
                accuracy=float(self.right(trained.classifier).float().mean()),
                seconds=trained.seconds,
                steps=trained.steps,
                reused=reused,
            )
            self.run.keep_curve(name, trained.curve)
            self._publish(folder, key, record, trained)
        return self.as_teacher(name, trained.classifier, wanted.name), record

    def _fetch(self, wanted: Intermediate, key: str, folder: Path) -> bool:
        """Puts a finished stage from the memory into the folder; False if this run trains, or trained, its own."""
        if done_file(folder).is_file():
            return _is_reused(folder)
        if self.store is None or not self.run.is_main:
            return False
        rows, batch_size = self.parts.validation, self.run.recipe.training.eval_batch_size
        about = take(self.store, key, STAGE_FILE, partial(self.blueprint, wanted), rows, batch_size, folder)
        if about is None:
            return False
        if about.stage is not None:
            about.stage.reused = True
            about.save(folder / STAGE_FILE)
        self.run.say(f"Chain: a stage of {wanted.num_params:,} parameters was trained before and is in the memory.")
        return True

    def _publish(self, folder: Path, key: str, record: StageRecord, trained: Trained) -> None:
        """Makes the stage's folder usable alone, and keeps a copy for other runs."""
        if not self.run.is_main:
            return
        public = dataclasses.replace(record, model=last_name(record.model))  # the file may travel
        About(key, Training.of(trained), stage=public).save(folder / STAGE_FILE)
        write_stage_card(self.run.record, record, folder)
        if self.store is not None and not record.reused:
            self.store.keep_model(key, folder)

    def fit(
        self,
        name: str,
        build: WarmBuild,
        schedule: Schedule,
        folder: Path,
        stages: Sequence[TorchTeacher],
        *,
        evaluations: int | None = None,
    ) -> Trained:
        """A model trained into a folder from the teachers and these stages, or found finished there. evaluations: None
        takes the recipe's.
        """
        self._claim(folder, self.key(build, schedule, stages))
        training = self.run.recipe.training
        training = dataclasses.replace(training, evaluations=evaluations or training.evaluations)
        trained = train_or_load(
            name,
            build,
            dataclasses.replace(self.run.recipe, training=training),
            schedule,
            folder,
            self.parts.train,
            self.parts.validation,
            num_views=self.parts.num_views,
            teachers=self.guides(stages),
            guide=self.parts.guide,
            cache=self.run.memory.cache,
        )
        # The saved weights, which are the same in every process; of batch statistics each process has its own.
        trained.classifier.model = type(trained.classifier.model).from_pretrained(folder)
        return trained

    def _claim(self, folder: Path, key: str) -> None:
        """Takes a folder for one training; what another one left there goes, lest it be mistaken for this one's."""
        file = _key_file(folder)
        if self.run.is_main and not (file.is_file() and file.read_text(encoding="utf-8") == key):
            clear_training(folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(key, encoding="utf-8")
        PartialState().wait_for_everyone()

    def as_teacher(self, name: str, classifier: Classifier, source: str) -> TorchTeacher:
        """A trained classifier as one that teaches."""
        return TorchTeacher.of(name, classifier, self.parts.train, device=self.run.device, source=source)

    def right(self, classifier: Classifier) -> torch.Tensor:
        """Which validation rows are answered right, bool `(rows,)`; the main process's answer in all of them."""
        size = self.run.recipe.training.eval_batch_size
        answer = [to_bits(answers_right(classifier, self.parts.validation, size))]
        return from_bits(broadcast_object_list(answer)[0])

    def key(self, build: WarmBuild, schedule: Schedule, stages: Sequence[TorchTeacher]) -> str:
        """Of all that decides a training below these stages: another recipe that needs the same arrives at the same."""
        tree, rows = recipe_tree(self.run.recipe), self.parts.train
        drop_unset(tree)
        return json_digest(
            {
                "model": build.describe(),
                "settings": {
                    section: {name: value for name, value in tree[section].items() if name not in left_out}
                    for section, left_out in _NOT_IN_KEY.items()
                },
                "schedule": schedule.key(),
                "processes": batches_per_step(self.run.recipe),
                "train": rows.training_key(self.parts.num_views),
                "guide": self.parts.guide.fingerprint,
                "validation": self.parts.validation.fingerprint,
                "labels": [part.labels.tolist() for part in (rows, self.parts.guide)],
                "guides": [guide.identity(rows) for guide in self.guides(stages)],
            }
        )


def _is_reused(folder: Path) -> bool:
    """Whether a finished stage in the run's folder came from the memory."""
    with suppress(ValueError):  # it was stopped before its file was written
        stage = About.load(folder / STAGE_FILE).stage
        return stage is not None and stage.reused
    return False


def _key_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.key")


def clear_training(folder: Path) -> None:
    """Removes a training; what says that it is finished goes first."""
    done_file(folder).unlink(missing_ok=True)
    _key_file(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
