"""HPM-KD: several large teachers into one small student, for the Hugging Face ecosystem.

Importing the package registers its two model families with the Auto classes of transformers, so that
`AutoModelForImageClassification.from_pretrained` and `pipeline` open a saved student.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _started_as_command() -> bool:
    """Whether this process is `hpmkd ...`, `python -m hf_hpmkd ...` or a worker of `engines`."""
    modules = {__name__, "loky.backend.popen_loky_posix"}
    return Path(sys.argv[0]).name == "hpmkd" or ("-m" in sys.orig_argv and bool(modules & set(sys.orig_argv)))


# These register the families once they need models; `hpmkd --help` should not wait for torch.
if not _started_as_command():
    import_module("hf_hpmkd.models")

# Looked up on first use, so that opening a saved student does not import scikit-learn, datasets and the Trainer.
_LAZY = {
    "HPMKDTrainer": "hf_hpmkd.trainer",
    "HPMKDTrainingArguments": "hf_hpmkd.training_args",
    "RunRecord": "hf_hpmkd.run_record",
    "TeacherCache": "hf_hpmkd.teacher_cache",
    "load_recipe": "hf_hpmkd.recipe",
    "load_teacher": "hf_hpmkd.teachers",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_hpmkd' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
