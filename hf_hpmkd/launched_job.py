"""A process's share of one job of a run, as `accelerate launch` starts it: `-m hf_hpmkd.launched_job FILE`.

The file (JSON) has the jobs, the name of the one that is meant, where its value goes, and who waits for it.
"""

import json
import sys
from pathlib import Path

import psutil
from accelerate import PartialState

from hf_hpmkd.engines import end_when
from hf_hpmkd.run_ahead import RunJobs
from hf_hpmkd.training_folder import write_json


def main(file: Path) -> None:
    """Does the job with the other processes; the first one writes its value."""
    about = json.loads(file.read_text(encoding="utf-8"))
    end_when(lambda: not _lives(about["parent"]))
    jobs = about["jobs"]
    value = RunJobs(**{**jobs, "launched": tuple(jobs["launched"])}).here(about["name"])
    if PartialState().is_main_process:
        write_json(Path(about["answer"]), value)


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1]))
