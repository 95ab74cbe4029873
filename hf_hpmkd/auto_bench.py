"""`hpmkd bench auto`: is the adaptive configuration worth it? Judged on the test rows of tables, images or texts,
leave-one-dataset-out.

Per table and seed, the same teachers, rows and steps for all: direct training, the same at twice the learning rate, the
usual fixed setting and the adaptive configuration, whose prior has not seen the table; with the first seeds also every
cell of a grid, and random search over it. What hears the teachers begins with the weights of one where it can, as in
any run. A table with a small test part is split anew for each seed. Each pair of table and seed is one JSON file, so
the same command goes on where an interrupted one stood.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd.auto_bench_report import gains_plot, summary
from hf_hpmkd.classifier_training import Trained, student_schedule, train_or_load
from hf_hpmkd.components.adaptive_configuration import DIRECT, FASTER, SPACE, Configuration
from hf_hpmkd.configuration_examples import SCHEMA, prior_row, read_prior, shipped_prior, write_prior
from hf_hpmkd.distill import student_builder
from hf_hpmkd.expected_gain import by_setting
from hf_hpmkd.gantt import plain_names
from hf_hpmkd.kept_student import judge_students
from hf_hpmkd.quick_validation import configure, is_direct, proof_needed
from hf_hpmkd.recipe import MIN_STEPS, Recipe, read_recipe, recipe_tree
from hf_hpmkd.recipe_rules import uses_teachers
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.table_runs import TableRuns, kind_of, num_rows, spare_time, table_folders
from hf_hpmkd.training_folder import write_json

FIXED = Configuration(alpha=0.9, temperature=4.0)
GRID = tuple(
    Configuration(alpha=alpha, temperature=temperature, learning_rate=rate)
    for rate in (1.0, 2.0, 4.0)
    for alpha, temperature in ((0.0, 4.0), *((a, t) for a in (0.5, 0.9) for t in (1.0, 2.0, 4.0, 8.0)))
)
"""Direct training, alpha and T, at the recipe's learning rate, twice and four times that."""

_SHORT = {(0.0, 4.0), (0.5, 1.0), (0.5, 4.0), (0.9, 4.0)}
SHORT_GRID = tuple(one for one in GRID if (one.alpha, one.temperature) in _SHORT)
"""Of these twelve, for images and texts, whose trainings take longer."""

FEW_TEST_ROWS = 200
"""A table with fewer is split anew for each seed, or one lucky row would be half a point, seed after seed."""


@dataclass(frozen=True)
class _Training:
    """How long and on how many rows the students of a kind of data are trained, at the learning rate that a recipe has
    where it names none. Parts: rows or shares.
    """

    most_rows: int
    epochs: int
    guide: float
    validation: float
    grid: tuple[Configuration, ...]


_TRAININGS = {
    "table": _Training(4_000, 15, 0.1, 0.2, GRID),
    "image": _Training(12_500, 4, 1_000, 2_500, SHORT_GRID),
    "text": _Training(12_500, 15, 0.1, 0.2, SHORT_GRID),
}


@dataclass(frozen=True)
class Settings:
    """data: folder with a folder of Parquet files per table. tables: None takes all. grid_seeds: seeds that the grid is
    trained with too. mode: that of `auto`. most_rows: training rows that a table keeps. student, most_rows, epochs:
    None takes what suits the kind of data. records: numbers of prior runs that the adaptive configuration may know;
    None is all.
    """

    data: Path
    folder: Path
    tables: Sequence[str] | None = None
    seeds: int = 3
    grid_seeds: int = 3
    mode: str | float = "fast"
    prior: Path | None = None
    student: str | None = None
    most_rows: int | None = None
    epochs: int | None = None
    records: Sequence[int | None] = (None,)

    @property
    def min_steps(self) -> int:
        """As in a line without a recipe: so many steps at least, unless it is said how long."""
        return 0 if self.epochs else MIN_STEPS

    def told(self) -> dict[str, Any]:
        """What all runs of a folder must have in common."""
        common = {"mode": self.mode, "student": self.student, "most_rows": self.most_rows, "epochs": self.epochs}
        common["min_steps"] = self.min_steps
        return common | {"prior": hashlib.sha256((self.prior or shipped_prior()).read_bytes()).hexdigest()[:12]}


@spare_time()
def bench_auto(settings: Settings, say: Callable[[str], None] = print) -> str:
    """Trains what is not trained yet and writes `table.md`, `bench.json` and `gains.png`; returns the table.

    Raises ValueError for unknown tables and for a folder with runs of other settings, and FileNotFoundError for one
    without tables.
    """
    folders = table_folders(settings.data)
    chosen = [folder for folder in folders if settings.tables is None or folder.name in settings.tables]
    if unknown := set(settings.tables or []) - {folder.name for folder in folders}:
        raise ValueError(f"There is no table {', '.join(sorted(unknown))} in {settings.data}.")
    PartialState(cpu=True)
    disable_progress_bar()
    settings.folder.mkdir(parents=True, exist_ok=True)
    asked = settings.told()
    for file in settings.folder.glob("*-[0-9]*.json"):
        if (judged := json.loads(file.read_text()).get("settings")) != asked:
            raise ValueError(
                f"{file} was judged with {judged or 'an earlier version'}, not with {asked}, and a table must be of "
                "like runs. Choose another folder with --output, or the settings of before."
            )
    for seed in range(settings.seeds):
        for folder in chosen:
            file = settings.folder / f"{folder.name}-{seed}.json"
            if not file.is_file():
                started = time.perf_counter()
                found = _judge(settings, folder, seed)
                write_json(file, found)
                say(f"{folder.name}, seed {seed}: {_told(found)} ({time.perf_counter() - started:.0f} s)")
    results = [json.loads(file.read_text()) for file in sorted(settings.folder.glob("*-[0-9]*.json"))]
    text = summary(results)
    versions, hardware = environment()
    about = {"commit": code_commit(), "versions": versions, "hardware": hardware}
    shown = {name: str(value) for name, value in asdict(settings).items() if name not in ("data", "folder", "prior")}
    write_json(settings.folder / "bench.json", {**about, "settings": shown, "results": results})
    (settings.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    with plain_names():
        gains_plot(results).savefig(settings.folder / "gains.png", dpi=120, metadata={"Software": None})
    return text


def _told(found: dict[str, Any]) -> str:
    accuracies = ", ".join(f"{name} {one['accuracy']:.2%}" for name, one in found["methods"].items())
    return f"{accuracies}; auto chose {found['methods']['auto']['chosen']}"


# ---- one table, one seed ---------------------------------------------------------------------------------------------


def _judge(settings: Settings, folder: Path, seed: int) -> dict[str, Any]:
    how = _TRAININGS[kind_of(folder)]
    data: dict[str, Any] = {"max_train_rows": settings.most_rows or how.most_rows, "views": 2}
    data |= {"guide_size": how.guide, "validation_size": how.validation}
    training = {"epochs": settings.epochs or how.epochs, "min_steps": settings.min_steps, "batch_size": 64}
    with tempfile.TemporaryDirectory() as place:
        student = {"model": settings.student} if settings.student else {}
        rows = folder
        if (test_rows := num_rows(folder, "test")) < FEW_TEST_ROWS:
            rows = _joined(folder, Path(place) / "rows")
            data |= {"test_size": test_rows} if test_rows else {}  # without a test split, a recipe's usual share
        runs = TableRuns(rows, Path(place), seed, warm_start=True, data=data, training=training, student=student)
        test = runs.parts.test
        methods: dict[str, dict[str, Any]] = {}
        direct: Trained | None = None

        def taught(configuration: Configuration) -> dict[str, Any]:
            nonlocal direct
            started = time.perf_counter()
            one = runs.teach(runs.recipe, configuration, range(len(runs.teachers)), test)
            seconds = time.perf_counter() - started
            if configuration == DIRECT:
                direct = one.trained
            last = [row["eval_accuracy"] for row in one.trained.curve if "eval_accuracy" in row][-1]
            return {"accuracy": one.accuracy, "validation": last, "seconds": seconds, "chosen": str(configuration)}

        known = {one: taught(one) for one in (DIRECT, FASTER, FIXED)}
        methods |= {"direct": known[DIRECT], "faster": known[FASTER], "fixed": known[FIXED]}
        grid = [known.get(cell) or taught(cell) for cell in how.grid] if seed < settings.grid_seeds else []
        for count in settings.records:
            prior = Path(place) / "prior.parquet"
            _write_left_out(settings.prior, folder.name, count, seed, prior)
            name = "auto" if count is None else f"auto-{count}"
            assert direct is not None
            methods[name] = _auto(settings, runs, prior, methods["direct"], direct)
        return {
            "data": folder.name,
            "seed": seed,
            "commit": code_commit(),
            "settings": settings.told(),
            "test_rows": len(test),
            "validation_rows": len(runs.parts.validation),
            "train_rows": len(runs.parts.train),
            "methods": methods,
            "grid": grid,
        }


def _joined(folder: Path, target: Path) -> Path:
    """A folder with the rows of all splits as one, from which each seed draws its own test rows."""
    target.mkdir()
    whole = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    pq.write_table(whole, target / "train.parquet")
    return target


def _write_left_out(source: Path | None, table: str, count: int | None, seed: int, target: Path) -> None:
    """The prior without a table, and of the rest so many rows, in whole settings drawn at random (the last one cut)."""
    examples = read_prior(source, leave_out=[table])
    if count is not None:
        drawn = by_setting(examples)
        order = np.random.default_rng(seed).permutation(len(drawn))
        examples = [one for index in order for one in drawn[index]][:count]
    empty = {name: None for name in SCHEMA.names}
    write_prior([prior_row(one, empty) for one in examples], {"left_out": table}, target)


def _auto(settings: Settings, runs: TableRuns, prior: Path, direct: dict[str, Any], plain: Trained) -> dict[str, Any]:
    """The adaptive configuration as `distill` runs it, and what it cost beside one training. direct, plain: the
    figures of direct training, and its student, which is kept where the other does not prove better. unproven: test
    accuracy of the other, kept or not.
    """
    tree = recipe_tree(runs.recipe)
    tree["auto"] = {"mode": settings.mode, "prior": str(prior), "choose": list(SPACE)}
    with tempfile.TemporaryDirectory() as place:
        run = TableRuns.make_run(read_recipe(tree, "the adaptive run"), Path(place))
        run.record.teachers = runs.run.record.teachers
        build = student_builder(run.recipe, runs.parts)  # the tries find their start themselves
        student = Path(place) / "student"
        chosen: Recipe = configure(run, runs.parts, runs.teachers, build, student, Path(place) / "direct")
        auto = run.record.auto
        assert auto is not None
        about = {
            "chosen": str(Configuration(**auto.configuration)),
            "distils": bool(auto.configuration["alpha"]),
            "reason": auto.reason,
            "trials": [asdict(one) for one in auto.trials],
            "trial_seconds": auto.seconds,
            "deciding_seconds": auto.deciding_seconds,
            "seeds": auto.seeds,
            "extra_steps": auto.extra_steps,
            "total_steps": auto.total_steps,
        }
        if is_direct(run.recipe, chosen):
            return {**direct, **about}
        teachers = runs.teachers if uses_teachers(chosen) else []
        trained = train_or_load(
            "student",
            runs.builder(chosen, range(len(runs.teachers))),
            chosen,
            student_schedule(chosen),
            student,
            runs.parts.train,
            runs.parts.validation,
            num_views=runs.parts.num_views,
            teachers=teachers,
            guide=runs.parts.guide if teachers else None,
        )
        size, needed = run.recipe.training.eval_batch_size, proof_needed(run.recipe, auto)
        proof = judge_students(plain.classifier, trained.classifier, runs.parts, size, needed)
        unproven = float(runs.right(trained, runs.parts.test).float().mean())
        about |= {"lead": proof.gain, "lead_error": proof.standard_error, "lead_needed": proof.needed}
        about |= {"kept": proof.kept, "unproven": unproven}
        return {**direct, **about} if proof.kept == "direct" else {"accuracy": unproven, **about}
