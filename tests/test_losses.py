"""Losses against second implementations, limits, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_hpmkd import losses, vocabulary


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    teachers = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(5, (6,), generator=generator)
    weights = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    return student, teachers, labels, weights / weights.sum(-1, keepdim=True)


def softmax_by_hand(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_log_mixture_equals_the_sum_written_out(batch):
    _, teachers, _, weights = batch
    mixed = losses.log_mixture(teachers, weights, 2.5).exp()
    for i in range(6):
        soft = [softmax_by_hand([z / 2.5 for z in teachers[m, i].tolist()]) for m in range(3)]
        for k in range(5):
            expected = sum(weights[i, m].item() * soft[m][k] for m in range(3))
            assert mixed[i, k].item() == pytest.approx(expected, rel=1e-9)


def test_forward_kl_equals_the_sum_written_out_times_t_squared(batch):
    student, teachers, labels, _ = batch
    target = F.log_softmax(teachers[0] / 3.0, dim=-1)
    result = losses.kd_loss("forward_kl", student, target, labels, 3.0)
    for i in range(6):
        p = softmax_by_hand([z / 3.0 for z in teachers[0, i].tolist()])
        q = softmax_by_hand([z / 3.0 for z in student[i].tolist()])
        expected = 9.0 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert result[i].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", vocabulary.KD_KINDS)
def test_every_kind_is_zero_at_the_teacher_and_positive_elsewhere(batch, kind):
    student, teachers, labels, weights = batch
    one = weights[:, :1] * 0 + 1
    standardized = kind == "standardized_kl"
    target = losses.log_mixture(teachers[:1], one, 2.0, standardized=standardized)
    assert losses.kd_loss(kind, teachers[0], target, labels, 2.0).abs().max() < 1e-6
    assert losses.kd_loss(kind, student, target, labels, 2.0).min() > 1e-4


def test_standardized_kl_does_not_see_scale_and_shift(batch):
    student, teachers, labels, weights = batch
    target = losses.log_mixture(teachers, weights, 2.0, standardized=True)
    moved = losses.log_mixture(teachers * 7 + 3, weights, 2.0, standardized=True)
    plain = losses.kd_loss("standardized_kl", student, target, labels, 2.0)
    assert torch.allclose(plain, losses.kd_loss("standardized_kl", 5 * student - 2, moved, labels, 2.0), atol=1e-6)
    assert not torch.allclose(plain, losses.kd_loss("forward_kl", student, target, labels, 2.0), atol=1e-2)


def test_decoupled_kd_with_coupled_weights_is_the_forward_kl(batch):
    """Zhao et al., eq. 6: KL = binary term + (1 - p(label)) * term among the others."""
    student, teachers, labels, _ = batch
    target = F.log_softmax(teachers[0] / 2.0, dim=-1)
    whole = losses.forward_kl(student, target, 2.0)
    binary = losses.decoupled_kd(student, target, labels, 2.0, 1.0, 0.0)
    others = losses.decoupled_kd(student, target, labels, 2.0, 0.0, 1.0)
    label_probability = target.exp().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(whole, binary + (1 - label_probability) * others, atol=1e-9)


def test_decoupled_kd_has_finite_gradients_for_certain_teachers(batch):
    student, teachers, labels, _ = batch
    student.requires_grad_()
    target = F.log_softmax(teachers[0] * 200, dim=-1)
    losses.decoupled_kd(student, target, labels, 1.0).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_dist_equals_pearson_correlations_of_numpy(batch):
    import numpy as np

    student, teachers, labels, _ = batch
    target = F.log_softmax(teachers[0], dim=-1)
    a, b = F.softmax(student, dim=-1).numpy(), target.exp().numpy()
    columns = np.mean([1 - np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(5)])
    expected = [1 - np.corrcoef(a[i], b[i])[0, 1] + columns for i in range(6)]
    assert losses.kd_loss("dist", student, target, labels, 1.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_jensen_shannon_equals_scipy_times_t_squared(batch):
    from scipy.spatial.distance import jensenshannon

    student, teachers, labels, _ = batch
    target = F.log_softmax(teachers[0] / 3.0, dim=-1)
    result = losses.kd_loss("js", student, target, labels, 3.0)
    expected = 9.0 * jensenshannon(F.softmax(student / 3.0, dim=-1).numpy(), target.exp().numpy(), axis=1) ** 2
    assert result.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jensen_shannon_is_bounded_and_lets_go_of_rows_that_are_far_off(dtype):
    teacher = torch.tensor([[6.0, 0.0, -2.0]], dtype=dtype)
    target = F.log_softmax(teacher / 2.0, dim=-1)

    def at(distance, loss):
        student = torch.tensor([[-distance, distance, 0.0]], dtype=dtype, requires_grad=True)
        value = loss(student, target, 2.0)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        return value.item(), gradient.norm().item()

    values, gradients = zip(*(at(distance, losses.jensen_shannon) for distance in (2.0, 8.0, 20.0, 1e4)), strict=True)
    assert list(values) == sorted(values)
    assert 0.8 * 4 * math.log(2) < values[-1] < 4 * math.log(2)  # the teacher's second guess is all they share
    assert gradients[0] > 10 * gradients[2] > 10 * gradients[3] == 0
    assert at(20.0, losses.forward_kl)[1] > at(2.0, losses.forward_kl)[1]


def test_jensen_shannon_is_a_quarter_of_the_kl_close_to_the_teacher(batch):
    _, teachers, labels, _ = batch
    target = F.log_softmax(teachers[0], dim=-1)
    close = teachers[0] + 1e-3 * teachers[1]
    ratio = losses.forward_kl(close, target, 1.0) / losses.kd_loss("js", close, target, labels, 1.0)
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0), rtol=1e-2)


def test_gradient_size_does_not_change_with_temperature_when_it_is_high(batch):
    """The reason for T²: at high T the gradient tends to (z_s - z_t) / K (Hinton et al., eq. 4), whatever T is."""
    student, teachers, labels, _ = batch
    student, teacher = student - student.mean(-1, keepdim=True), teachers[0] - teachers[0].mean(-1, keepdim=True)
    student.requires_grad_()
    for temperature in (1e3, 1e4):
        target = F.log_softmax(teacher / temperature, dim=-1)
        (gradient,) = torch.autograd.grad(losses.forward_kl(student, target, temperature).sum(), student)
        assert torch.allclose(gradient, (student.detach() - teacher) / 5, rtol=2e-2, atol=2e-3)


def test_logit_gradient_equals_autograd(batch):
    student, teachers, labels, weights = batch
    student.requires_grad_()
    target = losses.log_mixture(teachers, weights, 3.0)
    loss = 0.7 * losses.forward_kl(student, target, 3.0) + 0.3 * F.cross_entropy(student, labels, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), student)
    assert torch.allclose(losses.logit_gradient(student.detach(), target, labels, 3.0, 0.7), expected, atol=1e-10)


def test_mixture_nll_of_one_teacher_is_its_cross_entropy(batch):
    _, teachers, labels, weights = batch
    one = torch.ones_like(weights[:, :1])
    nll = losses.mixture_nll(teachers[:1], one, labels)
    assert torch.allclose(nll, F.cross_entropy(teachers[0], labels, reduction="none"))


def test_entropy_limits():
    assert losses.entropy(torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0.0, abs=1e-9)
    assert losses.entropy(torch.full((1, 4), 0.25)).item() == pytest.approx(math.log(4), rel=1e-6)


def test_feature_loss_ignores_scale_and_is_zero_when_equal(batch):
    student, teachers, _, _ = batch
    assert losses.feature_loss(student * 4 + 1, student).max() < 1e-4
    assert losses.feature_loss(student, teachers[0]).min() > 1e-2


def test_illegal_pairs_are_refused_and_legal_ones_pass():
    with pytest.raises(ValueError, match="dist.*cosine.*Legal pairs"):
        losses.check_kind_and_schedule("dist", "cosine")
    with pytest.raises(ValueError, match="kd_kind.*got 'kl'"):
        losses.check_kind_and_schedule("kl", "constant")
    with pytest.raises(ValueError, match="temperature_schedule.*got 'linear'"):
        losses.check_kind_and_schedule("dkd", "linear")
    for kind, schedules in vocabulary.LEGAL_SCHEDULES.items():
        for schedule in schedules:
            losses.check_kind_and_schedule(kind, schedule)


def test_shapes_that_do_not_fit_are_refused(batch):
    student, teachers, labels, _ = batch
    with pytest.raises(ValueError, match="same shape"):
        losses.kd_loss("forward_kl", student, teachers[0, :, :4], labels, 1.0)
