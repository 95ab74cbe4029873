"""Teacher outputs that came from elsewhere: whether they are what the teacher here answers, before anybody uses them.

A file is only data, and its checksum says that it arrived whole. What it cannot say is that the outputs are true: that
is found out by asking the teacher for a few of its rows again, drawn anew each time, so that nobody knows them before.
"""

import errno
import os
import random
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_kinds import Teacher
from hf_hpmkd.teacher_output_file import DamagedFileError, Stored, Wanted, read

CHECKED_ROWS = 32
_SPARE_BYTES = 2**20  # for the header of a file
# Another machine rounds otherwise: float16 storage alone moves a logit by a thousandth of itself.
_RELATIVE, _ABSOLUTE = 0.02, 0.05


class OutputSource(Protocol):
    """Where outputs may come from, and who must hear of it: an optimization memory."""

    def use(self, *names: str) -> None: ...
    def make_room(self, nbytes: int) -> None: ...
    def unchecked_outputs(self, name: str, max_bytes: int) -> Path | None: ...
    def refuse_outputs(self, path: Path, teacher: str, why: str) -> None: ...


def adopt(source: OutputSource, teacher: Teacher, rows: Rows, file: Wanted) -> bool:
    """Moves a wanted file from the source into its place, if it is there and stands the test. Hold the file's lock.

    A share p of false rows is found with probability 1 - (1 - p)^32: a tenth with 97 %.
    """
    size = file.layout.nbytes + _SPARE_BYTES
    path = source.unchecked_outputs(file.path.name, size)
    if path is None:
        return False
    try:
        fault = difference(teacher, rows, file, read(file, path))
    except (DamagedFileError, FileNotFoundError) as error:
        fault = str(error)
    if fault is not None:
        source.refuse_outputs(path, file.teacher, fault)
        return False
    try:
        file.root.mkdir(parents=True, exist_ok=True)
        _move(path, file.path)
    except OSError as error:
        warnings.warn(
            f"Outputs of teacher {file.teacher!r} from elsewhere cannot be moved to {file.root}: {error}. They are "
            "computed again.",
            stacklevel=2,
        )
        return False
    return True


def _move(path: Path, target: Path) -> None:
    """In one step, to another disk too: there `clear` knows a half copy by its name."""
    try:
        os.replace(path, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        shutil.copyfile(path, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    with suppress(OSError):  # it is where it is wanted
        path.unlink()


def difference(teacher: Teacher, rows: Rows, file: Wanted, stored: Stored) -> str | None:
    """How the stored outputs differ from the teacher's on a few rows drawn at random; None if they do not."""
    if file.layout.first_nan(stored) is not None:
        return "they hold NaN"
    indices = torch.tensor(sorted(random.SystemRandom().sample(range(len(rows)), min(CHECKED_ROWS, len(rows)))))
    answers = teacher.logits(rows, indices, torch.full_like(indices, file.view)).cpu()
    fresh = file.layout.decode(file.layout.encode(answers)).log_softmax(1)
    there = file.layout.decode({name: tensor[indices] for name, tensor in stored.items()}).log_softmax(1)
    if file.layout.topk is not None:  # which of two equal classes is kept is chance, so only the probabilities count
        fresh, there = fresh.exp(), there.exp()
    # Compared relative to the row's spread: a log-probability of -40 says no more than that the class is out.
    allowed = _ABSOLUTE + _RELATIVE * fresh.abs()
    wrong = ~((fresh - there).abs() <= allowed).all(1)  # NaN is wrong
    if not bool(wrong.any()):
        return None
    return f"the teacher here answers {int(wrong.sum())} of {len(indices)} rows otherwise"
