"""A comparison's record to tables and figures. Reads the record alone; opens no model and no data."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from hf_hpmkd.comparison_lines import (
    KEPT,
    KEPT_TOLD,
    PARTS,
    Line,
    accuracy,
    common_part,
    kept,
    lines,
    measured,
    same_students,
)
from hf_hpmkd.comparison_record import COMPARISON_FILE, ComparisonRecord
from hf_hpmkd.gantt import plain_names
from hf_hpmkd.paired_tests import Mean
from hf_hpmkd.report import markdown
from hf_hpmkd.run_record import last_name

# Okabe and Ito's palette, told apart with every common colour blindness.
_BASELINE, _OTHER, _REFERENCE = "#0072B2", "#D55E00", "#666666"
_PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D")
_SIGNIFICANT = 0.05
_ROUNDING = 1e-12  # of shares of the same rows


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(record: ComparisonRecord, part: str, with_kept: bool = False) -> str:
    """A Markdown table of one part: accuracy as mean ± standard deviation in percent, difference in points with its
    95 % interval over the seeds, corrected p, retention, seconds of training.
    """
    header = [
        "method",
        f"{part} accuracy, %",
        f"difference to {record.baseline}, points",
        "p (Holm)",
        "retention",
        "training s",
        "seeds",
    ]
    cells = [
        [
            line.method,
            _spread(line.accuracy, 100),
            "-" if line.difference is None else _interval(line.difference),
            "-" if line.p is None else _p(line.p),
            "-" if line.retention is None else f"{line.retention:.1%}",
            "-" if line.seconds is None else _spread(line.seconds, 1, digits=1),
            str(line.accuracy.count),
        ]
        for line in lines(record, part, with_kept)
    ]
    return markdown(header, cells, left=1)


def summary(record: ComparisonRecord) -> str:
    """The table of validation rows, that of test rows where they were looked at, what the methods are, and all that a
    reader has to know to weigh the figures.
    """
    if not record.results:
        return "No student is trained yet."
    blocks = [table(record, "validation", with_kept=True), "\n".join(f"- {note}" for note in notes(record))]
    if any("test" in one.scores for one in record.results):
        blocks.insert(1, table(record, "test", with_kept=True))
    meaning = [f"- {m.name}: {m.description}" for m in record.methods]
    if kept(record):
        meaning.append(f"- {KEPT}: {KEPT_TOLD}")
    return "\n\n".join([*blocks, "\n".join(meaning)])


def overview(records: Sequence[ComparisonRecord], part: str, shown: Sequence[str] | None = None) -> str:
    """Several comparisons side by side: a row per method, a column per data set and student, what the methods are.

    A cell is the accuracy in percent, mean ± standard deviation over the seeds, and in brackets the difference to the
    record's baseline in points, with * where its corrected p is below 0.05. shown: methods that get a row, in this
    order; None shows all. The correction is for all methods of a comparison, shown or not.
    """
    columns = [{line.method: line for line in lines(record, part, with_kept=True)} for record in records]
    known = list(dict.fromkeys(name for column in columns for name in column))
    methods = known if shown is None else [name for name in shown if name in known]
    header = ["method", *(f"{_data_name(record)}, {record.recipe['student']['model']}" for record in records)]
    rows = [[name, *(_cell(column.get(name)) for column in columns)] for name in methods]
    seeds = sorted({column[name].accuracy.count for column in columns for name in methods if name in column})
    counts = " or ".join(str(count) for count in seeds)
    by_rows = {line.by_rows for column in columns for line in column.values() if line.p is not None}
    tests = ["paired t"] * (by_rows != {True}) + ["McNemar's with one seed"] * (True in by_rows)
    told = (
        f"{part.capitalize()} accuracy in percent, mean ± standard deviation over {counts} seeds; in brackets the "
        f"difference to {' or '.join(sorted({record.baseline for record in records}))} in points, with * where p < "
        f"{_SIGNIFICANT} ({' or '.join(tests)}, Holm's correction within a column)."
    )
    if tuned := [_data_name(record) for record in records if record.trials]:
        where = "" if len(tuned) == len(records) else f" of {', '.join(tuned)}"
        told += f" What stands below is what each method{where} began its trials with; the table has what they chose."
    meaning: dict[str, dict[str, list[str]]] = {}  # name -> description -> data
    for record in records:
        for method in record.methods:
            meaning.setdefault(method.name, {}).setdefault(method.description, []).append(_data_name(record))
        if kept(record):
            meaning.setdefault(KEPT, {}).setdefault(KEPT_TOLD, []).append(_data_name(record))
    listed = "\n".join(f"- `{name}`: {_told(meaning[name])}" for name in methods)
    return "\n\n".join([markdown(header, rows, left=1), told, listed])


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    accuracy = _spread(line.accuracy, 100)
    if line.difference is None:
        return accuracy
    mark = "*" if line.p is not None and line.p < _SIGNIFICANT else ""
    return f"{accuracy} ({100 * line.difference.mean:+.2f}{mark})"


def _told(described: dict[str, list[str]]) -> str:
    """What a method is; where its description differs between data sets, for each."""
    if len(described) == 1:
        return next(iter(described))
    return "; ".join(f"{text} ({', '.join(data)})" for text, data in described.items())


def against(record: ComparisonRecord, baseline: str) -> ComparisonRecord:
    """The record with another of its methods as the one that the others are tested against. Raises ValueError for a
    method that it does not have.
    """
    names = [method.name for method in record.methods]
    if baseline not in names:
        raise ValueError(f"The baseline must be one of the methods ({', '.join(names)}), got {baseline!r}.")
    return dataclasses.replace(record, baseline=baseline)


def show(
    paths: Sequence[Path],
    plot: Path | None = None,
    baseline: str | None = None,
    shown: Sequence[str] | None = None,
) -> str:
    """The summaries again, from comparisons' folders or their records alone; of several also side by side.

    plot: where to draw `draw_compression`. baseline: tested against instead of the records' own. shown: methods that
    stand side by side and are drawn; None takes all. Raises ValueError for methods that no record has.
    """
    records = [ComparisonRecord.load(path / COMPARISON_FILE if path.is_dir() else path) for path in paths]
    if shown is not None:
        known = {line.method for record in records for line in lines(record, "validation", with_kept=True)}
        if unknown := [name for name in shown if name not in known]:
            raise ValueError(
                f"No comparison here has a method {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
            )
    if baseline is not None:
        records = [against(record, baseline) for record in records]
    told = [summary(record) for record in records]
    if len(records) > 1:
        told.insert(0, overview(records, common_part(records), shown))
    if plot is not None:
        with plain_names():
            told.append(f"Drawn into {draw_compression(records, common_part(records), plot, shown)}.")
    return "\n\n".join(told)


def notes(record: ComparisonRecord) -> list[str]:
    """Sentences on how the figures came about, and on what makes them weaker than they look."""
    parts = [part for part in PARTS if any(part in one.scores for one in record.results)]
    tests = [_told_of_tests(record, part) for part in parts]
    alike = all(one == tests[0] for one in tests)
    said = tests[0] if alike else [line for part in parts for line in _told_of_tests(record, part, f" on {part} rows")]
    rows = {part: {one.scores[part].rows for one in record.results if part in one.scores} for part in PARTS}
    sizes = ", ".join(f"{max(count):,} {part} rows" for part, count in rows.items() if count)
    steps = sorted({one.steps for one in record.results if one.steps is not None})
    params = sorted({one.num_params for one in record.results if one.num_params is not None})
    said.append(f"Measured on {sizes}; students of {_listed(params)} parameters, {_listed(steps)} steps.")
    if len(params) > 1:
        said.append("The terms were not equal: students differ in parameters.")
    if len(steps) > 1:
        of_method = {one.method: one.steps for one in record.results}
        told = ", ".join(f"{name} {count:,}" for name, count in of_method.items() if count is not None)
        said.append(f"The terms were not equal in steps: {told}.")
    if len({one.threads for one in record.results}) > 1:
        said.append("Students were trained with different numbers of threads, which round differently.")
    if len({one.commit for one in record.results}) > 1:
        said.append("Students were trained by different versions of this package.")
    if missing := [part for part in parts if _seeds(record, part) != {len(record.seeds)}]:
        where = "" if missing == parts else f" on {missing[0]} rows"
        said.append(f"Not every method has all {len(record.seeds)} seeds{where}: some students are missing.")
    said.append(
        "Teachers: "
        + (
            "the same for all seeds."
            if len(record.teachers) == 1
            else "trained anew for each seed; the same for all methods of a seed."
        )
    )
    if record.trials:
        chosen = [f"{one.method} {' '.join(one.overrides) or 'as it is'}" for one in record.trials if one.chosen]
        seconds, trainings = (sum(getattr(one, what) for one in record.trials) for what in ("seconds", "trainings"))
        said.append(
            f"Tuned on validation rows with {trainings} trainings, {seconds:,.0f} s. Chosen: {'; '.join(chosen)}."
        )
        said += [
            f"Of the learning rates tried the {word} was chosen for {', '.join(names)}, which may do better beyond it: "
            "compare around it (training.learning_rate=...) before you believe a difference."
            for word, names in record.at_the_edge().items()
        ]
    if record.looks:
        said.append(
            f"The test part was opened {len(record.looks)} time{'s' if len(record.looks) > 1 else ''}: "
            + "; ".join(f"{look.time} ({', '.join(look.students)})" for look in record.looks)
            + "."
        )
    else:
        said.append("The test part was not opened; validation rows also choose, so their figures flatter.")
    return said


def _told_of_tests(record: ComparisonRecord, part: str, where: str = "") -> list[str]:
    """How a part's lines were tested. where: words that name the part."""
    found = lines(record, part)
    results = {line.method: measured(record, line.method, part) for line in found if line.p is not None}
    groups = same_students(results, measured(record, record.baseline, part))
    twice = [" and ".join(group) for group in groups if len(group) > 1]
    baseline_again = sorted(results.keys() - {name for group in groups for name in group})
    twice += [" and ".join([record.baseline, *baseline_again])] if baseline_again else []
    if any(line.by_rows for line in found):
        said = [
            f"Tests with one seed{where}: McNemar's exact test on the rows of these two models; it says nothing of "
            "other seeds."
        ]
    else:
        said = [f"Tests{where}: paired t over the seeds that both have, two-sided."]
    said[0] += f" Holm's correction for {len(groups)} comparisons with {record.baseline}."
    if twice:
        said.append(f"Ended with the same students{where}, which are compared once: {'; '.join(twice)}.")
    return said


def _seeds(record: ComparisonRecord, part: str) -> set[int]:
    """How many seeds the methods have on a part."""
    return {line.accuracy.count for line in lines(record, part)}


def _listed(values: Sequence[int]) -> str:
    return " and ".join(f"{value:,}" for value in values) or "unknown"


def _spread(value: Mean, scale: float, digits: int = 2) -> str:
    mean = f"{scale * value.mean:.{digits}f}"
    return mean if value.sd is None else f"{mean} ± {scale * value.sd:.{digits}f}"


def _interval(value: Mean) -> str:
    mean = f"{100 * value.mean:+.2f}"
    if value.low is None or value.high is None or not value.sd or value.sd < _ROUNDING:
        return mean  # of values that are all alike nothing says how far others would be
    return f"{mean} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_plots(record: ComparisonRecord, folder: Path) -> list[Path]:
    """Draws accuracy.png and accuracy_seconds.png, on test rows where all finished students have them, else on
    validation rows. Makes the folder; returns the files.
    """
    if not record.results:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    part = common_part([record])
    drawings: dict[str, Callable[[ComparisonRecord, str], Figure]] = {
        "accuracy.png": _accuracy_figure,
        "accuracy_seconds.png": _seconds_figure,
    }
    written = []
    for name, draw in drawings.items():
        with plain_names():
            draw(record, part).savefig(folder / name, dpi=120, metadata={"Software": None})
        written.append(folder / name)
    return written


def _accuracy_figure(record: ComparisonRecord, part: str) -> Figure:
    """A row per method: its seeds as small dots, the mean with its 95 % interval as a large one."""
    found = lines(record, part)
    figure = Figure(figsize=(7.2, 1.4 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(found):
        colour = _BASELINE if line.method == record.baseline else _OTHER
        seeds = [100 * accuracy(one, part) for one in measured(record, line.method, part).values()]
        axes.plot(seeds, [place + 0.22] * len(seeds), "o", color=colour, alpha=0.45, markersize=3.5)
        axes.errorbar(100 * line.accuracy.mean, place, xerr=_bars(line.accuracy), fmt="o", color=colour, capsize=3)
    axes.axvline(100 * found[0].accuracy.mean, color=_REFERENCE, linewidth=1.0, linestyle=(0, (1, 1.5)), zorder=1)
    axes.set_yticks(range(len(found)), [line.method for line in found], fontsize=9)
    axes.invert_yaxis()
    _dress(axes, f"Accuracy on {part} rows: seeds, mean and 95 % interval", f"{part} accuracy (%)")
    return figure


def _seconds_figure(record: ComparisonRecord, part: str) -> Figure:
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    found = [line for line in lines(record, part) if line.seconds is not None]
    for place, line in enumerate(sorted(found, key=lambda line: -line.accuracy.mean)):  # the legend reads like the plot
        assert line.seconds is not None
        axes.errorbar(
            line.seconds.mean,
            100 * line.accuracy.mean,
            yerr=_bars(line.accuracy),
            fmt=_MARKERS[place // len(_PALETTE) % len(_MARKERS)],
            color=_PALETTE[place % len(_PALETTE)],
            label=line.method,
            capsize=3,
        )
    axes.set_xlim(left=0)
    axes.set_ylabel(f"{part} accuracy (%)", fontsize=10)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _dress(axes, "Accuracy against the student's training time", "seconds of training, mean over seeds")
    return figure


def draw_compression(
    records: Sequence[ComparisonRecord], part: str, path: Path, shown: Sequence[str] | None = None
) -> Path:
    """Draws retention against compression: a column of methods per comparison, at the size of its largest teacher over
    its student's. shown: methods that are drawn; None draws all. Raises ValueError where no record knows both sizes and
    has results of them on the part.
    """
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    colours: dict[str, str] = {}
    for place, record in enumerate(records):
        teachers = [one.num_params for known in record.teachers.values() for one in known if one.num_params]
        students = [one.num_params for one in record.results if one.num_params]
        with_kept = shown is not None and KEPT in shown
        found = [line for line in lines(record, part, with_kept) if line.retention is not None]
        found = [line for line in found if shown is None or line.method in shown]
        if not (teachers and students and found):
            continue
        compression = max(teachers) / max(students)
        for line in found:
            label = None if line.method in colours else line.method
            colour = colours.setdefault(line.method, _PALETTE[len(colours) % len(_PALETTE)])
            marker = _MARKERS[list(colours).index(line.method) // len(_PALETTE) % len(_MARKERS)]
            axes.plot(compression, 100 * (line.retention or 0.0), marker, color=colour, label=label, alpha=0.85)
        left = place % 2 == 0  # in turn, so that the names of two with like sizes do not cover each other
        axes.annotate(
            _data_name(record),
            (compression, 0.01),
            xytext=(-5 if left else 5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
            rotation=90,
        )
    if not colours:
        raise ValueError(
            "Compression needs a teacher and a student of known size, and none of the comparisons has both."
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%gx"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("retention of the best teacher's accuracy (%)", fontsize=10)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _dress(axes, f"Retention against compression, {part} rows", "parameters of the largest teacher / of the student")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _data_name(record: ComparisonRecord) -> str:
    return last_name(str(record.parts.get("path") or record.recipe["data"]["path"]))


def _bars(value: Mean) -> Any:
    """Distances below and above the mean, in points; None for a single seed."""
    if value.low is None or value.high is None:
        return None
    return [[100 * (value.mean - value.low)], [100 * (value.high - value.mean)]]


def _dress(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(xlabel, fontsize=10)
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
