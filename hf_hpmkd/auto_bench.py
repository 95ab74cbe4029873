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
import math
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
from matplotlib.figure import Figure
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd.classifier_training import Trained, student_schedule, train_or_load, write_json
from hf_hpmkd.components.adaptive_configuration import DIRECT, FASTER, SPACE, WARM_WORDS, Configuration
from hf_hpmkd.configuration_examples import SCHEMA, prior_row, read_prior, shipped_prior, write_prior
from hf_hpmkd.distill import student_builder
from hf_hpmkd.expected_gain import by_setting
from hf_hpmkd.kept_student import judge_students
from hf_hpmkd.paired_tests import Mean, mean_of
from hf_hpmkd.quick_validation import configure, is_direct, proof_needed
from hf_hpmkd.recipe import MIN_STEPS, Recipe, read_recipe, recipe_tree
from hf_hpmkd.recipe_rules import uses_teachers
from hf_hpmkd.report import markdown
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.table_runs import TableRuns, kind_of, num_rows, spare_time, table_folders

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


ENOUGH_ROWS = 1_000
"""Training rows from which on sets are summed up apart too: with fewer, gains vary more."""

_OTHERS = ("faster", "fixed")
"""Methods beside direct training and auto."""


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
    trained with too. most_rows: training rows that a table keeps. student, most_rows, epochs: None takes what suits the
    kind of data. records: numbers of prior runs that the adaptive configuration may know; None is all.
    """

    data: Path
    folder: Path
    tables: Sequence[str] | None = None
    seeds: int = 3
    grid_seeds: int = 3
    mode: str = "fast"
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
    _plot(results).savefig(settings.folder / "gains.png", dpi=120, metadata={"Software": None})
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
            rows, data["test_size"] = _joined(folder, Path(place) / "rows"), test_rows
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
        size, needed = run.recipe.training.eval_batch_size, proof_needed(run.recipe)
        proof = judge_students(plain.classifier, trained.classifier, runs.parts, size, needed)
        unproven = float(runs.right(trained, runs.parts.test).float().mean())
        about |= {"lead": proof.gain, "lead_error": proof.standard_error, "lead_needed": proof.needed}
        about |= {"kept": proof.kept, "unproven": unproven}
        return {**direct, **about} if proof.kept == "direct" else {"accuracy": unproven, **about}


# ---- the table -------------------------------------------------------------------------------------------------------


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Tables as Markdown: per data set, and over all of them."""
    lines: list[list[str]] = []
    sets = _by_set(results)
    methods = _everywhere([found for of_set in sets if (found := _regrets(of_set))])
    for of_set in sets:
        found = _regrets(of_set)
        gain = mean_of([100 * _gain(one, "auto") for one in of_set])
        others = (np.mean([100 * _gain(one, name) for one in of_set]) for name in _OTHERS)
        lines.append(
            [
                of_set[0]["data"],
                str(len(of_set)),
                f"{100 * np.mean([one['methods']['direct']['accuracy'] for one in of_set]):.2f}",
                *(f"{other:+.2f}" for other in others),
                f"{gain.mean:+.2f}{_interval(gain)}",
                f"{sum(map(_distils, of_set))} of {len(of_set)}",
                *(f"{found[method]:.2f}" if found else "" for method in methods),
            ]
        )
    header = ["data", "seeds", "direct, %", *(f"{name}, points" for name in (*_OTHERS, "auto")), "distilled"]
    table = markdown([*header, *(f"regret {method}" for method in methods)], lines, left=1)
    return f"{table}\n\n{totals(results)}"


def totals(results: Sequence[dict[str, Any]]) -> str:
    """What holds over all data sets, each counting as much as any other, as Markdown paragraphs."""
    sets = _by_set(results)
    parts = [f"{len(sets)} data sets, {len(results)} runs. Gains and regrets are points of test accuracy."]
    parts += [f"Mean gain of {told} over direct training." for told in _mean_gains(sets)]
    large = [of_set for of_set in sets if of_set[0]["train_rows"] >= ENOUGH_ROWS]
    if 0 < len(large) < len(sets):
        parts.append(
            f"On the {len(large)} sets with {ENOUGH_ROWS:,} training rows and more: {', '.join(_mean_gains(large))}."
        )
    parts.append(_what_was_chosen(results))
    if all("unproven" in auto for one in results if (auto := one["methods"]["auto"]).get("kept") == "direct"):
        parts.append(_cost_of_proof(sets))
    parts.append(_never_worse(sets))
    with_grid = [of_set for of_set in sets if _regrets(of_set)]
    if with_grid:
        regrets = [_regrets(of_set) for of_set in with_grid]
        told = ", ".join(f"{method} {np.mean([one[method] for one in regrets]):.2f}" for method in _everywhere(regrets))
        count = sum(bool(one["grid"]) for one in results)
        parts.append(f"Mean regret against the best cell of the grid on test rows ({count} runs): {told}.")
    seconds = [one["methods"]["auto"]["trial_seconds"] for one in results]
    deciding = [one["methods"]["auto"]["deciding_seconds"] for one in results]
    most = f"median {np.median(deciding):.1f} s (at most {max(deciding):.1f})"
    parts.append(f"Tries took {np.mean(seconds):.1f} s a run, deciding {most}.")
    if len(grown := _growth(sets)) > 1:
        header = ("runs of the prior", "data sets", "gain, points", "regret, points", "tries, s")
        parts.append(markdown(header, grown, left=0))
    return "\n\n".join(parts)


def _mean_gains(sets: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Of each method its name and mean gain, with the interval over the sets."""
    told = []
    for method in (*_OTHERS, "auto"):
        gain = mean_of([float(np.mean([100 * _gain(one, method) for one in of_set])) for of_set in sets])
        told.append(f"{method} {gain.mean:+.2f}{_interval(gain)}")
    return told


def _what_was_chosen(results: Sequence[dict[str, Any]]) -> str:
    distilled = [_gain(one, "auto") for one in results if _distils(one)]
    autos = [one["methods"]["auto"] for one in results]
    plain = sum(auto["chosen"] == str(DIRECT) for auto in autos)
    back = sum(auto.get("kept") == "direct" for auto in autos)
    kept = [auto["chosen"] for auto in autos if auto.get("kept") != "direct" and auto["chosen"] != str(DIRECT)]
    warm = sum(WARM_WORDS in one for one in kept)
    told = f"Of {len(results)} runs {len(distilled)} kept a distilled student"
    told += f", and gained {100 * np.mean(distilled):+.2f} there" if distilled else ""
    told += f"; {len(kept) - len(distilled)} kept direct training of another kind" if len(kept) > len(distilled) else ""
    told += f", {warm} of them from a teacher's weights" if warm else ""
    told += f"; {back} chose something else and gave it up for plain direct training" if back else ""
    return told + (f"; {plain} chose plain direct training at once." if plain else ".")


def _cost_of_proof(sets: Sequence[list[dict[str, Any]]]) -> str:
    """What auto would have gained, had every student been kept that promised to be better."""

    def gain(one: dict[str, Any]) -> float:
        auto, direct = one["methods"]["auto"], one["methods"]["direct"]
        return 100 * (auto.get("unproven", auto["accuracy"]) - direct["accuracy"])

    mean = mean_of([float(np.mean([gain(one) for one in of_set])) for of_set in sets])
    runs = [one for of_set in sets for one in of_set]
    lost, kept = sum(gain(one) < 0 for one in runs), sum(_gain(one, "auto") < 0 for one in runs)
    told = f"Had every student been kept, the mean gain would be {mean.mean:+.2f}{_interval(mean)}"
    return f"{told}, with a loss in {lost} runs instead of {kept}."


def _never_worse(sets: Sequence[list[dict[str, Any]]]) -> str:
    """On which sets the interval of the gain lies above half a point, or one test row if that is more, of a loss."""
    open_ = []
    judged = 0
    for of_set in sets:
        gain = mean_of([100 * _gain(one, "auto") for one in of_set])
        if gain.low is None:
            continue
        judged += 1
        if gain.low <= -max(0.5, 100 / of_set[0]["test_rows"]):
            open_.append(of_set[0]["data"])
    if not judged:
        return "With one seed a set has no interval."
    told = f"On {judged - len(open_)} of {judged} sets the 95 % interval of auto's gain lies above -0.5 points"
    return f"{told} (or one test row)" + (f"; not on {', '.join(open_)}." if open_ else ".")


def _everywhere(regrets: Sequence[dict[str, float]]) -> list[str]:
    """The methods with a regret on every set; none where no set has any."""
    return [method for method in (regrets[0] if regrets else {}) if all(method in one for one in regrets)]


def _growth(sets: Sequence[list[dict[str, Any]]]) -> list[list[str]]:
    """What auto does with so many runs of the prior, in the runs where it was tried with each number."""
    found = {name for of_set in sets for one in of_set for name in one["methods"] if name.startswith("auto-")}
    names = [*sorted(found, key=lambda name: int(name.removeprefix("auto-"))), "auto"]
    tried = [
        [one for one in of_set if one["grid"] and all(name in one["methods"] for name in names)] for of_set in sets
    ]
    tried = [of_set for of_set in tried if of_set]
    return [
        [
            name.removeprefix("auto-").replace("auto", "all"),
            str(len(tried)),
            f"{np.mean([np.mean([100 * _gain(one, name) for one in of_set]) for of_set in tried]):+.2f}",
            f"{np.mean([_regrets(of_set)[name] for of_set in tried]):.2f}",
            f"{np.mean([one['methods'][name]['trial_seconds'] for of_set in tried for one in of_set]):.1f}",
        ]
        for name in names
        if tried
    ]


def _by_set(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[one for one in results if one["data"] == name] for name in sorted({one["data"] for one in results})]


def _distils(one: dict[str, Any]) -> bool:
    """Whether the student that was kept is a distilled one."""
    auto = one["methods"]["auto"]
    return auto["distils"] and auto.get("kept") != "direct"


def _gain(one: dict[str, Any], method: str) -> float:
    return one["methods"][method]["accuracy"] - one["methods"]["direct"]["accuracy"]


def _interval(mean: Mean) -> str:
    return "" if mean.low is None else f" ({mean.low:+.2f} to {mean.high:+.2f})"


def _regrets(of_set: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Points below the best cell of the grid, by mean test accuracy over the seeds that trained it; {} without any.
    random: the cell that is best on validation rows among direct training and as many cells as auto's steps would pay
    for, drawn at random.
    """
    of_set = [one for one in of_set if one["grid"]]
    if not of_set:
        return {}
    best = np.mean([[cell["accuracy"] for cell in one["grid"]] for one in of_set], axis=0).max()
    methods = [name for name in of_set[0]["methods"] if all(name in one["methods"] for one in of_set)]
    found = {name: np.mean([one["methods"][name]["accuracy"] for one in of_set]) for name in methods}
    found["random"] = np.mean([_random_search(one) for one in of_set])
    return {name: round(100 * float(best - value), 6) + 0.0 for name, value in found.items()}  # no -0.00


def _random_search(one: dict[str, Any]) -> float:
    """Expected test accuracy over many draws."""
    auto, grid = one["methods"]["auto"], one["grid"]
    # What auto trained beside direct training: its other tries, and the whole student unless that is the direct one.
    steps = auto["extra_steps"] + (auto["chosen"] != str(DIRECT)) * auto["total_steps"]
    count = min(max(1, math.floor(steps / auto["total_steps"])), len(grid) - 1)
    random = np.random.default_rng(0)
    accuracies = []
    for _ in range(500):
        drawn = [grid[0], *(grid[1 + index] for index in random.permutation(len(grid) - 1)[:count])]
        accuracies.append(max(drawn, key=lambda cell: cell["validation"])["accuracy"])
    return float(np.mean(accuracies))


def _plot(results: Sequence[dict[str, Any]]) -> Figure:
    """A row per data set: gain of auto and of the fixed setting over direct training, seeds as small dots."""
    names = sorted({one["data"] for one in results})
    figure = Figure(figsize=(7.2, 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for colour, shift, method in (("#c44e52", 0.12, "fixed"), ("#4c72b0", -0.12, "auto")):
        for place, name in enumerate(names):
            gains = [100 * _gain(one, method) for one in results if one["data"] == name]
            axes.plot(gains, [place + shift] * len(gains), "o", color=colour, alpha=0.4, markersize=3.5)
            label = method if place == 0 else None
            axes.plot(np.mean(gains), place + shift, "D", color=colour, markersize=5, label=label)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("points of test accuracy over direct training")
    axes.legend(fontsize=9)
    return figure
