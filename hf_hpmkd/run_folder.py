"""The output folder of a run: who may use it, and whether it is new, interrupted or finished."""

import os
import shutil
from pathlib import Path

from hf_hpmkd.run_record import RECORD_FILE, RunRecord


class RunFolderError(ValueError):
    """The output folder cannot be used for this run."""


def claim(folder: Path, fingerprint: str, overwrite: bool = False) -> RunRecord | None:
    """Makes `folder` this run's own, before any work starts.

    Returns the record of an interrupted or finished run of the same recipe, or None where the run starts anew.
    overwrite: what lies in the folder, if it is a run, is removed first. Raises RunFolderError if the folder holds
    another run, something that is no run, or cannot be written.
    """
    record_file = folder / RECORD_FILE
    if record_file.is_file() and overwrite:
        shutil.rmtree(folder)
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
    if not record_file.is_file():
        found = sorted(path.name for path in folder.iterdir())
        if found:
            raise RunFolderError(
                f"The output folder must be empty or hold a run of this recipe, {folder} holds {', '.join(found[:5])}. "
                "Choose another with `output.dir=FOLDER`."
            )
        return None
    record = RunRecord.load(record_file)
    if record.recipe_fingerprint != fingerprint:
        if {path.name for path in folder.iterdir()} <= {RECORD_FILE, "recipe.yaml"}:
            return None  # it failed before it made anything: the recipe was mended
        raise RunFolderError(
            f"The output folder {folder} holds a run of another recipe (or of this one with other values; status "
            f"{record.status}). Choose another with `output.dir=FOLDER`, or replace it with `output.overwrite=true`."
        )
    return record
