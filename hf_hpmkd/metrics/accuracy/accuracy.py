"""Share of rows whose predicted class is the label. Offline metric module of `evaluate`: imports stand one per line."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of rows whose predicted class is the label, in [0, 1]; higher is better."


class Accuracy(evaluate.Metric):
    """`compute(predictions=classes, references=classes)` gives `{"accuracy": float}`. Raises ValueError for no rows."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("Accuracy needs at least one row, got none.")
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
