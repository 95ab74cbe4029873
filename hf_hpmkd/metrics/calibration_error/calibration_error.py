"""Expected calibration error. Offline metric module of `evaluate`: imports stand one per line."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "Mean gap between confidence and accuracy over equally wide bins of confidence; in [0, 1], lower is better."
)
_CITATION = "Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3"


class CalibrationError(evaluate.Metric):
    """`compute(predictions=probabilities, references=classes)` gives `{"calibration_error": float}`.

    predictions: `(rows, classes)` probabilities. bins: 15 by default; bin m holds confidences in ((m-1)/bins, m/bins].
    Each bin's |accuracy - mean confidence| counts by its share of rows (Guo et al. 2017, eq. 3). Raises ValueError for
    no rows, rows that are no probabilities, or bins < 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[list[float]], references: list[int], bins: int = 15) -> dict[str, float]:
        probabilities, true = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        if bins < 1 or len(true) == 0:
            raise ValueError(f"The calibration error needs at least one row and one bin, got {len(true)} and {bins}.")
        if probabilities.ndim != 2 or probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
            raise ValueError("The calibration error needs probabilities: every row of `predictions` must sum to 1.")
        confidence = probabilities.max(axis=1)
        correct = probabilities.argmax(axis=1) == true
        bin_of_row = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        gaps = np.bincount(bin_of_row, weights=correct - confidence, minlength=bins)
        return {"calibration_error": float(np.abs(gaps).sum() / len(true))}
