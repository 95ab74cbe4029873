"""CTKD: a temperature that learns to make the student's task harder (Li et al., AAAI 2023), its global form."""

import math
from typing import Any

import torch
from torch import nn

from hf_hpmkd.baselines.base import Baseline
from hf_hpmkd.distiller import Batch
from hf_hpmkd.losses import forward_kl, log_mixture

LOWEST, RANGE = 1.0, 20.0  # of the temperature: LOWEST to LOWEST + RANGE
RAMP = 10 / 240  # the authors let the adversary grow over 10 of 240 epochs; here it is that share of the steps


def adversary_strength(progress: float) -> float:
    """λ of the curriculum (eq. 9): from 0 at the start along a cosine to 1 after `RAMP`. progress: 0 to 1."""
    return 0.5 * (1 - math.cos(math.pi * min(progress / RAMP, 1.0)))


class _Reverse(torch.autograd.Function):
    """Passes a value on and turns its gradient round: what is minimised by the rest is maximised by the source."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradient, None


class GlobalTemperature(nn.Module):
    """One learned number that becomes a temperature; it starts at `LOWEST + RANGE * sigmoid(1)`, about 15.6."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        return LOWEST + RANGE * torch.sigmoid(self.place)


class CurriculumTemperature(Baseline):
    """KD from the teachers' mean at a temperature that ascends the same loss by gradient reversal."""

    trains_more = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.global_temperature = GlobalTemperature()
        self.own_extras(self.global_temperature)

    @property
    def temperature(self) -> float:
        return float(self.global_temperature().detach())

    def term(self, batch: Batch) -> torch.Tensor:
        teacher_logits = self.teacher_logits(batch).to(batch.logits.device)
        count = len(self.outputs.names)
        weights = teacher_logits.new_full((len(batch.labels), count), 1.0 / count)
        temperature = _Reverse.apply(self.global_temperature(), adversary_strength(self.step / self.total_steps))
        return forward_kl(batch.logits, log_mixture(teacher_logits, weights, temperature), temperature)
