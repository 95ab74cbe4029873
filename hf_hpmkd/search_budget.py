"""How long the tries of the adaptive configuration may take: the recipe's `auto` section, what it means in steps, and
how they are shared out.

Steps are counted, not seconds, so that the same recipe tries the same on a busy machine, and after an interruption.
"""

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)

# Counted low, so that the seconds promised are kept: what a second buys on a slow CPU core with other work, validation
# passes included. Small ResNets got 5e9 there, small BERTs on a newer one 6e9; a quiet core or a GPU, many times that.
_OPERATIONS_PER_SECOND = 5e9
# Of the loop itself, the gate's warm-up and the start of a try shared out: with an MLP of 16 units from four teachers
# 9 ms a step on a core that has other work too.
_SECONDS_PER_STEP = 0.010

# Of students that are trained at once: of a step of all, and of each of them. Of 76 MLPs of 16 units that is about
# twice what a core takes that has nothing else to do.
_SECONDS_PER_STACKED_STEP, _SECONDS_PER_STACKED = 0.002, 0.00015
_OPERATIONS_PER_LOOKUP, _OPERATIONS_PER_EMBEDDED = 49_000, 50  # per category column, and per weight of its codes

_FEW, _MANY = 4, 8
_FEW_AT_ONCE, _MANY_AT_ONCE = 18, 36
LEAST_AT_ONCE = 8
"""Candidates; a search for fewer had better try them one by one, the first steps first."""

_MOST_SEEDS = 4
_LEAST_SECONDS = 20.0
_SHARES = {"fast": 0.35, "thorough": 2.0}


@dataclass(config=_STRICT, kw_only=True)
class AutoConfig:
    """The adaptive configuration: how the student is trained is tried, and chosen, before it is trained."""

    mode: Literal["off", "fast", "thorough"] | Annotated[float, Field(gt=0)] = Field(
        "off",
        description="off: the recipe as it is. fast: tries that add at most 35 % to one training or 20 s, whichever is "
        "more. thorough: at most 200 %, or 20 s. A number: minutes. `auto: fast` says it all.",
    )
    choose: (
        list[
            Literal[
                "alpha",
                "temperature",
                "temperature_schedule",
                "kd_kind",
                "gate",
                "learning_rate",
                "weight_decay",
                "warm_start",
            ]
        ]
        | None
    ) = Field(
        None,
        min_length=1,
        description="What may be chosen; null: whatever this recipe leaves at its default. The rest is kept.",
    )
    prior: str | None = Field(
        None,
        min_length=1,
        description="File of what earlier runs showed, from `hpmkd prior build`; null: the one that comes with the "
        "package.",
    )


def most_candidates(mode: str | float) -> int:
    """How many configurations are tried at most, beside direct training."""
    return _FEW if mode == "fast" else _MANY


def budget_steps(mode: str | float, total_steps: int, operations_per_step: float) -> int:
    """Optimizer steps that the tries may add to a run. mode: fast, thorough, or minutes. total_steps: of one training.
    operations_per_step: floating point operations of one step, forward and backward.

    thorough, too, may take 20 s, or it would try less than fast where a training takes a few seconds.
    Raises ValueError for off, which tries nothing.
    """
    if mode == "off":
        raise ValueError("`auto.mode` off has no budget. Ask for fast, thorough or minutes.")
    step = _SECONDS_PER_STEP + operations_per_step / _OPERATIONS_PER_SECOND
    if not isinstance(mode, str):
        return int(60 * mode / step)
    return max(int(_SHARES[mode] * total_steps), int(_LEAST_SECONDS / step))


def at_once(
    mode: str | float, total_steps: int, budget: int, operations_per_step: float, lookups: float = 0.0
) -> tuple[int, int]:
    """How many candidates are tried to their end at once, beside direct training, and how often each, where a student
    can be stacked: (candidates, seeds), as many as fit into the budget. (0, 0) where too few would.

    budget, operations_per_step: as of `budget_steps`, of one student alone. lookups: as of `stacked_steps`.
    """
    fit, most = 0, _MOST_SEEDS * (_MANY_AT_ONCE + 1)
    while fit < most and stacked_steps(total_steps, fit + 1, operations_per_step, lookups) <= budget:
        fit += 1
    candidates = min(_FEW_AT_ONCE if mode == "fast" else _MANY_AT_ONCE, fit - 1)
    if candidates < LEAST_AT_ONCE:
        return 0, 0
    return candidates, min(fit // (candidates + 1), _MOST_SEEDS)


def stacked_steps(total_steps: int, students: int, operations_per_step: float, lookups: float = 0.0) -> int:
    """Steps of one student alone that take as long as so many students trained at once, to the end of total_steps.
    lookups: `lookup_operations` of each of them.
    """
    arithmetic = operations_per_step / _OPERATIONS_PER_SECOND
    of_each = _SECONDS_PER_STACKED + lookups / _OPERATIONS_PER_SECOND + arithmetic
    of_all = _SECONDS_PER_STACKED_STEP + students * of_each
    return math.ceil(total_steps * of_all / (_SECONDS_PER_STEP + arithmetic))


def lookup_operations(columns: int, weights: int) -> float:
    """What category columns cost a stacked student at a step besides arithmetic, in operations that take as long.
    weights: of the embeddings of their codes, each of which is changed at every step, read or not.
    """
    return float(columns * _OPERATIONS_PER_LOOKUP + weights * _OPERATIONS_PER_EMBEDDED)


@dataclasses.dataclass(frozen=True)
class Rung:
    """Up to `step` so many candidates are trained; the best of them go on to the next rung."""

    step: int
    candidates: int


def halving(total_steps: int, budget: int, most: int) -> list[Rung]:
    """Successive halving (Jamieson & Talwalkar 2016): the rungs of a search that adds at most `budget` steps to a run.

    most: candidates at the first rung, beside direct training, whose steps are not counted: it or the winner goes on as
    the run's student. Rungs double their steps while the candidates halve, down to two, of which the better goes on: a
    rung of one would choose nothing. What a budget does not suffice for is cut from the number of candidates first and
    then from the length. [] if it does not suffice for one step of one.
    """
    if budget >= most * total_steps:
        return [Rung(total_steps, most)]
    for count in range(most, 0, -1):
        sizes = [count]
        while sizes[-1] > 2:
            sizes.append(math.ceil(sizes[-1] / 2))
        # Each rung adds as many steps as all before it: with a first rung of s, the rungs end at s, 2 s, 4 s, ...
        per_step = sizes[0] + sum(size * 2**index for index, size in enumerate(sizes[1:]))
        first = min(budget // per_step, total_steps // 2 ** (len(sizes) - 1))
        if first and (count == 1 or first * 2 ** (len(sizes) - 1) >= total_steps // 8):
            return [Rung(first * 2**index, size) for index, size in enumerate(sizes)]
    return []
