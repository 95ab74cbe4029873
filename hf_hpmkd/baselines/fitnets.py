"""FitNets: a hint from the middle of the teacher (Romero et al., ICLR 2015)."""

from typing import Any

import torch
from torch import nn

from hf_hpmkd.baselines.base import Baseline
from hf_hpmkd.baselines.stages import StageReader, channels, check_pair
from hf_hpmkd.distiller import Batch

WEIGHT = 100.0  # Tian et al. (ICLR 2020)


def regressor(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Maps the student's channels to the teacher's: 1x1 convolution, batch normalisation, ReLU as in the teacher."""
    return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1), nn.BatchNorm2d(teacher_channels), nn.ReLU())


def hint_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the maps (eq. 3, as a mean over channels and positions), per sample `(batch,)`.

    student: `(batch, channels, height, width)`, regressed to the teacher's channels. Raises ValueError if height or
    width differ.
    """
    check_pair(student, teacher)
    return (student - teacher).flatten(1).pow(2).mean(1)


class FitNets(Baseline):
    """Cross-entropy plus `WEIGHT` times the hint loss after the middle stage, mean over the teachers.

    The hint is learned together with the labels, in one stage, as Tian et al. do: a first stage for the hint alone, as
    Romero et al. have it, would give this method more steps than the others. Raises ValueError for models without
    stages and for stored outputs.
    """

    trains_more = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.student_reader = StageReader(self.student)
        self.teacher_readers = [StageReader(teacher.model) for teacher in self.live_teachers()]
        width = channels(_middle(self.student_reader.stages))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.args.seed)
            maps = [regressor(width, channels(_middle(reader.stages))) for reader in self.teacher_readers]
        self.regressors = nn.ModuleList(maps)
        self.own_extras(self.regressors)

    def term(self, batch: Batch) -> torch.Tensor:
        guided = _middle(self.student_reader.read())
        self.teacher_logits(batch)  # the teachers' forward pass, which fills their readers
        losses = [
            hint_loss(regress(guided), _middle(reader.read()).to(guided.device))
            for regress, reader in zip(self.regressors, self.teacher_readers, strict=True)
        ]
        return WEIGHT * torch.stack(losses).mean(0)

    def close(self) -> None:
        super().close()
        for reader in [self.student_reader, *self.teacher_readers]:
            reader.close()


def _middle(found: list[Any]) -> Any:
    return found[len(found) // 2]
