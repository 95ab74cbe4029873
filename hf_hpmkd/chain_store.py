"""Finished stages of chains, kept by content beside the teacher outputs, so that no two runs train the same one."""

import os
import shutil
import tempfile
from pathlib import Path

STAGE_FILE = "stage.json"


class StageStore:
    """A folder with one folder per finished model, named by its content key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def beside(cls, teacher_outputs: Path) -> "StageStore":
        """The store that belongs to a folder of teacher outputs."""
        return cls(teacher_outputs / "models")

    def find_model(self, key: str) -> Path | None:
        """The folder of a finished model; None if there is none."""
        folder = self.root / key
        return folder if (folder / STAGE_FILE).is_file() else None

    def keep_model(self, key: str, folder: Path) -> Path:
        """Copies a finished model in, as a whole or not at all; one that is there stays as it is."""
        target = self.root / key
        if self.find_model(key) is not None:
            return target
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))
        try:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            os.replace(temporary, target)
        except OSError:
            if self.find_model(key) is None:  # else another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target
