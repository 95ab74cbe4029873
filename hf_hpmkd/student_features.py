"""What the adaptive configuration knows of a student before it chooses: the meta-features of a run's own rows, teachers
and landmark.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.data import DataParts
from hf_hpmkd.meta_features import data_features, size_features, teacher_features
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_kinds import Teacher

_FEATURE_ROWS, _FEATURE_VALUES = 2_000, 20_000_000  # at most; their moments take nine times the bytes of the values


def features_before(
    parts: DataParts, student: Classifier, guide_logits: torch.Tensor, teachers: Sequence[Teacher],
    train_accuracy: float | None, steps: int, learning_rate: float, warm_start: bool,
) -> dict[str, float]:  # fmt: skip
    """The meta-features that no training of the student is needed for. guide_logits: `(teachers, rows, classes)`.
    train_accuracy: of the teachers on the rows that teach, mean; None where unknown. learning_rate: the recipe's.
    warm_start: whether a student that hears them begins with the weights of one.
    """
    return {
        "log_learning_rate": math.log10(learning_rate),
        "warm_start": float(warm_start),
        **data_features(parts.train.labels, len(parts.class_names), _inputs(student, parts.train)),
        **size_features([one.num_params for one in teachers], student.num_params, steps),
        **teacher_features(guide_logits, parts.guide.labels, train_accuracy),
    }


def _inputs(student: Classifier, rows: Rows) -> np.ndarray | None:
    """Evenly spaced rows as quantities that the student sees, `(rows, columns)`; None where it sees none (tokens)."""

    def fed(indices: torch.Tensor) -> torch.Tensor:
        seen = student.feed(rows.raw(indices)).values()
        quantities = [value.flatten(1) for value in seen if value.is_floating_point()]
        return torch.cat(quantities, dim=1) if quantities else torch.empty(len(indices), 0)

    columns = fed(torch.zeros(1, dtype=torch.long)).shape[1]
    if not columns:
        return None
    count = min(len(rows), _FEATURE_ROWS, max(2, _FEATURE_VALUES // columns))
    return fed(torch.linspace(0, len(rows) - 1, count).long()).numpy()


def accuracy_at(curve: Sequence[dict[str, float]], step: int) -> float:
    """On validation rows, as a training measured it, of the weights that it had then. Raises ValueError where it did
    not measure then.
    """
    for row in curve:
        if row["step"] == step and "eval_accuracy" in row:
            return row["eval_accuracy"]
    raise ValueError(f"The training must have measured its accuracy after step {step}, it did not.")


def landmark_loss(curve: Sequence[dict[str, float]], step: int) -> float:
    """Mean training loss of the last three log lines up to a step."""
    losses = [row["loss"] for row in curve if "loss" in row and row["step"] <= step]
    return float(np.mean(losses[-3:])) if losses else math.nan
