"""The progressive chain of a run: its stages built, probed, trained, judged and kept, largest first.

How long the chain is, `components.progressive_chain` decides; this module gets it the figures. Everything that took
training lies in the run's folder `chain/`, finished stages in the memory too, so that the same command goes on where an
interrupted run stood, and no stage is trained twice.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from hf_hpmkd.classifier_training import (
    Schedule,
    Trained,
    done_file,
    student_schedule,
    total_steps,
    train_or_load,
    write_json,
)
from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.components.progressive_chain import (
    estimate_gain,
    from_bits,
    is_confirmed,
    is_promising,
    required_gain,
    taught_by,
    to_bits,
)
from hf_hpmkd.data import DataParts
from hf_hpmkd.evaluation import student_logits
from hf_hpmkd.intermediate_models import Intermediate, find_intermediates
from hf_hpmkd.memory_files import MANIFEST
from hf_hpmkd.model_cost import training_flops
from hf_hpmkd.recipe import recipe_tree
from hf_hpmkd.recipe_rules import uses_teachers
from hf_hpmkd.run_context import Run
from hf_hpmkd.run_record import ChainDecision, ChainRecord, StageRecord
from hf_hpmkd.stage_card import write_stage_card
from hf_hpmkd.tasks.base import json_digest
from hf_hpmkd.teacher_kinds import FoldedTeacher, Teacher, TorchTeacher
from hf_hpmkd.warm_start import can_warm_start, warm_start

FOLDER = "chain"
STAGE_FILE = "stage.json"
_STAGE_FORMAT = 1
# What a recipe says that changes nothing in a stage's weights; epochs and seed are in its schedule.
_NOT_IN_KEY = {
    "training": ("report_to", "num_workers", "save_total_limit", "metrics", "log_every", "epochs", "seed"),
    "distillation": ("cache_dir", "direct"),
}


class StudentBuilder(Protocol):
    """Makes the student with its initial weights, or on the meta device. seed: None takes the recipe's."""

    def __call__(self, *, meta: bool = False, seed: int | None = None) -> Classifier: ...


@dataclass(frozen=True)
class Chain:
    """What stands above the student. guides: what it learns from. above: what it may start from, nearest first."""

    guides: list[Teacher]
    above: list[TorchTeacher]


class WarmBuild:
    """Builds a classifier and gives it what the first fitting model of `above` has to give.

    share: of its parameters that were copied, 0 to 1, after the first call.
    """

    def __init__(self, build: Callable[[], Classifier], above: Sequence[TorchTeacher]) -> None:
        self.build, self.above, self.share = build, above, 0.0

    def __call__(self) -> Classifier:
        classifier = self.build()
        source = self.source(classifier.model)
        if source is not None and isinstance(source.model, PreTrainedModel):
            self.share = warm_start(classifier.model, source.model).fraction
        return classifier

    def source(self, model: PreTrainedModel) -> TorchTeacher | None:
        """What such a model would start from."""
        for one in self.above:
            if isinstance(one.model, PreTrainedModel) and can_warm_start(model, one.model):
                return one
        return None


def build_chain(run: Run, parts: DataParts, teachers: Sequence[Teacher], build_student: StudentBuilder) -> Chain:
    """Decides on the stages, trains them into `run.folder/chain` and writes what was decided, and why, into the record.

    Raises ValueError where the recipe asks for stages and none can be built.
    """
    stages = _Stages(run, parts, list(teachers))
    chain = run.record.chain
    if chain is None or not chain.reason:
        chain = run.record.chain = ChainRecord()
        chain.reason = _fill(chain, stages, build_student)
        chain.stages = stages.records
        run.say(f"Chain: {chain.reason}")
        run.save()
    else:  # decided before an interruption
        for one in chain.stages:
            stages.keep(*stages.train(Intermediate(one.model, one.num_params, one.target or one.num_params)))
    if run.is_main:
        shutil.rmtree(run.folder / FOLDER / "probes", ignore_errors=True)
    starts_warm = run.recipe.chain.warm_start and not run.recipe.student.pretrained
    return Chain(stages.guides(stages.finished), stages.above(stages.finished) if starts_warm else [])


def _fill(chain: ChainRecord, stages: "_Stages", build_student: StudentBuilder) -> str:
    """Trains the stages; returns why there are so many."""
    recipe = stages.run.recipe
    config = recipe.chain
    if not uses_teachers(recipe):
        return "no intermediate model, because the student does not listen to teachers (distillation.alpha is 0)."
    if config.length == "auto" and not config.models:
        return _decide(chain, stages, _Probes(stages, build_student))
    if config.models:
        sizes = [build_classifier(name, stages.parts.train, meta=True).num_params for name in config.models]
        wanted = [Intermediate(name, size, size) for name, size in zip(config.models, sizes, strict=True)]
    else:
        assert config.length != "auto"
        wanted = stages.find(config.length)
    for one in wanted:
        stages.keep(*stages.train(one))
    sizes_told = " and ".join(f"{one.num_params:,}" for one in wanted)
    return f"{_counted(len(wanted))}{f' of {sizes_told} parameters' if wanted else ''}, as the recipe asks."


def _decide(chain: ChainRecord, stages: "_Stages", probes: "_Probes") -> str:
    """One stage after the other, each at the geometric middle of what stands above and the student, while it pays."""
    run, reasons = stages.run, []
    while len(stages.finished) < run.recipe.chain.max_length:
        try:
            candidate = stages.find(1)[0]
        except ValueError as error:
            reasons.append(f"no further one can be built: {str(error).rstrip('.')}")
            break
        size = f"{candidate.num_params:,} parameters"
        probe = probes.before(candidate)
        chain.decisions.append(probe)
        run.say(f"Chain: would a stage of {size} pay? {_figures(probe)}: {'yes' if probe.accepted else 'no'}.")
        run.save()
        if not probe.accepted:
            reasons.append(f"none of {size}: {_figures(probe)}")
            break
        stage, record = stages.train(candidate)
        measured = probes.after(candidate, stage)
        chain.decisions.append(measured)
        run.say(f"Chain: does the finished one? {_figures(measured)}: {'yes' if measured.accepted else 'no'}.")
        run.save()
        if not measured.accepted:
            stages.drop(record)
            reasons.append(f"one of {size} was trained and left out: {_figures(measured)}")
            break
        stages.keep(stage, record)
        reasons.append(f"one of {size}: {_figures(probe)}, {_figures(measured)}")
    return f"{_counted(len(stages.finished))} ({'; '.join(reasons)})."


def _counted(count: int) -> str:
    return {0: "no intermediate model", 1: "one intermediate model"}.get(count, f"{count} intermediate models")


def _figures(decision: ChainDecision) -> str:
    when = "in the probe" if decision.moment == "probe" else "measured with the finished stage"
    return (
        f"{decision.gain:+.2f} ± {decision.standard_error:.2f} points {when}, {decision.required:.2f} asked for a cost "
        f"of {decision.cost:.1f} student trainings"
    )


class _Stages:
    """The stages of one run: what there is, and how another is made."""

    def __init__(self, run: Run, parts: DataParts, teachers: list[Teacher]) -> None:
        self.run, self.parts, self.teachers = run, parts, teachers
        self.folder = run.folder / FOLDER
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
            shutil.rmtree(self.folder / record.name)
            done_file(self.folder / record.name).unlink()

    def guides(self, stages: Sequence[TorchTeacher]) -> list[Teacher]:
        """What the next model learns from."""
        return taught_by(self.teachers, list(stages), self.run.recipe.chain.guidance)

    def above(self, stages: Sequence[TorchTeacher]) -> list[TorchTeacher]:
        """What the next model may start from: the lowest stage first, then the teachers, the smallest first."""
        whole = [one.full if isinstance(one, FoldedTeacher) else one for one in self.teachers]
        networks = [one for one in whole if isinstance(one, TorchTeacher)]
        return [*reversed(stages), *sorted(networks, key=lambda one: one.num_params or 0)]

    def builder(self, wanted: Intermediate) -> WarmBuild:
        """Makes the next stage with its initial weights."""
        seed = self.run.recipe.training.seed
        above = self.above(self.finished) if self.run.recipe.chain.warm_start else []
        return WarmBuild(lambda: build_classifier(wanted.name, self.parts.train, seed=seed), above)

    def schedule(self) -> Schedule:
        """A stage's schedule: the student's, with the chain's own epochs and learning rate where given."""
        schedule, config = student_schedule(self.run.recipe), self.run.recipe.chain
        return dataclasses.replace(
            schedule,
            epochs=config.epochs or schedule.epochs,
            learning_rate=config.learning_rate or schedule.learning_rate,
        )

    def train(self, wanted: Intermediate) -> tuple[TorchTeacher, StageRecord]:
        """The next stage: trained, or found finished in this run's folder or in the memory."""
        name = f"stage-{len(self.finished) + 1}"
        folder, build, key = self.folder / name, self.builder(wanted), self.key(wanted)
        with self.store.making(key) if self.store is not None and self.run.is_main else nullcontext():
            with PartialState().main_process_first():
                found = done_file(folder).is_file() or self._fetch(wanted, key, folder)
            trained = self.fit(name, build, self.schedule(), folder, self.finished)
            stage = self.as_teacher(name, trained.classifier, wanted.name)
            about = self._about(folder) if found else None
            if about is not None:
                return stage, StageRecord(**{**about["stage"], "name": name})
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
            )
            self.run.keep_curve(name, trained.curve)
            self._publish(folder, key, record, trained)
        return stage, record

    def _fetch(self, wanted: Intermediate, key: str, folder: Path) -> bool:
        """Puts a finished stage from the memory into the folder; False if there is none that can be used."""
        kept = self.store.find_model(key) if self.store is not None and self.run.is_main else None
        if kept is None:
            return done_file(folder).is_file()
        about = self._about(kept)
        if about is None or about["stage"]["num_params"] != wanted.num_params:
            self.run.warn(f"The stage {key} of the memory has no usable {STAGE_FILE} and is trained again.")
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for file in kept.iterdir():
            if file.name != MANIFEST:
                shutil.copy2(file, folder)
        about["stage"]["reused"] = True
        write_json(folder / STAGE_FILE, about)
        # The code of our own models is no data, so the memory does not hold it; saving the model writes it again.
        model = build_classifier(wanted.name, self.parts.train).model
        type(model).from_pretrained(folder).save_pretrained(folder)
        write_json(done_file(folder), about["trained"])
        self.run.say(f"Chain: a stage of {wanted.num_params:,} parameters was trained before and is in the memory.")
        return True

    def _about(self, folder: Path) -> dict[str, Any] | None:
        """What a stage's folder says of it; None where it says nothing that can be read."""
        try:
            about = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
            StageRecord(**about["stage"])
            Trained(None, **about["trained"])  # type: ignore[arg-type]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return about if about.get("format_version") == _STAGE_FORMAT else None

    def _publish(self, folder: Path, key: str, record: StageRecord, trained: Trained) -> None:
        """Makes the stage's folder usable alone, and keeps a copy for other runs."""
        if not self.run.is_main:
            return
        saved = {name: getattr(trained, name) for name in ("seconds", "steps", "curve", "calibration", "class_weights")}
        about = {"format_version": _STAGE_FORMAT, "key": key, "stage": dataclasses.asdict(record), "trained": saved}
        write_json(folder / STAGE_FILE, about)
        write_stage_card(self.run.record, record, folder)
        if self.store is not None:
            self.store.keep_model(key, folder)

    def fit(
        self,
        name: str,
        build: Callable[[], Classifier],
        schedule: Schedule,
        folder: Path,
        stages: Sequence[TorchTeacher],
    ) -> Trained:
        """A model trained into a folder from the teachers and these stages."""
        recipe = self.run.recipe
        if schedule.max_steps > 0:  # a probe is looked at once, at its end
            recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, evaluations=1))
        trained = train_or_load(
            name,
            build,
            recipe,
            schedule,
            folder,
            self.parts.train,
            self.parts.validation,
            num_views=self.parts.num_views,
            teachers=self.guides(stages),
            guide=self.parts.guide,
        )
        # The saved weights, which are the same in every process; of batch statistics each process has its own.
        trained.classifier.model = type(trained.classifier.model).from_pretrained(folder)
        return trained

    def as_teacher(self, name: str, classifier: Classifier, source: str) -> TorchTeacher:
        """A trained classifier as one that teaches."""
        return TorchTeacher.of(name, classifier, self.parts.train, device=self.run.device, source=source)

    def right(self, classifier: Classifier) -> torch.Tensor:
        """Which validation rows are answered right, bool `(rows,)`; the main process's answer in all of them."""
        judged = self.as_teacher("judged", classifier, "judged")
        logits = student_logits(judged, self.parts.validation, self.run.recipe.training.eval_batch_size)
        answer = [to_bits(logits.argmax(-1) == self.parts.validation.labels)]
        return from_bits(broadcast_object_list(answer)[0])

    def key(self, wanted: Intermediate) -> str:
        """Of all that decides a stage's weights: another recipe that needs the same stage arrives at the same key."""
        tree, rows = recipe_tree(self.run.recipe), self.parts.train
        build = self.builder(wanted)
        start = build.source(build().model)
        return json_digest(
            {
                "model": wanted.name,
                "settings": {
                    section: {name: value for name, value in tree[section].items() if name not in left_out}
                    for section, left_out in _NOT_IN_KEY.items()
                },
                "schedule": dataclasses.asdict(self.schedule()),
                "processes": PartialState().num_processes,
                "train": [rows.fingerprint, rows.view_key() if self.parts.num_views else None, self.parts.num_views],
                "guide": self.parts.guide.fingerprint,
                "validation": self.parts.validation.fingerprint,
                "labels": [part.labels.tolist() for part in (rows, self.parts.guide)],
                "guides": [guide.identity(rows) for guide in self.guides(self.finished)],
                "start": start.fingerprint if start is not None else None,
            }
        )


class _Probes:
    """Short trainings that tell what a stage brings to the student."""

    def __init__(self, stages: _Stages, build_student: StudentBuilder) -> None:
        self.stages, self.build_student = stages, build_student
        self.config = stages.run.recipe.chain
        self.folder = stages.folder / "probes"
        self.student_flops = training_flops(build_student(meta=True), stages.parts.train)

    def before(self, candidate: Intermediate) -> ChainDecision:
        """Judged by a stage that is itself trained for a short time only."""
        started, stages = time.perf_counter(), self.stages
        name = f"stage-{len(stages.finished) + 1}"
        folder = self.folder / name
        trained = stages.fit(
            f"probe of {name}", stages.builder(candidate), self._short(stages.schedule()), folder, stages.finished
        )
        decision = self._judge("probe", candidate, stages.as_teacher(name, trained.classifier, candidate.name), started)
        return decision

    def after(self, candidate: Intermediate, stage: TorchTeacher) -> ChainDecision:
        """Judged by the finished stage."""
        return self._judge("measured", candidate, stage, time.perf_counter())

    def _judge(self, moment: str, candidate: Intermediate, stage: TorchTeacher, started: float) -> ChainDecision:
        finished = self.stages.finished
        gain = estimate_gain(
            self._students(f"{stage.name}-{moment}", [*finished, stage]),
            self._students(f"{stage.name}-without", finished),
        )
        cost = self._cost(candidate)
        required = required_gain(self.config.min_gain, cost)
        accepted = (is_promising if moment == "probe" else is_confirmed)(gain, required)
        seconds = time.perf_counter() - started
        about = (moment, candidate.name, candidate.num_params)
        return ChainDecision(*about, gain.gain, gain.standard_error, required, cost, accepted, seconds)

    def _cost(self, candidate: Intermediate) -> float:
        """A stage's training in student trainings, by operations: seconds would make the decision depend on luck."""
        rows = self.stages.parts.train
        flops = training_flops(build_classifier(candidate.name, rows, meta=True), rows)
        steps = [
            total_steps(self.stages.run.recipe, one, len(rows)) for one in (self.stages.schedule(), self._student())
        ]
        return flops * steps[0] / (self.student_flops * steps[1])

    def _students(self, name: str, above: Sequence[TorchTeacher]) -> torch.Tensor:
        """Which validation rows short-trained students answer right, bool `(seeds, rows)`; kept as they get known."""
        answers = []
        for extra in range(self.config.probe_seeds):
            folder = self.folder / f"{name}-{extra}"
            file = folder.with_suffix(".json")
            if not file.is_file():
                schedule = self._short(self._student())
                schedule = dataclasses.replace(schedule, seed=schedule.seed + extra)
                build = self._student_builder(schedule.seed, above)
                told = f"probe of {name}, {extra + 1} of {self.config.probe_seeds}"
                right = self.stages.right(self.stages.fit(told, build, schedule, folder, above).classifier)
                if self.stages.run.is_main:
                    write_json(file, to_bits(right))
                    shutil.rmtree(folder)
                    done_file(folder).unlink()
                PartialState().wait_for_everyone()
            answers.append(from_bits(json.loads(file.read_text(encoding="utf-8"))))
        return torch.stack(answers)

    def _student(self) -> Schedule:
        return student_schedule(self.stages.run.recipe)

    def _student_builder(self, seed: int, above: Sequence[TorchTeacher]) -> WarmBuild:
        starts_warm = self.config.warm_start and not self.stages.run.recipe.student.pretrained
        return WarmBuild(lambda: self.build_student(seed=seed), self.stages.above(above) if starts_warm else [])

    def _short(self, schedule: Schedule) -> Schedule:
        steps = total_steps(self.stages.run.recipe, schedule, len(self.stages.parts.train))
        return dataclasses.replace(schedule, max_steps=max(1, round(self.config.probe_share * steps)), keep="last")
