"""What the baselines share: a loss of the form (1 - alpha) cross-entropy + alpha term, and modules trained beside the
student. Knows no method.
"""

import torch
from torch import nn

from hf_hpmkd.distiller import Batch, BatchLosses, Distiller, GuideRows, TeacherOutputs, average_gradients
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.teacher_outputs import LiveOutputs
from hf_hpmkd.training_args import HPMKDTrainingArguments


class Baseline(Distiller):
    """A distiller whose `term`, per sample, takes the place of the KD loss. All teachers weigh the same."""

    def __init__(
        self,
        args: HPMKDTrainingArguments,
        student: nn.Module,
        outputs: TeacherOutputs,
        guide: GuideRows | None,
        total_steps: int,
    ) -> None:
        super().__init__(args, student, outputs, guide, total_steps)
        self.total_steps = max(total_steps, 1)
        self._begins_step = True

    def term(self, batch: Batch) -> torch.Tensor:
        """What the teachers add, `(batch,)`."""
        raise NotImplementedError

    def batch_losses(self, batch: Batch) -> BatchLosses:
        if self.extras is not None and self._begins_step:
            self.extras.zero_grad()  # the trainer clears the student's gradients alone
        self._begins_step = False
        term = self.term(batch)
        ce = self.cross_entropy(batch.logits, batch.labels)
        total = self.args.alpha * term + (1.0 - self.args.alpha) * ce
        count = len(self.outputs.names)
        return BatchLosses(total, term.detach(), ce.detach(), ce.new_full((len(ce), count), 1.0 / count))

    def finish_step(self) -> torch.Tensor | None:
        if self.extras is not None:
            average_gradients(self.extras)
            if self.args.max_grad_norm > 0:  # the rule that the trainer keeps for the student
                nn.utils.clip_grad_norm_(self.extras.parameters(), self.args.max_grad_norm)
        self._begins_step = True
        return super().finish_step()

    def own_extras(self, module: nn.Module) -> nn.Module:
        """Makes a module one that is trained, saved and resumed with the student. Raises ValueError under fp16."""
        if self.args.fp16:
            raise ValueError(
                f"fp16 scales gradients, which {type(self).__name__} does not undo for what it trains beside the "
                "student. Use bf16."
            )
        self.extras = module.to(next(self.student.parameters()).device)
        return self.extras

    def live_teachers(self) -> list[TorchTeacher]:
        """The teachers as modules. Raises ValueError for stored outputs and for teachers that are no torch modules."""
        if not isinstance(self.outputs, LiveOutputs):
            raise ValueError(
                f"{type(self).__name__} looks inside its teachers, so it needs teacher_outputs=live, got stored ones."
            )
        teachers = [teacher for teacher in self.outputs.teachers if isinstance(teacher, TorchTeacher)]
        if len(teachers) < len(self.outputs.teachers):
            raise ValueError(f"{type(self).__name__} looks inside its teachers, so each must be a torch module.")
        return teachers
