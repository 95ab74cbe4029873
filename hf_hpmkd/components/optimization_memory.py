"""What is known from earlier runs, as one folder: their records, teacher outputs and models. Knows nothing of training.

    README.md                           card; `load_dataset(folder)` reads the records
    .records.index                      all of them in one file, to be read at once; made again where it is gone
    records/<id>.parquet                one file per run, never changed and never evicted: two memories merge by union
    teacher_outputs/<key>.safetensors   see `teacher_output_file`
    models/<key>/                       see `memory_files`; intermediate models by content key, students by record id
    unchecked/                          teacher outputs from elsewhere, which no run has compared with the teacher yet

The folder is laid out like a Hub dataset repository. Outputs and models are a cache: above a limit the least recently
used go, but nothing that a running job uses.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from hf_hpmkd import memory_files, memory_index, memory_records
from hf_hpmkd.memory_files import MANIFEST, DamagedModelError, Mark, is_key, is_output_name, local_folder, tolerated
from hf_hpmkd.memory_index import Indexed
from hf_hpmkd.memory_records import BadRecordError, Row, is_record_name

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: records/*.parquet
tags:
- hf_hpmkd
- knowledge-distillation
- optimization-memory
---

# An optimization memory of hf_hpmkd

Knowledge distillations, one row per run: what was known before it (data, teachers, student), its configuration, and
what it gave. `models/` holds trained models by key, `teacher_outputs/` logits of teachers by key, if they were shared.

```python
from datasets import load_dataset

runs = load_dataset("THIS_REPOSITORY_OR_FOLDER", split="train").to_pandas()
```

`hpmkd distill RECIPE --memory hf://datasets/USER/NAME` reads it before a run and adds the run after it.
Format version: 1.
"""


def default_root() -> Path:
    """$HPMKD_MEMORY, else the folder hpmkd/memory in the Hugging Face home. Raises ValueError if it names the Hub."""
    chosen = os.environ.get("HPMKD_MEMORY")
    return local_folder(chosen, "$HPMKD_MEMORY") if chosen else Path(HF_HOME) / "hpmkd" / "memory"


def default_outputs_root() -> Path:
    """$HPMKD_CACHE, else teacher_outputs in the memory."""
    chosen = os.environ.get("HPMKD_CACHE")
    return Path(chosen).expanduser() if chosen else default_root() / "teacher_outputs"


@dataclass(frozen=True)
class Item:
    """Something that may be evicted. name: as jobs mark it. last_used: seconds since 1970."""

    name: str
    path: Path
    nbytes: int
    last_used: float


@dataclass
class Freed:
    """What an eviction did. over: bytes above the limit that stay, because running jobs use them."""

    names: list[str] = field(default_factory=list)
    nbytes: int = 0
    over: int = 0


@dataclass
class Gained:
    """What came in from elsewhere. skipped: lines "NAME: why not"."""

    records: int = 0
    models: int = 0
    outputs: int = 0
    skipped: list[str] = field(default_factory=list)


class OptimizationMemory:
    """The memory in a folder. root: None takes `default_root`; made at the first write. limit_bytes: of outputs and
    models together, None sets none. outputs_root: None takes $HPMKD_CACHE or, for a root that was given or where that
    is unset, `teacher_outputs` in it. on_message: gets a line where something is told; None prints nothing.

    Raises ValueError for a negative limit, and for a root on the Hub (`memory_hub.HubMemory` reads that).
    """

    def __init__(
        self,
        root: str | Path | None = None,
        limit_bytes: int | None = None,
        outputs_root: str | Path | None = None,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"`limit_bytes` must be 0 or more, got {limit_bytes}. None sets no limit.")
        self.root = (default_root() if root is None else local_folder(root, "the folder of a memory")).absolute()
        default = default_outputs_root() if root is None else self.root / "teacher_outputs"
        self.outputs_root = (default if outputs_root is None else Path(outputs_root)).expanduser().absolute()
        self.limit_bytes = limit_bytes
        self.say = on_message or (lambda line: None)
        self._mark: Mark | None = None
        self.models_found = self.models_computed = 0
        self.model_seconds = 0.0  # of training that the found ones took, as far as it is known

    @property
    def where(self) -> str:
        """The memory in a few words, without local paths."""
        return "local"

    @contextmanager
    def running(self) -> Iterator["OptimizationMemory"]:
        """Within the block nothing that was read from or written to this memory is evicted, by whomever."""
        self._mark = Mark(self.root)
        try:
            yield self
        finally:
            with tolerated("forget what was in use"):
                self._mark.close()
            self._mark = None

    def use(self, *names: str) -> None:
        """Marks outputs (file names) and models (models/KEY) as used by this job; nothing outside `running`."""
        if self._mark is not None:
            with tolerated("mark what is in use"):
                self._mark.add(*names)

    # ---- records -----------------------------------------------------------------------------------------------------

    def add_record(self, row: Row) -> bool:
        """Remembers a run; False if it was known. The record is on the disk when this returns."""
        return self._add_record_file(memory_records.row_bytes(row), row["id"] + memory_records.SUFFIX)

    def _add_record_file(self, content: bytes, name: str) -> bool:
        target = self.root / "records" / name
        if target.exists():
            return False
        self._write_card()
        target.parent.mkdir(parents=True, exist_ok=True)
        with memory_files.staging(self.root) as folder:
            memory_files.write_synced(folder / name, content)
            os.replace(folder / name, target)
        return True

    def _write_card(self) -> None:
        card = self.root / "README.md"
        if not card.exists():
            with memory_files.staging(self.root) as folder:
                memory_files.write_synced(folder / "README.md", CARD.encode())
                os.replace(folder / "README.md", card)

    def records(self) -> tuple[list[Row], list[str]]:
        """All runs, the latest finished first, and a line "NAME: why" for each file in `records/` that is no record."""
        index = self.root / memory_index.NAME
        known = memory_index.read_index(index)
        found, faults = self._checked_records(known)
        if sum(one is not known.get(name) for name, one in found.items()) > memory_index.MOST_APART:
            # Only a cache: where the disk takes no file, or another process works in the folder, it is left.
            with suppress(OSError, Timeout), memory_files.lock_all(self.root).acquire(timeout=0):
                memory_index.write_index(index, found)
        rows = [one.row for one in found.values()]
        return sorted(rows, key=lambda row: (row["finished"] or "", row["id"]), reverse=True), faults

    def _checked_records(self, known: Mapping[str, Indexed]) -> tuple[dict[str, Indexed], list[str]]:
        """The records by file name, those that are not known, or changed since, read and checked; and faults."""
        found: dict[str, Indexed] = {}
        faults = []
        try:
            paths = _files(self.root / "records")
        except OSError as error:
            return {}, [f"records: {error}"]
        for path in paths:
            try:
                status = path.lstat()
                one = known.get(path.name)
                if one is None or not one.is_of(status):
                    one = Indexed.of(status, memory_records.read_named_row(path))
                found[path.name] = one
            except (BadRecordError, OSError) as error:
                faults.append(f"records/{memory_files.shown(path.name)}: {error}")
        return found, faults

    # ---- models ------------------------------------------------------------------------------------------------------

    def find_model(self, key: str) -> Path | None:
        """The folder of a finished model: config.json, .safetensors weights, what else it was kept with; or None.

        Every byte is compared with its checksum; a damaged model is removed, with a warning, so that it can be made
        again. A disk that fails is warned of, and then there is none. key: letters, digits, `.`, `_` and `-`. Raises
        ValueError for another.
        """
        _require_key(key)
        found = None
        with tolerated("be searched for a model"):
            found = self._local_model(key) or self._fetch_model(key)
        self.models_found += found is not None
        self.models_computed += found is None
        return found

    def refuse_model(self, key: str, why: str) -> None:
        """Removes a found model that turned out to be of no use, with a warning: its place is the next one's."""
        warnings.warn(f"The model {key} of the memory is not used and is removed: {why}.", stacklevel=2)
        self.models_found -= 1
        self.models_computed += 1
        with tolerated("remove a model"):
            self._remove(self.root / "models" / key)

    @contextmanager
    def making(self, key: str, wait: bool = True) -> Iterator[None]:
        """Within the block no other process makes the model of this key: it waits, and then finds it.

        wait: False goes on without, where another process is at it.
        """
        _require_key(key)
        lock = FileLock(self.root / "making" / f"{key}.lock")
        with tolerated("be locked"), suppress(Timeout):
            (self.root / "making").mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        try:
            yield
        finally:
            lock.release()

    def _local_model(self, key: str) -> Path | None:
        self.use(f"models/{key}")
        folder = self.root / "models" / key
        if not folder.exists():
            return None
        try:
            memory_files.check_model(folder)
        except DamagedModelError as error:
            warnings.warn(f"The model {key} in {self.root} is damaged ({error}) and is removed.", stacklevel=3)
            self._remove(folder)
            return None
        with suppress(OSError):  # somebody else's, or read-only: it serves all the same
            os.utime(folder / MANIFEST)
        return folder

    def _fetch_model(self, key: str) -> Path | None:
        """A model from elsewhere, now in its place; None here, where there is no elsewhere."""
        return None

    def keep_model(self, key: str, folder: str | Path) -> Path | None:
        """Copies a finished model in, in one step, and returns its place. One that is there already stays.

        Only data files are copied: settings, vocabularies, .safetensors. None where the disk fails, with a warning.
        Raises ValueError for a key of another form, or a folder without config.json or weights.
        """
        _require_key(key)
        with tolerated("keep a model"):
            self.use(f"models/{key}")
            target = self.root / "models" / key
            if not target.exists():
                with memory_files.staging(self.root) as place:
                    memory_files.pack_model(Path(folder), place / "model")
                    self.make_room(memory_files.folder_bytes(place))
                    self._move_model(place / "model", target)
            return target
        return None

    def _move_model(self, folder: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.exists():  # another process was first: the two are the same by their key
                raise

    def _remove(self, path: Path) -> None:
        """Takes a file or folder out of its place in one step, then deletes it."""
        with memory_files.staging(self.root) as folder:
            try:
                os.rename(path, folder / "removed")
            except FileNotFoundError:  # another process was first
                return

    # ---- teacher outputs ---------------------------------------------------------------------------------------------

    def unchecked_outputs(self, name: str, max_bytes: int) -> Path | None:
        """A file of teacher outputs that came from elsewhere, for the caller to check and move away; or None.

        max_bytes: more it cannot have; a larger file is named, and left.
        """
        path = self.root / "unchecked" / name
        if not is_output_name(name) or path.is_symlink() or not path.is_file():
            return None
        if path.stat().st_size > max_bytes:
            self.say(f"Memory: {name[:12]} from elsewhere is too large ({path.stat().st_size:,} bytes) and not used.")
            return None
        return path

    def refuse_outputs(self, path: Path, teacher: str, why: str) -> None:
        """Deletes an unchecked file that is not to be trusted, and says so."""
        with tolerated("remove outputs"):
            path.unlink(missing_ok=True)
        self.say(f"Memory: outputs of teacher {teacher!r} from elsewhere ({path.stem[:12]}) are not used: {why}.")

    # ---- keeping it small and whole ----------------------------------------------------------------------------------

    def items(self) -> list[Item]:
        """What may be evicted, the least recently used first."""
        found = []
        for folder in (self.outputs_root, self.root / "unchecked"):
            for path in _files(folder):
                if is_output_name(path.name):
                    status = path.lstat()
                    found.append(Item(path.name, path, status.st_size, status.st_mtime))
        for path in _files(self.root / "models"):
            used = path / MANIFEST if (path / MANIFEST).exists() else path
            size = memory_files.folder_bytes(path)
            found.append(Item(f"models/{path.name}", path, size, used.lstat().st_mtime))
        return sorted(found, key=lambda item: (item.last_used, item.name))

    def make_room(self, nbytes: int) -> None:
        """Evicts so that so many bytes more stay within the limit."""
        if self.limit_bytes is not None:
            with tolerated("make room"):
                self.evict(self.limit_bytes - nbytes)

    def evict(self, limit_bytes: int | None = None) -> Freed:
        """Deletes the least recently used outputs and models until at most so many bytes are left, and what stopped
        processes left behind. None only does the latter. Records stay, and whatever a running job uses.
        """
        freed = Freed()
        if not self.root.is_dir():
            return freed
        gone = []
        with memory_files.lock_all(self.root):
            memory_files.sweep(self.root)
            used = memory_files.used_names(self.root)
            items = self.items()
            left = sum(item.nbytes for item in items)
            limit = math.inf if limit_bytes is None else max(limit_bytes, 0)
            for item in items:
                if left <= limit:
                    break
                if item.name not in used:
                    # A folder is renamed first, so that no reader sees half a model.
                    gone.append(item.path.with_name(f".gone-{item.path.name}"))
                    os.replace(item.path, gone[-1])
                    freed.names.append(item.name)
                    freed.nbytes += item.nbytes
                    left -= item.nbytes
            freed.over = 0 if limit == math.inf else int(max(left - limit, 0))
            gone += [path for folder in self._folders() if folder.is_dir() for path in folder.glob(".gone-*")]
            for path in gone:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return freed

    def _folders(self) -> Sequence[Path]:
        return self.outputs_root, self.root / "unchecked", self.root / "models"

    def faults(self) -> list[str]:
        """A line "NAME: why" for each record and model that is damaged or should not be there. Reads every byte.

        Teacher outputs are `TeacherCache.damaged`'s.
        """
        found = self._checked_records({})[1]
        for path in _files(self.root / "models"):
            try:
                if not is_key(path.name) or path.is_symlink() or not path.is_dir():
                    raise DamagedModelError("it is no folder with the name of a model")
                memory_files.check_model(path)
            except DamagedModelError as error:
                found.append(f"models/{memory_files.shown(path.name)}: {error}")
        return found

    def merge(self, other: str | Path) -> Gained:
        """Takes in what another memory's folder has and this one lacks. That folder is read, never written, and not
        trusted: records and models are checked, teacher outputs wait in `unchecked/` for a run that can compare them.
        A folder of teacher outputs alone, as `$HPMKD_CACHE` may name one, is taken in like that too.

        Raises FileNotFoundError if there is no such folder, or nothing of a memory in it.
        """
        other = Path(other).expanduser()
        if not other.is_dir():
            raise FileNotFoundError(f"A memory to merge is a folder, there is none at {other}.")
        known = ("records", "models", "teacher_outputs")
        if not any((other / name).exists() for name in (*known, ".jobs")) and not any(
            is_output_name(one.name) for one in _files(other)
        ):
            raise FileNotFoundError(
                f"A memory holds {', '.join(known)}, or files of teacher outputs alone; {other} has none of them."
            )
        gained = Gained()
        for path in _files(other / "records"):
            try:
                memory_records.read_named_row(path)
                gained.records += self._add_record_file(path.read_bytes(), path.name)
            except (BadRecordError, OSError) as error:
                gained.skipped.append(f"records/{memory_files.shown(path.name)}: {error}")
        for path in _files(other / "models"):
            try:
                gained.models += self._take_model(path)
            except (DamagedModelError, OSError) as error:
                gained.skipped.append(f"models/{memory_files.shown(path.name)}: {error}")
        alone = [path for path in _files(other) if is_output_name(path.name)]
        for path in [*_files(other / "teacher_outputs"), *alone]:
            if path.suffix == ".lock":  # our own
                continue
            if not is_output_name(path.name) or path.is_symlink():
                gained.skipped.append(f"teacher_outputs/{memory_files.shown(path.name)}: it is no file of outputs")
            else:
                gained.outputs += self._take_outputs(path)
        return gained

    def _take_model(self, path: Path) -> bool:
        """A model's folder from elsewhere, copied, then checked, then moved into its place."""
        if not is_key(path.name) or path.is_symlink() or not path.is_dir():
            raise DamagedModelError("it is no folder with the name of a model")
        target = self.root / "models" / path.name
        if target.exists():
            return False
        manifest = memory_files.read_manifest((path / MANIFEST).read_bytes())
        with memory_files.staging(self.root) as place:
            (place / "model").mkdir()
            for name in (*manifest, MANIFEST):
                if (path / name).is_symlink():
                    raise DamagedModelError(f"its {name} is a link")
                memory_files.copy_synced(path / name, place / "model" / name)
            memory_files.check_model(place / "model")
            self._move_model(place / "model", target)
        return True

    def _take_outputs(self, path: Path) -> bool:
        target = self.root / "unchecked" / path.name
        if target.exists() or (self.outputs_root / path.name).exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with memory_files.staging(self.root) as place:
            memory_files.copy_synced(path, place / path.name)
            os.replace(place / path.name, target)
        return True

    def known_names(self) -> dict[str, Any]:
        """What this memory holds, by kind, as names."""
        return {
            "records": [path.name for path in _files(self.root / "records") if is_record_name(path.name)],
            "models": [path.name for path in _files(self.root / "models") if is_key(path.name)],
            "outputs": [path.name for path in _files(self.outputs_root) if is_output_name(path.name)],
        }


def _files(folder: Path) -> list[Path]:
    """What lies in a folder, hidden ones left out, by name; nothing where there is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _require_key(key: str) -> None:
    if not is_key(key):
        raise ValueError(
            f"A model's key is up to 128 letters, digits, `.`, `_` and `-`, got {memory_files.shown(key)!r}. Take a "
            "hash of what decides the model."
        )
