"""F1 of each class, averaged with equal weights. Offline metric module of `evaluate`: imports stand one per line."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Harmonic mean of precision and recall per class, averaged over classes; in [0, 1], higher is better."


class MacroF1(evaluate.Metric):
    """`compute(predictions=classes, references=classes)` gives `{"macro_f1": float}`.

    F1 of a class is 2 TP / (2 TP + FP + FN); the average goes over all classes that occur in labels or predictions, as
    in scikit-learn. A rare class weighs as much as a frequent one. Raises ValueError for no rows.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("Macro F1 needs at least one row, got none.")
        predicted, true = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, true)[:, None]
        hits = ((predicted == classes) & (true == classes)).sum(axis=1)
        # 2 TP + FP + FN = how often the class was predicted + how often it was true; never 0, since the class occurs.
        occurrences = (predicted == classes).sum(axis=1) + (true == classes).sum(axis=1)
        return {"macro_f1": float(np.mean(2 * hits / occurrences))}
