"""One run while it happens: its recipe, folder and record, kept in step on disk. Trains and decides nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from hf_hpmkd import report
from hf_hpmkd.classifier_training import Trained
from hf_hpmkd.data import DataParts
from hf_hpmkd.model_card import write_card
from hf_hpmkd.recipe import Recipe, TeacherConfig, fingerprint, recipe_tree
from hf_hpmkd.recipe_rules import is_trained_here
from hf_hpmkd.run_environment import environment
from hf_hpmkd.run_memory import RunMemory
from hf_hpmkd.run_record import RECORD_FILE, JobRecord, RunRecord, Status, TeacherRecord
from hf_hpmkd.teacher_kinds import Teacher


class Run:
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
        """Adds the seconds of a phase, and when it was, to the record and saves it."""
        started, begun = time.perf_counter(), time.time()
        yield
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + time.perf_counter() - started
        self.record.jobs.append(JobRecord(name, "main", begun, time.time()))
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
        self.say(f"{parts.kind}, {len(parts.class_names)} classes; rows: {sizes}.")
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

    def keep_curve(self, name: str, history: list[dict[str, float]]) -> None:
        self.record.curves[name] = [dict(row) for row in history]
        self.save()

    def keep_start(self, share: float, origin: str) -> None:
        """What the student began with: share of its parameters that came from a model above, and which; "" none."""
        if self.record.chain is not None:
            self.record.chain.student_warm_start, self.record.chain.student_origin = share, origin
        if origin:
            self.say(f"The student began with weights of {origin}: {share:.0%} of its parameters.")

    def keep_weights(self, student: Trained, guides: list[Teacher]) -> None:
        """What the student made of those above it. guides: what it learned from."""
        self.record.taught_by = [guide.name for guide in guides]
        self.record.class_weights = student.class_weights or None
        last = next((row for row in reversed(student.curve) if any(key.startswith("weight/") for key in row)), {})
        stages = self.record.chain.stages if self.record.chain is not None else []
        for stage in stages:
            stage.mean_weight = last.get(f"weight/{stage.name}")
        calibration = dict(zip(self.record.taught_by, student.calibration or [], strict=False))
        for teacher in self.record.teachers:
            teacher.calibration_temperature = calibration.get(teacher.name)
            teacher.mean_weight = last.get(f"weight/{teacher.name}")

    def write_report(self) -> None:
        if not self.is_main:
            return
        self.record.status = "completed"
        self._write_card(self.recipe.hub.license)

    def _write_card(self, license: str | None) -> None:
        plots = report.draw_plots(self.record, self.folder / "plots")
        write_card(self.record, self.folder, self.folder / "student", plots, license)

    def keep_hub(self, recipe: Recipe) -> None:
        """Of a finished run: writes the card anew where the recipe names another licence by now."""
        hub = self.record.recipe.setdefault("hub", {})
        if self.is_main and recipe.hub.license not in (None, hub.get("license")):
            hub["license"] = recipe.hub.license
            self.save()
            self._write_card(recipe.hub.license)
            self.say(f"The card is written anew, with the licence {recipe.hub.license}.")


def new_record(recipe: Recipe) -> RunRecord:
    """An empty record of a run that starts now."""
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
