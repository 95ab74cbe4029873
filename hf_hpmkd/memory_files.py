"""How a memory keeps its folder whole: writing in one step, marks of running jobs, and which files may be in it at all.

Every write goes into `.tmp/` first and is renamed into place, so a process that is stopped at any moment leaves old or
new files, never half ones. A running job holds a lock beside its mark; the system lets go of it when the process ends,
however it ends.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FORMAT_VERSION = 1
MANIFEST = "memory.json"
MAX_MODEL_BYTES = 50 * 10**9
_MAX_MODEL_FILES = 64
_MAX_TEXT_BYTES = 64 * 2**20  # of any file of a model that holds no weights; large vocabularies take some 20 MB
_OUTPUT_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
# Weights, settings and vocabularies. No suffix here is one of code or of pickles.
_MODEL_FILE = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,100}\.(safetensors|json|jsonl|txt|model|jinja|md)")


class DamagedModelError(ValueError):
    """A folder that is no sound model of a memory. The message tells why, without the folder's name."""


def is_output_name(name: str) -> bool:
    """Whether a file name is one that stored teacher outputs can have."""
    return _OUTPUT_NAME.fullmatch(name) is not None


def is_key(key: str) -> bool:
    """Whether a text can be the key of a model: a single folder name that means no other place."""
    return _KEY.fullmatch(key) is not None and ".." not in key


def is_model_file(name: str) -> bool:
    """Whether a file may be in a model's folder: data alone, directly in it."""
    return _MODEL_FILE.fullmatch(name) is not None and ".." not in name


def local_folder(where: str | Path, what: str) -> Path:
    """The folder of a memory. what: how the user named it. Raises ValueError for one on the Hub."""
    path = Path(where).expanduser()
    if path.parts[:1] == ("hf:",):
        raise ValueError(
            f"{what[0].upper()}{what[1:]} must be a folder of this machine, got hf://{'/'.join(path.parts[1:])}. A run "
            "uses a shared memory by `memory.path` of its recipe or `hpmkd distill --memory`; `hpmkd memory pull` "
            "brings one here."
        )
    return path


def shown(name: str) -> str:
    """A name from elsewhere, fit for a terminal: escaped and cut."""
    text = name.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """A fault of the disk ends the block with a warning, and nothing else: a run can do without its memory."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"The memory cannot {what}: {error}. The run goes on without that.", stacklevel=4)


# ---- writing in one step ---------------------------------------------------------------------------------------------


def lock_all(root: Path) -> FileLock:
    """Held for moments by who starts a mark, and by who deletes: so nothing is deleted that was just marked."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".lock")


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A new folder on the memory's own disk, gone afterwards. `sweep` removes those of stopped processes."""
    parent = root / ".tmp"
    name = uuid.uuid4().hex
    with lock_all(root):
        parent.mkdir(exist_ok=True)
        lock = FileLock(parent / f"{name}.lock")
        lock.acquire()
    folder = parent / name
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (parent / f"{name}.lock").unlink(missing_ok=True)
        lock.release()


def sweep(root: Path) -> None:
    """Removes what stopped processes left: half-written files, and marks of jobs that run no more. Holds `lock_all`."""
    for lock_file in [*(root / ".tmp").glob("*.lock"), *(root / ".jobs").glob("*.lock")]:
        lock = FileLock(lock_file)
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                lock_file.with_suffix(".used").unlink(missing_ok=True)
                lock_file.unlink(missing_ok=True)
        except Timeout:
            continue


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_synced(source: Path, target: Path) -> str:
    """Copies a file, waits until the disk has it, and returns the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with open(source, "rb") as read, open(target, "wb") as written:
        while chunk := read.read(1 << 20):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


# ---- marks of running jobs -------------------------------------------------------------------------------------------


class Mark:
    """What one running job uses, as lines of a file beside which it holds a lock."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: set[str] = set()
        with lock_all(root):
            (root / ".jobs").mkdir(exist_ok=True)
            self._file = root / ".jobs" / f"{uuid.uuid4().hex}.used"
            self._lock = FileLock(self._file.with_suffix(".lock"))
            self._lock.acquire()
            self._file.touch()

    def add(self, *names: str) -> None:
        """From its return on, nothing of these names is deleted while the job runs."""
        new = [name for name in names if name not in self._names]
        if not new:
            return
        with lock_all(self._root), open(self._file, "a", encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in new))
        self._names.update(new)

    def close(self) -> None:
        self._file.unlink(missing_ok=True)
        self._file.with_suffix(".lock").unlink(missing_ok=True)
        self._lock.release()


def used_names(root: Path) -> set[str]:
    """The names that running jobs have marked. Call it holding `lock_all`, after `sweep`."""
    return {name for file in (root / ".jobs").glob("*.used") for name in file.read_text(encoding="utf-8").splitlines()}


# ---- models ----------------------------------------------------------------------------------------------------------


def pack_model(source: Path, folder: Path) -> None:
    """Copies a model's data files into a new folder, with a manifest of their sizes and checksums.

    What is no data (code, pickles, subfolders) is left out. Raises ValueError where config.json or weights are missing.
    """
    folder.mkdir()
    files: dict[str, Any] = {}
    for path in sorted(source.iterdir()):
        if path.is_file() and is_model_file(path.name) and path.name != MANIFEST:
            digest = copy_synced(path, folder / path.name)
            files[path.name] = {"bytes": (folder / path.name).stat().st_size, "sha256": digest}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"A model to keep is a folder with config.json and .safetensors weights, {source} holds "
            f"{', '.join(files) or 'none of its files'}. Write it with `save_pretrained`."
        )
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def check_model(folder: Path) -> None:
    """Raises DamagedModelError unless the folder holds exactly the files of its manifest, data alone, unchanged."""
    try:
        manifest = read_manifest((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise DamagedModelError(f"it has no readable {MANIFEST} ({type(error).__name__})") from error
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != manifest.keys():
        raise DamagedModelError(f"its files are not those of its {MANIFEST}")
    for name, about in manifest.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != about["bytes"]:
            raise DamagedModelError(f"its {name} has another size, or is no file")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                raise DamagedModelError(f"its {name} has another checksum")
        if name.endswith(".index.json"):
            _check_index(path, manifest)


def _check_index(path: Path, manifest: Mapping[str, Any]) -> None:
    """An index says in which files the weights lie. Loaders follow it wherever it points."""
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedModelError(f"its {path.name} cannot be read ({type(error).__name__})") from error
    if strange := [str(name) for name in shards if name not in manifest or not str(name).endswith(".safetensors")]:
        raise DamagedModelError(f"its {path.name} names {shown(strange[0])}, which is no file of weights beside it")


def read_manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of a manifest from anywhere. Raises DamagedModelError for what breaks a rule."""
    try:
        tree: Any = json.loads(content) if len(content) <= _MAX_TEXT_BYTES else None
        version, files = tree["format_version"], {str(name): dict(about) for name, about in tree["files"].items()}
        sizes = {name: (about["bytes"], about["sha256"]) for name, about in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedModelError(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if version != FORMAT_VERSION:
        raise DamagedModelError(f"it has format {version!r:.20}, this version of hf_hpmkd reads {FORMAT_VERSION}")
    if strange := [name for name in sizes if not is_model_file(name) or name == MANIFEST]:
        raise DamagedModelError(f"it names {shown(strange[0])}, which is no data file of a model")
    whole = all(isinstance(size, int) and size >= 0 and isinstance(sha, str) for size, sha in sizes.values())
    if not whole or len(sizes) > _MAX_MODEL_FILES or "config.json" not in sizes:
        raise DamagedModelError(f"its {MANIFEST} does not describe a model")
    too_large = [name for name, (size, _) in sizes.items() if size > _limit(name)]
    if too_large or sum(size for size, _ in sizes.values()) > MAX_MODEL_BYTES:
        raise DamagedModelError(f"its files are too large ({', '.join(too_large) or 'together'})")
    return files


def mark_origin(folder: Path, where: str) -> None:
    """Notes in a model's manifest where it was fetched: whoever keeps it shall not publish it as an own one."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    write_synced(folder / MANIFEST, json.dumps({**manifest, "from": where}, indent=1).encode())


def model_origin(folder: Path) -> str | None:
    """Where a model was fetched; None for one that was made here."""
    try:
        origin = json.loads((folder / MANIFEST).read_bytes()).get("from")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return None if origin is None else str(origin)


def _limit(name: str) -> int:
    return MAX_MODEL_BYTES if name.endswith(".safetensors") else _MAX_TEXT_BYTES


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
