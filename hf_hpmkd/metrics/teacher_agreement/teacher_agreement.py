"""Share of rows on which student and teacher agree. Offline metric module of `evaluate`: imports stand one per line."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of rows where the student predicts the teacher's class, right or wrong; in [0, 1]."
_CITATION = "Stanton et al. 2021, Does Knowledge Distillation Really Work?, sec. 2"


class TeacherAgreement(evaluate.Metric):
    """`compute(predictions=student classes, references=teacher classes)` gives `{"teacher_agreement": float}`.

    Labels play no part: a student may agree with a wrong teacher. Raises ValueError for no rows.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("Teacher agreement needs at least one row, got none.")
        return {"teacher_agreement": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
