"""Chooses how to distil: the configurations there are, which ones to try, and what a try proves.

Pure: no training, no data, no files. The paper (section on the adaptive configuration manager) predicts accuracy
retention; here the target is the gain over *direct training* of the same student on the same rows, because the question
that matters is whether to distil at all, and direct training is always an answer.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from hf_hpmkd.vocabulary import LEGAL_SCHEDULES

EARLY = (0.125, 0.25, 0.5, 0.75)
"""Shares of a training at which an example may know how far ahead it was."""

FEW_EXAMPLES = 50
"""Below so many, the nearest runs are asked instead of a regression (the paper's rule)."""

UNKNOWN_SPREAD = 2.0
"""Points; how far gains lie apart where nothing is known."""

TRAINING_NOISE = 0.3
"""Points by which two trainings that differ in nothing but chance end apart, whatever rows they are judged on. A guess:
with one seed a run cannot measure it."""

_LEADS_ALIKE = 60  # early leads of examples that are asked what became of them
# How far apart two candidates lie, encoded: by another kind, a temperature of more than twice or quite another alpha,
# not by a weight decay (however different), half or twice a learning rate or a gate alone, between which a short try
# cannot tell.
_UNLIKE = 1.2
_ALPHA_SHARE = 2.0  # of the distance between two alphas: a quarter and nine tenths are two ways to teach
_GATE_SHARE = 0.5  # of that between two gates
_DECAY_SHARE = 0.5  # of that between two weight decays
_START = 2.0  # how far apart two starts lie
WARM_WORDS = "from a teacher's weights"
_UNUSUAL = 0.1  # points by which an unusual value has to promise more, each: the best of thousands owes most to chance


@dataclass(frozen=True)
class Configuration:
    """One way to train the student. alpha 0 is direct training; the teachers' settings then mean nothing.

    learning_rate, weight_decay: factors on what the recipe says. temperature: of a schedule that moves, its start.
    warm_start: of direct training alone, whether it begins with a teacher's weights; a student that hears its teachers
    begins as the recipe says.
    """

    alpha: float = 0.0
    temperature: float = 4.0
    temperature_schedule: str = "constant"
    kd_kind: str = "forward_kl"
    gate: str = "mixture"
    learning_rate: float = 1.0
    weight_decay: float = 1.0
    warm_start: bool = False

    @property
    def distils(self) -> bool:
        return self.alpha > 0

    def __str__(self) -> str:
        words = ["direct training" + f" {WARM_WORDS}" * self.warm_start]
        if self.distils:
            scheduled = self.temperature_schedule != "constant"
            temperature = f"T {self.temperature_schedule}" if scheduled else f"T {self.temperature:g}"
            words = [f"alpha {self.alpha:g}", temperature, self.kd_kind, f"gate {self.gate}"]
        for name in ("learning_rate", "weight_decay"):
            if (factor := getattr(self, name)) != 1:
                words.append(f"{name} x{factor:g}")
        return ", ".join(words)


DIRECT = Configuration()

FASTER = Configuration(learning_rate=2.0)
"""Direct training at twice the learning rate: what a student that has not learned enough needs, teachers or not."""

SPACE: dict[str, tuple[Any, ...]] = {
    "alpha": (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
    "temperature": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "temperature_schedule": ("constant", "cosine", "learned"),
    "kd_kind": ("forward_kl", "standardized_kl", "dkd", "dist"),
    "gate": ("mixture", "label", "uniform"),
    "learning_rate": (0.5, 1.0, 2.0, 4.0),
    "weight_decay": (0.1, 1.0, 10.0),
    "warm_start": (False, True),
}
"""The values that are considered. Every field of a Configuration has its line. A kind that is missing here (js) is used
where a recipe sets it; the shipped prior has no run of it, and takes it for the KL."""

CONTENDERS = (
    *(Configuration(learning_rate=rate) for rate in (2.0, 4.0)),
    *(Configuration(learning_rate=rate, warm_start=True) for rate in (1.0, 2.0, 4.0)),
    *(Configuration(alpha=0.5, temperature=1.0, learning_rate=rate) for rate in (1.0, 2.0, 4.0)),
    *(Configuration(alpha=0.9, temperature=1.0, learning_rate=rate) for rate in (1.0, 4.0)),
    Configuration(alpha=0.25, temperature=1.0, learning_rate=4.0),
    *(Configuration(alpha=alpha, temperature=2.0, learning_rate=4.0) for alpha in (0.5, 0.9)),
    *(Configuration(alpha=0.9, temperature=4.0, learning_rate=rate) for rate in (1.0, 4.0)),
    Configuration(alpha=0.9, temperature=8.0, learning_rate=2.0),
    Configuration(alpha=0.5, temperature=2.0, kd_kind="dist", learning_rate=2.0),
    Configuration(alpha=0.5, temperature=2.0, kd_kind="dkd", learning_rate=2.0),
)
"""Configurations of which every data set of a prior tells what each gains, so that it is known which of them together
leave no data set behind (`expected_gain.portfolio`)."""

# Tried first where nothing is known: what the literature and small probes recommend, the boldest first.
_USUAL = (
    Configuration(alpha=0.9, temperature=4.0),
    Configuration(alpha=0.5, temperature=1.0),
    Configuration(warm_start=True),
    Configuration(alpha=0.5, temperature=2.0),
    Configuration(alpha=0.9, temperature=8.0),
    Configuration(alpha=0.25, temperature=1.0, gate="label"),
)
_KINDS, _GATES = tuple(LEGAL_SCHEDULES), ("mixture", "joint", "label", "uniform")
_GATE_COLUMNS = slice(4 + len(_KINDS), 4 + len(_KINDS) + len(_GATES))  # of an encoded configuration
_DECAY_COLUMN, _ALPHA_COLUMN = -2, 0
_ROOM = 5  # candidates; of fewer, none is spared for what the regression expects most of


@dataclass(frozen=True)
class Example:
    """What one run showed. gain: points of accuracy over direct training, noise: its standard error, in points.

    early: the gain at each of EARLY, with the mean of the weights until there (in the shipped prior, with the weights
    as they were); NaN where unknown. data: what the run was on, for words and for leaving out. own: from the user's
    memory, not from the shipped prior.
    """

    features: Mapping[str, float]
    configuration: Configuration
    gain: float
    noise: float = 1.0
    early: tuple[float, ...] = (math.nan,) * len(EARLY)
    data: str = ""
    own: bool = False


@dataclass(frozen=True)
class Prediction:
    """Expected gain of each configuration, `(configurations,)`, in points; spread: one standard deviation of it."""

    gain: np.ndarray
    spread: np.ndarray


def configurations(free: Collection[str], kept: Configuration) -> list[Configuration]:
    """All combinations of SPACE that go together. free: names of the fields that may change; of the others `kept` has
    the value. The usual ones come first. Raises ValueError for a field that does not exist.
    """
    if unknown := set(free) - set(SPACE):
        raise ValueError(f"Unknown fields {', '.join(sorted(unknown))}. Known: {', '.join(SPACE)}.")
    values = [SPACE[name] if name in free else (getattr(kept, name),) for name in SPACE]
    found = [Configuration(**{n: v for n, v in asdict(one).items() if n in free} | _kept(kept, free)) for one in _USUAL]
    found = [one for one in map(_plain, found) if _is_legal(one) and not (one.distils and one.warm_start)]
    for combination in itertools.product(*values):
        one = _plain(Configuration(**dict(zip(SPACE, combination, strict=True))))
        if one.distils and one.warm_start:
            continue  # whether it does is the recipe's business
        elif one.temperature_schedule != "constant" and "temperature" in free and one.temperature != DIRECT.temperature:
            continue  # it moves, so where it starts matters little
        if _is_legal(one):
            found.append(one)
    return list(dict.fromkeys(found))


def _kept(kept: Configuration, free: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in asdict(kept).items() if name not in free}


def _plain(one: Configuration) -> Configuration:
    """Of the labels alone nothing counts but rate, decay and start; the rest is as in direct training."""
    if one.distils:
        return one
    kept_too = ("learning_rate", "weight_decay", "warm_start")
    return replace(DIRECT, **{name: getattr(one, name) for name in kept_too})


def _is_legal(one: Configuration) -> bool:
    return one.temperature_schedule in LEGAL_SCHEDULES[one.kd_kind]


@cache
def encode(configuration: Configuration) -> np.ndarray:
    """`(columns,)`: a configuration as numbers of like size; direct training has zeros for what the teachers do."""
    one = configuration
    rates = [math.log2(one.learning_rate), math.log10(one.weight_decay), _START * one.warm_start]
    if not one.distils:
        return np.array([0.0] * (4 + len(_KINDS) + len(_GATES)) + rates)
    moves = one.temperature_schedule != "constant"
    taught = [one.alpha, math.log2(one.temperature) * (not moves), float(moves), one.temperature_schedule == "learned"]
    kinds = [float(one.kd_kind == kind) for kind in _KINDS]
    gates = [float(one.gate == gate) for gate in _GATES]
    return np.array([*taught, *kinds, *gates, *rates], dtype=np.float64)


def encoded_columns(encoded: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of encoded configurations, `(rows, columns)`, by name; temperature, learning_rate: to base 2."""
    taught = ("alpha", "temperature", "moves", "learned", *_KINDS, *_GATES)
    names = (*taught, "learning_rate", "weight_decay", "warm_start")
    return dict(zip(names, encoded.T, strict=True))


# ---- what to try -----------------------------------------------------------------------------------------------------


def propose(
    prediction: Prediction,
    configurations: Sequence[Configuration],
    count: int,
    own: int | None = None,
    portfolio: Sequence[Configuration] = (),
) -> list[int]:
    """Positions of the candidates for a try.

    Of two or more, the first are what the recipe itself says (own: its position, where its author chose it with care)
    and direct training at a higher learning rate, where that is possible: without it, what a learning rate gains would
    be put down to the teachers. Then come those of a portfolio, in its order, which together leave few data sets
    behind; of _ROOM or more the last, and all that remain, are the most promising ones: by the expected gain, less a
    little for every unusual value, each unlike those before it. (An upper confidence bound, the usual rule where there
    are many tries, chose worse of the prior's own runs.) Plain direct training is never among them, because it is
    always tried.
    """
    hope = prediction.gain - _UNUSUAL * np.array([_unusual(one) for one in configurations])
    encoded = np.array([encode(one) for one in configurations])
    encoded[:, _ALPHA_COLUMN] *= _ALPHA_SHARE
    encoded[:, _GATE_COLUMNS] *= _GATE_SHARE
    encoded[:, _DECAY_COLUMN] *= _DECAY_SHARE
    place = {one: index for index, one in enumerate(configurations)}
    together = [place[one] for one in portfolio if one in place]
    faster = _fastest(configurations, hope, together)
    chosen: list[int] = []
    if count > 1:
        chosen = [index for index in dict.fromkeys((own, faster)) if index not in (None, place.get(DIRECT))][:count]
    room = count - (count >= _ROOM)
    chosen += [index for index in together if index not in chosen][: max(room - len(chosen), 0)]
    open_ = np.array([one != DIRECT for one in configurations])
    for index in chosen:
        open_ &= np.linalg.norm(encoded - encoded[index], axis=1) > _UNLIKE
    while open_.any() and len(chosen) < count:
        chosen.append(int(np.argmax(np.where(open_, hope, -np.inf))))
        open_ &= np.linalg.norm(encoded - encoded[chosen[-1]], axis=1) > _UNLIKE
    return chosen


def _fastest(configurations: Sequence[Configuration], hope: np.ndarray, portfolio: Sequence[int]) -> int | None:
    """Direct training at a higher learning rate: the portfolio's, else the most hopeful; of equals that which is most
    like twice the rate.
    """
    faster = [i for i, one in enumerate(configurations) if replace(one, learning_rate=1.0, weight_decay=1.0) == DIRECT]
    faster = [index for index in faster if configurations[index].learning_rate > 1]
    unlike = [np.abs(encode(configurations[index]) - encode(FASTER)).sum() for index in faster]
    ranked = sorted(zip(faster, unlike, strict=True), key=lambda one: (-hope[one[0]], one[1]))
    known = [index for index in portfolio if index in faster]
    return next(iter([*known, *(index for index, _ in ranked)]), None)


def _unusual(one: Configuration) -> int:
    """How many of the values that seldom matter differ from the usual ones."""
    names = ("temperature_schedule", "kd_kind", "gate", "weight_decay")
    return sum(getattr(one, name) != getattr(DIRECT, name) for name in names)


# ---- what a try proves -----------------------------------------------------------------------------------------------


class Leads:
    """What becomes of a lead that a student has early in its training, as examples tell that know theirs.

    A large lead changes more than a small one, one that few rows show more than one that many show, and now and then
    one turns round altogether. So the answer comes from the examples that were about as far ahead and about as noisy,
    by the percentiles of how their leads changed (which few of them do not move): a local regression, in the sense of
    Cleveland (1979).
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        early = np.array([one.early for one in examples]).reshape(len(examples), len(EARLY))
        gains = np.array([one.gain for one in examples])
        known = ~np.isnan(early)
        noise = np.array([one.noise for one in examples])
        # Per share of EARLY: the leads then, their noise, and by how much they had changed in the end.
        self.known = [(early[on, i], noise[on], gains[on] - early[on, i]) for i, on in enumerate(known.T)]

    def final(self, lead: float, noise: float, share: float) -> tuple[float, float]:
        """Expected lead at the end, and one standard deviation of it, both in points, of a lead after a share (0 to 1)
        of the training. noise: its standard error, in points, which is not part of the answer. Interpolated between
        EARLY; at 0 a lead says nothing, at 1 it is the final one.

        With fewer than FEW_EXAMPLES half of a lead at a quarter of the training remains, give or take 1.5 points.
        """
        means, spreads = [0.0], [UNKNOWN_SPREAD]
        for at, (leads, noises, changes) in zip(EARLY, self.known, strict=True):
            if len(leads) < FEW_EXAMPLES:
                means.append(float(np.interp(at, (0, 0.25, 1), (0, 0.5, 1))) * lead)
                spreads.append(float(np.interp(at, (0, 0.25, 1), (UNKNOWN_SPREAD, 1.5, 0))))
                continue
            unlike = np.abs(leads - lead) + np.abs(noises - noise)
            alike = np.argsort(unlike, kind="stable")[:_LEADS_ALIKE]
            low, middle, high = np.percentile(changes[alike], [15.87, 50, 84.13])
            means.append(lead + float(middle))
            spreads.append(float(high - low) / 2)
        places = [0.0, *EARLY, 1.0]
        return float(np.interp(share, places, [*means, lead])), float(np.interp(share, places, [*spreads, 0.0]))


@dataclass(frozen=True)
class Judged:
    """A candidate after its try, in points over direct training. expected: before it; measured: in it, at `share` of
    the training; gain: both together. The second of each pair is a standard deviation.
    """

    configuration: Configuration
    expected: tuple[float, float]
    measured: tuple[float, float]
    share: float
    gain: tuple[float, float]

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better among the candidates of one run after as many steps: by the lead alone, of equal leads
        by the gain. (How uncertain leads are, and how they change, is much the same for all candidates of a run. By
        the gain, large leads would lose to smaller ones, of which more is known.)
        """
        return self.measured[0], self.gain[0]


def judge(
    configuration: Configuration,
    expected: tuple[float, float],
    measured: tuple[float, float],
    share: float,
    leads: Leads,
) -> Judged:
    """Joins what was expected with what was measured, each weighted by its certainty (two normal distributions).

    To the error of the measurement, which is that of the rows, the chance in a training and the distance to its end are
    added.
    """
    final, spread = leads.final(*measured, share)
    variance = spread**2 + measured[1] ** 2 + TRAINING_NOISE**2
    precision = 1 / expected[1] ** 2 + 1 / variance
    mean = (expected[0] / expected[1] ** 2 + final / variance) / precision
    return Judged(configuration, expected, measured, share, (mean, precision**-0.5))


@dataclass(frozen=True)
class Choice:
    """The configuration that was chosen, and why, in a sentence. judged: the candidates that reached the last rung."""

    configuration: Configuration
    reason: str
    judged: list[Judged] = field(default_factory=list)


def choose(
    judged: Sequence[Judged], margin: float, fallback: Configuration = DIRECT, rows: str = "validation rows"
) -> Choice:
    """Of the candidates whose gain is above 0 by `margin` standard deviations the one that is furthest ahead, else
    direct training.

    fallback: what is chosen without a candidate. One that distils rules direct training out, because the user has set
    alpha: then the best candidate is taken whatever it promises. rows: what measured, in words.
    """
    if not judged:
        return Choice(fallback, f"{fallback}, because there was nothing to try within the budget")
    promising = [one for one in judged if one.gain[0] > margin * one.gain[1]]
    best = max(promising or judged, key=lambda one: one.rank)
    told = (
        f"{best.configuration}: expected {_points(best.expected)}, measured {_points(best.measured)} points over "
        f"direct training on {rows} after {best.share:.0%} of the steps, together {_points(best.gain)}"
    )
    if fallback.distils or promising:
        return Choice(best.configuration, told, list(judged))
    asked = f"is surely better ({margin:g} standard deviations are asked for)" if margin else "promises to be better"
    return Choice(fallback, f"direct training, because no candidate {asked}; the best was {told}", list(judged))


def _points(value: tuple[float, float]) -> str:
    return f"{value[0]:+.2f} ± {value[1]:.2f}"
