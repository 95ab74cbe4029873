"""Meta-features against scipy, scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score

from hf_hpmkd.meta_features import (
    FEATURES,
    data_features,
    landmark_features,
    size_features,
    teacher_features,
    vector,
)


def test_data_features_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    inputs = random.gamma(2.0, size=(500, 3)) * [1.0, 5.0, 0.2] + [0.0, 3.0, -1.0]
    labels = torch.from_numpy(random.choice(4, size=500, p=[0.1, 0.2, 0.3, 0.4]))
    found = data_features(labels, 4, inputs)
    counts = np.bincount(labels, minlength=4)
    assert found["log_rows"] == pytest.approx(math.log10(500))
    assert found["log_inputs"] == pytest.approx(math.log10(3))
    assert found["log_imbalance"] == pytest.approx(math.log10(counts.max() / counts.min()))
    assert found["class_entropy"] == pytest.approx(stats.entropy(counts, base=4))
    assert found["input_mean"] == pytest.approx(inputs.mean())
    assert found["input_variance"] == pytest.approx(inputs.var(axis=0).mean())
    assert found["input_skewness"] == pytest.approx(stats.skew(inputs).mean())
    assert found["input_kurtosis"] == pytest.approx(stats.kurtosis(inputs).mean())


def test_balanced_classes_have_full_entropy_and_no_imbalance() -> None:
    found = data_features(torch.arange(30) % 3, 3, None)
    assert found["class_entropy"] == pytest.approx(1.0) and found["log_imbalance"] == pytest.approx(0.0)
    assert "input_mean" not in found


def test_constant_columns_and_absent_classes_change_no_moment() -> None:
    random = np.random.default_rng(1)
    inputs = random.normal(size=(200, 2))
    padded = np.concatenate([inputs, np.full((200, 5), 7.0)], axis=1)
    labels = torch.arange(200) % 2
    one, two = data_features(labels, 2, inputs), data_features(labels, 2, padded)
    for name in ("input_mean", "input_variance", "input_skewness", "input_kurtosis"):
        assert one[name] == pytest.approx(two[name])
    assert data_features(labels, 5, inputs)["log_imbalance"] == pytest.approx(0.0)


def test_the_capacity_gap_is_the_logarithm_of_the_compression() -> None:
    found = size_features([1_000, None, 50_000], 500, 200)
    assert found["log_capacity_gap"] == pytest.approx(2.0)
    assert found["log_steps"] == pytest.approx(math.log10(200)) and found["teachers"] == 3
    assert math.isnan(size_features([None], 500, 200)["log_capacity_gap"])


def reference_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    confidence, answer = probabilities.max(1), probabilities.argmax(1)
    total = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if inside.any():
            total += inside.mean() * abs((answer[inside] == labels[inside]).mean() - confidence[inside].mean())
    return total


def test_teacher_features_are_those_of_a_second_implementation() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    logits = torch.randn(3, 300, 4, generator=generator)
    logits[torch.arange(3)[:, None], torch.arange(300), labels] += torch.tensor([0.5, 1.5, 2.5])[:, None]
    found = teacher_features(logits, labels, train_accuracy=0.9)
    mixture = logits.softmax(-1).mean(0).numpy()
    answers = logits.argmax(-1).numpy()
    each = [accuracy_score(labels, one) for one in answers]
    assert found["teacher_accuracy"] == pytest.approx(max(each))
    assert found["mixture_accuracy"] == pytest.approx(accuracy_score(labels, mixture.argmax(1)))
    assert found["calibration_error"] == pytest.approx(reference_calibration_error(mixture, labels.numpy()), abs=1e-6)
    assert found["teacher_entropy"] == pytest.approx(stats.entropy(mixture, axis=1, base=4).mean(), abs=1e-6)
    pairs = [(answers[i] == answers[j]).mean() for i in range(3) for j in range(i)]
    assert found["agreement"] == pytest.approx(np.mean(pairs))
    assert found["overfit"] == pytest.approx(0.9 - np.mean(each))


def test_limits_of_teachers() -> None:
    labels = torch.arange(40) % 4
    perfect = 100.0 * torch.nn.functional.one_hot(labels, 4).float()
    sure = teacher_features(torch.stack([perfect, perfect]), labels)
    assert sure["calibration_error"] == pytest.approx(0) and sure["teacher_entropy"] == pytest.approx(0, abs=1e-9)
    assert sure["agreement"] == 1 and sure["mixture_accuracy"] == 1 and math.isnan(sure["overfit"])
    ignorant = teacher_features(torch.zeros(1, 40, 4), labels)
    assert ignorant["teacher_entropy"] == pytest.approx(1) and ignorant["agreement"] == 1


def test_a_landmark_that_guesses_has_loss_one() -> None:
    found = landmark_features([0.3, 0.5], math.log(7), 7, 0.9)
    assert found["landmark_loss"] == pytest.approx(1) and found["landmark_slope"] == pytest.approx(0.2)
    assert found["landmark_gap"] == pytest.approx(0.4)


def test_a_vector_has_every_feature_in_order() -> None:
    found = vector({"log_steps": 2.0})
    assert found.shape == (len(FEATURES),) and found[FEATURES.index("log_steps")] == 2
    assert np.isnan(np.delete(found, FEATURES.index("log_steps"))).all()
    with pytest.raises(ValueError, match="Unknown meta-features: speed"):
        vector({"speed": 1.0})


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 5, 3\) and \(4,\)"):
        teacher_features(torch.zeros(2, 5, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one training row"):
        data_features(torch.zeros(0, dtype=torch.long), 2, None)
