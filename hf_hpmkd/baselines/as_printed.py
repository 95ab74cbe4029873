"""HPM-KD's loss as its paper prints it: without the factor T², so that a higher temperature teaches less."""

import torch

from hf_hpmkd.distiller import Distiller


class AsPrinted(Distiller):
    """The weights, temperatures and terms of the settings; the KD term is divided by T² again."""

    def kd(self, student_logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().kd(student_logits, target, labels) / self.scheduler.temperature**2
