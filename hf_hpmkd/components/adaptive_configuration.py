"""Chooses how to distil: what earlier runs lead to expect of a configuration, which ones to try, and what a try proves.

Pure: no training, no data, no files. The paper (section on the adaptive configuration manager) predicts accuracy
retention; here the target is the gain over *direct training* of the same student on the same rows, because the question
that matters is whether to distil at all, and direct training is always an answer.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import numpy as np

from hf_hpmkd.losses import LEGAL_SCHEDULES
from hf_hpmkd.meta_features import vector

EARLY = (0.125, 0.25, 0.5, 0.75)
"""Shares of a training at which an example may know how far ahead it was."""

FEW_EXAMPLES = 50
"""Below so many, the nearest runs are asked instead of a regression (the paper's rule)."""

_NEAREST = 5
_MEMBERS = 5
_MOST_ROWS = 2_000  # of a member, so that many examples cost no more time
_UNKNOWN = -100.0
_UNKNOWN_SPREAD = 2.0  # points; how far gains lie apart where nothing is known
_OWN_WEIGHT = 3.0  # of a run of the user's own memory, against one of the shipped prior
TRAINING_NOISE = 0.3
"""Points by which two trainings that differ in nothing but chance end apart, whatever rows they are judged on. A guess:
with one seed a run cannot measure it."""

_LEADS_ALIKE = 60  # early leads of examples that are asked what became of them
# How far apart two candidates lie, encoded: by another kind or by a temperature of more than twice, not by a weight
# decay (however different), half or twice a learning rate, an alpha or a gate alone, between which a short try cannot
# tell.
_UNLIKE = 1.2
_GATE_SHARE = 0.5  # of the distance between two gates
_DECAY_SHARE = 0.5  # of that between two weight decays
_START = 2.0  # how far apart two starts lie
WARM_WORDS = "from a teacher's weights"
_BOLDNESS = 1.0  # standard deviations that a candidate is credited with before it is tried


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
"""The values that are considered. Every field of a Configuration has its line."""

# Tried first where nothing is known: what the literature and small probes recommend, the boldest first.
_USUAL = (
    Configuration(alpha=0.9, temperature=4.0),
    Configuration(alpha=0.5, temperature=1.0),
    Configuration(alpha=0.5, temperature=2.0),
    Configuration(alpha=0.9, temperature=8.0),
    Configuration(alpha=0.25, temperature=1.0, gate="label"),
)
_KINDS, _GATES = tuple(LEGAL_SCHEDULES), ("mixture", "joint", "label", "uniform")
_GATE_COLUMNS = slice(4 + len(_KINDS), 4 + len(_KINDS) + len(_GATES))  # of an encoded configuration
_DECAY_COLUMN = -2


@dataclass(frozen=True)
class Example:
    """What one run showed. gain: points of accuracy over direct training, noise: its standard error, in points.

    early: the gain at each of EARLY, NaN where unknown. data: what the run was on, for words and for leaving out.
    own: from the user's memory, not from the shipped prior.
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
    """Expected gain of each configuration, `(configurations,)`, in points; spread: one standard deviation of it.

    doubt: the part of the spread that more examples would take away, which is what makes a try worth while.
    """

    gain: np.ndarray
    spread: np.ndarray
    doubt: np.ndarray


class Predictor(Protocol):
    """Says what to expect."""

    def predict(self, features: Mapping[str, float], configurations: Sequence[Configuration]) -> Prediction: ...

    def words(self) -> str:
        """What it knows, to end a sentence on where expectations come from."""
        ...


def configurations(free: Collection[str], kept: Configuration) -> list[Configuration]:
    """All combinations of SPACE that go together. free: names of the fields that may change; of the others `kept` has
    the value. The usual ones come first. Raises ValueError for a field that does not exist.
    """
    if unknown := set(free) - set(SPACE):
        raise ValueError(f"Unknown fields {', '.join(sorted(unknown))}. Known: {', '.join(SPACE)}.")
    values = [SPACE[name] if name in free else (getattr(kept, name),) for name in SPACE]
    found = [Configuration(**{n: v for n, v in asdict(one).items() if n in free} | _kept(kept, free)) for one in _USUAL]
    found = [one for one in found if _is_legal(one)]
    for combination in itertools.product(*values):
        one = Configuration(**dict(zip(SPACE, combination, strict=True)))
        if not one.distils:
            kept_too = ("learning_rate", "weight_decay", "warm_start")
            one = replace(DIRECT, **{name: getattr(one, name) for name in kept_too})
        elif one.warm_start:
            continue  # whether it does is the recipe's business
        elif one.temperature_schedule != "constant" and "temperature" in free and one.temperature != DIRECT.temperature:
            continue  # it moves, so where it starts matters little
        if _is_legal(one):
            found.append(one)
    return list(dict.fromkeys(found))


def _kept(kept: Configuration, free: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in asdict(kept).items() if name not in free}


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


# ---- what to expect --------------------------------------------------------------------------------------------------


def predictor(examples: Sequence[Example], seed: int = 0) -> Predictor:
    """A regression over enough examples, the nearest ones of a few, or nothing known."""
    return Surrogate(examples, seed) if len(examples) >= FEW_EXAMPLES else Nearest(examples)


class Nearest:
    """What the most similar runs gave: mean over the five nearest by cosine of standardised features, weighted by that
    and by the likeness of the configurations, with one imagined run of gain 0. Without examples nothing is expected.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def predict(self, features: Mapping[str, float], configurations: Sequence[Configuration]) -> Prediction:
        encoded = np.array([encode(one) for one in configurations])
        weights = np.zeros((len(configurations), 1))
        gains = np.zeros(1)
        if self.examples:
            alike = likeness(features, self.examples)
            nearest = np.argsort(-alike, kind="stable")[:_NEAREST]
            known = np.array([encode(self.examples[index].configuration) for index in nearest])
            distance = ((encoded[:, None] - known[None]) ** 2).sum(-1)
            weights = np.exp(-0.5 * distance) * np.clip(alike[nearest], 0, None)
            gains = np.array([self.examples[index].gain for index in nearest])
        total = weights.sum(1)
        spread = _UNKNOWN_SPREAD / np.sqrt(1 + total)
        return Prediction((weights * gains).sum(1) / (1 + total), spread, spread)

    def words(self) -> str:
        if not self.examples:
            return "no earlier run, so the usual settings were tried"
        return f"the nearest of {_counted(self.examples)}"


class Surrogate:
    """Gradient-boosted trees over features and configuration, an ensemble over resampled *data sets*.

    How the members differ is what more data sets would settle; how far they miss data sets that they have not seen is
    added to it. Rows of the user's own memory weigh more than those of the shipped prior.
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.examples = list(examples)
        inputs = _inputs([one.features for one in examples], [one.configuration for one in examples])
        gains = np.array([one.gain for one in examples])
        noise = np.array([one.noise for one in examples])
        weights = np.array([_OWN_WEIGHT if one.own else 1.0 for one in examples]) / (1.0 + noise**2)
        names, of_row = np.unique([one.data for one in examples], return_inverse=True)
        random = np.random.default_rng(seed)
        self.members = []
        missed: list[np.ndarray] = []
        for member in range(_MEMBERS):
            times = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[of_row]
            if len(names) < 3:  # too few to leave any out
                times = np.bincount(random.integers(len(gains), size=len(gains)), minlength=len(gains))
            model = HistGradientBoostingRegressor(
                max_iter=50,
                learning_rate=0.1,
                max_leaf_nodes=8,
                min_samples_leaf=10,
                max_bins=32,  # with the usual 255 ten thousand examples take eight times as long
                random_state=member,
            )
            rows = np.flatnonzero(times)
            if len(rows) > _MOST_ROWS:
                rows = random.choice(rows, _MOST_ROWS, replace=False)
            model.fit(inputs[rows], gains[rows], sample_weight=(weights * times)[rows])
            self.members.append(model)
            unseen = times == 0
            if unseen.any():
                missed.append((gains[unseen] - model.predict(inputs[unseen])) ** 2 - noise[unseen] ** 2)
        # A tenth of a point at least: no regression knows a gain better.
        self.residual = math.sqrt(max(float(np.concatenate(missed).mean()), 0.01)) if missed else _UNKNOWN_SPREAD

    def predict(self, features: Mapping[str, float], configurations: Sequence[Configuration]) -> Prediction:
        inputs = _inputs([features], configurations)
        answers = np.array([model.predict(inputs) for model in self.members])
        doubt = answers.std(axis=0)
        return Prediction(answers.mean(axis=0), np.sqrt(doubt**2 + self.residual**2), doubt)

    def words(self) -> str:
        return f"a regression over {_counted(self.examples)}"


def _inputs(features: Sequence[Mapping[str, float]], configurations: Sequence[Configuration]) -> np.ndarray:
    """`(configurations, columns)`. features: one per configuration, or one for all."""
    # scikit-learn 1.9 fails on a column without a single value, so what is unknown lies far below all else.
    known = np.nan_to_num(np.array([vector(one) for one in features]), nan=_UNKNOWN)
    encoded = np.array([encode(one) for one in configurations])
    return np.hstack([np.broadcast_to(known, (len(encoded), known.shape[1])), encoded])


def _counted(examples: Sequence[Example]) -> str:
    own = sum(one.own for one in examples)
    parts = [f"{own:,} runs of the memory"] if own else []
    parts += [f"{len(examples) - own:,} runs of a prior"] if own < len(examples) else []
    return " and ".join(parts)


def likeness(features: Mapping[str, float], examples: Sequence[Example]) -> np.ndarray:
    """Cosine, -1 to 1, of each example's features with these, all standardised over the examples; unknown ones count as
    average. `(examples,)`.
    """
    known = np.array([vector(one.features) for one in examples])
    with np.errstate(invalid="ignore"):
        there = ~np.isnan(known)
        count = np.maximum(there.sum(0), 1)
        mean = np.where(there, known, 0).sum(0) / count
        deviation = np.sqrt((np.where(there, known - mean, 0) ** 2).sum(0) / count)
    scale = np.where(deviation > 1e-9, deviation, 1.0)
    rows = np.nan_to_num((known - mean) / scale)
    here = np.nan_to_num((vector(features) - mean) / scale)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(here)
    return np.divide(rows @ here, norms, out=np.zeros(len(rows)), where=norms > 0)


def most_alike(features: Mapping[str, float], examples: Sequence[Example], count: int = 3) -> list[str]:
    """Names of the data sets whose runs were most alike, the nearest first."""
    if not examples:
        return []
    order = np.argsort(-likeness(features, examples), kind="stable")
    return list(dict.fromkeys(examples[index].data for index in order if examples[index].data))[:count]


# ---- what to try -----------------------------------------------------------------------------------------------------


def propose(
    prediction: Prediction, configurations: Sequence[Configuration], count: int, own: int | None = None
) -> list[int]:
    """Positions of the candidates for a try: the most promising ones, each unlike those before it.

    Promising is the expected gain plus its doubt (an upper confidence bound). Plain direct training is never among
    them, because it is always tried. The best direct training at a higher learning rate is, where one is possible and
    not the only candidate: without it, what a learning rate gains would be put down to the teachers. So is, of three or
    more, the best from a teacher's weights, lest what the start gains be put down to their answers. own: position of
    what the recipe itself says, where its author chose that with care; it is among the candidates too.
    """
    hope = prediction.gain + _BOLDNESS * prediction.doubt
    encoded = np.array([encode(one) for one in configurations])
    encoded[:, _GATE_COLUMNS] *= _GATE_SHARE
    encoded[:, _DECAY_COLUMN] *= _DECAY_SHARE
    open_ = np.array([one != DIRECT for one in configurations])
    always = [] if own is None else [own]

    def add(usual: Configuration, possible: list[bool]) -> None:
        """The most hopeful one that is possible; of equals that which is most like the usual one."""
        unlike = np.abs(encoded - encode(usual)).sum(axis=1)
        always.extend(sorted(np.flatnonzero(possible).tolist(), key=lambda index: (-hope[index], unlike[index]))[:1])

    direct = [not (one.distils or one.warm_start) for one in configurations]
    add(FASTER, [is_direct and one.learning_rate > 1 for is_direct, one in zip(direct, configurations, strict=True)])
    if count > 2:
        add(replace(DIRECT, warm_start=True), [one.warm_start for one in configurations])
    if count > 1:
        hope[always] = np.inf
    chosen: list[int] = []
    while open_.any() and len(chosen) < count:
        best = int(np.argmax(np.where(open_, hope, -np.inf)))
        chosen.append(best)
        open_ &= np.linalg.norm(encoded - encoded[best], axis=1) > _UNLIKE
    return chosen


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
        means, spreads = [0.0], [_UNKNOWN_SPREAD]
        for at, (leads, noises, changes) in zip(EARLY, self.known, strict=True):
            if len(leads) < FEW_EXAMPLES:
                means.append(float(np.interp(at, (0, 0.25, 1), (0, 0.5, 1))) * lead)
                spreads.append(float(np.interp(at, (0, 0.25, 1), (_UNKNOWN_SPREAD, 1.5, 0))))
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


def choose(judged: Sequence[Judged], margin: float, fallback: Configuration = DIRECT) -> Choice:
    """The best candidate if its gain is above 0 by `margin` standard deviations, else direct training.

    fallback: what is chosen without a candidate. One that distils rules direct training out, because the user has set
    alpha: then the best candidate is taken whatever it promises.
    """
    if not judged:
        return Choice(fallback, f"{fallback}, because the budget does not suffice to try anything")
    best = max(judged, key=lambda one: one.gain[0] - margin * one.gain[1])
    told = (
        f"{best.configuration}: expected {_points(best.expected)}, measured {_points(best.measured)} points over "
        f"direct training on validation rows after {best.share:.0%} of the steps, together {_points(best.gain)}"
    )
    if fallback.distils or best.gain[0] > margin * best.gain[1]:
        return Choice(best.configuration, told, list(judged))
    asked = f"is surely better ({margin:g} standard deviations are asked for)" if margin else "promises to be better"
    return Choice(fallback, f"direct training, because no candidate {asked}; the best was {told}", list(judged))


def _points(value: tuple[float, float]) -> str:
    return f"{value[0]:+.2f} ± {value[1]:.2f}"
