"""Teachers that are spoiled on purpose. A method that gains from them gains by something else than their knowledge."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from hf_hpmkd.tasks.base import UNAUGMENTED, Rows
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_kinds import Teacher
from hf_hpmkd.teacher_outputs import CachedOutputs

CONTROLS = ("constant", "shuffled", "permuted")
_SEED = 0


class ControlTeacher(Teacher):
    """A teacher's answers, spoiled. how:

    - constant: every row gets the same answer, all classes alike;
    - shuffled: every row gets the answer that belongs to another row;
    - permuted: every class gets the answer that belongs to the next class.

    num_views: augmented views of the training rows. cache: holds the teacher's own answers, so that it is not run
    again. Raises ValueError for another `how`.
    """

    kind = "control"

    def __init__(self, teacher: Teacher, how: str, num_views: int, cache: TeacherCache) -> None:
        if how not in CONTROLS:
            raise ValueError(f"`how` must be one of {', '.join(CONTROLS)}, got {how!r}.")
        names = [teacher.class_names[index] for index in teacher.alignment]  # `logits` has the data's order already
        super().__init__(f"{teacher.name}-{how}", f"{how}:{teacher.source}", names, names)
        self.teacher, self.how = teacher, how
        self.num_views, self.cache = num_views, cache
        self.answers_views = teacher.answers_views
        self._outputs_of: dict[tuple[str, int], CachedOutputs] = {}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.how} {_SEED} {self.teacher.fingerprint}".encode()).hexdigest()

    def identity(self, rows: Rows) -> dict[str, Any]:
        return {**self.teacher.identity(rows), "control": [self.how, _SEED]}

    def _outputs(self, rows: Rows, indices: Tensor, views: Tensor | None) -> Tensor:
        if self.how == "constant":
            return torch.zeros(len(indices), len(self.class_names))
        if self.how == "shuffled":
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))
            # Of a permutation's neighbours none is a row itself, which it may be of the permutation.
            indices = order.roll(1)[torch.argsort(order)[indices]]
        views = torch.full_like(indices, UNAUGMENTED) if views is None else views
        logits = self._stored(rows, bool((views != UNAUGMENTED).any())).lookup(indices, views)[0]
        return logits.roll(1, dims=-1) if self.how == "permuted" else logits

    def _stored(self, rows: Rows, augmented: bool) -> CachedOutputs:
        key = (rows.fingerprint, self.num_views if augmented else 0)
        if key not in self._outputs_of:
            self._outputs_of[key] = self.cache.outputs([self.teacher], rows, key[1], progress=False)
        return self._outputs_of[key]
