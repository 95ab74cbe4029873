"""The output folder of a run: who may use it, and whether it is new, interrupted or finished."""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hf_hpmkd.run_record import RECORD_FILE, RunRecord

LOCK = ".lock"
REPLACED = ".replaced"
"""Where the run that `output.overwrite` replaces lies until the new one has its teachers."""
_BEGUN = (RECORD_FILE, "recipe.yaml")
"""What the folder of a run holds before anything is made."""


class RunFolderError(ValueError):
    """The output folder cannot be used for this run."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps others out of it within the block. Raises RunFolderError where somebody is in it."""
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(
            f"An output folder is for one run at a time, and another is running in {folder}. Wait for it, or choose "
            "another folder (`output.dir=FOLDER`, or --output)."
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def make_folder(folder: Path) -> None:
    """Raises RunFolderError where that is not possible, or the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise RunFolderError(
            f"The output folder must be one that can be made, got {folder}: {error.strerror}. Choose another with "
            "`output.dir=FOLDER`."
        ) from error
    if not writable:
        raise RunFolderError(
            f"The output folder must be writable, {folder} is not. Change its permissions or choose another with "
            "`output.dir=FOLDER`."
        )


def contents(folder: Path) -> set[str]:
    """Names of what lies in a folder, but for the lock and a run that is being replaced."""
    return {path.name for path in folder.iterdir()} - {LOCK, REPLACED}


def _set_aside(folder: Path) -> None:
    """Makes room for a new run. What is aside already is the last one that was whole, and stays."""
    names, aside = contents(folder), folder / REPLACED
    if aside.is_dir():
        for name in names:
            _remove(folder / name)
        return
    aside.mkdir()
    for name in names:
        (folder / name).rename(aside / name)


def drop_replaced(folder: Path) -> None:
    """The new run can be trained, so the one that it replaces goes."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """The new run has failed: where it has made nothing, the one that it was to replace is put back."""
    aside = folder / REPLACED
    if not aside.is_dir() or not contents(folder) <= set(_BEGUN):
        return
    for name in contents(folder):
        _remove(folder / name)
    for path in aside.iterdir():
        path.rename(folder / path.name)
    aside.rmdir()


def require_same_rows(
    folder: Path,
    before: Mapping[str, str],
    now: dict[str, str],
    nothing: Collection[str] = _BEGUN,
    finished: bool = False,
) -> dict[str, str]:
    """What lies in a folder was trained on the rows of its time: raises RunFolderError where they are others now.

    before, now: fingerprints of the parts; before is empty where nothing was seen yet. nothing: names of what lies in
    the folder of a run that has trained nothing, whose data may have been mended since. finished: whether the run is,
    so that `output.overwrite` replaces it. Returns those of now.
    """
    if contents(folder) <= set(nothing):
        return now
    if changed := [part for part, told in now.items() if before.get(part, told) != told]:
        instead = "remove this one"
        if finished:
            instead = f"replace the run with `output.overwrite=true` (`hpmkd report {folder}` shows it as it is)"
        raise RunFolderError(
            f"The rows of {' and '.join(changed)} are others than the run in {folder} was trained on: the data have "
            "changed since, or this version cuts them otherwise. Restore them, choose another folder "
            f"(`output.dir=FOLDER`, or --output), or {instead}."
        )
    return now


def require_same_processes(folder: Path, before: int | None, now: int) -> None:
    """Raises RunFolderError where a run was begun with another number of processes: each takes a batch of every step,
    so that a training has fewer steps the more there are. before: None where the record does not say.
    """
    if before not in (None, now) and not contents(folder) <= set(_BEGUN):
        raise RunFolderError(
            f"A run goes on with as many processes as it began with, the one in {folder} began with {before} and there "
            f"are {now}. Launch it with {before}, or choose another folder (`output.dir=FOLDER`, or --output)."
        )


def claim(folder: Path, fingerprint: str, overwrite: bool = False) -> RunRecord | None:
    """Makes `folder` this run's own, before any work starts.

    Returns the record of an interrupted or finished run of the same recipe, or None where the run starts anew.
    overwrite: a run that lies in the folder is set aside, to be dropped or restored when it is known whether the new
    one can be trained; but an unfinished one of the same recipe goes on: the command that began it says so whether it
    overwrites or not. Raises RunFolderError if the folder holds another run, something that is no run, or cannot be
    written.
    """
    record_file = folder / RECORD_FILE
    make_folder(folder)
    if record_file.is_file() and overwrite and not _is_unfinished(record_file, fingerprint):
        _set_aside(folder)
    if not record_file.is_file():
        found = sorted(contents(folder))
        if found:
            raise RunFolderError(
                f"The output folder must be empty or hold a run of this recipe, {folder} holds {', '.join(found[:5])}. "
                "Choose another with `output.dir=FOLDER`."
            )
        return None
    record = RunRecord.load(record_file)
    if record.recipe_fingerprint != fingerprint:
        if contents(folder) <= set(_BEGUN):
            return None  # it failed before it made anything: the recipe was mended
        raise RunFolderError(
            f"The output folder {folder} holds a run of another recipe (or of this one with other values; status "
            f"{record.status}). Choose another with `output.dir=FOLDER`, or replace it with `output.overwrite=true`."
        )
    return record


def _is_unfinished(record_file: Path, fingerprint: str) -> bool:
    """Whether a run of this recipe was begun there and not finished."""
    with suppress(ValueError, RecursionError):  # a record that cannot be read is none to go on with
        record = RunRecord.load(record_file)
        return record.recipe_fingerprint == fingerprint and record.status != "completed"
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
