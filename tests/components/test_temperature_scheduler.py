"""Temperature schedules: the formulas, their limits, the learned gradient against finite differences, resume."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from hf_hpmkd.components import temperature_scheduler as ts
from hf_hpmkd.losses import forward_kl, log_mixture


def run(schedule, losses, **settings):
    settings = {"temperature": 4.0, "temperature_min": 2.0, "temperature_max": 6.0, **settings}
    scheduler = ts.TemperatureScheduler(schedule, total_steps=len(losses), **settings)
    seen = [scheduler.temperature]
    for loss in losses:
        scheduler.observe(loss)
        seen.append(scheduler.temperature)
    return scheduler, seen


def test_constant_stays_where_it_is_even_outside_the_range():
    assert set(run("constant", [1.0] * 20, temperature=9.0)[1]) == {9.0}


def test_cosine_equals_its_formula():
    _, seen = run("cosine", [1.0] * 40)
    for step, temperature in enumerate(seen):
        assert temperature == pytest.approx(2 + 4 * (1 + math.cos(math.pi * step / 40)) / 2)
    assert (seen[0], seen[-1]) == (6.0, pytest.approx(2.0))


def test_loss_schedule_starts_high_and_follows_the_loss_down():
    _, seen = run("loss", [3.0 * math.exp(-i / 20) for i in range(200)])
    assert seen[0] == seen[1] == 6.0
    assert all(later <= earlier + 1e-12 for earlier, later in zip(seen[1:], seen[2:], strict=False))
    assert seen[-1] < 2.1


def test_convergence_is_high_while_the_loss_moves_and_low_once_it_stands():
    """The paper's prose; its printed formula would give the opposite."""
    losses = [4.0 - 3.9 * i / 100 for i in range(100)] + [0.1] * 300
    _, seen = run("convergence", losses)
    assert min(seen[1:100]) > 5.3
    assert seen[-1] < 2.1
    assert ts.convergence_progress(0.0, 1.0) == 0.0
    assert ts.convergence_progress(-50.0, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0 + (-1) ** (i // 10) for i in range(100)], "cosine"),
        ([2.0 * math.exp(-i / 20) for i in range(100)], "convergence"),
        ([2.0 - 0.5 * i / 100 for i in range(100)], "loss"),
        ([1.0] * 5, "cosine"),
    ],
)
def test_auto_chooses_by_the_first_tenth(losses, expected):
    assert ts.choose_schedule(losses) == expected


def test_auto_settles_after_a_tenth_and_then_follows_its_choice():
    scheduler, seen = run("auto", [2.0 - 0.5 * i / 100 for i in range(1000)])
    assert scheduler.chosen == "loss"
    reference = ts.TemperatureScheduler("cosine", 4.0, 2.0, 6.0, 1000)
    for step in range(99):
        assert seen[step] == reference.temperature
        reference.observe()


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 7, generator=generator)
    features = torch.randn(32, 6, generator=generator)
    guide_features = torch.randn(40, 6, generator=generator)

    def logits(h, w=weight):
        return F.pad(h, (0, 1), value=1.0) @ w.T

    teachers = torch.randn(2, 32, 4, generator=generator) * 3
    train = ts.HeadBatch(features, logits(features), torch.randint(4, (32,), generator=generator))
    guide = ts.HeadBatch(guide_features, logits(guide_features), torch.randint(4, (40,), generator=generator))
    return weight, logits, teachers, train, guide


def test_learned_gradient_equals_finite_differences_of_a_real_virtual_step(head):
    """The reference takes the step with autograd through the head and evaluates the guide loss."""
    weight, logits, teachers, train, guide = head
    weights = torch.full((32, 2), 0.5)
    length = 0.1 * 2.0

    def guide_loss(t):
        w = weight.double().requires_grad_()
        z = F.pad(train.features.double(), (0, 1), value=1.0) @ w.T
        target = log_mixture(teachers.double(), weights.double(), t)
        loss = 0.8 * forward_kl(z, target, t) + 0.2 * F.cross_entropy(z, train.labels, reduction="none")
        (direction,) = torch.autograd.grad(loss.sum(), w)
        moved = w.detach() - length * direction / direction.norm()
        return F.cross_entropy(logits(guide.features.double(), moved), guide.labels).item()

    for t in (1.5, 3.0, 5.0):
        expected = (guide_loss(t + 1e-3) - guide_loss(t - 1e-3)) / 2e-3
        found = ts.temperature_gradient(train, lambda x: log_mixture(teachers, weights, x), guide, 2.0, 0.8, t)
        assert found == pytest.approx(expected, rel=2e-2, abs=1e-6)


def test_without_teachers_weight_the_temperature_has_no_gradient(head):
    _, _, teachers, train, guide = head
    weights = torch.full((32, 2), 0.5)
    gradient = ts.temperature_gradient(train, lambda t: log_mixture(teachers, weights, t), guide, 2.0, 0.0, 3.0)
    assert gradient == pytest.approx(0.0, abs=1e-7)


def test_learned_moves_against_the_gradient_and_stays_in_its_range():
    up = ts.TemperatureScheduler("learned", 4.0, 2.0, 6.0, 100, num_updates=20)
    down = ts.TemperatureScheduler("learned", 4.0, 2.0, 6.0, 100, num_updates=20)
    up.learn(-0.3)
    down.learn(0.3)
    assert down.temperature < 4.0 < up.temperature
    for _ in range(40):
        up.learn(-0.3)
        down.learn(1e-7)
    assert up.temperature == 6.0
    assert down.temperature == 2.0
    assert ts.TemperatureScheduler("learned", 9.0, 2.0, 6.0, 100).temperature == 6.0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "loss", "convergence", "auto", "learned"])
def test_a_restored_scheduler_goes_on_the_same(schedule):
    losses = [2.0 * math.exp(-i / 30) + 0.1 * math.sin(i) for i in range(100)]
    whole, seen = run(schedule, losses)
    for stop in (3, 10, 50):
        first = ts.TemperatureScheduler(schedule, 4.0, 2.0, 6.0, 100, num_updates=10)
        for loss in losses[:stop]:
            first.observe(loss)
        twin = ts.TemperatureScheduler(schedule, 4.0, 2.0, 6.0, 100, num_updates=10)
        twin.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step, loss in enumerate(losses[stop:], start=stop + 1):
            twin.observe(loss)
            assert twin.temperature == seen[step]
        assert twin.state_dict() == whole.state_dict()


def test_a_restored_learned_scheduler_keeps_its_moments():
    first = ts.TemperatureScheduler("learned", 4.0, 2.0, 6.0, 100, num_updates=30)
    twin = ts.TemperatureScheduler("learned", 4.0, 2.0, 6.0, 100, num_updates=30)
    for gradient in (0.1, -0.2, 0.05):
        first.learn(gradient)
    twin.load_state_dict(json.loads(json.dumps(first.state_dict())))
    first.learn(0.3)
    twin.learn(0.3)
    assert twin.temperature == first.temperature


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="below `temperature_max`, got 8.0 and 4.0"):
        ts.TemperatureScheduler("cosine", 4.0, 8.0, 4.0, 10)
    with pytest.raises(ValueError, match="above 0, got 0"):
        ts.TemperatureScheduler("constant", 0, 2.0, 6.0, 10)
    with pytest.raises(ValueError, match="got 'linear'"):
        ts.TemperatureScheduler("linear", 4.0, 2.0, 6.0, 10)
    assert ts.TemperatureScheduler("constant", 4.0, 0.0, 6.0, 10).temperature == 4, "it has no range"
    saved = ts.TemperatureScheduler("cosine", 4.0, 2.0, 6.0, 10).state_dict()
    with pytest.raises(ValueError, match="saved with `temperature_schedule=cosine`"):
        ts.TemperatureScheduler("loss", 4.0, 2.0, 6.0, 10).load_state_dict(saved)
