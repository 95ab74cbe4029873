"""What is measured of a model: four metrics of our own, loaded offline, and any other that `evaluate` knows."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import evaluate
import numpy as np

OWN_METRICS = ("accuracy", "macro_f1", "calibration_error", "teacher_agreement")
_FROM_PROBABILITIES = ("calibration_error",)


@cache
def load_metric(name: str) -> evaluate.EvaluationModule:
    """One of OWN_METRICS from this folder, without network; any other id or path through `evaluate.load`.

    Raises FileNotFoundError, as `evaluate` does, if there is no such metric or it cannot be fetched.
    """
    path = str(Path(__file__).parent / name / f"{name}.py") if name in OWN_METRICS else name
    # In memory: the default file in the cache folder is locked against other processes.
    return evaluate.load(path, keep_in_memory=True)


def check_metrics(names: Sequence[str], num_classes: int) -> None:
    """Raises ValueError for a metric that cannot be computed of so many classes: what comes at the end should be known
    at the start. names: of metrics that `load_metric` finds.
    """
    logits, labels = np.eye(num_classes), np.arange(num_classes)
    for name in names:
        try:
            compute_metrics([name], logits, labels, logits)
        except Exception as error:  # it is somebody's code
            raise ValueError(
                f"`training.metrics`: {name} cannot be computed of {num_classes} classes and no more than predictions "
                f"and labels ({error}). Leave it out, or give the folder of one that can; of ours there are "
                f"{', '.join(OWN_METRICS)}."
            ) from error


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def compute_metrics(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None
) -> dict[str, float]:
    """The named metrics of one model on one part.

    logits, teacher_logits: `(rows, classes)`; labels: `(rows,)`. Metrics of other authors get predicted classes and
    labels, and give all their numbers. Raises ValueError for shapes that do not fit, logits that are not finite, no
    rows, or teacher_agreement without teacher_logits.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"Logits must be (rows, classes), with a label for each of one or more rows, got {logits.shape} and "
            f"{labels.shape}."
        )
    if not np.isfinite(logits).all():
        raise ValueError(
            "Logits must be finite, got NaN or infinity: the model has diverged. Lower the learning "
            "rate, or train in fp32."
        )
    if teacher_logits is not None and np.shape(teacher_logits) != logits.shape:
        raise ValueError(f"Teacher logits must have the shape {logits.shape}, got {np.shape(teacher_logits)}.")
    predicted = logits.argmax(axis=1)
    results: dict[str, float] = {}
    for name in names:
        references = labels
        if name == "teacher_agreement":
            if teacher_logits is None:
                raise ValueError("`teacher_agreement` needs teacher_logits. Pass them, or leave this metric out.")
            references = np.argmax(teacher_logits, axis=1)
        predictions = softmax(logits) if name in _FROM_PROBABILITIES else predicted
        values = load_metric(name).compute(predictions=predictions, references=references)
        results.update({key: float(value) for key, value in values.items() if np.ndim(value) == 0})
    return results
