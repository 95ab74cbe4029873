"""`hpmkd prior build`: short real runs over tables, images or texts, a row each, for the adaptive configuration.

Per data set and seed the teachers are trained once; per setting (student, teachers, learning rate, steps, start) one
student directly and some in other ways, on the same rows in the same order. First each data set gets one setting as a
line without a recipe has it, in which every contender is run; then come settings and ways that are drawn at random.
Students that hear teachers mostly begin with the weights of one where they can, as in any run. A row holds what the
adaptive configuration would have known, what was done and what it gained on validation rows, in the end and, with the
mean of the weights, on the way. The test rows are never opened. The same command goes on where an interrupted one
stood.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd.components.adaptive_configuration import CONTENDERS, DIRECT, EARLY, SPACE, Configuration, Example
from hf_hpmkd.components.progressive_chain import estimate_gain
from hf_hpmkd.configuration_examples import SCHEMA, prior_row, write_prior
from hf_hpmkd.meta_features import LANDMARK, landmark_features
from hf_hpmkd.recipe import MIN_STEPS, Recipe, read_recipe, recipe_tree
from hf_hpmkd.recipe_rules import usual_learning_rate
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.run_record import write_whole
from hf_hpmkd.student_features import landmark_loss
from hf_hpmkd.table_runs import TableRuns, kind_of, num_rows, spare_time, table_folders
from hf_hpmkd.vocabulary import LEGAL_SCHEDULES

STUDENTS = {
    "table": ("mlp-4", "mlp-8", "mlp-16", "mlp-32", "mlp-64", "mlp-16x16"),
    "image": ("cifar-resnet-8x2", "cifar-resnet-8x4", "cifar-resnet-8x8", "cifar-resnet-14x4"),
    "text": ("bert-1x16", "bert-1x32", "bert-1x64", "bert-2x32"),
}
SETTINGS_PER_TABLE = 5  # training teachers takes as long as one
RUNS_PER_SETTING = 6

_ROWS = (300, 1_000, 3_000, 6_000)  # the most training rows that a table keeps
_STEPS = (160, 320, 1_000)
_LEARNING_RATES = {"table": (0.003, 0.01, 0.03), "image": (0.001, 0.003, 0.01), "text": (0.0005, 0.001, 0.002)}
_CONTENDER_ROWS = {"table": 4_000, "image": 12_500, "text": 12_500}  # the most that a data set keeps for them
_WARM_SHARE = 0.8  # of the settings; in the others students begin from nothing
_VERSION = 2  # of how the runs are made; leads of the mean of the weights, contenders as long as a line: 2
_BATCH = 64
_EVALUATIONS = 8  # so that the landmark and its half fall on one
_DRAWS: dict[str, tuple[tuple[Any, ...], tuple[float, ...] | None]] = {
    "alpha": (SPACE["alpha"][1:], None),
    "temperature": (SPACE["temperature"], None),
    "temperature_schedule": (("constant", "cosine", "learned"), (0.8, 0.1, 0.1)),
    "kd_kind": (SPACE["kd_kind"], (0.61, 0.13, 0.13, 0.13)),
    "gate": (SPACE["gate"], (0.4, 0.3, 0.3)),
    "learning_rate": (SPACE["learning_rate"], (0.15, 0.35, 0.25, 0.25)),
    "weight_decay": (SPACE["weight_decay"], (0.15, 0.7, 0.15)),
}
_DIRECT_SHARE = 0.25


@spare_time()
def build_prior(
    data: Path, runs: int, output: Path, tables: list[str] | None = None, say: Callable[[str], None] = print
) -> int:
    """Runs until the prior has so many rows, and writes it; returns how many it has.

    data: folder with a folder of Parquet files per table or set of images. tables: names of those to use; None takes
    all. output: the Parquet file; beside it, with the suffix .jsonl, lie the rows one by one as they come.
    Raises ValueError for unknown tables, fewer than one run, and rows of another version in that file.
    """
    folders = table_folders(data)
    if unknown := set(tables or []) - {folder.name for folder in folders}:
        raise ValueError(f"There is no table {', '.join(sorted(unknown))} in {data}.")
    if runs < 1:
        raise ValueError(f"--runs must be at least 1, got {runs}.")
    folders = [folder for folder in folders if tables is None or folder.name in tables]
    PartialState(cpu=True)
    disable_progress_bar()
    log = output.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if rows and (rows[0].get("version") != _VERSION or set(_without_marks(rows[0])) != set(SCHEMA.names)):
        raise ValueError(
            f"{log} must hold rows of this version, it holds those of another, which tell other things. Choose another "
            "--output, or remove it."
        )
    known = {_part(row) for row in rows if row.get("last")}
    rows = [row for row in rows if _part(row) in known]  # half done: anew
    if rows:  # a stop between the two files leaves the prior behind
        write_prior([_without_marks(row) for row in rows], _provenance(rows), output)
    for seed in itertools.count(-1):
        for folder in folders:
            if len(rows) >= runs:
                return len(rows)
            if (folder.name, max(seed, 0), seed < 0) in known:
                continue
            started = time.perf_counter()
            new = list(_contenders_on_table(folder) if seed < 0 else _rows_of_table(folder, seed))
            rows += [{**row, "contender": seed < 0, "last": row is new[-1], "version": _VERSION} for row in new]
            write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
            write_prior([_without_marks(row) for row in rows], _provenance(rows), output)
            gains = np.array([row["gain"] for row in new])
            what = "contenders" if seed < 0 else f"seed {seed}"
            say(
                f"{folder.name}, {what}: {len(new)} runs, gain {gains.mean():+.2f}, best {gains.max():+.2f} "
                f"points, {time.perf_counter() - started:.0f} s; {len(rows)} of {runs}"
            )
    raise AssertionError("the seeds never end")


def _part(row: dict[str, Any]) -> tuple[str, int, bool]:
    """What a row was run together with: data set, seed, and whether the contenders ran or what was drawn."""
    return row["data"], row["seed"], bool(row.get("contender"))


def _without_marks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("contender", "last", "version")}


def _provenance(rows: list[dict[str, Any]]) -> dict[str, Any]:
    versions, hardware = environment()
    of_setting = ("data", "seed", "student", "taught_by", "steps", "base_learning_rate", "feature_warm_start")
    settings = {(*(row[name] for name in of_setting), bool(row.get("contender"))) for row in rows}
    return {
        "command": "hpmkd prior build",
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": code_commit(),
        "runs": len(rows),
        "direct_runs_beside": len(settings),
        "data": sorted({row["data"] for row in rows}),
        "teachers": sorted({one for row in rows for one in row["taught_by"].split(", ")}),
        "judged_on": "validation rows drawn from the training split; the test split is never opened",
        "versions": versions,
        "hardware": hardware,
    }


def _contenders_on_table(folder: Path) -> Iterator[dict[str, Any]]:
    """One setting of a table, as a line without a recipe has it, and every contender in it."""
    most_rows = _CONTENDER_ROWS[kind_of(folder)]
    with tempfile.TemporaryDirectory() as place:
        runs = TableRuns(folder, Path(place), 0, data={"max_train_rows": most_rows, **_held_out(folder)})
        rate, heard = usual_learning_rate(runs.recipe.student.model), list(range(len(runs.recipe.teachers)))
        recipe = _recipe_of_setting(runs, runs.recipe.student.model, MIN_STEPS, rate, warm=True)
        ways = [one for one in CONTENDERS if not one.warm_start or runs.can_start(recipe, heard)]
        yield from _rows_of_setting(runs, recipe, heard, ways)


def _rows_of_table(folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Settings and ways drawn at random, on one table and seed."""
    random = np.random.default_rng([seed, *folder.name.encode()])
    with tempfile.TemporaryDirectory() as place:
        data = {"max_train_rows": int(random.choice(_ROWS)), **_held_out(folder)}
        runs = TableRuns(folder, Path(place), seed, folds=int(random.choice([0, 3])), data=data)
        for _ in range(SETTINGS_PER_TABLE):
            yield from _rows_of_drawn_setting(runs, random)


def _held_out(folder: Path) -> dict[str, int]:
    """Rows that weigh the teachers, and rows that judge."""
    guide, validation = (min(most, num_rows(folder) // share) for most, share in ((500, 10), (2_000, 4)))
    return {"guide_size": guide, "validation_size": validation}


def _rows_of_drawn_setting(runs: TableRuns, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """One setting drawn at random, and some ways to compare with direct training in it."""
    steps, rate = int(random.choice(_STEPS)), float(random.choice(_LEARNING_RATES[runs.kind]))
    teachers = len(runs.recipe.teachers)
    heard = sorted(random.choice(teachers, size=random.integers(1, teachers + 1), replace=False).tolist())
    student = str(random.choice(STUDENTS[runs.kind]))
    warm = bool(random.random() < _WARM_SHARE)
    recipe = _recipe_of_setting(runs, student, steps, rate, warm)
    can_start = runs.can_start(recipe, heard)
    yield from _rows_of_setting(runs, recipe, heard, [draw(random, can_start) for _ in range(RUNS_PER_SETTING)])


def _recipe_of_setting(runs: TableRuns, student: str, steps: int, rate: float, warm: bool) -> Recipe:
    tree = recipe_tree(runs.recipe)
    tree["student"]["model"] = student
    tree["training"] |= {
        "max_steps": steps,
        "batch_size": _BATCH,
        "learning_rate": rate,
        "evaluations": _EVALUATIONS,
        "log_every": max(1, steps // 32),
        "save_total_limit": 1,
    }
    tree["chain"]["warm_start"] = warm
    return read_recipe(tree, "a run of the prior")


def _rows_of_setting(
    runs: TableRuns, recipe: Recipe, heard: Sequence[int], ways: Sequence[Configuration]
) -> Iterator[dict[str, Any]]:
    """A row per way. heard: positions of the teachers."""
    validation, steps = runs.parts.validation, recipe.training.max_steps
    early_steps = [round(share * steps) for share in EARLY]
    direct = runs.teach(recipe, DIRECT, heard, validation, averaged_at=early_steps)
    features = runs.features(recipe, heard, steps)
    landmark = round(LANDMARK * steps)
    accuracies = [direct.accuracy_at(landmark // 2), direct.accuracy_at(landmark)]
    loss = landmark_loss(direct.trained.curve, landmark)
    features |= landmark_features(accuracies, loss, len(runs.parts.class_names), features["mixture_accuracy"])
    about = {
        "student": recipe.student.model,
        "taught_by": ", ".join(recipe.teachers[index].model for index in heard),
        "seed": recipe.data.seed,
        "steps": steps,
        "judged_rows": len(validation),
        "base_learning_rate": recipe.training.learning_rate,
        "direct_accuracy": direct.accuracy,
    }
    for way in ways:
        taught = runs.teach(recipe, way, heard, validation, averaged_at=early_steps)
        gain = estimate_gain(taught.right[None], direct.right[None])
        early = tuple(100 * (taught.averaged[step] - direct.averaged[step]) for step in early_steps)
        noise = max(gain.standard_error, 100 / len(validation))
        example = Example(features, way, gain.gain, noise, early, data=Path(recipe.data.path or "").name)
        yield prior_row(example, {**about, "accuracy": taught.accuracy})


def draw(random: np.random.Generator, can_start: bool = True) -> Configuration:
    """A configuration at random, more often one of the usual kinds, now and then direct training at other rates, or,
    where a student can start so, from a teacher's weights.
    """
    while True:
        drawn: dict[str, Any] = {}
        for name, (values, shares) in _DRAWS.items():
            drawn[name] = values[int(random.choice(len(values), p=shares))]
        if random.random() < _DIRECT_SHARE:
            rates = {name: drawn[name] for name in ("learning_rate", "weight_decay")}
            one = Configuration(**rates, warm_start=can_start and bool(random.random() < 0.5))
            if one != DIRECT:
                return one
        elif drawn["temperature_schedule"] in LEGAL_SCHEDULES[drawn["kd_kind"]]:
            if drawn["temperature_schedule"] != "constant":
                drawn["temperature"] = DIRECT.temperature
            return Configuration(**drawn)
