"""The main job: several teachers in, one small, trained, documented student out. Reads like the algorithm.

    parts    = train, guide, validation, test                      (data)
    teachers = loaded, or trained on the spot without guide rows    (teachers, classifier_training)
    direct   = the student trained on labels alone, to compare      (classifier_training)
    student  = the student trained on the teachers' outputs         (trainer, distiller)
    report   = test opened once; record, table, plots, card         (evaluation, report, model_card)
    memory   = teacher outputs found there, the run added at the end (run_memory)

Every step leaves its result in the output folder, so that the same command goes on where an interrupted run stood.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd import report
from hf_hpmkd.classifier_training import Schedule, Trained, student_schedule, train_or_load
from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.data import DataParts, load_parts
from hf_hpmkd.evaluation import evaluate_teachers, evaluate_test
from hf_hpmkd.heads import find_classifier_head
from hf_hpmkd.hub_store import check_can_push, push_run
from hf_hpmkd.metrics import load_metric
from hf_hpmkd.model_card import write_card
from hf_hpmkd.recipe import Recipe, TeacherConfig, fingerprint, recipe_tree
from hf_hpmkd.recipe_rules import is_sklearn, is_trained_here, teacher_names
from hf_hpmkd.run_folder import claim
from hf_hpmkd.run_memory import RunMemory, run_memory
from hf_hpmkd.run_record import RECORD_FILE, ModelRecord, RunRecord, Status, TeacherRecord, code_commit, environment
from hf_hpmkd.teacher_kinds import Teacher, check_teacher
from hf_hpmkd.teacher_training import train_teacher
from hf_hpmkd.teachers import load_teacher

_CHECKED_ROWS = 64


def distill(recipe: Recipe, recipe_source: str = "a recipe") -> Path:
    """Runs a recipe and returns its output folder, with `student/`, `run_record.json`, `plots/` and `README.md`.

    A finished run of the same recipe is left as it is and its table shown again. Raises ValueError (with the rule, what
    arrived and the way out) on anything that cannot work, before the long work starts.
    """
    folder = Path(recipe.output.dir)
    if recipe.hub.push and recipe.hub.repo_id is not None:
        check_can_push(recipe.hub.repo_id)
    # Several processes without a GPU find each other (gloo) only where the CPU is asked for in so many words.
    state = PartialState(cpu=not torch.accelerator.is_available())
    disable_progress_bar()  # transformers draws one for every checkpoint it writes
    with state.main_process_first():
        known = claim(folder, fingerprint(recipe), recipe.output.overwrite and state.is_main_process)
        record = known or _new_record(recipe)
        if state.is_main_process and record.status != "completed":
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(recipe), sort_keys=False), encoding="utf-8")
            record.status, record.error = "running", None
            record.save(folder / RECORD_FILE)
    with run_memory(recipe, state.is_main_process) as memory:
        run = _Run(folder, record, memory)
        if record.status == "completed":
            run.say(f"{folder} holds the finished run of {recipe_source}; `output.overwrite=true` runs it again.")
        else:
            memory.before()
            with run.recording():
                _run(run)
        memory.after(record, folder / "student")
    run.say("\n" + report.result_table(record))
    run.say(f"\nThe student is in {folder / 'student'}, its card in {folder / 'README.md'}.")
    if recipe.hub.push and recipe.hub.repo_id is not None and state.is_main_process:
        run.say(f"Published as {push_run(folder, recipe.hub.repo_id, recipe.hub.private)}.")
    return folder


def _run(run: "_Run") -> None:
    recipe, record = run.recipe, run.record
    for metric in recipe.training.metrics:
        load_metric(metric)  # a name that does not exist should not be found out at the end
    with run.phase("data"):
        all_trained_here = all(is_trained_here(teacher.model) for teacher in recipe.teachers)
        parts = load_parts(recipe.data, task=recipe.task.type, teachers_saw_train=not all_trained_here)
        record.class_names = parts.class_names
        record.parts = parts.provenance
        record.commits |= {"hf_hpmkd": code_commit(), "data": parts.provenance.get("commit")}
        run.describe_data(parts)
        build_student = student_builder(recipe, parts)
        blueprint = build_student(meta=True)
        num_params = check_student(recipe, blueprint, len(parts.class_names))
        if recipe.student.pretrained:
            record.commits["student"] = getattr(blueprint.model.config, "_commit_hash", None)

    with run.phase("teachers"):
        named = list(zip(teacher_names(recipe), recipe.teachers, strict=True))
        # What is loaded can be wrong in many ways, so it comes before what takes minutes to train.
        loaded = {name: load(run, name, one, parts) for name, one in named if not is_trained_here(one.model)}
        teachers = [loaded.get(name) or train(run, name, one, parts) for name, one in named]
        for one, (_, config) in zip(teachers, named, strict=True):
            run.keep_teacher(one, config)
        run.warn_if_larger_than_every_teacher(num_params, teachers)
        evaluate_teachers(run.record, teachers, parts, recipe, run.memory.cache, say=run.say, warn=run.warn)

    def train_student(name: str, with_teachers: list[Teacher]) -> Trained:
        with run.phase(name):
            trained = train_or_load(
                name,
                build_student,
                recipe,
                student_schedule(recipe),
                run.folder / name,
                parts.train,
                parts.validation,
                num_views=parts.num_views,
                teachers=with_teachers,
                guide=parts.guide if with_teachers else None,
                on_log=lambda history: run.keep_curve(name, history),
            )
        run.keep_curve(name, trained.curve)
        record.models[name] = ModelRecord(name=name, num_params=num_params, seconds=trained.seconds)
        return trained

    trained: dict[str, Trained] = {}
    if recipe.distillation.direct:
        trained["direct"] = train_student("direct", [])
    trained["student"] = train_student("student", teachers if uses_teachers(recipe) else [])
    run.keep_weights(trained["student"], teachers)

    with run.phase("report"):
        classifiers = {name: one.classifier for name, one in trained.items()}
        evaluate_test(record, teachers, classifiers, parts, recipe, run.memory.cache, say=run.say)
        run.memory.count(record)
        run.write_report()


def student_builder(recipe: Recipe, parts: DataParts):
    """A function that makes the student with its initial weights (or on the meta device), from the recipe alone."""
    student = recipe.student

    def build(meta: bool = False) -> Classifier:
        return build_classifier(
            student.model,
            parts.train,
            seed=recipe.training.seed,
            pretrained=student.pretrained,
            revision=student.revision,
            trust_remote_code=student.trust_remote_code,
            meta=meta,
        )

    return build


def check_student(recipe: Recipe, student: Classifier, num_classes: int) -> int:
    """The student's parameters. Raises ValueError where the settings need features that its architecture lacks."""
    assert student.model is not None
    distillation = recipe.distillation
    reads = distillation.gate in ("mixture", "joint") or distillation.temperature_schedule == "learned"
    if uses_teachers(recipe) and (reads or distillation.feature_weight > 0):
        find_classifier_head(student.model, num_classes)
    return student.num_params


def uses_teachers(recipe: Recipe) -> bool:
    """Whether the student's loss listens to the teachers at all."""
    return recipe.distillation.alpha > 0 or recipe.distillation.feature_weight > 0


def load(run: "_Run", name: str, config: TeacherConfig, parts: DataParts) -> Teacher:
    """A teacher from the Hub, timm, a file or a column, checked on a few guide rows."""
    teacher = load_teacher(
        config.model,
        parts.train,
        name=name,
        labels=config.labels,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        trusted_types=config.trusted_types,
        device=run.device,
    )
    few = torch.arange(min(_CHECKED_ROWS, len(parts.guide)))
    check_teacher(teacher, teacher.logits(parts.guide, few).cpu(), parts.guide.labels[few])
    return teacher


def train(run: "_Run", name: str, config: TeacherConfig, parts: DataParts) -> Teacher:
    """A teacher trained on the spot into `teachers/<name>`, or found there when the run is resumed."""
    training = run.recipe.training
    schedule = Schedule(
        epochs=config.epochs or training.epochs,
        max_steps=-1,
        learning_rate=config.learning_rate or training.learning_rate,
        batch_size=config.batch_size or training.batch_size,
        seed=training.seed,
    )
    folder = run.folder / "teachers" / name
    with PartialState().main_process_first() if is_sklearn(config.model) else nullcontext():
        teacher, run.training_seconds[name] = train_teacher(config, name, schedule, run.recipe, parts, folder)
    return teacher.to(run.device)


class _Run:
    """The recipe, folder, record and memory of one run; only the main process speaks and writes."""

    def __init__(self, folder: Path, record: RunRecord, memory: RunMemory) -> None:
        self.folder, self.record, self.memory = folder, record, memory
        self.recipe, self.is_main = memory.recipe, memory.is_main
        self.device = PartialState().device
        self.training_seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        self.memory.say(text)

    def warn(self, text: str) -> None:
        if text not in self.record.warnings:
            self.record.warnings.append(text)
            self.say(f"Warning: {text}")

    def save(self) -> None:
        if self.is_main:
            self.record.save(self.folder / RECORD_FILE)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of a phase to the record and saves it."""
        started = time.perf_counter()
        yield
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + time.perf_counter() - started
        self.save()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Whatever ends the run, the record says how it ended."""
        try:
            yield
        except KeyboardInterrupt:
            self._end("interrupted")
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        self._end("completed")

    def _end(self, status: Status, error: str | None = None) -> None:
        self.record.status, self.record.error = status, error
        self.record.finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.save()

    def describe_data(self, parts: DataParts) -> None:
        sizes = ", ".join(f"{name} {len(getattr(parts, name))}" for name in ("train", "guide", "validation", "test"))
        self.say(f"{parts.task}, {len(parts.class_names)} classes; rows: {sizes}.")
        for warning in parts.provenance.get("warnings", []):
            self.warn(warning)

    def warn_if_larger_than_every_teacher(self, num_params: int, teachers: list[Teacher]) -> None:
        sizes = [teacher.num_params for teacher in teachers if teacher.num_params is not None]
        if sizes and num_params > max(sizes):
            self.warn(
                f"The student ({num_params:,} parameters) is larger than every teacher whose size is known (at most "
                f"{max(sizes):,}), so nothing is compressed."
            )

    def keep_teacher(self, teacher: Teacher, config: TeacherConfig) -> None:
        """Writes down what the teacher is; its figures are the evaluation's."""
        if config.license is not None:
            teacher.license = config.license
        known = next((one for one in self.record.teachers if one.name == teacher.name), None)
        if known is None:
            known = TeacherRecord(name=teacher.name, source=config.model, kind=teacher.kind)
            self.record.teachers.append(known)
        known.num_params, known.license, known.commit = teacher.num_params, teacher.license, teacher.commit
        known.trained_here, known.seconds = is_trained_here(config.model), self.training_seconds.get(teacher.name)
        self.record.commits[teacher.name] = teacher.commit

    def keep_curve(self, name: str, history: list[dict[str, float]]) -> None:
        self.record.curves[name] = [dict(row) for row in history]
        self.save()

    def keep_weights(self, student: Trained, teachers: list[Teacher]) -> None:
        self.record.class_weights = student.class_weights or None
        last = next((row for row in reversed(student.curve) if any(key.startswith("weight/") for key in row)), {})
        for index, teacher in enumerate(self.record.teachers):
            teacher.mean_weight = last.get(f"weight/{teachers[index].name}")
            if student.calibration is not None:
                teacher.calibration_temperature = student.calibration[index]

    def write_report(self) -> None:
        if not self.is_main:
            return
        self.record.status = "completed"
        plots = report.draw_plots(self.record, self.folder / "plots")
        write_card(self.record, self.folder, self.folder / "student", plots)


def _new_record(recipe: Recipe) -> RunRecord:
    versions, hardware = environment()
    return RunRecord(
        status="running",
        recipe=recipe_tree(recipe),
        recipe_fingerprint=fingerprint(recipe),
        seed=recipe.training.seed,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions,
        hardware=hardware,
    )
