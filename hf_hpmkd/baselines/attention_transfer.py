"""AT: the student looks where its teacher looks (Zagoruyko and Komodakis, ICLR 2017)."""

from typing import Any

import torch
import torch.nn.functional as F

from hf_hpmkd.baselines.base import Baseline
from hf_hpmkd.baselines.stages import StageReader, check_pair
from hf_hpmkd.distiller import Batch

WEIGHT = 1000.0  # Tian et al. (ICLR 2020), with the mean over positions


def attention_map(maps: torch.Tensor) -> torch.Tensor:
    """Where a stage is active: the mean over channels of the squares, as a vector of length 1 (eq. 1 and 2, p = 2).

    maps: `(batch, channels, height, width)`, any number of channels. Returns `(batch, height * width)`.
    """
    return F.normalize(maps.pow(2).mean(1).flatten(1), dim=1)


def attention_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the two attention maps, per sample `(batch,)`; 0 where both look the same way.

    Raises ValueError if height or width differ.
    """
    check_pair(student, teacher)
    return (attention_map(student) - attention_map(teacher)).pow(2).mean(1)


class AttentionTransfer(Baseline):
    """Cross-entropy plus `WEIGHT` times the attention loss, summed over the stages, mean over the teachers.

    Raises ValueError for models without stages, stored outputs, and unequal numbers of stages.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.student_reader = StageReader(self.student)
        self.teacher_readers = [StageReader(teacher.model) for teacher in self.live_teachers()]
        counts = {len(reader.stages) for reader in [self.student_reader, *self.teacher_readers]}
        if len(counts) > 1:
            raise ValueError(f"Student and teachers must have the same number of stages, got {sorted(counts)}.")

    def term(self, batch: Batch) -> torch.Tensor:
        maps = self.student_reader.read()
        self.teacher_logits(batch)  # the teachers' forward pass, which fills their readers
        losses = [
            torch.stack([attention_loss(s, t.to(s.device)) for s, t in zip(maps, reader.read(), strict=True)]).sum(0)
            for reader in self.teacher_readers
        ]
        return WEIGHT * torch.stack(losses).mean(0)

    def close(self) -> None:
        super().close()
        for reader in [self.student_reader, *self.teacher_readers]:
            reader.close()
