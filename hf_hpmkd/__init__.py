"""HPM-KD: several large teachers into one small student, for the Hugging Face ecosystem.

Importing the package registers its two model families with the Auto classes of transformers, so that
`AutoModelForImageClassification.from_pretrained` and `pipeline` open a saved student.
"""

from importlib import import_module
from typing import Any

from hf_hpmkd import models as models  # registers CifarResNet and TabularMLP with the Auto classes

__version__ = "0.1.0"

# Looked up on first use, so that opening a saved student does not import scikit-learn, datasets and the Trainer.
_LAZY = {
    "HPMKDTrainer": "hf_hpmkd.trainer",
    "HPMKDTrainingArguments": "hf_hpmkd.training_args",
    "RunRecord": "hf_hpmkd.run_record",
    "TeacherCache": "hf_hpmkd.teacher_cache",
    "distill": "hf_hpmkd.distill",
    "load_recipe": "hf_hpmkd.recipe",
    "load_teacher": "hf_hpmkd.teachers",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_hpmkd' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
