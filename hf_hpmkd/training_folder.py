"""The folder of one training: its checkpoints, the finished classifier, and how both are moved, copied and removed."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from hf_hpmkd.trainer import STATE_FILE


def clear_checkpoints(folder: Path) -> None:
    """Removes those of a finished training; what report_to wrote among them stays, beside the folder."""
    if (trackers := folder / "checkpoints" / "runs").is_dir():
        shutil.copytree(trackers, folder.with_name(f"{folder.name}.runs"), dirs_exist_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def done_file(folder: Path) -> Path:
    """Says that `folder` holds a finished classifier, and how it went; beside it, because it holds the model alone."""
    return folder.with_name(f"{folder.name}.trained.json")


def move_training(source: Path, target: Path) -> None:
    """Moves a training, finished or not, to another folder, where it goes on as if it had begun there. Called again, it
    does what was left when it was stopped.
    """
    if source.exists():
        shutil.move(source, target)
    for file in target.glob("checkpoints/*/trainer_state.json"):
        state = json.loads(file.read_text(encoding="utf-8"))
        if best := state["best_model_checkpoint"]:
            state["best_model_checkpoint"] = str(target / "checkpoints" / Path(best).name)
            write_json(file, state)
    if done_file(source).is_file():
        done_file(source).replace(done_file(target))


def copy_training(source: Path, target: Path) -> None:
    """Puts a copy of a finished training into a folder where there is none yet."""
    if not done_file(target).is_file():
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.copy2(done_file(source), done_file(target))


def give_way(student: Path, other: Path, aside: Path) -> None:
    """Puts a copy of a finished training in the place of another, which is kept aside. Stopped anywhere, it can be done
    again.
    """
    copy_training(student, aside)
    remove_training(student)
    copy_training(other, student)


def remove_training(folder: Path) -> None:
    """Removes a training; stopped anywhere, it does not pass for a finished one."""
    done_file(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def step_of(checkpoint: str) -> int:
    """The step at which a checkpoint was written."""
    return int(Path(checkpoint).name.rsplit("-", 1)[1])


def last_complete_checkpoint(folder: Path, distills: bool) -> str | None:
    """The newest checkpoint that was written to its end; a kill while writing leaves one that was not."""
    while folder.is_dir():
        last = get_last_checkpoint(str(folder))
        if last is None:
            return None
        # `trainer_state.json` is the last file that a checkpoint gets.
        if (Path(last) / "trainer_state.json").is_file() and (not distills or (Path(last) / STATE_FILE).is_file()):
            return last
        with suppress(FileNotFoundError):  # another process is at it too
            shutil.rmtree(last)
    return None


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
