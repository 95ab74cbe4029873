"""What a comparison was and gave, as JSON: one file per trained student, and one for the whole.

Imports the run record alone, and no model library.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from hf_hpmkd.run_record import ChainRecord, Number, TeacherRecord, plain_values, without_paths, write_whole

FORMAT_VERSION = 1
COMPARISON_FILE = "comparison.json"

_STRICT = ConfigDict(extra="forbid")


@cache
def _adapter(what: type) -> TypeAdapter[Any]:
    """Building one takes longer than all else, and a comparison reads the files of its students again and again."""
    return TypeAdapter(what)


class _JsonFile:
    """A dataclass that is written to a JSON file and read back."""

    _what: ClassVar[str]
    format_version: int

    def to_dict(self) -> dict[str, Any]:
        tree = plain_values(dataclasses.asdict(self), "record")  # type: ignore[call-overload]
        return {"format_version": tree.pop("format_version"), **tree}

    @classmethod
    def from_dict(cls, tree: Any, source: str) -> Self:
        """Raises ValueError for a newer format, unknown keys and values of a wrong type."""
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if not isinstance(version, int):
            raise ValueError(f"{cls._what} is a JSON object with a whole `format_version`; {source} is none.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{source} has format {version}, this version of hf_hpmkd reads up to {FORMAT_VERSION}. Update "
                "hf_hpmkd."
            )
        try:
            return _adapter(cls).validate_python(tree)  # type: ignore[arg-type]
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)
            )
        raise ValueError(f"{source} cannot be read: {faults}. Mend the file, or remove it and run again.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file as a whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Raises FileNotFoundError, and ValueError as `from_dict` does or for damaged JSON."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"There is no {path}. The files of a comparison lie in the folder that `--output` named."
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} must be JSON, but: {error}. Remove the file and run again.") from error
        return cls.from_dict(tree, str(path))


@dataclass
class Score:
    """A model's answers on one part. accuracy: share of rows. hits: which rows were right, one bit each, as hex digits;
    the last digit is filled up with zeros.
    """

    __pydantic_config__ = _STRICT

    accuracy: Number
    rows: int
    hits: str

    @classmethod
    def of(cls, right: np.ndarray) -> "Score":
        """right: `(rows,)` of truth values."""
        return cls(float(right.mean()), len(right), np.packbits(right).tobytes().hex())

    def right(self) -> np.ndarray:
        """The truth values again."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.hits), np.uint8), count=self.rows).astype(bool)


@dataclass
class Result(_JsonFile):
    """The student of one method and seed.

    recipe_fingerprint: of everything that decides the result. teachers: which of the recipe's were heard. taught_by:
    the key of `ComparisonRecord.teachers`. chain: the intermediate models, if any. seconds: of the student's training
    and of the chain's stages and decisions. curve: the student's log. threads: of torch.
    weights: digest of the student's, None in records of earlier versions. scores: part -> Score; "test" only where
    somebody asked for it.
    """

    __pydantic_config__ = _STRICT
    _what: ClassVar[str] = "A result"

    method: str
    seed: int
    recipe_fingerprint: str
    status: Literal["waiting", "running", "completed", "failed"] = "waiting"
    overrides: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    taught_by: str = ""
    chain: ChainRecord | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    seconds: Number | None = None
    steps: int | None = None
    num_params: int | None = None
    weights: str | None = None
    threads: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    started: str | None = None
    finished: str | None = None
    commit: str | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    format_version: int = FORMAT_VERSION

    def accuracy(self, part: str) -> float | None:
        """Share of rows of a part, 0 to 1; None where it was not measured."""
        return self.scores[part].accuracy if part in self.scores else None


@dataclass
class MethodRecord:
    """A method as it was compared; see `methods.Method`."""

    __pydantic_config__ = _STRICT

    name: str
    description: str
    overrides: list[str] = field(default_factory=list)
    teachers: str = "all"
    loss: str = ""
    fresh_views: bool = False


@dataclass
class Trial:
    """One version that a method's tuning tried. overrides: what it changed in the method. accuracy: share of validation
    rows, mean over its trainings. seconds: of all of them. chosen: that the method goes into the comparison so.
    """

    __pydantic_config__ = _STRICT

    method: str
    overrides: list[str]
    accuracy: Number
    seconds: Number
    chosen: bool = False
    trainings: int = 1


@dataclass
class Look:
    """One opening of the test part: when, and for which students (method -> seeds)."""

    __pydantic_config__ = _STRICT

    time: str
    students: dict[str, list[int]]


@dataclass
class ComparisonRecord(_JsonFile):
    """Several methods on the same seeds.

    recipe: the one they share, with the seed 0 in its place. baseline: the method that the others are compared with.
    teacher_seed: of all teachers trained on the spot; None where each seed has its own. tuning_teacher_seed: of those
    that the tuning heard. teachers: "seed-0", ... or "loaded" -> the teachers of these students. parts: the provenance
    of the data. rows: part, but test -> fingerprint of its rows and labels. results: of the finished students, without
    their curves. trials: of the methods' tuning, if any. looks: every opening of the test part.
    """

    __pydantic_config__ = _STRICT
    _what: ClassVar[str] = "A comparison record"

    source: str
    recipe: dict[str, Any]
    recipe_fingerprint: str
    baseline: str
    methods: list[MethodRecord] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    teacher_seed: int | None = None
    tuning_teacher_seed: int | None = None
    teachers: dict[str, list[TeacherRecord]] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    started: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def of_method(self, name: str) -> dict[int, Result]:
        """The finished students of a method, by seed."""
        return {one.seed: one for one in sorted(self.results, key=lambda one: one.seed) if one.method == name}

    def at_the_edge(self) -> dict[str, list[str]]:
        """Methods whose tuning chose the largest, or the smallest, of several learning rates, by that word: beyond it
        they may do better.
        """
        found: dict[str, list[str]] = {}
        for method in self.methods:
            trials = [trial for trial in self.trials if trial.method == method.name]
            chosen = next((trial for trial in trials if trial.chosen), None)
            if chosen is None:
                continue
            own = method.overrides[: len(method.overrides) - len(chosen.overrides)]  # what was chosen stands behind it
            rates = {self._learning_rate([*own, *trial.overrides]) for trial in trials}
            for word, edge in (("largest", max(rates)), ("smallest", min(rates))):
                if len(rates) > 1 and self._learning_rate(method.overrides) == edge:
                    found.setdefault(word, []).append(method.name)
        return found

    def _learning_rate(self, overrides: list[str]) -> float:
        said = [word.partition("=")[2] for word in overrides if word.startswith("training.learning_rate=")]
        return float(said[-1] if said else self.recipe["training"]["learning_rate"])

    def retention(self, result: Result, part: str) -> float | None:
        """Accuracy over that of the best single teacher on the same rows; None where either is missing."""
        accuracies = [one.accuracy[part] for one in self.teachers.get(result.taught_by, []) if part in one.accuracy]
        mine = result.accuracy(part)
        return mine / max(accuracies) if mine is not None and accuracies and max(accuracies) else None

    def public(self) -> "ComparisonRecord":
        """A copy fit to be published: of each local path only the last name is left."""
        return self.from_dict(without_paths(self.to_dict()), "the comparison record")
