"""What is known before a distillation, as numbers: of the data, the models, the teachers' outputs, a landmark run.

Arrays in, a dict of floats out; opens no data, runs no model. Logarithms are to base 10 unless a name says otherwise.
What cannot be known (a teacher without a parameter count) is NaN.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

FEATURES = (
    "log_rows",
    "log_inputs",
    "log_classes",
    "log_imbalance",
    "class_entropy",
    "input_mean",
    "input_variance",
    "input_skewness",
    "input_kurtosis",
    "log_student_params",
    "log_capacity_gap",
    "log_steps",
    "log_learning_rate",
    "teachers",
    "warm_start",
    "teacher_accuracy",
    "mixture_accuracy",
    "calibration_error",
    "teacher_entropy",
    "agreement",
    "overfit",
    "landmark_accuracy",
    "landmark_slope",
    "landmark_loss",
    "landmark_gap",
)
"""All features, in the order of `vector`."""

_KNOWN = frozenset(FEATURES)

LANDMARK = 0.25
"""How much of the student's direct training the landmark is."""

_BINS = 15
_MOST_ROWS = 2_000


def vector(features: Mapping[str, float]) -> np.ndarray:
    """`(features,)` in the order of FEATURES; NaN for what is not known. Raises ValueError for an unknown name."""
    if unknown := features.keys() - _KNOWN:
        raise ValueError(f"Unknown meta-features: {', '.join(sorted(unknown))}. Known: {', '.join(FEATURES)}.")
    return np.array([features.get(name, math.nan) for name in FEATURES], dtype=np.float64)


def data_features(labels: Tensor, num_classes: int, inputs: np.ndarray | None) -> dict[str, float]:
    """Size, classes and moments of the training rows.

    labels: `(rows,)` in 0..num_classes-1. inputs: `(rows, columns)` as the student sees them, or some of the rows;
    None where they are no quantities (tokens). Imbalance is that of the classes that occur, largest over smallest;
    entropy is over log(num_classes), so 1 is balanced. The moments are means over the columns that vary; kurtosis is
    the excess (0 for a normal column). Raises ValueError without a row.
    """
    if not len(labels):
        raise ValueError("Meta-features need at least one training row, got none.")
    counts = torch.bincount(labels, minlength=num_classes).double().numpy()
    shares = counts[counts > 0] / counts.sum()
    found = {
        "log_rows": math.log10(len(labels)),
        "log_classes": math.log10(num_classes),
        "log_imbalance": math.log10(shares.max() / shares.min()),
        "class_entropy": float(-(shares * np.log(shares)).sum() / math.log(num_classes)),
    }
    if inputs is not None:
        found["log_inputs"] = math.log10(inputs.shape[1])
        moments = _moments(inputs[:_MOST_ROWS].astype(np.float64))
        found |= dict(zip(("input_mean", "input_variance", "input_skewness", "input_kurtosis"), moments, strict=True))
    return found


def _moments(inputs: np.ndarray) -> tuple[float, float, float, float]:
    centred = inputs - inputs.mean(0)
    variance = (centred**2).mean(0)
    varies = variance > 1e-12
    if not varies.any():
        return float(inputs.mean()), 0.0, math.nan, math.nan
    scaled = centred[:, varies] / np.sqrt(variance[varies])
    mean, spread = float(inputs[:, varies].mean()), float(variance[varies].mean())
    return mean, spread, float((scaled**3).mean()), float((scaled**4).mean() - 3.0)


def size_features(teacher_params: Sequence[int | None], student_params: int, total_steps: int) -> dict[str, float]:
    """Sizes. The capacity gap is log(largest teacher / student), the logarithm of the compression; NaN where no teacher
    has a count. total_steps: optimizer steps of the student's whole training.
    """
    known = [count for count in teacher_params if count]
    return {
        "log_student_params": math.log10(student_params),
        "log_capacity_gap": math.log10(max(known) / student_params) if known else math.nan,
        "log_steps": math.log10(total_steps),
        "teachers": float(len(teacher_params)),
    }


def teacher_features(logits: Tensor, labels: Tensor, train_accuracy: float | None = None) -> dict[str, float]:
    """What the teachers' answers to guide rows tell.

    logits: `(teachers, rows, classes)`; labels: `(rows,)`. teacher_accuracy: of the best one. The others are of the
    plain mean of their probabilities: accuracy, expected calibration error (15 equal bins, as in Guo et al. 2017),
    entropy over log(classes). agreement: share of rows on which two of them name the same class, mean over pairs; 1 for
    one teacher. overfit: train_accuracy (mean over teachers, on the rows that teach) minus the same on guide rows.
    Raises ValueError for shapes that do not fit.
    """
    if logits.dim() != 3 or logits.shape[1:2] != labels.shape or not logits.numel():
        raise ValueError(
            f"Logits must be (teachers, rows, classes) and labels (rows,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    mixture = logits.double().softmax(-1).mean(0)
    answers = logits.argmax(-1)
    right = (answers == labels).double().mean(1)
    same = (answers[:, None] == answers[None]).double().mean(-1)
    count = len(logits)
    confidence, answer = mixture.max(-1)
    entropy = -(mixture * mixture.clamp_min(1e-12).log()).sum(-1).mean() / math.log(logits.shape[-1])
    return {
        "teacher_accuracy": float(right.max()),
        "mixture_accuracy": float((answer == labels).double().mean()),
        "calibration_error": _calibration_error(confidence, answer == labels),
        "teacher_entropy": float(entropy),
        "agreement": float((same.sum() - count) / (count * (count - 1))) if count > 1 else 1.0,
        "overfit": math.nan if train_accuracy is None else train_accuracy - float(right.mean()),
    }


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, right.double() - confidence)
    return float(gap.abs().sum() / len(confidence))


def landmark_features(
    accuracies: Sequence[float], loss: float, num_classes: int, mixture_accuracy: float
) -> dict[str, float]:
    """What a short direct training of the student tells.

    accuracies: on validation rows, at half and at the whole of the landmark. loss: cross-entropy on its last training
    batches, over log(num_classes), so 1 is guessing. gap: how much better the teachers' mixture is.
    Raises ValueError unless there are two accuracies.
    """
    half, whole = accuracies
    return {
        "landmark_accuracy": whole,
        "landmark_slope": whole - half,
        "landmark_loss": loss / math.log(num_classes),
        "landmark_gap": mixture_accuracy - whole,
    }
