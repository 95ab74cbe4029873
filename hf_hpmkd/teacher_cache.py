"""Teacher outputs on disk: computed once per (teacher, rows, view), found again by content, shared by processes.

One safetensors file per teacher and view. What a file is called follows from everything that decides its contents, so
that a changed weight, row, augmentation or preprocessing is another file, and a copy of the data elsewhere is the same
one. How a file looks is in `teacher_output_file`.
"""

import math
import os
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from hf_hpmkd.components.optimization_memory import default_outputs_root
from hf_hpmkd.foreign_outputs import OutputSource, adopt
from hf_hpmkd.progress import progress_bar
from hf_hpmkd.tasks.base import UNAUGMENTED, Rows
from hf_hpmkd.teacher_kinds import Teacher
from hf_hpmkd.teacher_output_file import (
    SUFFIX,
    DamagedFileError,
    Layout,
    Stored,
    Wanted,
    list_files,
    read,
    read_about,
    read_seconds,
    write,
)
from hf_hpmkd.teacher_outputs import CachedOutputs, LiveOutputs

__all__ = ["CacheEntry", "CachedOutputs", "CaptureSize", "LiveOutputs", "TeacherCache", "estimate"]

_FLUSH_BYTES = 64 * 2**20
_SPARE_BYTES = 64 * 2**20  # kept free on the disk, so that a run can still write its log
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class CaptureSize:
    """What a capture writes."""

    bytes: int
    files: int

    def __str__(self) -> str:
        return f"{self.files} files, {readable_bytes(self.bytes)}"


def estimate(
    num_teachers: int, num_rows: int, num_classes: int, num_views: int, mode: str = "full", topk: int | None = None
) -> CaptureSize:
    """Bytes and files that the outputs of so many teachers take. num_views: 0 for the unaugmented rows alone."""
    files = num_teachers * max(num_views, 1)
    return CaptureSize(files * Layout(mode, topk, num_rows, num_classes).nbytes, files)


def readable_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass(frozen=True)
class CacheEntry:
    """One file. last_used: seconds since 1970. teacher is "?" where the file cannot be read."""

    path: Path
    teacher: str
    view: int
    mode: str
    rows: int
    classes: int
    nbytes: int
    last_used: float


@dataclass
class Tally:
    """What was asked of a cache, each file once. seconds: what computing the found ones took, as far as they say."""

    found: int = 0
    computed: int = 0
    found_bytes: int = 0
    found_seconds: float = 0.0
    names: set[str] = field(default_factory=set)

    def add(self, paths: Sequence[Path], computed: set[Path]) -> None:
        for path in paths:
            if path.name in self.names:
                continue
            self.names.add(path.name)
            if path in computed:
                self.computed += 1
            else:
                self.found += 1
                with suppress(FileNotFoundError):  # read before, and deleted since
                    self.found_bytes += path.stat().st_size
                self.found_seconds += read_seconds(path) or 0.0


class TeacherCache:
    """The folder of teacher outputs. root: None takes $HPMKD_CACHE, or teacher_outputs in the default memory; made when
    the first file is written. source: the memory that hears what is used and may have files from elsewhere.
    """

    def __init__(self, root: str | Path | None = None, source: OutputSource | None = None) -> None:
        self.root = (default_outputs_root() if root is None else Path(root)).expanduser()
        self.source = source
        self.tally = Tally()

    def outputs(
        self,
        teachers: Sequence[Teacher],
        rows: Rows,
        num_views: int,
        *,
        mode: str = "full",
        topk: int | None = None,
        only: int | None = None,
        batch_size: int = 256,
        progress: bool = True,
        on_message: Callable[[str], None] | None = None,
    ) -> CachedOutputs:
        """The outputs of the teachers on rows, in views 0..num_views-1 (0: unaugmented alone), or in view `only` of
        them; what is missing is computed.

        mode: "full" keeps all logits, "topk" the log-probabilities of the `topk` largest classes. batch_size: rows per
        forward pass, halved where memory does not suffice. on_message: gets a line on bytes and time before and during
        a capture; None prints to stderr if progress. Several processes may ask for the same at once: they share the
        work.

        Raises ValueError for views that rows or a teacher do not have, for NaN among the outputs, and for topk below
        1; OSError if the disk has no room. A damaged file is rebuilt, with a warning.
        """
        if num_views < 0 or batch_size < 1:
            raise ValueError(
                f"`num_views` must be 0 or more, `batch_size` at least 1, got {num_views} and {batch_size}."
            )
        if not teachers:
            raise ValueError("At least one teacher is needed, got none.")
        if num_views:
            _require_views(teachers, rows)
        say = on_message or (_print_to_stderr if progress else _say_nothing)
        layout = Layout(mode, topk, len(rows), len(rows.class_names))
        views = [only] if only is not None else list(range(num_views)) or [UNAUGMENTED]
        wanted = [self._wanted(teacher, rows, views, layout) for teacher in teachers]
        if self.source is not None:
            self.source.use(*(file.path.name for of_teacher in wanted for file in of_teacher))
        found: dict[str, Stored] = {}
        missing: list[tuple[Teacher, Wanted]] = []
        for teacher, of_teacher in zip(teachers, wanted, strict=True):
            for file in of_teacher:
                if file.key not in found and (stored := _open(file)) is not None:
                    found[file.key] = stored
                elif file.key not in found and all(file.key != other.key for _, other in missing):
                    missing.append((teacher, file))
        missing = self._adopted(missing, rows, found)
        captured: set[Path] = set()
        if missing:
            self._require_room(CaptureSize(len(missing) * layout.nbytes, len(missing)), say)
            capture = _Capture(rows, batch_size, progress, say, missing)
            captured = self._capture_missing(missing, capture, found)
        # What other processes of this run compute meanwhile was not there either.
        self.tally.add([file.path for of_teacher in wanted for file in of_teacher], {file.path for _, file in missing})
        stored_files = [[found[file.key] for file in of_teacher] for of_teacher in wanted]
        names = [teacher.name for teacher in teachers]
        return CachedOutputs(names, stored_files, layout, views, len(found) - len(captured), len(captured))

    def _wanted(self, teacher: Teacher, rows: Rows, views: Sequence[int], layout: Layout) -> list[Wanted]:
        """The files of a teacher's outputs, one per view."""
        identity, name = teacher.identity(rows), teacher.name
        keys = [{} if view == UNAUGMENTED else rows.view_key() for view in views]
        about = (self.root, identity, rows.fingerprint)
        return [Wanted(*about, key, view, layout, name) for view, key in zip(views, keys, strict=True)]

    def has(self, teacher: Teacher, rows: Rows, view: int | None, mode: str = "full", topk: int | None = None) -> bool:
        """Whether the file of a teacher's outputs is there, sound or not. view: None for unaugmented rows."""
        layout = Layout(mode, topk, len(rows), len(rows.class_names))
        return self._wanted(teacher, rows, [UNAUGMENTED if view is None else view], layout)[0].path.is_file()

    def _adopted(
        self, missing: list[tuple[Teacher, Wanted]], rows: Rows, found: dict[str, Stored]
    ) -> list[tuple[Teacher, Wanted]]:
        """Takes what the source has from elsewhere, once it is checked; returns what is missing then."""
        if self.source is None or not missing:
            return missing
        self.root.mkdir(parents=True, exist_ok=True)
        still = []
        for teacher, file in missing:
            stored = None
            with suppress(Timeout), FileLock(file.path.with_suffix(".lock"), timeout=0):  # another process is at it
                if file.path.exists() or adopt(self.source, teacher, rows, file):
                    stored = _open(file, warn=False)
            if stored is None:
                still.append((teacher, file))
            else:
                found[file.key] = stored
        return still

    def _require_room(self, size: CaptureSize, say: Callable[[str], None]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if self.source is not None:
            self.source.make_room(size.bytes)
        free = shutil.disk_usage(self.root).free
        if size.bytes + _SPARE_BYTES > free:
            raise OSError(
                f"The teacher outputs need {size}, but only {readable_bytes(free)} are free in {self.root}. Free some "
                "(`hpmkd cache clear`), choose another folder (cache_dir, or $HPMKD_CACHE), keep the largest classes "
                "only (teacher_outputs: topk), or keep nothing (teacher_outputs: live)."
            )
        say(f"Teacher outputs to compute: {size}, into {self.root}")

    def _capture_missing(
        self, missing: list[tuple[Teacher, Wanted]], capture: "_Capture", found: dict[str, Stored]
    ) -> set[Path]:
        """Computes what is missing. A file that another process is at is left for later, when it is usually done."""
        captured: set[Path] = set()
        waiting = deque(missing)
        put_back = 0
        told = False
        with capture:
            while waiting:
                teacher, file = waiting.popleft()
                try:
                    with FileLock(file.path.with_suffix(".lock"), timeout=0):
                        stored = _open(file, warn=False)
                        if stored is None:
                            started = time.perf_counter()
                            outputs = capture.run(teacher, file)
                            stored = _written(file, outputs, time.perf_counter() - started)
                            captured.add(file.path)
                        else:
                            capture.skip()
                        found[file.key] = stored
                    put_back = 0
                except Timeout:
                    waiting.append((teacher, file))
                    put_back += 1
                    if put_back >= len(waiting):
                        if not told:
                            capture.say(f"Waiting for another process that computes {len(waiting)} of the files.")
                            told = True
                        time.sleep(_POLL_SECONDS)
        return captured

    # ---- what lies in the folder -------------------------------------------------------------------------------------

    def entries(self) -> list[CacheEntry]:
        """All files, the latest used first."""
        found = []
        for path in list_files(self.root):
            if (status := _status(path)) is None:
                continue
            try:
                about = read_about(path)
            except DamagedFileError:
                about = {"teacher": "?", "view": UNAUGMENTED, "mode": "?", "rows": 0, "classes": 0}
            found.append(CacheEntry(path, **about, nbytes=status.st_size, last_used=status.st_mtime))
        return sorted(found, key=lambda entry: -entry.last_used)

    def ls(self) -> str:
        """The files as a table to print."""
        entries = self.entries()
        if not entries:
            return f"No teacher outputs in {self.root}."
        lines = [
            f"{'teacher':28} {'view':>5} {'mode':5} {'rows':>9} {'classes':>7} {'size':>9}  last used         file"
        ]
        for entry in entries:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
            view = "-" if entry.view == UNAUGMENTED else str(entry.view)
            lines.append(
                f"{entry.teacher[:28]:28} {view:>5} {entry.mode:5} {entry.rows:>9,} {entry.classes:>7,} "
                f"{readable_bytes(entry.nbytes):>9}  {used}  {entry.path.stem[:12]}"
            )
        total = readable_bytes(sum(entry.nbytes for entry in entries))
        return "\n".join([*lines, f"{len(entries)} files, {total}, in {self.root}"])

    def damaged(self) -> dict[Path, str]:
        """Files whose contents do not fit their checksum or name, each with what is wrong. Reads every byte."""
        faults = {}
        for path in list_files(self.root):
            try:
                read(path)
            except DamagedFileError as error:
                faults[path] = str(error)
        return faults

    def verify(self) -> str:
        """`damaged` as text to print."""
        faults = self.damaged()
        checked = f"{len(list_files(self.root))} files checked, {len(faults)} damaged."
        rebuilt = ["They are rebuilt when next needed."] if faults else []
        return "\n".join([*(f"{path.name}: {fault}" for path, fault in faults.items()), checked, *rebuilt])

    def clear(self, older_than: float | None = None) -> str:
        """Deletes files, and what stopped processes left behind; says how many. Touches nothing that it did not name
        itself.

        older_than: days since the last use; None deletes all. A file that a process is writing now stays.
        """
        limit = math.inf if older_than is None else time.time() - older_than * 86400
        count = size = 0
        for path in list_files(self.root, with_leftovers=True):
            if (status := _status(path)) is None or status.st_mtime > limit:
                continue
            lock = path.with_name(path.name.split(".")[0] + ".lock")
            try:
                with FileLock(lock, timeout=0):
                    path.unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)
            except Timeout:
                continue
            count += path.suffix == SUFFIX
            size += status.st_size
        return f"{count} files deleted, {readable_bytes(size)} freed, in {self.root}"


def _status(path: Path) -> os.stat_result | None:
    """None where the file has gone since it was listed."""
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _require_views(teachers: Sequence[Teacher], rows: Rows) -> None:
    if not rows.supports_views:
        raise ValueError("Views were asked for, but these rows have no augmentation. Use num_views=0.")
    fixed = [teacher.name for teacher in teachers if not teacher.answers_views]
    if fixed:
        raise ValueError(
            f"Teachers {', '.join(fixed)} have one answer per row and cannot answer augmented views. Switch "
            "augmentation off (`data.augmentation: none`), or load the models themselves."
        )


def _open(file: Wanted, warn: bool = True) -> Stored | None:
    """The stored outputs; None if there are none, or none that are sound."""
    try:
        stored = read(file)
        with suppress(OSError):  # somebody else's, or read-only: it serves all the same
            os.utime(file.path)
        return stored
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        if warn:
            warnings.warn(
                f"The stored outputs of teacher {file.teacher!r} are damaged ({error}) and are computed again.",
                stacklevel=3,
            )
        return None


def _written(file: Wanted, outputs: dict[str, Tensor], seconds: float) -> Stored:
    """The outputs as their new file has them; in memory where the disk does not take it."""
    try:
        write(file, outputs, seconds)
        return read(file)
    except (OSError, SafetensorError) as error:
        told = f"The outputs of teacher {file.teacher!r} cannot be written and stay in this process: {error}."
        warnings.warn(told, stacklevel=4)
        return outputs


def _print_to_stderr(message: str) -> None:
    tqdm.write(message, file=sys.stderr)  # which leaves the progress bar in one piece


def _say_nothing(message: str) -> None:
    pass


class _Capture:
    """Runs teachers over rows, view by view, with a progress bar over all files."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        progress: bool,
        say: Callable[[str], None],
        missing: list[tuple[Teacher, Wanted]],
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.say = say
        self.files_of = {id(teacher): sum(other is teacher for other, _ in missing) for teacher, _ in missing}
        total = len(missing) * len(rows)
        self.bar = progress_bar(total=total, desc="Teacher outputs", unit="row", unit_scale=True, shown=progress)

    def __enter__(self) -> "_Capture":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def skip(self) -> None:
        """Another process has made the file."""
        self.bar.update(len(self.rows))

    def run(self, teacher: Teacher, file: Wanted) -> dict[str, Tensor]:
        """The tensors of a file. Raises ValueError for NaN."""
        outputs = file.layout.empty()
        pending: list[dict[str, Tensor]] = []  # on the teacher's device: copying each batch would wait for the device
        done = start = pending_bytes = 0
        started, warm_start = time.perf_counter(), 0
        while start < len(self.rows):
            stop = min(start + max(self.batch_size, teacher.min_batch), len(self.rows))
            encoded = self._batch(teacher, file, start, stop)
            if encoded is None:
                continue
            pending.append(encoded)
            pending_bytes += sum(tensor.nbytes for tensor in encoded.values())
            if pending_bytes > _FLUSH_BYTES or stop == len(self.rows) or not teacher.is_live:
                done = _flush(pending, outputs, done)
                pending_bytes = 0
            self.bar.update(stop - start)
            start = stop
            if warm_start == 0:
                started, warm_start = time.perf_counter(), start
            elif self.files_of.get(id(teacher)):
                self._tell_time(teacher, (time.perf_counter() - started) / (start - warm_start), start)
        broken = file.layout.first_nan(outputs)
        if broken is not None:
            raise ValueError(
                f"Teacher {teacher.name!r} answers row {broken} (view {file.view}) with NaN or infinite logits. Check "
                "its weights and its preprocessing, or load it in float32."
            )
        return outputs

    def _batch(self, teacher: Teacher, file: Wanted, start: int, stop: int) -> dict[str, Tensor] | None:
        """The encoded outputs of some rows; None if memory did not suffice, then with a smaller batch size."""
        indices = torch.arange(start, stop)
        try:
            return file.layout.encode(teacher.logits(self.rows, indices, torch.full_like(indices, file.view)))
        except RuntimeError as error:
            if self.batch_size == 1 or not should_reduce_batch_size(error):
                raise
        self.batch_size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say(
            f"Memory does not suffice for teacher {teacher.name!r}: going on with batches of {self.batch_size} rows."
        )
        return None

    def _tell_time(self, teacher: Teacher, seconds_per_row: float, rows_done: int) -> None:
        files = self.files_of.pop(id(teacher))
        seconds = seconds_per_row * (files * len(self.rows) - rows_done)
        amount = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        self.say(f"Teacher {teacher.name!r}: about {amount} for {files} file(s) of {len(self.rows):,} rows.")


def _flush(pending: list[dict[str, Tensor]], outputs: dict[str, Tensor], done: int) -> int:
    """Copies what is pending to its place behind the rows that are done; returns how many are done then."""
    rows = sum(len(next(iter(batch.values()))) for batch in pending)
    for key, output in outputs.items():
        parts = [batch[key] for batch in pending]
        output[done : done + rows] = parts[0] if len(parts) == 1 else torch.cat(parts)
    pending.clear()
    return done + rows
