"""What a run was and what it gave, as one JSON file. Everything that is printed, drawn or claimed comes from here.

Imports nothing of ours and no model library.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

FORMAT_VERSION = 1
RECORD_FILE = "run_record.json"

Status = Literal["running", "completed", "failed", "interrupted"]
Number = int | float

_STRICT = ConfigDict(extra="forbid")


@dataclass
class TeacherRecord:
    """One teacher. accuracy: part -> share of rows, 0 to 1. latency_ms: median milliseconds from one raw row to its
    logits, preprocessing included. mean_weight: mean over the last logged training steps, 0 to 1.
    """

    __pydantic_config__ = _STRICT

    name: str
    source: str
    kind: str
    num_params: int | None = None
    trained_here: bool = False
    license: str | None = None
    commit: str | None = None
    accuracy: dict[str, Number] = field(default_factory=dict)
    calibration_temperature: Number | None = None
    mean_weight: Number | None = None
    latency_ms: Number | None = None
    seconds: Number | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class ModelRecord:
    """The student that the run kept ("student"), the same model trained without teachers ("direct"), or the distilled
    one where the run kept the direct one ("distilled").

    metrics: part -> metric -> value. retention: test accuracy over that of the best single teacher on the same rows.
    compression: parameters of the largest teacher that has a count, over its own. seconds: of training.
    latency_ms: as in TeacherRecord.
    """

    __pydantic_config__ = _STRICT

    name: str
    num_params: int | None = None
    metrics: dict[str, dict[str, Number]] = field(default_factory=dict)
    retention: Number | None = None
    compression: Number | None = None
    seconds: Number | None = None
    latency_ms: Number | None = None

    def accuracy(self, part: str = "test") -> float | None:
        """Accuracy on a part, 0 to 1; None if it was not measured."""
        return self.metrics.get(part, {}).get("accuracy")


@dataclass
class StageRecord:
    """One intermediate model of the chain. model: its name. target: parameters asked for. guides: what taught it.

    warm_start: share of its parameters that came from a model above, 0 to 1. accuracy: on validation rows, 0 to 1.
    reused: found finished, from an earlier run. mean_weight: as in TeacherRecord, for the student.
    """

    __pydantic_config__ = _STRICT

    name: str
    model: str
    num_params: int
    target: int | None = None
    guides: list[str] = field(default_factory=list)
    warm_start: Number = 0.0
    accuracy: Number | None = None
    seconds: Number | None = None
    steps: int | None = None
    reused: bool = False
    mean_weight: Number | None = None


@dataclass
class ChainDecision:
    """One step of the chain's reasoning. moment: "probe" (before a stage is trained) or "measured" (after).

    gain, standard_error, required: points of validation accuracy of the student. cost: the stage's training over the
    student's, in floating point operations. seconds: of the trainings that only the decision needed.
    """

    __pydantic_config__ = _STRICT

    moment: str
    model: str
    num_params: int
    gain: Number
    standard_error: Number
    required: Number
    cost: Number
    accepted: bool
    seconds: Number = 0.0


@dataclass
class ChainRecord:
    """The progressive chain, largest stage first. reason: why it has the length it has, in a sentence.

    left_out: stages that were trained and, once measured, not kept. student_warm_start: share of the student's
    parameters that came from a model above, 0 to 1. student_origin: which; "" none.
    """

    __pydantic_config__ = _STRICT

    stages: list[StageRecord] = field(default_factory=list)
    decisions: list[ChainDecision] = field(default_factory=list)
    reason: str = ""
    student_warm_start: Number = 0.0
    student_origin: str = ""
    left_out: list[StageRecord] = field(default_factory=list)


@dataclass
class JobRecord:
    """A job or a phase of a run that happened. worker: who did it; "main" is the run's own process, whose phases may
    wait for workers. kind: jobs whose estimates err alike. started, ended: seconds since 1970. estimated: seconds,
    before it began and without what earlier runs had taught; None for phases. attempts: how often it was started.
    """

    __pydantic_config__ = _STRICT

    name: str
    worker: str
    started: Number
    ended: Number
    kind: str = "phase"
    estimated: Number | None = None
    attempts: int = 1


@dataclass
class TrialRecord:
    """One configuration that was tried. name: it in words. steps: of its training. gain, standard_error: points over
    direct training at the same step, by validation rows, and guide rows too where AutoRecord has seeds. expected:
    (gain, spread) in points, before the try.
    """

    __pydantic_config__ = _STRICT

    name: str
    steps: int
    gain: Number
    standard_error: Number
    expected: tuple[Number, Number]
    seconds: Number = 0.0


@dataclass
class AutoRecord:
    """What the adaptive configuration chose. reason: why, in a sentence. knowledge: where expectations came from.
    alike: the data sets whose runs were most like this one. configuration: the fields of
    `adaptive_configuration.Configuration`. overrides: section -> key -> value, how the recipe was changed. total_steps:
    of one training; budget_steps: that the tries might add, extra_steps: that they added. seconds: of the tries;
    extra_seconds: of those that no training goes on from, None in a record from before this was told.
    deciding_seconds: of all the rest. seeds: how often each was tried, where all were trained at once and to their end
    (they count as the steps of one student that take as long); 0 where one by one.
    """

    __pydantic_config__ = _STRICT

    reason: str
    knowledge: str
    alike: list[str]
    configuration: dict[str, Any]
    overrides: dict[str, dict[str, Any]]
    features: dict[str, Number]
    trials: list[TrialRecord]
    total_steps: int
    budget_steps: int
    extra_steps: int
    seconds: Number
    deciding_seconds: Number
    extra_seconds: Number | None = None
    seeds: int = 0


@dataclass
class KeptRecord:
    """Which of two students a run kept, by the validation rows that each answered right, or by those and the guide rows
    where a gain was needed (in records of before 2026-11-28 by validation rows alone).

    kept: "distilled" or "direct". gain, standard_error: of the distilled one over the direct one, on the same rows, in
    points. rows: how many. needed: the gain that the distilled one had to show; None: not to be surely worse sufficed.
    """

    __pydantic_config__ = _STRICT

    kept: Literal["distilled", "direct"]
    gain: Number
    standard_error: Number
    rows: int
    needed: Number | None = None


@dataclass
class RunRecord:
    """One distillation.

    parts: the provenance of the data; parts["parts"][part]["rows"] is a part's size. rows: part -> fingerprint of its
    rows and labels. curves: run name ("student",
    "direct", a teacher, a stage) -> rows of its log, each with `step`. taught_by: what taught the student, teachers and
    stages of the chain. class_weights: `taught_by x classes`, mean weight of each on the guide rows of each class; a
    column of zeros is a class without guide rows. kept: None for a run without direct training, one that keeps the
    distilled student anyhow, and before it is decided. auto: None for a run whose recipe is taken as it is, and before
    it is decided. chain: None before it is decided. seconds: phase -> seconds.
    memory: which one, and what was found in it; {} for a run without. pipeline: who did the jobs, and why; {} for a run
    without workers. processes: whose batches make a step; None in older records. jobs: what happened when, an
    interrupted run's jobs before its last ones.
    events: {"time", "text"}. Times are UTC, ISO 8601.
    """

    __pydantic_config__ = _STRICT

    status: Status = "running"
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_fingerprint: str = ""
    seed: int = 0
    started: str | None = None
    finished: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    teachers: list[TeacherRecord] = field(default_factory=list)
    auto: AutoRecord | None = None
    chain: ChainRecord | None = None
    models: dict[str, ModelRecord] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Number | None]]] = field(default_factory=dict)
    taught_by: list[str] = field(default_factory=list)
    class_weights: list[list[Number]] | None = None
    kept: KeptRecord | None = None
    class_names: list[str] = field(default_factory=list)
    seconds: dict[str, Number] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)
    processes: int | None = None
    jobs: list[JobRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    events: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def distilled(self) -> ModelRecord | None:
        """The student that learned from the teachers, kept or not; None before it is trained."""
        return self.models.get("distilled", self.models.get("student"))

    @property
    def chose_labels_alone(self) -> bool:
        """Whether the adaptive configuration chose the labels alone, at whatever rate and from whatever weights."""
        return self.auto is not None and not self.auto.configuration["alpha"]

    @property
    def other_name(self) -> str:
        """What the student is called that was trained otherwise than the direct one."""
        return "chosen" if self.chose_labels_alone else "distilled"

    @property
    def chose_direct(self) -> bool:
        """Whether what it chose is the run's direct training and nothing else."""
        if self.auto is None or not self.chose_labels_alone:
            return False
        chosen = self.auto.configuration
        return (chosen["learning_rate"], chosen["weight_decay"]) == (1, 1) and not chosen.get("warm_start")

    @property
    def kept_direct(self) -> bool:
        """Whether the directly trained student took the other one's place."""
        return self.kept is not None and self.kept.kept == "direct"

    @property
    def distils(self) -> bool:
        """Whether the run trained a student on the teachers' answers or features, kept or not."""
        asked = self.recipe.get("distillation", {})
        silent = self.auto is None and asked.get("alpha") == 0 and not asked.get("feature_weight")
        return not silent and not self.chose_labels_alone

    @property
    def labels_alone(self) -> bool:
        """Whether the student that the run left learned nothing from the teachers' answers."""
        return not self.distils or self.kept_direct

    @property
    def began_with(self) -> str:
        """Name of the teacher, or stage, whose weights the student that the run left began with; "" for none."""
        return "" if self.chain is None or self.kept_direct else self.chain.student_origin

    @property
    def hinted(self) -> bool:
        """Whether the student that the run left was drawn to the layers of the teacher that it began with."""
        asked = self.recipe.get("distillation", {})
        return bool(asked.get("hint_weight") and self.began_with) and not self.chose_labels_alone

    def num_rows(self, part: str) -> int | None:
        """Rows of a part; None if the record does not say."""
        return self.parts.get("parts", {}).get(part, {}).get("rows")

    def guessed(self, part: str) -> float:
        """Accuracy, 0 to 1, of always answering the commonest class; where the record does not say, of guessing."""
        known = self.parts.get("parts", {}).get(part, {}).get("commonest_class")
        return known if known is not None else 1 / len(self.class_names) if self.class_names else 0.0

    def best_teacher(self, part: str = "test") -> TeacherRecord | None:
        """The single teacher with the highest accuracy on a part; None if no teacher was measured on it."""
        measured = [teacher for teacher in self.teachers if part in teacher.accuracy]
        return max(measured, key=lambda teacher: teacher.accuracy[part], default=None)

    def retention(self, accuracy: float | None, part: str = "test") -> float | None:
        """`accuracy` over that of the best single teacher on the same rows; None where either is missing."""
        best = self.best_teacher(part)
        if accuracy is None or best is None or not best.accuracy[part]:
            return None
        return accuracy / best.accuracy[part]

    def compression(self, num_params: int | None) -> float | None:
        """Parameters of the largest teacher over `num_params`; None where no teacher, or not the model, has a count."""
        sizes = [teacher.num_params for teacher in self.teachers if teacher.num_params]
        return max(sizes) / num_params if sizes and num_params else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinity become the strings "NaN", "Infinity", "-Infinity".

        Raises TypeError, naming the key, for a value that JSON has no form for.
        """
        tree = plain_values(dataclasses.asdict(self), "record")
        return {"format_version": tree.pop("format_version"), **tree}

    @classmethod
    def from_dict(cls, tree: Any, source: str = "the run record") -> "RunRecord":
        """Reads what `to_dict` gave. Raises ValueError for a newer format, unknown keys and values of a wrong type."""
        if not isinstance(tree, dict) or not isinstance(tree.get("format_version"), int):
            raise ValueError(f"A run record is a JSON object with a whole `format_version`; {source} is none.")
        if tree["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{source} has format {tree['format_version']}, this version of hf_hpmkd reads up to {FORMAT_VERSION}. "
                "Update hf_hpmkd."
            )
        try:
            return _ADAPTER.validate_python(tree)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
        unknown = [_dotted(fault["loc"]) for fault in faults if fault["type"] == "unexpected_keyword_argument"]
        if unknown:
            raise ValueError(
                f"{source} holds keys that this version of hf_hpmkd does not know: {', '.join(unknown)}. A newer "
                "version wrote it, or a hand; update hf_hpmkd, or take the keys out."
            )
        lines = "; ".join(f"{_dotted(fault['loc'])}: {fault['msg']}" for fault in faults)
        raise ValueError(f"{source} cannot be read: {lines}. Mend the file, or run again with `output.overwrite=true`.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record as a whole or not at all: into a temporary file beside it, then renamed.

        Raises TypeError or ValueError for a record that could not be read back; the old file then stays.
        """
        tree = self.to_dict()
        self.from_dict(tree, "the record to be saved")
        write_whole(Path(path), json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunRecord":
        """Reads a saved record. Raises FileNotFoundError, and ValueError as `from_dict` does or for damaged JSON."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"There is no run record at {path}. Give the folder of a run (of a comparison: hpmkd compare --table "
                "FOLDER)."
            ) from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(
                f"The run record {path} must be JSON, but: {error}. Remove the file, or restore it from a copy."
            ) from error
        return cls.from_dict(tree, str(path))

    def public(self) -> "RunRecord":
        """A copy fit to be published: of each local path only the last name is left."""
        return self.from_dict(without_paths(self.to_dict()))


_ADAPTER = TypeAdapter(RunRecord)


def write_whole(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all: into a temporary one beside it, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in location if key not in ("int", "float"))


def plain_values(value: Any, where: str) -> Any:
    """The value as JSON takes it: see `RunRecord.to_dict`. where: names it in messages."""
    if isinstance(value, dict):
        return {str(key): plain_values(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # scalars and arrays of numpy and torch
        return plain_values(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"`{where}` must be a number, text, list or dict, got {type(value).__name__}. Convert it first.")


# ---- paths -----------------------------------------------------------------------------------------------------------

# Where a local path begins in running text: not inside a word, nor at the // of a URL.
_START = r"(?<![\w/.\\~-])(?:file://)?"
_NAME = r"[^\s/\\'\"`<>|:;,()\[\]{}]+"
_QUOTED_PATH = re.compile(r"(?P<quote>['\"`])(?:file://)?(?:~?/|\.\./|[A-Za-z]:[/\\])(?![/\\])[^'\"`\n]*(?P=quote)")
_PATH = re.compile(
    rf"{_START}(?:(?:/(?!/)|\\\\|\.\./)(?:{_NAME}[/\\])+|(?:~[\w-]*|[A-Za-z]:)[/\\](?:{_NAME}[/\\])*){_NAME}/?"
)
_WHOLE_PATH = re.compile(r"(?:local-dir:)?(?:file://)?(?:~|/(?!/)|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)[^\n]*")


def last_name(path: str) -> str:
    """The last component of a POSIX or Windows path, without a trailing slash."""
    return PurePosixPath(PureWindowsPath(path.rstrip("/\\")).as_posix()).name


def hide_paths(text: str) -> str:
    """The text with each local path (absolute, or from ~ or ..) cut down to its last name. URLs and Hub ids stay."""
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home + os.sep, "~" + os.sep)  # also catches a home with spaces in its name
    text = _QUOTED_PATH.sub(lambda found: found["quote"] + last_name(found[0][1:-1]) + found["quote"], text)
    return _PATH.sub(lambda found: last_name(found[0]), text)


def without_paths(value: Any, key: str = "") -> Any:
    """A tree of plain values with each local path cut down to its last name. key: the one that the value stands at."""
    if isinstance(value, dict):
        return {name: without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in _PATH_KEYS and _WHOLE_PATH.fullmatch(value):
        return ("local-dir:" if value.startswith("local-dir:") else "") + last_name(value)
    return hide_paths(value)


_PATH_KEYS = ("path", "dir", "cache_dir", "model", "source")  # their whole value may be a path, with spaces
