"""What earlier runs lead to expect: how much a configuration gains over direct training, and how surely.

The surrogate of the adaptive configuration, fitted to the examples of a memory and of a prior. Pure: no training, no
files.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from hf_hpmkd.components.adaptive_configuration import (
    CONTENDERS,
    FEW_EXAMPLES,
    UNKNOWN_SPREAD,
    Configuration,
    Example,
    Prediction,
    encode,
    encoded_columns,
)
from hf_hpmkd.meta_features import FEATURES, vector

_NEAREST = 5
_MEMBERS = 5
_FEW_SETS = 3  # data sets; with fewer, none is left out, and nothing is known of those not seen
_MOST_ROWS = 2_000  # of a member, so that many examples cost no more time
_MOST_GAIN = 10.0  # points that a gain counts for; what gains more has compared with a student that had hardly begun
_PENALTY = 30.0  # of the linear part
_UNKNOWN = -100.0
_OWN = "data sets of the memory"
_OWN_WEIGHT = 3.0  # of a run of the user's own memory, against one of the shipped prior
_ALIKE = 80  # examples that are asked how far they ended from what was expected of them
_TIE = 1e-3  # keeps in order what is expected to gain the same
_LEAST_SPREAD = 0.5  # points; no regression knows a gain better
_CLEAR_GAIN = 5.0  # points that a contender's gain counts for at most
_GAIN_SPREAD = 5.0  # points; how far contenders' gains lie apart: with as much noise, half of a gain counts
_ROWS_SHARE = 2.0  # of the distance between two examples that their rows make, a factor of ten being one
_LEAST_WEIGHT = 0.5  # of a setting that is nothing like the one at hand


class Predictor(Protocol):
    """Says what to expect."""

    def predict(self, features: Mapping[str, float], configurations: Sequence[Configuration]) -> Prediction: ...

    def words(self) -> str:
        """What it knows, to end a sentence on where expectations come from."""
        ...


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
        spread = UNKNOWN_SPREAD / np.sqrt(1 + total)
        return Prediction((weights * gains).sum(1) / (1 + total), spread)

    def words(self) -> str:
        if not self.examples:
            return "no earlier run, so the usual settings were tried"
        return f"the nearest of {_counted(self.examples)}"


class Surrogate:
    """A linear model of what configurations gain anywhere, and gradient-boosted trees over features and configuration
    for what it leaves; an ensemble over resampled *data sets*.

    Runs are noisy, and most of what they have in common is simple: the rate, the start, how much and how softly the
    teachers are heard. Trees alone need many runs to see that. What members promise is set right by what it came to on
    data sets that they had not seen (isotonic regression). How far a gain may lie from it is told by the examples of
    which as much was expected, on about as many rows: mean square, less the noise of their own measurement. Rows of
    the user's own memory weigh more than those of the shipped prior.
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0) -> None:
        from sklearn.isotonic import IsotonicRegression

        self.examples = list(examples)
        features = np.array([vector(one.features) for one in examples])
        encoded = np.array([encode(one.configuration) for one in examples])
        gains = np.clip([one.gain for one in examples], -_MOST_GAIN, _MOST_GAIN)
        noise = np.array([one.noise for one in examples])
        weights = np.array([_OWN_WEIGHT if one.own else 1.0 for one in examples]) / (1.0 + noise**2)
        names, of_row = np.unique([one.data for one in examples], return_inverse=True)
        random = np.random.default_rng(seed)
        self.members: list[_Member] = []
        unseen = np.full((_MEMBERS, len(gains)), math.nan)
        for number in range(_MEMBERS):
            times = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[of_row]
            if len(names) < _FEW_SETS:  # to leave any out
                times = np.bincount(random.integers(len(gains), size=len(gains)), minlength=len(gains))
            rows = np.flatnonzero(times)
            if len(rows) > _MOST_ROWS:
                rows = random.choice(rows, _MOST_ROWS, replace=False)
            member = _Member(features[rows], encoded[rows], gains[rows], (weights * times)[rows], number)
            self.members.append(member)
            if not times.all():
                unseen[number, times == 0] = member.predict(features[times == 0], encoded[times == 0])
        known = ~np.isnan(unseen).all(axis=0) & (len(names) >= _FEW_SETS)
        promised = np.nanmean(unseen[:, known], axis=0) if known.any() else np.zeros(0)
        self._calibration = IsotonicRegression(out_of_bounds="clip") if len(promised) >= FEW_EXAMPLES else None
        if self._calibration is not None:
            self._calibration.fit(promised, gains[known], sample_weight=weights[known])
        # The residuals are those of the fit itself, so spreads come out a little small; there are hundreds of rows.
        self._expected = self._calibrated(promised)
        self._missed = gains[known] - self._expected
        self._noise = noise[known]
        log_rows = features[:, _LOG_ROWS]
        self._usual_rows = float(np.nanmean(log_rows)) if not np.isnan(log_rows).all() else 0.0
        self._log_rows = np.nan_to_num(log_rows[known], nan=self._usual_rows)

    def _calibrated(self, promised: np.ndarray) -> np.ndarray:
        """What gains the members promise have come to on data sets that they had not seen, in the same order."""
        return promised if self._calibration is None else self._calibration.predict(promised) + _TIE * promised

    def predict(self, features: Mapping[str, float], configurations: Sequence[Configuration]) -> Prediction:
        here = vector(features)
        encoded = np.array([encode(one) for one in configurations])
        rows = np.broadcast_to(here, (len(encoded), len(here)))
        gain = self._calibrated(np.mean([one.predict(rows, encoded) for one in self.members], axis=0))
        return Prediction(gain, self._spread(gain, float(np.nan_to_num(here[_LOG_ROWS], nan=self._usual_rows))))

    def _spread(self, expected: np.ndarray, log_rows: float) -> np.ndarray:
        """One standard deviation of the gain where as much was expected, of the shape of `expected`, in points."""
        if len(self._missed) < FEW_EXAMPLES:
            return np.full_like(expected, UNKNOWN_SPREAD)
        # What was expected is asked in steps of a tenth, or thousands of configurations would each search for theirs.
        steps, place = np.unique(np.round(expected, 1), return_inverse=True)
        found = np.empty(len(steps))
        for index, step in enumerate(steps):
            unlike = np.abs(self._expected - step) + _ROWS_SHARE * np.abs(self._log_rows - log_rows)
            alike = np.argsort(unlike, kind="stable")[:_ALIKE]
            variance = float((self._missed[alike] ** 2 - self._noise[alike] ** 2).mean())
            found[index] = math.sqrt(max(variance, _LEAST_SPREAD**2))
        return found[place]

    def words(self) -> str:
        return f"a regression over {_counted(self.examples)}"


_LOG_ROWS = FEATURES.index("log_rows")
_LINEAR_FEATURES = ("warm_start", "log_learning_rate", "log_steps", "log_student_params")
_LINEAR_COLUMNS = [FEATURES.index(name) for name in _LINEAR_FEATURES]


class _Member:
    """One of the ensemble: ridge regression on `_terms`, then boosted trees on what that leaves."""

    def __init__(
        self, features: np.ndarray, encoded: np.ndarray, gains: np.ndarray, weights: np.ndarray, seed: int
    ) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.linear = make_pipeline(StandardScaler(), Ridge(alpha=_PENALTY))
        linear = features[:, _LINEAR_COLUMNS]
        known = ~np.isnan(linear)
        self.usual = np.where(known, linear, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        terms = self._terms(features, encoded)
        self.linear.fit(terms, gains, ridge__sample_weight=weights)
        self.trees = HistGradientBoostingRegressor(
            max_iter=50,
            learning_rate=0.1,
            max_leaf_nodes=8,
            min_samples_leaf=10,
            max_bins=32,  # with the usual 255 ten thousand examples take eight times as long
            random_state=seed,
        )
        left = gains - self.linear.predict(terms)
        self.trees.fit(_with_features(features, encoded), left, sample_weight=weights)

    def predict(self, features: np.ndarray, encoded: np.ndarray) -> np.ndarray:
        """`(rows,)`, in points. features: `(rows, features)`; encoded: `(rows, columns)`."""
        left = self.trees.predict(_with_features(features, encoded))
        return self.linear.predict(self._terms(features, encoded)) + left

    def _terms(self, features: np.ndarray, encoded: np.ndarray) -> np.ndarray:
        """`_terms`, where what is not known is as it usually is."""
        linear = features[:, _LINEAR_COLUMNS]
        return _terms(np.where(np.isnan(linear), self.usual, linear), encoded)


def _with_features(features: np.ndarray, encoded: np.ndarray) -> np.ndarray:
    # scikit-learn 1.9 fails on a column without a single value, so what is unknown lies far below all else.
    return np.hstack([np.nan_to_num(features, nan=_UNKNOWN), encoded])


def _terms(features: np.ndarray, encoded: np.ndarray) -> np.ndarray:
    """`(rows, terms)`: what a configuration changes, and how that depends on steps, learning rate, size and start.

    features: `(rows, features)`, the columns of _LINEAR_FEATURES.
    """
    one = encoded_columns(encoded)
    known = dict(zip(_LINEAR_FEATURES, features.T, strict=True))
    heard, rate = (one["alpha"] > 0).astype(float), one["learning_rate"]
    start = np.maximum(one["warm_start"] > 0, heard * known["warm_start"])
    alone = [
        heard,
        one["alpha"],
        one["temperature"],
        one["alpha"] * one["temperature"],
        one["temperature"] * (one["forward_kl"] + one["js"]),
        one["moves"],
        one["standardized_kl"],
        one["dkd"],
        one["dist"],
        one["label"],
        one["uniform"],
        rate,
        rate**2,
        one["weight_decay"],
        start,
        rate * heard,
        rate * start,
    ]
    base, steps, size = (known[name] for name in _LINEAR_FEATURES[1:])
    depends = [base, steps, base * rate, steps * rate, size * rate, base * heard, size * heard]
    depends += [base * start, steps * start, size * start]
    return np.column_stack([*alone, *depends])


def portfolio(
    features: Mapping[str, float], examples: Sequence[Example], possible: Sequence[Configuration]
) -> list[Configuration]:
    """What to try, in the order in which each adds most to what the best of those before it gains.

    Which configuration suits a data set can hardly be foretold, but tries tell; so what is tried should leave no data
    set behind. Asked are the contenders in the settings of a prior in which all of them were run, the more the more
    alike they are to the one at hand; gains that few rows show count for less; direct training, which is always tried,
    gains 0. Greedy, as for algorithm portfolios (Feurer et al. 2022, Auto-Sklearn 2.0, sec. 4.1), until none adds.
    possible: what may be tried here; what is most like a contender that distils stands in for it. [] without a complete
    setting.
    """
    complete, ways = contended(examples), _stand_ins(possible)
    if not complete or not ways:
        return []
    weights = np.clip(likeness(features, [next(iter(of.values())) for of in complete]), _LEAST_WEIGHT, None)
    gains = np.array([[_certain(of.get(one)) for one in ways] for of in complete])
    names, best = list(ways.values()), np.zeros(len(complete))
    order: list[Configuration] = []
    while True:
        adds = weights @ np.maximum(gains - best[:, None], 0.0)
        adds[[name in order for name in names]] = 0.0
        first = int(np.argmax(adds))
        if adds[first] <= 0:
            return order
        order.append(names[first])
        best = np.maximum(best, gains[:, first])


def contended(examples: Sequence[Example]) -> list[dict[Configuration, Example]]:
    """The settings in which every contender was run, but for those from a teacher's weights where there was none."""
    needed = [one for one in CONTENDERS if not one.warm_start]
    found = [{one.configuration: one for one in of if one.configuration in _CONTENDERS} for of in by_setting(examples)]
    return [of for of in found if all(one in of for one in needed)]


def by_setting(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each setting: what differs in nothing but the configuration, and so has one direct training."""
    found: dict[tuple[str, frozenset[tuple[str, float]]], list[Example]] = {}
    for one in examples:
        found.setdefault((one.data, frozenset(one.features.items())), []).append(one)
    return list(found.values())


def _stand_ins(possible: Sequence[Configuration]) -> dict[Configuration, Configuration]:
    """Contender -> itself where it is possible. For one that distils and is not, what is most like it of what is: it
    differs by what a recipe keeps, or by a gate that the student cannot feed. Direct training differs by its rate and
    start alone, so nothing stands in for it.
    """
    taught = [one for one in possible if one.distils]
    encoded = np.array([encode(one) for one in taught])
    there = set(possible)
    found = {}
    for one in CONTENDERS:
        if one in there:
            found[one] = one
        elif one.distils and taught:
            found[one] = taught[int(np.argmin(np.linalg.norm(encoded - encode(one), axis=1)))]
    return found


_CONTENDERS = frozenset(CONTENDERS)


def _certain(one: Example | None) -> float:
    """A gain, the nearer to 0 the less its measurement tells (the mean of a normal posterior)."""
    if one is None:
        return 0.0
    return min(max(one.gain, -_CLEAR_GAIN), _CLEAR_GAIN) * _GAIN_SPREAD**2 / (_GAIN_SPREAD**2 + one.noise**2)


def _counted(examples: Sequence[Example]) -> str:
    own = sum(one.own for one in examples)
    parts = [f"{own:,} run{'s' if own > 1 else ''} of the memory"] if own else []
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
    """Names of the data sets whose runs were most alike, the nearest first. Those of a memory stay its own: a card is
    read by others.
    """
    if not examples:
        return []
    order = np.argsort(-likeness(features, examples), kind="stable")
    names = (_OWN if (one := examples[index]).own else one.data for index in order)
    return list(dict.fromkeys(name for name in names if name))[:count]
