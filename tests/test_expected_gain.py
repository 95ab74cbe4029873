"""What is expected of configurations, and tried together, against closed forms and worlds whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hf_hpmkd.components.adaptive_configuration import (
    CONTENDERS,
    DIRECT,
    EARLY,
    FASTER,
    SPACE,
    Configuration,
    Example,
    configurations,
    encode,
    encoded_columns,
    propose,
)
from hf_hpmkd.expected_gain import Nearest, Surrogate, likeness, most_alike, portfolio, predictor

SOFT, HARD = Configuration(alpha=0.9, temperature=4.0), Configuration(alpha=0.5, temperature=1.0)
WARM = Configuration(warm_start=True)


def world(count: int, seed: int = 0, noise: float = 0.3) -> list[Example]:
    """Soft targets help large students and hurt small ones, in proportion to alpha; nothing else matters."""
    random = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        size = random.uniform(1, 5)
        alpha = random.choice([0.25, 0.5, 0.75, 0.9, 1.0])
        gain = 2.0 * alpha * (size - 3.0) + random.normal(scale=noise)
        features = {"log_student_params": size, "log_rows": random.uniform(2, 4)}
        early = tuple(0.5 * gain + random.normal(scale=0.01) for _ in EARLY)
        taught = Configuration(alpha=alpha, temperature=float(random.choice([1, 2, 4])))
        examples.append(Example(features, taught, gain, noise, early, data=f"set {index % 20}"))
    return examples


def test_the_surrogate_learns_who_is_hurt() -> None:
    surrogate = predictor(world(600))
    assert isinstance(surrogate, Surrogate)
    for size in (1.5, 4.5):
        found = surrogate.predict({"log_student_params": size, "log_rows": 3.0}, [SOFT, Configuration(alpha=0.25)])
        truth = np.array([2.0 * 0.9 * (size - 3), 2.0 * 0.25 * (size - 3)])
        assert np.abs(found.gain - truth).max() < 0.6
        assert (found.spread < 1.0).all()


def test_data_sets_that_differ_by_themselves_make_the_surrogate_unsure() -> None:
    """Half of the spread between data sets is nothing that features tell: the predictions must own up to it."""
    random = np.random.default_rng(0)
    of_set = {f"set {index}": random.normal(scale=3.0) for index in range(20)}
    told, hidden = world(600), []
    for one in told:
        hidden.append(Example(one.features, one.configuration, one.gain + of_set[one.data], one.noise, data=one.data))
    sure, unsure = (
        Surrogate(examples).predict({"log_student_params": 3.0}, [SOFT]).spread[0] for examples in (told, hidden)
    )
    assert sure < 1.0 and 2.0 < unsure < 6.0


def test_own_runs_outweigh_the_prior() -> None:
    shipped = [Example({"log_rows": 3.0}, SOFT, -2.0, data=f"s{i}") for i in range(60)]
    own = [Example({"log_rows": 3.0}, SOFT, 2.0, data=f"o{i}", own=True) for i in range(60)]
    assert Surrogate(shipped + own).predict({"log_rows": 3.0}, [SOFT]).gain[0] > 0.2


def test_few_runs_count_by_likeness() -> None:
    examples = [
        Example({"log_rows": 2.0, "log_classes": 0.3}, SOFT, -3.0, data="small"),
        Example({"log_rows": 5.0, "log_classes": 2.0}, SOFT, 4.0, data="large"),
    ]
    nearest = predictor(examples)
    assert isinstance(nearest, Nearest)
    small = nearest.predict({"log_rows": 2.2, "log_classes": 0.4}, [SOFT, Configuration(alpha=0.25, kd_kind="dist")])
    large = nearest.predict({"log_rows": 4.8, "log_classes": 1.9}, [SOFT])
    assert small.gain[0] < -1 and large.gain[0] > 1
    assert abs(small.gain[1]) < abs(small.gain[0]) and small.spread[1] > small.spread[0]
    assert most_alike({"log_rows": 4.8, "log_classes": 1.9}, examples) == ["large", "small"]


def test_data_sets_of_a_memory_are_not_named() -> None:
    places = {"secret a": 2.0, "secret b": 2.1, "public": 3.0, "far": 5.0}
    examples = [
        Example({"log_rows": size, "log_classes": 5 - size}, SOFT, 1.0, data=name, own=name.startswith("secret"))
        for name, size in places.items()
    ]
    here = {"log_rows": 2.0, "log_classes": 3.0}
    assert most_alike(here, examples, count=2) == ["data sets of the memory", "public"]
    assert most_alike(here, examples[2:]) == ["public", "far"]


def test_nothing_known_expects_nothing_and_tries_the_usual() -> None:
    found = configurations(SPACE, DIRECT)
    prediction = predictor([]).predict({}, found)
    assert not prediction.gain.any() and (prediction.spread == prediction.spread[0]).all()
    tried = [found[index] for index in propose(prediction, found, 4)]
    assert sorted(map(str, tried)) == sorted(map(str, [FASTER, WARM, SOFT, HARD]))


def contended(name: str, size: float, gains: dict[Configuration, float], noise: float = 0.1) -> list[Example]:
    """A data set on which every contender was run; those that are not named lose."""
    return [Example({"log_rows": size}, one, gains.get(one, -1.0), noise, data=name) for one in CONTENDERS]


def test_a_portfolio_leaves_no_data_set_behind() -> None:
    """Not the best ones on the mean: the second is that which helps where the first does not."""
    first, second, third, fourth = CONTENDERS[5], CONTENDERS[6], CONTENDERS[9], CONTENDERS[0]
    examples = [
        *contended("a", 3.0, {first: 4.0, second: 3.9}),
        *contended("b", 3.0, {first: 4.0, second: 3.9}),
        *contended("c", 3.0, {third: 2.0}),
        *contended("d", 3.0, {fourth: 9.0}, noise=20.0),  # on a handful of rows
    ]
    assert portfolio({"log_rows": 3.0}, examples, CONTENDERS) == [first, third, fourth]  # nothing else adds
    assert portfolio({}, examples[:-1], CONTENDERS) == [first, third]  # a setting with a gap does not count
    assert portfolio({}, world(100), CONTENDERS) == []


def test_settings_alike_weigh_more_in_a_portfolio() -> None:
    small, large = CONTENDERS[5], CONTENDERS[9]
    examples = [*contended("s", 2.0, {small: 2.0}), *contended("m", 3.5, {}), *contended("l", 5.0, {large: 2.0})]
    assert portfolio({"log_rows": 2.1}, examples, CONTENDERS)[0] == small
    assert portfolio({"log_rows": 4.9}, examples, CONTENDERS)[0] == large


def test_what_members_promise_is_set_right_by_data_sets_they_had_not_seen() -> None:
    """Where nothing can be told of an unseen data set, nothing is promised, however well the seen ones are fitted."""
    random = np.random.default_rng(1)
    examples = []
    for index in range(30):
        gain, place = random.normal(scale=3.0), random.uniform(2, 4)
        examples += [Example({"log_rows": place}, SOFT, gain, 0.1, data=f"set {index}") for _ in range(10)]
    found = Surrogate(examples).predict({"log_rows": examples[0].features["log_rows"]}, [SOFT])
    assert abs(found.gain[0]) < 1.5 and 2.0 < found.spread[0] < 4.5


def test_likeness_is_the_cosine_of_standardised_features() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(30, 2))
    examples = [Example({"log_rows": a, "log_classes": b}, SOFT, 0.0) for a, b in values]
    here = np.array([0.7, -0.2])
    scaled, point = stats.zscore(values), (here - values.mean(0)) / values.std(0)
    expected = scaled @ point / np.linalg.norm(scaled, axis=1) / np.linalg.norm(point)
    assert likeness({"log_rows": 0.7, "log_classes": -0.2}, examples) == pytest.approx(expected)


def test_what_is_most_like_a_contender_stands_in_for_it() -> None:
    """A recipe may keep a value that no contender has, and a student may lack what a gate reads."""
    examples = contended("a", 3.0, {one: 2.0 for one in CONTENDERS if one.distils} | {FASTER: 1.0})
    free = set(SPACE) - {"gate"}
    labelled = configurations(free, Configuration(gate="label"))
    first = portfolio({}, examples, labelled)[0]
    assert first.distils and first.gate == "label" and replace(first, gate="mixture") in CONTENDERS
    uniform = [one for one in configurations(SPACE, DIRECT) if not one.distils or one.gate == "uniform"]
    assert [one.gate for one in portfolio({}, examples, uniform) if one.distils] == ["uniform"]
    assert portfolio({}, examples, [DIRECT, FASTER]) == [FASTER]
    assert portfolio({}, examples, [DIRECT, replace(DIRECT, weight_decay=10.0)]) == []  # the rate is kept


def test_what_is_not_known_of_a_run_does_not_move_what_is_expected() -> None:
    """An unknown number of steps is no training of one step, and not the longest there is."""
    random = np.random.default_rng(2)
    examples = []
    for one in world(400):
        steps = random.uniform(2.2, 3.2)
        examples.append(
            replace(one, features={**one.features, "log_steps": steps}, gain=one.gain + 4.0 * (steps - 2.7))
        )
    here = {"log_student_params": 4.0, "log_rows": 3.0}
    surrogate = Surrogate(examples)
    usual, unknown = (surrogate.predict(one, [SOFT]).gain[0] for one in ({**here, "log_steps": 2.7}, here))
    assert usual == pytest.approx(1.8, abs=0.7) and abs(usual - unknown) < 2.5


def test_one_data_set_tells_nothing_of_others() -> None:
    examples = [replace(one, data="the only one") for one in world(200)]
    assert Surrogate(examples).predict({}, [SOFT]).spread[0] == 2.0


def test_columns_are_named_as_they_are_encoded() -> None:
    one = Configuration(0.75, 8.0, "constant", "dkd", "label", 4.0, 10.0)
    columns = encoded_columns(
        np.array([encode(one), encode(WARM), encode(replace(HARD, temperature_schedule="learned"))])
    )
    told = {name: values.tolist() for name, values in columns.items() if values.any()}
    assert told == {
        "alpha": [0.75, 0.0, 0.5], "temperature": [3.0, 0.0, 0.0], "moves": [0.0, 0.0, 1.0], "learned": [0.0, 0.0, 1.0],
        "dkd": [1.0, 0.0, 0.0], "forward_kl": [0.0, 0.0, 1.0], "label": [1.0, 0.0, 0.0], "mixture": [0.0, 0.0, 1.0],
        "learning_rate": [2.0, 0.0, 0.0], "weight_decay": [1.0, 0.0, 0.0], "warm_start": [0.0, 2.0, 0.0],
    }  # fmt: skip
