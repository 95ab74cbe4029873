"""Decides how long the progressive chain is: what a stage brings to the student, against what it costs.

Knows nothing of models, data or training: it is handed which validation rows were answered right. The paper (section
on the progressive chain) ends a chain when a stage is less than epsilon better than the larger model above it, which
ends nearly every chain at once; what counts is whether the *student* gains, so that is what is measured here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

Guidance = Literal["dense", "previous"]
Above = TypeVar("Above")


@dataclass(frozen=True)
class GainEstimate:
    """Accuracy with a stage minus accuracy without it. gain, standard_error: points of accuracy (100 = all rows)."""

    gain: float
    standard_error: float


def estimate_gain(with_stage: Tensor, without: Tensor) -> GainEstimate:
    """The gain and its standard error, from the same rows and seeds answered with and without a stage.

    with_stage, without: bool `(seeds, rows)`, whether a student answered the row right. The two sources of chance, what
    rows the part happens to hold and how training happens to go, are added: s2(rows) / rows + s2(seeds) / seeds, the
    variances being those of the paired differences averaged over the other side. That counts what is left of row and
    seed together twice, so the error is rather too large. With one seed its part is unknown and left out.

    Raises ValueError for shapes that differ, or without a row.
    """
    if with_stage.shape != without.shape or with_stage.dim() != 2 or not with_stage.numel():
        raise ValueError(
            "Both sides must be (seeds, rows) with at least one of each and alike, got "
            f"{tuple(with_stage.shape)} and {tuple(without.shape)}."
        )
    difference = with_stage.double() - without.double()
    variance = 0.0
    for axis in (0, 1):
        means = difference.mean(axis)
        if len(means) > 1:
            variance += float(means.var()) / len(means)
    return GainEstimate(100 * float(difference.mean()), 100 * variance**0.5)


def required_gain(min_gain: float, cost: float) -> float:
    """Points that a stage must bring: `min_gain` per student training that it costs. cost: the stage's training over
    the student's, in floating point operations, 0 or more. Raises ValueError for a negative one.
    """
    if cost < 0:
        raise ValueError(f"The cost of a stage must be 0 or more student trainings, got {cost}.")
    return min_gain * cost


def is_promising(probe: GainEstimate, required: float) -> bool:
    """Whether to train a stage that a short probe has judged: unless it lies a standard error below what is required.

    Lenient, because the probe's stage is trained for a part of its steps only and teaches less than the finished one.
    """
    return probe.gain + probe.standard_error >= required


def is_confirmed(measured: GainEstimate, required: float) -> bool:
    """Whether a finished stage teaches the student: only if the measured gain itself reaches what is required."""
    return measured.gain >= required


def taught_by(teachers: Sequence[Above], stages: Sequence[Above], guidance: Guidance) -> list[Above]:
    """What the next model of the chain learns from. dense: all that stands above it, original teachers and stages.
    previous (the paper's): the stage right above, or the teachers where there is none yet.
    """
    if guidance == "dense" or not stages:
        return [*teachers, *stages]
    return [stages[-1]]


def to_bits(answers: Tensor) -> str:
    """A bool tensor `(rows,)` as text of 0 and 1, to keep in JSON; `from_bits` reads it back."""
    return "".join("1" if right else "0" for right in answers.tolist())


def from_bits(bits: str) -> Tensor:
    """What `to_bits` wrote."""
    return torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)
