"""Which student a run keeps: the distilled one, unless the same model trained on labels alone is surely better.

Soft targets can hurt, most of all students that cannot even fit the labels. The direct training is there to compare
with, so its student may take the place of the other; validation rows decide, and test rows stay closed. Where the
adaptive configuration has chosen, the burden of proof is the other way round, because the best of several tries looks
better than it is on the rows that chose it; so the guide rows, which weigh and calibrate the teachers, are asked too.
Tries that were whole trainings are evidence as well: other pairs of students, trained in the same two ways.
"""

import dataclasses
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_hpmkd.classifier_training import Trained
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.data import DataParts
from hf_hpmkd.kept_classifiers import answers_right
from hf_hpmkd.paired_tests import surely_better
from hf_hpmkd.run_context import Run
from hf_hpmkd.run_record import KeptRecord
from hf_hpmkd.training_folder import done_file, give_way

DISTILLED = "distilled"


@dataclasses.dataclass(frozen=True)
class Proof:
    """What a distilled student has to show to be kept. errors: standard errors by which it must be better than the
    directly trained one. pairs: whole trainings in both ways that tries have compared before, on the same rows; gain,
    standard_error: what they showed, in points.
    """

    errors: float
    pairs: int = 0
    gain: float = 0.0
    standard_error: float = 0.0

    def needed(self, error: float) -> float:
        """The gain, in points, that the student must exceed. error: the standard error of its own.

        Gain and error are means over all pairs. As the rows are the same, the error of the mean is taken to be the mean
        of the errors, its upper bound. However much tries have shown, no student is kept that looks no better itself.
        """
        together = self.errors * (self.pairs * self.standard_error + error) - self.pairs * self.gain
        return max(together, 0.0) if self.pairs else together


def rows_right(classifier: Classifier, parts: DataParts, batch_size: int, proof: Proof | None = None) -> torch.Tensor:
    """Which of the rows that decide it answers right, bool `(rows,)`: the validation rows, and where a proof is asked
    for the guide rows after them.
    """
    asked = [parts.validation] if proof is None else [parts.validation, parts.guide]
    return torch.cat([answers_right(classifier, rows, batch_size) for rows in asked])


def judge(direct: torch.Tensor, distilled: torch.Tensor, proof: Proof | None = None) -> KeptRecord:
    """Which of two to keep, by the rows that each answered right, bool `(rows,)`, at least one.

    The direct one only where it is better by more than a standard error of the paired difference; with `proof`, unless
    the distilled one shows what that asks for. The error is that of these two models, which are there to be chosen
    from: how other trainings might have ended is no matter.
    """
    is_better, loss, error = surely_better(direct.tolist(), distilled.tolist())
    needed = None
    if proof is not None:
        needed = proof.needed(100 * error)
        is_better = -100 * loss <= needed
    return KeptRecord(
        kept="direct" if is_better else "distilled",
        gain=round(-100 * loss, 4) + 0.0,  # no -0.0
        standard_error=round(100 * error, 4),
        rows=len(direct),
        needed=None if needed is None else round(needed, 4),
    )


def distilled_folder(folder: Path) -> Path:
    """Where a run's distilled student is trained: `student`, or `distilled` once another has taken its place."""
    moved = folder / DISTILLED
    return moved if done_file(moved).is_file() else folder / "student"


def keep_better(run: Run, parts: DataParts, trained: dict[str, Trained], proof: Proof | None = None) -> None:
    """Keeps the better of `direct` and `student`, as `judge` says; where it is the first, the second becomes
    `distilled`.
    """
    size = run.recipe.training.eval_batch_size
    found = judge_students(trained["direct"].classifier, trained["student"].classifier, parts, size, proof)
    run.record.kept = kept = broadcast_object_list([found])[0]
    if kept.kept == "distilled":
        return
    if run.is_main:
        give_way(run.folder / "student", run.folder / "direct", run.folder / DISTILLED)
    PartialState().wait_for_everyone()
    trained[DISTILLED], trained["student"] = trained["student"], trained["direct"]
    models = run.record.models
    models[DISTILLED] = dataclasses.replace(models["student"], name=DISTILLED)
    models["student"] = dataclasses.replace(models["direct"], name="student")


def judge_students(
    direct: Classifier, distilled: Classifier, parts: DataParts, batch_size: int, proof: Proof | None = None
) -> KeptRecord:
    """`judge` by the rows that decide it."""
    right, other = (rows_right(one, parts, batch_size, proof) for one in (direct, distilled))
    return judge(right, other, proof)
