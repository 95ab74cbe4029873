"""DML: two students of the same kind teach each other, without a teacher (Zhang et al., CVPR 2018)."""

from typing import Any

import torch
import torch.nn.functional as F

from hf_hpmkd.baselines.base import Baseline
from hf_hpmkd.distiller import Batch, BatchLosses
from hf_hpmkd.losses import forward_kl


class MutualLearning(Baseline):
    """Both minimise `(1 - alpha) cross-entropy + alpha KL(the other ‖ oneself)` on the same batches (eq. 4 to 6).

    The peer comes in as the only teacher: the student's architecture with other initial weights, run live. It is
    trained by the student's optimizer on the student's schedule, and thrown away in the end. Raises ValueError for
    several teachers, or one that is no torch module.
    """

    trains_more = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        teachers = self.live_teachers()
        if len(teachers) != 1:
            raise ValueError(f"Mutual learning has one peer in the teacher's place, got {len(teachers)}.")
        self.peer = self.own_extras(teachers[0].model.requires_grad_(True).train())
        self._peer_logits: torch.Tensor | None = None

    def term(self, batch: Batch) -> torch.Tensor:
        outputs = self.peer(**batch.inputs)
        self._peer_logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
        return forward_kl(batch.logits, F.log_softmax(self._peer_logits.detach(), dim=-1), 1.0)

    def batch_losses(self, batch: Batch) -> BatchLosses:
        losses = super().batch_losses(batch)
        peer_logits, self._peer_logits = self._peer_logits, None
        assert peer_logits is not None
        kl = forward_kl(peer_logits, F.log_softmax(batch.logits.detach(), dim=-1), 1.0)
        ce = self.cross_entropy(peer_logits, batch.labels)
        losses.total = losses.total + self.args.alpha * kl + (1.0 - self.args.alpha) * ce
        return losses
