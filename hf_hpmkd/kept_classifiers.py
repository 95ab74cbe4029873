"""Classifiers that an earlier run finished, found in the memory by all that decides them and kept there for the next.

Whoever may write to a memory may have put one there, so a found one is taken apart: only its weights are used, and the
figures beside them. They must fit the model that is built here, and answer as many validation rows right as they say.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import PartialState
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hf_hpmkd.classifier_training import Trained
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.components.optimization_memory import OptimizationMemory
from hf_hpmkd.evaluation import student_logits
from hf_hpmkd.run_record import Number, StageRecord
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.training_folder import done_file, write_json

FORMAT_VERSION = 1
# What the training section of a recipe says that changes no weight.
NOT_IN_KEY = ("report_to", "num_workers", "save_total_limit", "metrics", "log_every")
# Another machine rounds otherwise, which turns the answers to a few rows.
_SPARE_ROWS, _SPARE_SHARE = 3, 0.02


@dataclass
class Training:
    """What there is to say of a training besides its weights; see `Trained`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    steps: Annotated[int, Field(ge=0)]
    curve: list[dict[str, float]] = field(default_factory=list)
    calibration: list[float] | None = None
    class_weights: list[list[float]] | None = None

    @classmethod
    def of(cls, trained: Trained) -> "Training":
        return cls(**{one.name: getattr(trained, one.name) for one in dataclasses.fields(cls)})


@dataclass
class About:
    """What lies beside a kept classifier. accuracy: on validation rows, 0 to 1. stage: of one in a chain."""

    key: str
    trained: Training
    accuracy: Number | None = None
    stage: StageRecord | None = None
    format_version: int = FORMAT_VERSION

    @property
    def claimed(self) -> Number | None:
        return self.accuracy if self.stage is None else self.stage.accuracy

    def save(self, file: Path) -> None:
        write_json(file, dataclasses.asdict(self))

    @classmethod
    def load(cls, file: Path) -> "About":
        """Raises ValueError, which tells why, where there is nothing of this form."""
        try:
            about = _ADAPTER.validate_python(json.loads(file.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise ValueError(
                f"its {file.name} is not of the form it should have ({error.error_count()} faults)"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"its {file.name} cannot be read ({type(error).__name__})") from error
        if about.format_version != FORMAT_VERSION:
            raise ValueError(f"its {file.name} has format {about.format_version}, this version reads {FORMAT_VERSION}")
        return about


_ADAPTER = TypeAdapter(About)


@contextmanager
def making(store: OptimizationMemory | None, key: str) -> Iterator[None]:
    """Within the block no other run trains the classifier of this key. Several processes of one run do not wait for
    it: those that wait for the one that waits would give up."""
    state = PartialState()
    with store.making(key, state.num_processes == 1) if store is not None and state.is_main_process else nullcontext():
        yield


def take(
    store: OptimizationMemory,
    key: str,
    about_file: str,
    build: Callable[[], Classifier],
    validation: Rows,
    batch_size: int,
    folder: Path,
) -> About | None:
    """Puts a finished classifier from the memory into `folder`, as if it had been trained there; None if there is none.

    build: makes it, be it on the meta device. One that cannot be used is named and removed, so that the next takes its
    place. Call it in the main process.
    """
    found = store.find_model(key)
    if found is None:
        return None
    try:
        about = About.load(found / about_file)
        if about.key != key:
            raise ValueError(f"its {about_file} is that of another")
        classifier = _with_weights(build(), found)
        _require_accuracy(about.claimed, classifier, validation, batch_size)
    except ValueError as error:
        store.refuse_model(key, str(error))
        return None
    classifier.model.save_pretrained(folder)
    if classifier.feed.processor is not None:
        classifier.feed.processor.save_pretrained(folder)
    about.save(folder / about_file)
    write_json(done_file(folder), dataclasses.asdict(about.trained))
    store.model_seconds += about.trained.seconds
    return about


def measure(classifier: Classifier, rows: Rows, batch_size: int) -> float:
    """The share of unaugmented rows that it answers right, 0 to 1."""
    return float(answers_right(classifier, rows, batch_size).double().mean())


def answers_right(classifier: Classifier, rows: Rows, batch_size: int) -> torch.Tensor:
    """Which unaugmented rows it answers right, bool `(rows,)`, on the CPU."""
    model = TorchTeacher.of("judged", classifier, rows, PartialState().device)
    return student_logits(model, rows, batch_size).argmax(-1) == rows.labels


def _with_weights(classifier: Classifier, folder: Path) -> Classifier:
    """The classifier with the weights of a folder, whose own settings are not read. Raises ValueError if they do not
    fit."""
    model = classifier.model
    try:
        loaded: Any = type(model).from_pretrained(
            folder, config=model.config, dtype=model.dtype, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:  # a file from anywhere can go wrong in any way
        raise ValueError(f"its weights cannot be loaded ({type(error).__name__})") from error
    model, told = loaded
    if wrong := [key for keys in (told["missing_keys"], told["unexpected_keys"]) for key in keys]:
        raise ValueError(f"its weights are those of another model ({len(wrong)} tensors too few or too many)")
    return dataclasses.replace(classifier, model=model)


def _require_accuracy(claimed: Any, classifier: Classifier, rows: Rows, batch_size: int) -> None:
    if claimed is None:
        raise ValueError("it does not say how good it is")
    measured = measure(classifier, rows, batch_size)
    if not abs(claimed - measured) <= max(_SPARE_SHARE, _SPARE_ROWS / len(rows)):
        raise ValueError(f"it should answer {claimed:.2%} of the validation rows right, and answers {measured:.2%}")
