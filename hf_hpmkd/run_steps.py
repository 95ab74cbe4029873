"""The steps of a run that its own process and its workers share: how its student is built, how its teachers are got."""

import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState

from hf_hpmkd.chain_probes import StudentBuilder
from hf_hpmkd.classifier_training import teacher_schedule
from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.data import DataParts
from hf_hpmkd.recipe import Recipe, TeacherConfig
from hf_hpmkd.recipe_rules import is_sklearn, is_trained_here, teacher_names
from hf_hpmkd.run_context import Run
from hf_hpmkd.teacher_kinds import ColumnTeacher, Teacher, check_teacher
from hf_hpmkd.teacher_training import train_teacher
from hf_hpmkd.teachers import load_teacher

_CHECKED_ROWS = 64
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def student_builder(recipe: Recipe, parts: DataParts) -> StudentBuilder:
    """A function that makes the student with its initial weights (or on the meta device), from the recipe alone."""
    student = recipe.student

    def build(*, meta: bool = False, seed: int | None = None) -> Classifier:
        return build_classifier(
            student.model,
            parts.train,
            seed=recipe.training.seed if seed is None else seed,
            pretrained=student.pretrained,
            revision=student.revision,
            trust_remote_code=student.trust_remote_code,
            meta=meta,
        )

    return build


def get_teachers(run: Run, parts: DataParts) -> list[Teacher]:
    """The recipe's teachers, loaded or trained on the spot (or found in the run's folder), written into the record."""
    named = list(zip(teacher_names(run.recipe), run.recipe.teachers, strict=True))
    # What is loaded can be wrong in many ways, so it comes before what takes minutes to train.
    loaded = {name: load(run, name, one, parts) for name, one in named if not is_trained_here(one.model)}
    teachers = [loaded.get(name) or train(run, name, one, parts) for name, one in named]
    for one, (_, config) in zip(teachers, named, strict=True):
        run.keep_teacher(one, config)
    return teachers


def load(run: Run, name: str, config: TeacherConfig, parts: DataParts) -> Teacher:
    """A teacher from the Hub, timm, a file or a column, checked on a few guide rows."""
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", category=UserWarning, module=r"hf_hpmkd\.")
        teacher = load_teacher(
            config.model,
            parts.train,
            name=name,
            labels=config.labels,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            trusted_types=config.trusted_types,
            device=run.device,
            dtype=_DTYPES.get(config.precision or ""),
        )
    for one in told:
        if one.category is UserWarning and Path(one.filename).parent == Path(__file__).parent:  # ours: for the card too
            run.warn(f"Teacher {name!r}: {one.message}")
        else:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)
    if isinstance(teacher, ColumnTeacher):  # a gap in the test rows is not to be found at the end
        for part in (parts.train, parts.validation, parts.test):
            teacher.require_answers(part)
    few = torch.arange(min(_CHECKED_ROWS, len(parts.guide)))
    check_teacher(teacher, teacher.logits(parts.guide, few).cpu(), parts.guide.labels[few])
    return teacher


def train(run: Run, name: str, config: TeacherConfig, parts: DataParts) -> Teacher:
    """A teacher trained on the spot into `teachers/<name>`, or found there when the run is resumed."""
    schedule = teacher_schedule(run.recipe, config)
    folder = run.folder / "teachers" / name
    with PartialState().main_process_first() if is_sklearn(config.model) else nullcontext():
        teacher, run.training_seconds[name] = train_teacher(config, name, schedule, run.memory, parts, folder)
    return teacher.to(run.device)
