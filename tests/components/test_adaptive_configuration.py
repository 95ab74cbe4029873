"""What is expected, tried and concluded, against closed forms, limits and worlds whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hf_hpmkd.components.adaptive_configuration import (
    DIRECT,
    EARLY,
    FASTER,
    SPACE,
    TRAINING_NOISE,
    Configuration,
    Example,
    Leads,
    Prediction,
    choose,
    configurations,
    encode,
    judge,
    propose,
)
from hf_hpmkd.vocabulary import LEGAL_SCHEDULES

SOFT, HARD = Configuration(alpha=0.9, temperature=4.0), Configuration(alpha=0.5, temperature=1.0)
WARM = Configuration(warm_start=True)


# ---- the space -------------------------------------------------------------------------------------------------------


def test_every_combination_goes_together_and_is_there_once() -> None:
    found = configurations(SPACE, DIRECT)
    assert len(found) == len(set(found)) and DIRECT in found
    assert all(one.temperature_schedule in LEGAL_SCHEDULES[one.kd_kind] for one in found)
    for name, values in SPACE.items():
        assert {getattr(one, name) for one in found} == set(values), name
    direct = [one for one in found if not one.distils]
    assert len(direct) == len(SPACE["learning_rate"]) * len(SPACE["weight_decay"]) * len(SPACE["warm_start"])
    assert not any(one.warm_start for one in found if one.distils)  # the recipe says where those begin
    cold = configurations(set(SPACE) - {"warm_start"}, DIRECT)
    assert set(found) - set(cold) == {one for one in direct if one.warm_start}


def test_what_the_user_set_is_kept() -> None:
    kept = Configuration(alpha=0.3, temperature=5.0, gate="joint")
    found = configurations(["kd_kind", "learning_rate"], kept)
    assert {(one.alpha, one.temperature, one.gate, one.weight_decay) for one in found} == {(0.3, 5.0, "joint", 1.0)}
    assert {one.kd_kind for one in found} == set(SPACE["kd_kind"])
    with pytest.raises(ValueError, match="Unknown fields colour"):
        configurations(["colour"], DIRECT)


def test_the_labels_alone_are_there_once_whatever_the_recipe_says_of_teachers():
    kept = replace(DIRECT, temperature=2.0, gate="label")
    found = configurations(set(SPACE) - {"alpha", "temperature", "gate"}, kept)
    plain = [one for one in found if (one.learning_rate, one.weight_decay, one.warm_start) == (1.0, 1.0, False)]
    assert plain == [DIRECT]


def test_encodings_tell_configurations_apart_but_not_what_means_nothing() -> None:
    found = configurations(SPACE, DIRECT)
    assert len({tuple(encode(one)) for one in found}) == len(found)
    assert np.array_equal(encode(Configuration(temperature=8.0, gate="label")), encode(DIRECT))


# ---- what to try -----------------------------------------------------------------------------------------------------


def expected(*gains: float) -> Prediction:
    return Prediction(np.array(gains), np.zeros(len(gains)))


def test_candidates_are_hopeful_and_unlike() -> None:
    found = [DIRECT, SOFT, Configuration(alpha=0.9, temperature=4.0, weight_decay=1.0001), HARD]
    assert propose(expected(9.0, 1.0, 0.9, 0.0), found, 3) == [1, 3]


def test_candidates_differ_by_more_than_a_try_can_tell() -> None:
    """Another kind, quite another alpha or temperature is another candidate; another gate or weight decay is none."""
    first = replace(HARD, weight_decay=0.1)
    near = [replace(first, gate="label"), replace(first, alpha=0.75), replace(first, weight_decay=10.0)]
    far = [replace(first, kd_kind="dist"), replace(first, temperature=4.0), replace(first, alpha=0.9, temperature=2.0)]
    found = [first, *near, *far]
    assert propose(expected(9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0), found, len(found)) == [0, 4, 5, 6]


def test_of_two_that_promise_nearly_the_same_the_usual_one_is_tried() -> None:
    odd = replace(HARD, gate="label", weight_decay=10.0)
    assert propose(expected(1.15, 1.0), [odd, HARD], 1) == [1]
    assert propose(expected(1.25, 1.0), [odd, HARD], 1) == [0]


def test_a_faster_direct_training_is_always_tried_beside_the_others() -> None:
    """So that what a learning rate gains is not put down to the teachers."""
    found = [DIRECT, SOFT, HARD, FASTER]
    assert sorted(propose(expected(0.0, 2.0, 1.0, -9.0), found, 2)) == [1, 3]
    assert propose(expected(0.0, 2.0, 1.0, -9.0), found, 1) == [1]  # the only try is for what promises most
    assert propose(expected(0.0, 2.0, 1.0), found[:3], 2) == [1, 2]


def test_the_faster_one_is_that_which_promises_most() -> None:
    found = [DIRECT, SOFT, FASTER, replace(FASTER, learning_rate=4.0), replace(FASTER, weight_decay=10.0)]
    assert propose(expected(0.0, 2.0, -3.0, -2.0, -3.0), found, 2) == [3, 1]
    assert propose(expected(0.0, 2.0, -3.0, -3.0, -3.0), found, 2) == [2, 1]


def test_a_portfolio_comes_first_and_the_most_promising_one_last() -> None:
    faster = replace(FASTER, learning_rate=4.0)
    soft = replace(SOFT, learning_rate=2.0)
    found = [DIRECT, SOFT, HARD, FASTER, faster, WARM, soft]
    odd = replace(SOFT, kd_kind="dist")
    found.append(odd)
    hopes = expected(0.0, 3.0, 1.0, 0.5, -9.0, -8.0, 2.0, 4.0)
    apart = replace(HARD, alpha=0.25)  # the user has set alpha: it cannot be tried
    together = [HARD, apart, WARM, faster, soft, SOFT]
    assert propose(hopes, found, 5, portfolio=together) == [4, 2, 5, 6, 7]
    assert propose(hopes, found, 4, portfolio=together) == [4, 2, 5, 6]  # of four, none is spared for it
    assert propose(hopes, found, 1, portfolio=together) == [2]
    assert propose(hopes, found, 3, portfolio=[HARD]) == [3, 2, 7]  # where it ends, what promises most goes on


def test_what_the_recipe_says_with_care_is_tried() -> None:
    found = [DIRECT, SOFT, HARD, FASTER]
    prediction = expected(0.0, 2.0, -5.0, -9.0)
    assert sorted(propose(prediction, found, 2, own=2)) == [2, 3]
    assert sorted(propose(prediction, found, 3, own=2)) == [1, 2, 3]
    assert propose(prediction, found, 1, own=2) == [1]
    assert sorted(propose(prediction, found, 3, own=0)) == [1, 2, 3]  # direct training has its own try


# ---- what a try proves -----------------------------------------------------------------------------------------------


def leads_of(lead: float, change: float, deviation: float, at: float = EARLY[1], count: int = 400) -> list[Example]:
    """Examples of about one early lead, which changed by so much, give or take a normal deviation."""
    random = np.random.default_rng(0)
    early = [math.nan] * len(EARLY)
    found = []
    for led, changed in zip(random.normal(lead, 0.05, count), random.normal(change, deviation, count), strict=True):
        early[EARLY.index(at)] = led
        found.append(Example({}, SOFT, led + changed, early=tuple(early)))
    return found


def test_judging_is_the_product_of_two_normal_distributions() -> None:
    leads = Leads(leads_of(3.0, -1.2, 0.4))
    final, spread = leads.final(3.0, 0.5, 0.5)
    found = judge(SOFT, (1.0, 2.0), (3.0, 0.5), 0.5, leads)
    grid = np.linspace(-20, 20, 400_001)
    spread = math.hypot(spread, 0.5, TRAINING_NOISE)
    weight = stats.norm.pdf(grid, 1.0, 2.0) * stats.norm.pdf(grid, final, spread)
    mean = (weight @ grid) / weight.sum()
    assert found.gain[0] == pytest.approx(mean, abs=1e-4)
    assert found.gain[1] == pytest.approx(math.sqrt((weight @ (grid - mean) ** 2) / weight.sum()), abs=1e-4)


def test_a_whole_training_is_believed_and_a_start_is_not() -> None:
    for examples in ([], leads_of(2.0, -1.0, 1.0, EARLY[0])):
        assert Leads(examples).final(2.5, 1.0, 1.0) == (2.5, 0.0)
        mean, spread = Leads(examples).final(2.5, 1.0, 0.01)
        assert mean < 0.2 and spread > 1.5


def test_what_becomes_of_a_lead_is_learned_from_leads_like_it() -> None:
    examples = [*leads_of(0.0, 0.0, 0.2), *leads_of(10.0, -4.0, 3.0)]
    small, large = (Leads(examples).final(lead, 1.0, EARLY[1]) for lead in (0.0, 10.0))
    assert small == (pytest.approx(0.0, abs=0.1), pytest.approx(0.2, rel=0.4))
    assert large == (pytest.approx(6.0, abs=1.0), pytest.approx(3.0, rel=0.4))


def test_a_lead_that_many_rows_show_lasts_as_those_do() -> None:
    sure = [replace(one, noise=0.2) for one in leads_of(2.0, 0.0, 0.3)]
    unsure = [replace(one, noise=3.0) for one in leads_of(2.0, 0.0, 2.5)]
    leads = Leads([*unsure, *sure])
    assert leads.final(2.0, 0.3, EARLY[1])[1] == pytest.approx(0.3, rel=0.4)
    assert leads.final(2.0, 2.8, EARLY[1])[1] == pytest.approx(2.5, rel=0.4)


def test_a_few_leads_that_turn_round_do_not_shake_all_others() -> None:
    calm = leads_of(1.0, 0.0, 0.3)
    wild = [Example({}, SOFT, -60.0, early=one.early) for one in calm[::20]]
    before, after = (Leads(examples).final(1.0, 1.0, EARLY[1])[1] for examples in (calm, [*calm, *wild]))
    assert after < 1.5 * before


def test_half_of_an_early_lead_remains_where_nothing_is_known() -> None:
    assert Leads([]).final(4.0, 0.3, EARLY[1]) == (2.0, 1.5)


def test_distillation_has_to_prove_itself() -> None:
    def judged(configuration: Configuration, gain: float, deviation: float):
        return judge(configuration, (0.0, 1e6), (gain, deviation), 1.0, Leads([]))

    sure, unsure = judged(HARD, 1.0, 0.3), judged(SOFT, 1.2, 2.0)
    assert choose([sure, unsure], margin=1.0).configuration == HARD
    assert choose([unsure], margin=1.0).configuration == DIRECT
    assert choose([unsure], margin=0.5).configuration == SOFT
    assert choose([judged(SOFT, -3.0, 0.1)], 1.0, fallback=HARD).configuration == SOFT  # alpha is the user's
    assert choose([], 1.0).configuration == DIRECT and choose([], 1.0, fallback=HARD).configuration == HARD


def test_a_lead_never_loses_to_a_smaller_one() -> None:
    """Though much less is expected of it, and leads like it vanish more often than smaller ones."""
    leads = Leads([*leads_of(6.0, 0.0, 0.2), *leads_of(8.0, -7.0, 4.0)])
    smaller, larger = (judge(one, (hope, 1.0), (lead, 0.5), EARLY[1], leads)
                       for one, hope, lead in ((HARD, 2.0, 6.0), (SOFT, 0.5, 8.0)))  # fmt: skip
    assert larger.gain[0] < smaller.gain[0] - 1.0
    assert choose([smaller, larger], margin=0.0).configuration == SOFT
    equal = judge(SOFT, (0.5, 1.0), (6.0, 0.5), EARLY[1], leads)
    assert choose([equal, smaller], margin=0.0).configuration == HARD  # of which more was expected


def test_noise_alone_seldom_misleads() -> None:
    """Four candidates as good as direct training, on rows that tell a point: seldom one of them looks surely better."""
    random = np.random.default_rng(0)
    misled = 0
    for _ in range(400):
        judged = [judge(SOFT, (0.0, 2.0), (gain, 1.0), 1.0, Leads([])) for gain in random.normal(size=4)]
        misled += choose(judged, margin=2.0).configuration.distils
    assert 0.02 < misled / 400 < 0.12


def test_the_reason_says_what_was_weighed() -> None:
    judged = judge(SOFT, (0.5, 1.0), (-2.0, 0.4), 0.25, Leads([]))
    reason = choose([judged], 1.0).reason
    assert reason.startswith("direct training, because no candidate is surely better")
    for words in ("alpha 0.9, T 4", "+0.50 ± 1.00", "-2.00 ± 0.40", "25% of the steps"):
        assert words in reason
    assert "direct training" in str(DIRECT) and str(Configuration(learning_rate=2.0)).endswith("learning_rate x2")
