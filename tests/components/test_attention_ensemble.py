"""The attention ensemble: calibration, closed forms, what the trained gate must and must not do."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_hpmkd.components import attention_ensemble as ae

CLASSES, ROWS, WIDTH = 6, 600, 8
pytestmark = pytest.mark.usefixtures("whole_runs")  # the warm-up


def world(seed=0):
    """Labels, features that carry the label weakly, and a function making a teacher that is right with given odds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    features = torch.randn(ROWS, WIDTH, generator=generator)
    features[:, :CLASSES] += 1.5 * F.one_hot(labels, CLASSES)

    def teacher(accuracy, sharpness=4.0):
        right = torch.rand(ROWS, generator=generator) < accuracy
        said = torch.where(right, labels, torch.randint(CLASSES, (ROWS,), generator=generator))
        return sharpness * F.one_hot(said, CLASSES) + 0.3 * torch.randn(ROWS, CLASSES, generator=generator)

    return labels, features, teacher, generator


def warm(logits, features, labels, steps=200, **settings):
    ensemble = ae.AttentionEnsemble("mixture", len(logits), CLASSES, WIDTH, **settings)
    ensemble.calibrate(logits, labels)
    ensemble.warm_up(features, ensemble.calibrated(logits), labels, steps, 128)
    return ensemble, ensemble.weights(features, ensemble.calibrated(logits), labels)


def honest_teacher():
    """Labels drawn from softmax(z) make z calibrated."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, CLASSES, generator=generator)
    return logits, torch.multinomial(F.softmax(logits, -1), 1, generator=generator).squeeze(-1)


def test_calibration_finds_the_scale_that_was_applied():
    """3 z is over-confident by 3."""
    logits, labels = honest_teacher()
    assert ae.fit_calibration(logits, labels) == pytest.approx(1.0, abs=0.05)
    assert ae.fit_calibration(3 * logits, labels) == pytest.approx(3.0, abs=0.15)


def test_few_rows_move_the_calibration_little():
    """The mode of the posterior, looked up on a grid: between 1 and the likeliest scale, nearer to it of many rows."""
    logits, labels = honest_teacher()
    grid = torch.linspace(0.25, 20, 4000).double()
    for scale in (0.5, 3.0):
        short = []
        for rows in (5, 50, 5000):
            spoken, told = scale * logits[:rows].double(), labels[:rows]
            nll = torch.stack([F.cross_entropy(spoken / tau, told, reduction="sum") for tau in grid])
            posterior = nll + (grid.log() / 0.5) ** 2 / 2
            found, likeliest = ae.fit_calibration(spoken, told), float(grid[nll.argmin()])
            assert found == pytest.approx(float(grid[posterior.argmin()]), abs=0.01)
            assert min(1, likeliest) - 0.01 <= found <= max(1, likeliest) + 0.01
            short.append(abs(math.log(found / likeliest)))
        assert short[0] > short[1] > 10 * short[2]
        assert found == pytest.approx(scale, rel=0.05)


def test_a_teacher_that_answers_a_dozen_rows_right_is_not_taken_to_be_certain():
    right = torch.tensor([[4.0, 0.0, 0.0]]).repeat(12, 1)  # sure to 96 %
    tau = ae.fit_calibration(right, torch.zeros(12, dtype=torch.long))
    assert 0.6 < tau < 0.95
    assert ae.fit_calibration(torch.ones(12, 3), torch.zeros(12, dtype=torch.long)) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("scales", "taught_at"), [((3.0, 3.0), 3.0), ((3.0, 6.0), 3.0), ((0.5, 3.0), 1.0)])
def test_what_is_taught_has_the_scale_of_the_best(scales, taught_at):
    """The first teacher is the best; where it is under-confident, both are taught as they are honest."""
    best, labels = honest_teacher()
    worse = best + torch.randn(best.shape, generator=torch.Generator().manual_seed(1))
    ensemble = ae.AttentionEnsemble("uniform", 2, CLASSES, WIDTH)
    spoken = torch.stack([scales[0] * best, scales[1] * worse])
    ensemble.calibrate(spoken, labels)
    taught = ensemble.taught(ensemble.calibrated(spoken))
    assert torch.allclose(taught[0], taught_at * best, rtol=0.05)
    assert torch.allclose(taught[1], taught_at * worse / ae.fit_calibration(worse, labels), rtol=0.06)


def test_one_over_confident_teacher_teaches_as_it_is():
    logits, labels = honest_teacher()
    ensemble = ae.AttentionEnsemble("uniform", 1, CLASSES, WIDTH)
    ensemble.calibrate(3 * logits[None], labels)
    assert ensemble.calibration.item() == pytest.approx(3, rel=0.05)
    assert torch.allclose(ensemble.taught(ensemble.calibrated(logits[None])), logits[None])


def test_calibration_of_a_shuffled_teacher_flattens_it():
    labels, _, teacher, generator = world()
    shuffled = teacher(0.95)[torch.randperm(ROWS, generator=generator)]
    assert ae.fit_calibration(shuffled, labels) > 10


def test_label_weights_equal_the_closed_form():
    labels, _, teacher, _ = world()
    logits = torch.stack([teacher(0.9), teacher(0.5), teacher(0.2)])
    weights = ae.label_weights(logits, labels)
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    expected = (1 - losses.exp() / losses.exp().sum(0)) / 2
    assert torch.allclose(weights, expected.T, atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(ROWS))
    assert torch.equal(ae.label_weights(logits[:1], labels), torch.ones(ROWS, 1))


def test_statistics_of_certain_and_ignorant_teachers():
    logits = torch.stack([torch.tensor([[50.0, 0.0, 0.0]]), torch.zeros(1, 3)])
    _, statistics = ae.teacher_statistics(logits)
    assert statistics[0, 0, :2].tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    assert statistics[0, 1, :2].tolist() == pytest.approx([1 / 3, 1.0], abs=1e-5)
    same = torch.randn(1, 4, 3).repeat(2, 1, 1)
    assert ae.teacher_statistics(same)[1][..., 2].abs().max() < 1e-5


@pytest.mark.parametrize("objective", ae.GATE_OBJECTIVES)
def test_weights_are_a_distribution_over_the_teachers(objective):
    labels, features, teacher, _ = world()
    logits = torch.stack([teacher(0.9), teacher(0.6)])
    ensemble = ae.AttentionEnsemble(objective, 2, CLASSES, WIDTH)
    weights = ensemble.weights(features, logits, labels)
    assert weights.shape == (ROWS, 2)
    assert torch.allclose(weights.sum(-1), torch.ones(ROWS), atol=1e-6)
    assert weights.min() >= 0


def test_identical_teachers_keep_equal_weights_through_training():
    labels, features, teacher, _ = world()
    same, other = teacher(0.8), teacher(0.6)
    _, weights = warm(torch.stack([same, same]), features, labels)
    assert (weights - 0.5).abs().max() < 1e-3
    _, weights = warm(torch.stack([same, other, same]), features, labels)
    assert (weights[:, 0] - weights[:, 2]).abs().max() < 1e-3
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 0.05  # the gate did learn


def test_a_constant_and_a_shuffled_teacher_get_under_five_percent():
    labels, features, teacher, generator = world()
    constant = torch.randn(CLASSES, generator=generator).expand(ROWS, CLASSES)
    shuffled = teacher(0.9)[torch.randperm(ROWS, generator=generator)]
    _, weights = warm(torch.stack([teacher(0.9), teacher(0.85), constant, shuffled]), features, labels)
    assert weights[:, 2].mean() < 0.05
    assert weights[:, 3].mean() < 0.05


def test_two_specialists_get_their_own_classes():
    labels, features, teacher, generator = world()
    first_half = labels < CLASSES // 2
    good, noise = teacher(0.97), teacher(0.0)
    first = torch.where(first_half.unsqueeze(-1), good, noise)
    second = torch.where(first_half.unsqueeze(-1), noise, good)
    _, weights = warm(torch.stack([first, second]), features, labels)
    assert weights[first_half, 0].mean() > 0.8
    assert weights[~first_half, 1].mean() > 0.8


def test_entropy_weight_keeps_weights_apart_from_one_hot():
    labels, features, teacher, _ = world()
    logits = torch.stack([teacher(0.9), teacher(0.9)])
    _, free = warm(logits, features, labels, entropy_weight=0.0)
    _, spread = warm(logits, features, labels, entropy_weight=5.0)
    assert (spread - 0.5).abs().max() < 0.15
    assert (free - 0.5).abs().max() > (spread - 0.5).abs().max()


def test_only_joint_weights_carry_a_gradient_and_none_reaches_the_student():
    labels, features, teacher, _ = world()
    logits = torch.stack([teacher(0.9), teacher(0.6)])
    features.requires_grad_()
    assert not ae.AttentionEnsemble("mixture", 2, CLASSES, WIDTH).weights(features, logits, labels).requires_grad
    joint = ae.AttentionEnsemble("joint", 2, CLASSES, WIDTH)
    before = [p.clone() for p in joint.gate.parameters()]
    (joint.weights(features, logits, labels)[:, 0] ** 2).sum().backward()
    joint.joint_step()
    assert features.grad is None
    assert any(not torch.equal(a, b) for a, b in zip(before, joint.gate.parameters(), strict=True))
    assert all(p.grad is None for p in joint.gate.parameters())


def test_training_leaves_the_global_random_state_alone():
    labels, features, teacher, _ = world()
    state = torch.get_rng_state()
    warm(torch.stack([teacher(0.9), teacher(0.6)]), features, labels, steps=3)
    assert torch.equal(state, torch.get_rng_state())


def test_a_restored_ensemble_goes_on_bitwise():
    labels, features, teacher, _ = world()
    logits = torch.stack([teacher(0.9), teacher(0.6)])
    ensemble, _ = warm(logits, features, labels, steps=5)
    saved = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    twin = ae.AttentionEnsemble("mixture", 2, CLASSES, WIDTH, seed=99)
    twin.load_state_dict(saved)
    for one in (ensemble, twin):
        one.warm_up(features, one.calibrated(logits), labels, 5, 64)
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


def test_a_foreign_state_is_refused():
    saved = ae.AttentionEnsemble("mixture", 2, CLASSES, WIDTH).state_dict()
    with pytest.raises(ValueError, match="has 2 teachers, this run has 3"):
        ae.AttentionEnsemble("mixture", 3, CLASSES, WIDTH).load_state_dict(saved)
    with pytest.raises(ValueError, match="gate=uniform"):
        ae.AttentionEnsemble("uniform", 2, CLASSES, WIDTH).load_state_dict(saved)
    with pytest.raises(ValueError, match="objective must be one of"):
        ae.AttentionEnsemble("max", 2, CLASSES, WIDTH)
