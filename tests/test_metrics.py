"""Metrics against scikit-learn, loops and numbers worked out by hand; loaded without network."""

import ast
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

import hf_hpmkd.metrics as metrics
from hf_hpmkd.metrics import OWN_METRICS, check_metrics, compute_metrics, load_metric, softmax

FOLDER = Path(metrics.__file__).parent


def made(rows=300, classes=5, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, classes)) * 2, random.integers(0, classes, rows)


def calibration_error_by_loop(probabilities, labels, bins=15):
    """Guo et al. 2017, eq. 3, bin by bin."""
    total = 0.0
    for m in range(1, bins + 1):
        members = [i for i, row in enumerate(probabilities) if (m - 1) / bins < max(row) <= m / bins]
        if members:
            accuracy = sum(int(np.argmax(probabilities[i]) == labels[i]) for i in members) / len(members)
            confidence = sum(max(probabilities[i]) for i in members) / len(members)
            total += len(members) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_own_metrics_equal_other_implementations(seed):
    logits, labels = made(seed=seed)
    teacher, _ = made(seed=seed + 10)
    predicted = logits.argmax(1)
    results = compute_metrics(OWN_METRICS, logits, labels, teacher)
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "calibration_error": calibration_error_by_loop(softmax(logits), labels),
        "teacher_agreement": accuracy_score(teacher.argmax(1), predicted),
    }
    assert results.keys() == expected.keys()
    assert results == pytest.approx(expected, abs=1e-12)


def test_macro_f1_counts_absent_classes_as_scikit_learn_does():
    # Class 2 is never true, class 3 never predicted, class 1 neither.
    labels, predicted = [0, 0, 3, 3, 0], [0, 2, 0, 2, 0]
    value = load_metric("macro_f1").compute(predictions=predicted, references=labels)["macro_f1"]
    assert value == pytest.approx(f1_score(labels, predicted, average="macro")) == pytest.approx((4 / 6) / 3)


def test_calibration_error_by_hand():
    metric = load_metric("calibration_error")
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]]
    # One of two at 0.9 is right (gap 0.4), the one at 0.6 is wrong (0.6), the one at 1.0 right (0).
    value = metric.compute(predictions=probabilities, references=[0, 1, 0, 0])["calibration_error"]
    assert value == pytest.approx((2 * 0.4 + 0.6) / 4)
    # In a single bin gaps of both signs cancel: accuracy 2/4 against a mean confidence of 0.85.
    value = metric.compute(predictions=probabilities, references=[0, 1, 0, 0], bins=1)["calibration_error"]
    assert value == pytest.approx(0.35)


def test_a_confidence_on_the_edge_belongs_to_the_lower_bin():
    probabilities = [[0.5, 0.5], [0.51, 0.49]]
    value = load_metric("calibration_error").compute(predictions=probabilities, references=[0, 1], bins=2)
    # Two bins, gaps 0.5 and 0.51; in one bin they would cancel to 0.005.
    assert value["calibration_error"] == pytest.approx((0.5 + 0.51) / 2)


@pytest.mark.parametrize("rows", [[[0.9, 0.3]], [[2.0, -1.0]]])
def test_calibration_error_refuses_logits(rows):
    with pytest.raises(ValueError, match="must sum to 1"):
        load_metric("calibration_error").compute(predictions=rows, references=[0])


def test_every_row_counts_only_with_its_own_label():
    logits, labels = made()
    order = np.random.default_rng(1).permutation(len(labels))
    straight = compute_metrics(["accuracy", "calibration_error"], logits, labels)
    assert compute_metrics(["accuracy", "calibration_error"], logits[order], labels[order]) == pytest.approx(straight)
    assert compute_metrics(["accuracy"], logits, labels[order])["accuracy"] != straight["accuracy"]


def test_softmax_is_stable():
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, -1e4]])), [[0.5, 0.5, 0.0]])
    logits, _ = made()
    np.testing.assert_allclose(softmax(logits), np.exp(logits) / np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("logits", "labels", "teacher", "match"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), None, "a label for each"),
        (np.zeros((0, 2)), np.zeros(0, int), None, "one or more rows"),
        (np.zeros(3), np.zeros(3, int), None, r"\(rows, classes\)"),
        (np.array([[0.0, np.nan]]), np.zeros(1, int), None, "must be finite"),
        (np.zeros((3, 2)), np.zeros(3, int), np.zeros((3, 4)), r"shape \(3, 2\), got \(3, 4\)"),
        (np.zeros((3, 2)), np.zeros(3, int), None, "needs teacher_logits"),
    ],
)
def test_compute_metrics_refuses(logits, labels, teacher, match):
    with pytest.raises(ValueError, match=match):
        compute_metrics(["teacher_agreement"], logits, labels, teacher)


def test_other_metrics_load_by_path_and_give_all_their_numbers(tmp_path):
    module = tmp_path / "counts.py"
    module.write_text((FOLDER / "accuracy" / "accuracy.py").read_text().replace('{"accuracy":', '{"rows": 4, "share":'))
    logits, labels = np.eye(2)[[0, 1, 1, 0]], np.array([0, 1, 0, 0])
    results = compute_metrics(["accuracy", str(module)], logits, labels)
    assert results == {"accuracy": 0.75, "rows": 4.0, "share": 0.75}


def test_every_module_works_offline():
    """`evaluate` reads imports line by line, so that one bracketed or indented import would send it to the network."""
    for name in OWN_METRICS:
        source = (FOLDER / name / f"{name}.py").read_text()
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports and all(node.lineno == node.end_lineno and node.col_offset == 0 for node in imports)
        assert {alias.name.split(".")[0] for node in imports for alias in node.names} <= {
            "datasets",
            "evaluate",
            "numpy",
        }
        assert load_metric(name) is load_metric(name)


def test_a_metric_that_cannot_take_so_many_classes_is_told_at_the_start(tmp_path):
    check_metrics(OWN_METRICS, 3)
    own = tmp_path / "two_alone"
    own.mkdir()
    source = (FOLDER / "macro_f1" / "macro_f1.py").read_text()
    line = next(line for line in source.splitlines() if "def _compute" in line)
    check = "        if len(set(references)) > 2:\n            raise TypeError('two classes alone')"
    (own / "two_alone.py").write_text(source.replace(line, f"{line}\n{check}"))
    check_metrics([str(own)], 2)
    with pytest.raises(ValueError, match=r"two_alone cannot be computed of 3 classes .*two classes alone"):
        check_metrics([str(own)], 3)
