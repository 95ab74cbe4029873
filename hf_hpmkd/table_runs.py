"""Short real runs on a table, images or texts: rows and teachers, got once, and students trained by the usual trainer.

For the prior and for judging it. Nothing here opens the test rows unless it is asked to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_hpmkd.chain_stages import Stages, WarmBuild
from hf_hpmkd.classifier_training import Trained, old_garbage_left, student_schedule, teacher_schedule, train_or_load
from hf_hpmkd.components.adaptive_configuration import Configuration
from hf_hpmkd.data import DataParts
from hf_hpmkd.distill import student_builder
from hf_hpmkd.evaluation import evaluate_teachers, teacher_logits
from hf_hpmkd.recipe import Recipe, TeacherConfig, read_recipe
from hf_hpmkd.recipe_configuration import overrides_of, with_values
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import is_sklearn, teacher_names
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_memory import RunMemory
from hf_hpmkd.run_steps import train
from hf_hpmkd.stopped_training import AveragesAt, put_average
from hf_hpmkd.student_features import accuracy_at, features_before
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.tasks.text import TEXT_COLUMNS, usual_pair
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher
from hf_hpmkd.teacher_training import fit_sklearn
from hf_hpmkd.training_folder import remove_training

TEACHERS: tuple[dict[str, Any], ...] = (
    {"model": "mlp-64x64", "epochs": 12, "learning_rate": 0.003, "batch_size": 64},
    {"model": "sklearn:RandomForestClassifier", "params": {"n_estimators": 60, "min_samples_leaf": 2}},
    {"model": "sklearn:HistGradientBoostingClassifier", "params": {"max_iter": 40}},
    {"model": "sklearn:LogisticRegression"},
)
"""Unlike teachers, small enough to be trained for every table anew."""

IMAGE_TEACHERS: tuple[dict[str, Any], ...] = (
    {"model": "cifar-resnet-14x8", "epochs": 8, "learning_rate": 0.01, "batch_size": 64},
    {"model": "cifar-resnet-8x8", "epochs": 6, "learning_rate": 0.01, "batch_size": 64},
    {"model": "sklearn:RandomForestClassifier", "params": {"n_estimators": 60, "min_samples_leaf": 2}},
    {"model": "sklearn:LogisticRegression", "params": {"max_iter": 100}},
)
"""The same for images."""

TEXT_TEACHERS: tuple[dict[str, Any], ...] = (
    {"model": "bert-2x128", "epochs": 8, "learning_rate": 0.0005, "batch_size": 64},
    {"model": "sklearn:LogisticRegression", "params": {"C": 10.0}},
)
"""The same for texts."""


@dataclass
class Taught:
    """A student that was trained. right: which rows of a part it answers right, bool `(rows,)`. averaged: its accuracy
    on validation rows with the mean of its weights until a step, by step.
    """

    trained: Trained
    right: Tensor
    averaged: dict[int, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return float(self.right.float().mean())

    def accuracy_at(self, step: int) -> float:
        """On validation rows, as its training measured it. Raises ValueError where it did not measure then."""
        return accuracy_at(self.trained.curve, step)


class TableRuns:
    """The runs on one table, or set of images or texts. folder: of Parquet files. place: where teachers and their
    outputs are kept meanwhile.

    folds: of the scikit-learn teachers; 0 lets them answer rows that they have learned by heart. warm_start: whether
    students that hear the teachers begin with the weights of one. The sections are the recipe's; data and output are
    filled in.
    """

    def __init__(
        self,
        folder: Path,
        place: Path,
        seed: int,
        *,
        folds: int = 3,
        warm_start: bool = False,
        **sections: dict[str, Any],
    ) -> None:
        self.place, self.kind = place, kind_of(folder)
        chosen = {"image": IMAGE_TEACHERS, "text": TEXT_TEACHERS, "table": TEACHERS}[self.kind]
        model = {"image": "cifar-resnet-8x4", "text": "bert-1x32", "table": "mlp-16"}[self.kind]
        teachers = [{**one, "folds": folds} if one["model"].startswith("sklearn") else one for one in chosen]
        tree: dict[str, Any] = {
            "data": {"path": str(folder), "seed": seed, **sections.pop("data", {})},
            "teachers": teachers,
            "student": {"model": model, **sections.pop("student", {})},
            "chain": {"warm_start": warm_start},
            "memory": {"use": False},
            "output": {"dir": str(place)},
            **sections,
        }
        tree["training"] = {"seed": seed, **tree.get("training", {})}
        self.run = self.make_run(read_recipe(tree, f"the runs on {folder.name}"), place)

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @staticmethod
    def make_run(recipe: Recipe, place: Path) -> Run:
        """A run that says nothing and remembers nothing."""
        place.mkdir(parents=True, exist_ok=True)
        return Run(place, new_record(recipe), RunMemory(recipe, None, is_main=True, say=lambda line: None))

    @cached_property
    def parts(self) -> DataParts:
        return recipe_parts(self.recipe)

    @cached_property
    def teachers(self) -> list[Teacher]:
        """Trained, and asked about the rows that a student needs."""
        named = zip(teacher_names(self.recipe), self.recipe.teachers, strict=True)
        teachers = [self._teacher(name, one) for name, one in named]
        quiet = {"say": self.run.say, "warn": self.run.say}
        evaluate_teachers(self.run.record, teachers, self.parts, self.recipe, self.run.memory.cache, **quiet)
        return teachers

    def _teacher(self, name: str, config: TeacherConfig) -> Teacher:
        """As for any run, but that scikit-learn's are not written to disk and read again, which takes longer than to
        train them.
        """
        if not is_sklearn(config.model):
            teacher = train(self.run, name, config, self.parts)
        else:
            teacher = fit_sklearn(config, name, teacher_schedule(self.recipe, config).seed, self.parts.train)
        self.run.keep_teacher(teacher, config)
        return teacher

    def features(self, recipe: Recipe, heard: Sequence[int], steps: int) -> dict[str, float]:
        """The meta-features before any student is trained. heard: positions of the teachers that a student hears."""
        teachers = [self.teachers[index] for index in heard]
        logits = teacher_logits(teachers, self.parts.guide, recipe, self.run.memory.cache, self.run.say)
        known = [self.run.record.teachers[index].accuracy["train"] for index in heard]
        return features_before(
            self.parts,
            student_builder(recipe, self.parts)(),
            logits,
            teachers,
            sum(known) / len(known),
            steps,
            recipe.training.learning_rate,
            recipe.chain.warm_start and self.can_start(recipe, heard),
        )

    def can_start(self, recipe: Recipe, heard: Sequence[int]) -> bool:
        """Whether a student of a recipe can begin with the weights of one of these teachers."""
        return WarmBuild(student_builder(recipe, self.parts), self._above(heard), self.parts.train).can_start

    def teach(
        self,
        recipe: Recipe,
        configuration: Configuration,
        heard: Sequence[int],
        judged_on: Rows,
        name: str = "student",
        averaged_at: Sequence[int] = (),
    ) -> Taught:
        """A student of a recipe, trained as a configuration says, and which rows it answers right. heard: positions of
        the teachers that it may hear and start from. averaged_at: steps after which the mean of its weights is judged;
        the classifier that comes back then has the last of these means.
        """
        recipe = with_values(recipe, overrides_of(configuration, recipe))
        teachers = [self.teachers[index] for index in heard] if configuration.distils else []
        averages = AveragesAt(averaged_at)
        trained = train_or_load(
            name,
            self.builder(recipe, heard),
            recipe,
            student_schedule(recipe),
            self.place / name,
            self.parts.train,
            self.parts.validation,
            num_views=self.parts.num_views,
            teachers=teachers,
            guide=self.parts.guide if teachers else None,
            resumable=False,
            callbacks=[averages] if averaged_at else [],
        )
        taught = Taught(trained, self.right(trained, judged_on))
        for step, average in averages.found.items():
            put_average(trained.classifier, average, self.parts.train)
            taught.averaged[step] = float(self.right(trained, self.parts.validation).float().mean())
        remove_training(self.place / name)
        return taught

    def builder(self, recipe: Recipe, heard: Sequence[int]) -> WarmBuild:
        """Makes the student of a recipe, with the weights that it begins with. heard: as in `teach`."""
        above = self._above(heard) if recipe.chain.warm_start else []
        return WarmBuild(student_builder(recipe, self.parts), above, self.parts.train)

    def _above(self, heard: Sequence[int]) -> list[TorchTeacher]:
        """What a student may start from."""
        return Stages(self.run, self.parts, [self.teachers[index] for index in heard], self.place).above([])

    def right(self, trained: Trained, rows: Rows) -> Tensor:
        """Which rows a student answers right, bool `(rows,)`: all at once, which is quicker than batch by batch."""
        student = TorchTeacher.of("student", trained.classifier, self.parts.train, device=self.run.device)
        return student.logits(rows, torch.arange(len(rows))).argmax(-1).cpu() == rows.labels


def table_folders(data: Path) -> list[Path]:
    """The folders of tables in a folder: those that hold Parquet files. Raises FileNotFoundError if there is none."""
    found = [folder for folder in sorted(data.iterdir()) if folder.is_dir() and any(folder.glob("*.parquet"))]
    if not found:
        raise FileNotFoundError(f"{data} must hold a folder of Parquet files per table, it holds none.")
    return found


def kind_of(folder: Path) -> Literal["image", "text", "table"]:
    """What a folder's Parquet files hold, told by their columns: `datasets` stores images as structs; a column with one
    of the usual names of a text, or a usual pair, makes texts.
    """
    schema = pq.read_schema(next(folder.glob("*.parquet")))
    if any(pa.types.is_struct(column.type) for column in schema):
        return "image"
    strings = [one.name for one in schema if pa.types.is_string(one.type) or pa.types.is_large_string(one.type)]
    return "text" if set(TEXT_COLUMNS) & set(schema.names) or usual_pair(strings) else "table"


def num_rows(folder: Path, split: str = "train") -> int:
    """Rows of a split of a table's folder."""
    return sum(pq.read_metadata(file).num_rows for file in folder.glob(f"{split}*.parquet"))


@contextmanager
def spare_time() -> Iterator[None]:
    """For the training of many small students: one thread, and `old_garbage_left`; both as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with old_garbage_left():
            yield
    finally:
        torch.set_num_threads(threads)
