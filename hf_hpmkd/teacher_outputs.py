"""Where a training loop gets its teacher logits from: files read into memory as needed, or teachers run on the spot.

Both answer `lookup(rows, views, inputs)`. Knows nothing of how files come to be (`teacher_cache`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_hpmkd.dataset_rows import SharedInputsFeed
from hf_hpmkd.tasks.base import Feed, Rows, json_digest
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher
from hf_hpmkd.teacher_output_file import Layout, Stored


class CachedOutputs:
    """Teacher logits read from memory-mapped files. hits: files found; misses: files computed by this process."""

    def __init__(
        self, names: list[str], files: list[list[Stored]], layout: Layout, views: list[int], hits: int, misses: int
    ) -> None:
        self.names = names
        self.num_teachers = len(names)
        self.num_classes = layout.classes
        self.num_rows = layout.rows
        self.hits = hits
        self.misses = misses
        self._files = files
        self._layout = layout
        self._views = views
        self._resident: dict[str, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs, on disk and, after `to`, on the device."""
        return self._layout.nbytes * self.num_teachers * len(self._views)

    def to(self, device: torch.device | str) -> "CachedOutputs":
        """Copies all outputs to a device, so that lookups there wait for nothing. Returns itself."""
        self._resident = {
            key: torch.cat(
                [torch.stack([file[key] for file in of_view]) for of_view in zip(*self._files, strict=True)], 1
            )
            .contiguous()
            .to(device)
            for key in self._layout.keys
        }
        return self

    def lookup(self, rows: Tensor, views: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Logits `(teachers, batch, classes)`, float32, of rows in views, both `(batch,)`. inputs: not needed here.

        Log-probabilities where topk was stored: the same to any softmax. On the device of `to`, else on the CPU. Raises
        IndexError for rows or views that were not stored.
        """
        if self._resident is not None:
            device = next(iter(self._resident.values())).device
            places = (views - self._views[0]).to(device) * self.num_rows + rows.to(device)
            if device.type == "cpu":
                self._check(rows, views)
            return self._layout.decode({key: value.index_select(1, places) for key, value in self._resident.items()})
        rows, views = rows.cpu(), views.cpu()
        self._check(rows, views)
        gathered = self._layout.empty((self.num_teachers, len(rows)))
        order = torch.argsort(views, stable=True)
        sorted_rows = rows[order].contiguous()
        stop = 0
        for place, count in enumerate(torch.bincount(views - self._views[0], minlength=len(self._views)).tolist()):
            start, stop = stop, stop + count
            if not count:
                continue
            chosen = sorted_rows[start:stop]
            for teacher, of_teacher in enumerate(self._files):
                for key, stored in of_teacher[place].items():
                    torch.index_select(stored, 0, chosen, out=gathered[key][teacher, start:stop])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return self._layout.decode({key: value.index_select(1, back) for key, value in gathered.items()})

    def _check(self, rows: Tensor, views: Tensor) -> None:
        if len(rows) != len(views):
            raise ValueError(f"One view per row is needed, got {len(views)} views for {len(rows)} rows.")
        if not len(rows):
            return
        low, high = int(views.min()), int(views.max())
        if low < self._views[0] or high > self._views[-1]:
            raise IndexError(f"Views {self._views[0]}..{self._views[-1]} are stored, asked for {low}..{high}.")
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self.num_rows:
            raise IndexError(f"Rows 0..{self.num_rows - 1} are stored, asked for {low}..{high}.")


class LiveOutputs:
    """Teacher logits computed when they are asked for; nothing is stored.

    student_feed: where a teacher's feed does the same as this one, it takes the student's inputs as they are.
    """

    nbytes = 0
    hits = 0
    misses = 0

    def __init__(self, teachers: Sequence[Teacher], rows: Rows, student_feed: Feed | None = None) -> None:
        if not teachers:
            raise ValueError("At least one teacher is needed, got none.")
        self.teachers = list(teachers)
        self.rows = rows
        self.names = [teacher.name for teacher in teachers]
        self.num_teachers = len(self.teachers)
        self.num_classes = len(rows.class_names)
        students = None if student_feed is None else json_digest(student_feed.describe())
        self._feed_keys = [
            json_digest(teacher.feed.describe()) if isinstance(teacher, TorchTeacher) else "" for teacher in teachers
        ]
        self._takes_students = [
            isinstance(teacher, TorchTeacher) and (isinstance(teacher.feed, SharedInputsFeed) or key == students)
            for teacher, key in zip(teachers, self._feed_keys, strict=True)
        ]

    def lookup(self, rows: Tensor, views: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Logits `(teachers, batch, classes)`, float32, on the first teacher's device. inputs: the student's of the
        batch."""
        rows, views = rows.cpu(), views.cpu()
        logits = [
            teacher.forward_logits(fed)
            if isinstance(teacher, TorchTeacher) and fed is not None
            else teacher.logits(self.rows, rows, views)
            for teacher, fed in zip(self.teachers, self._feed(rows, views, inputs), strict=True)
        ]
        return torch.stack([one.to(logits[0].device) for one in logits])

    def lookup_with_features(
        self, rows: Tensor, views: Tensor, inputs: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `lookup`, and each teacher's penultimate features `(batch, width)`. Raises ValueError for teachers that
        are no torch modules."""
        others = [teacher.name for teacher in self.teachers if not isinstance(teacher, TorchTeacher)]
        if others:
            raise ValueError(
                f"The feature term needs teachers that are torch modules; {', '.join(others)} are not. Set "
                "feature_weight=0."
            )
        pairs = [
            teacher.forward_inputs(fed)
            for teacher, fed in zip(self.teachers, self._feed(rows.cpu(), views.cpu(), inputs), strict=True)
            if isinstance(teacher, TorchTeacher) and fed is not None
        ]
        logits, features = zip(*pairs, strict=True)
        return torch.stack([one.to(logits[0].device) for one in logits]), list(features)

    def _feed(self, rows: Tensor, views: Tensor, inputs: Mapping[str, Any] | None) -> list[Mapping[str, Any] | None]:
        """The inputs of each torch teacher, None for others. Equal feeds run once, raw rows are read once."""
        raw: dict[str, Any] | None = None
        by_feed: dict[str, Mapping[str, Any]] = {}
        fed: list[Mapping[str, Any] | None] = []
        for teacher, key, takes_students in zip(self.teachers, self._feed_keys, self._takes_students, strict=True):
            if not isinstance(teacher, TorchTeacher):
                fed.append(None)
            elif takes_students and inputs is not None:
                shared = isinstance(teacher.feed, SharedInputsFeed)
                fed.append(teacher.feed({"inputs": inputs}) if shared else inputs)
            else:
                if key not in by_feed:
                    raw = self.rows.raw(rows, views) if raw is None else raw
                    by_feed[key] = teacher.feed(raw)
                fed.append(by_feed[key])
        return fed
