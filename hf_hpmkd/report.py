"""Run records to tables, sentences and figures. Reads the record alone; opens no model and no data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hf_hpmkd.gantt import Bar, gantt, plain_names
from hf_hpmkd.run_record import ModelRecord, RunRecord, last_name

HEADER = ("model", "parameters", "compression", "test accuracy", "retention", "training s", "ms/sample")

_Z_95 = 1.959964  # the normal distribution's two-sided 95 %
# Okabe and Ito's palette, told apart with every common colour blindness. Teachers take the last ones in turn.
_STUDENT, _DIRECT = "#D55E00", "#0072B2"
_TEACHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_REFERENCE: dict[str, Any] = {"color": "#666666", "linewidth": 1.2, "linestyle": (0, (1, 1.5)), "zorder": 1}
_MAX_CELLS_WITH_NUMBERS = 150
_MAX_CLASS_NAMES = 40
_MAX_MARKED_POINTS = 25

Line = tuple[list[float], list[float]]  # steps, values


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table, unrounded. accuracy, retention: shares; None where the record does not say."""

    name: str
    num_params: int | None
    compression: float | None
    accuracy: float | None
    retention: float | None
    seconds: float | None
    latency_ms: float | None

    def cells(self) -> list[str]:
        """The line as text, "-" for what is not known."""
        return [
            self.name,
            _cell(self.num_params, "{:,}"),
            _cell(self.compression, "{:.1f}x"),
            _cell(self.accuracy, "{:.2%}"),
            _cell(self.retention, "{:.2%}"),
            _cell(self.seconds, "{:.1f}"),
            _cell(self.latency_ms, "{:.2f}"),
        ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def rows(record: RunRecord) -> list[Row]:
    """Teachers, then the directly trained model, then the student. Ratios are computed here, from the accuracies and
    counts; the record's own retention is used only where `accuracy` was not among the metrics.
    """
    found = []
    for teacher in record.teachers:
        accuracy = teacher.accuracy.get("test")
        ratios = record.compression(teacher.num_params), accuracy, record.retention(accuracy)
        found.append(Row(f"teacher {teacher.name}", teacher.num_params, *ratios, teacher.seconds, teacher.latency_ms))
    for name in sorted(record.models, key=lambda name: {"direct": 1, "distilled": 2, "student": 3}.get(name, 0)):
        model = record.models[name]
        ratios = record.compression(model.num_params), model.accuracy(), student_retention(record, model)
        shown = record.other_name if name == "distilled" else name
        found.append(Row(shown, model.num_params, *ratios, model.seconds, model.latency_ms))
    return found


def student_retention(record: RunRecord, model: ModelRecord) -> float | None:
    """Test accuracy of a model over that of the best single teacher on the same rows."""
    return model.retention if model.accuracy() is None else record.retention(model.accuracy())


def result_table(record: RunRecord) -> str:
    """The table as aligned plain text, and under it what the run shows about distillation."""
    cells = [list(HEADER), *(row.cells() for row in rows(record))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    auto = [f"Configuration: {record.auto.reason}."] if record.auto is not None else []
    chain = [f"Chain: {record.chain.reason}"] if record.chain is not None and record.chain.reason else []
    kept = [kept_told(record)] if record.kept is not None else []
    return "\n".join([*lines, "", *auto, *chain, verdict(record), *kept])


def markdown_table(record: RunRecord) -> str:
    """The same table as Markdown."""
    lines = [row.cells() for row in rows(record)]
    return markdown(HEADER, lines, left=1)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are left-aligned, the others right-aligned."""
    ruler = [":--" if column < left else "--:" for column in range(len(header))]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ruler, *escaped])


def deciding_parts(record: RunRecord) -> str:
    """The parts whose rows said which student the run keeps. Records of before a proof took in guide rows have none."""
    whole = record.kept is None or record.kept.rows == record.num_rows("validation")
    return "validation" if whole else "validation and guide"


def kept_told(record: RunRecord) -> str:
    """Which student the run kept, in a sentence; "" where there was no choice."""
    other, kept, stages = record.other_name, record.kept, record.chain is not None and record.chain.stages
    if kept is None:
        return ""
    rows = f"{kept.rows:,} {deciding_parts(record)} rows"
    gain = f"{kept.gain:+.2f} ± {kept.standard_error:.2f} points for the {other} one on {rows}"
    if kept.needed is not None:
        tries = record.auto is not None and record.auto.seeds > 0 and not stages
        gain += f", {kept.needed:+.2f} asked for" + " after what its tries showed" * tries
    if kept.kept == "distilled":
        return f"Kept: the {other} student ({gain})."
    return f"Kept: the directly trained student ({gain}); the {other} one is in `distilled/` of the run's folder."


def auto_section(record: RunRecord) -> str:
    """What the adaptive configuration tried and chose, as Markdown; "" for a run that took its recipe as it is."""
    if (auto := record.auto) is None:
        return ""
    lines = [f"## Configuration\n\nChosen: {auto.reason}. Expectations come from {auto.knowledge}."]
    if auto.alike:
        lines.append(f"Runs on {', '.join(auto.alike)} were most like this one.")
    if auto.trials:
        cells = [
            [
                one.name,
                f"{one.steps:,} of {auto.total_steps:,}",
                f"{one.expected[0]:+.2f} ± {one.expected[1]:.2f}",
                f"{one.gain:+.2f} ± {one.standard_error:.2f}",
            ]
            for one in auto.trials
        ]
        header = ("tried", "steps", "expected gain, points", "gain so far, points")
        lines.append(markdown(header, cells, left=1))
    rows, how = ("validation and guide", f", {auto.seeds} of each at once,") if auto.seeds else ("validation", "")
    lines.append(
        f"Gains are over direct training, on the same {rows} rows at the same step. The tries{how} added "
        f"{auto.extra_steps:,} steps of {auto.budget_steps:,} allowed and took {auto.seconds:.1f} s, deciding "
        f"{auto.deciding_seconds:.1f} s."
    )
    return "\n\n".join(lines)


def chain_section(record: RunRecord) -> str:
    """The chain's stages and what decided on them, as Markdown; "" for a run without a chain."""
    if record.chain is None or not record.chain.reason:
        return ""
    lines = [f"## Chain\n\nBetween the teachers and the student: {record.chain.reason}"]
    if record.chain.student_origin:
        whose = "The student" if record.began_with else f"The {record.other_name} student, which was not kept,"
        lines.append(
            f"{whose} began with layers and channels of `{record.chain.student_origin}`: "
            f"{record.chain.student_warm_start:.0%} of its parameters came from there. Direct training began from "
            "nothing."
        )
    if record.chain.stages:
        cells = [
            [
                f"`chain/{stage.name}`",
                f"`{last_name(stage.model)}`",
                f"{stage.num_params:,}",
                "-" if stage.accuracy is None else f"{stage.accuracy:.2%}",
                ", ".join(stage.guides),
                f"{stage.warm_start:.0%}",
                "-" if stage.seconds is None else f"{stage.seconds:.0f}{' (an earlier run)' if stage.reused else ''}",
            ]
            for stage in record.chain.stages
        ]
        header = ("stage", "model", "parameters", "validation accuracy", "learned from", "from above", "training s")
        lines.append(markdown(header, cells, left=2))
        lines.append(
            "From above: share of the parameters that a larger model of the family gave, as copies or fitted to it."
        )
    if record.chain.decisions:
        cells = [
            [
                f"{one.num_params:,} parameters",
                "probe" if one.moment == "probe" else "finished stage",
                f"{one.gain:+.2f} ± {one.standard_error:.2f}",
                f"{one.required:.2f}",
                f"{one.cost:.1f}",
                "yes" if one.accepted else "no",
            ]
            for one in record.chain.decisions
        ]
        columns = (
            "stage of",
            "judged by",
            "gain of the student, points",
            "asked for",
            "cost, student trainings",
            "kept",
        )
        lines.append(markdown(columns, cells, left=2))
        lines.append("The gains are those of shortly trained students on validation rows.")
    return "\n\n".join(lines)


# ---- what a run shows ------------------------------------------------------------------------------------------------


def difference_margin(first: float, second: float, num_rows: int) -> float:
    """95 % margin of the difference of two accuracies measured on `num_rows` rows each.

    Of two binomial shares, with one hit and one miss added to each (Agresti and Caffo 2000), so that it is not zero at
    accuracy 0 or 1. It takes the two as independent; on the same rows they seldom are, which makes it wide. It holds
    for these two trained models and says nothing of other seeds. Raises ValueError for shares outside 0..1 or no rows.
    """
    if num_rows < 1 or not (0 <= first <= 1 and 0 <= second <= 1):
        raise ValueError(f"Needs accuracies in 0..1 and at least 1 row, got {first}, {second} and {num_rows}.")
    shares = [(accuracy * num_rows + 1) / (num_rows + 2) for accuracy in (first, second)]
    return _Z_95 * math.sqrt(sum(share * (1 - share) for share in shares) / (num_rows + 2))


def verdict(record: RunRecord) -> str:
    """One sentence: is the student better than, worse than, or not distinguishable from the directly trained model?"""
    student, direct = record.distilled, record.models.get("direct")
    if student is None:
        return f"The run has no student (status: {record.status})."
    if record.chose_direct:
        return "The adaptive configuration found nothing better than direct training, so that is the student's."
    if direct is None:
        return (
            "The student was not also trained without teachers in this run, so the run does not show what distillation "
            "added."
        )
    accuracy, base, num_rows = student.accuracy(), direct.accuracy(), record.num_rows("test")
    if accuracy is None or base is None or not num_rows:
        return "Test accuracies of student and direct training were not both recorded, so the two are not compared."
    if base <= record.guessed("test"):
        return (
            f"Direct training ended no better than guessing ({base:.2%}, the student {accuracy:.2%}), so the run does "
            "not show what distillation added: train for longer (training.min_steps)."
        )
    margin = difference_margin(accuracy, base, num_rows)
    points = 100 * (accuracy - base)
    figures = f"{accuracy:.2%} against {base:.2%}, {points:+.2f} points"
    bound = f"{100 * margin:.2f} points (95 %, binomial, {num_rows:,} test rows, one run)"
    other = record.other_name
    if abs(accuracy - base) <= margin:
        return (
            f"{other.capitalize()} and directly trained student are not distinguishable by this run: {figures}, within "
            f"the uncertainty of {bound}."
        )
    better = "better" if points > 0 else "worse"
    compared = f"The {other} student is {better} than the directly trained one"
    return f"{compared}: {figures}, beyond the uncertainty of {bound}."


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_plots(record: RunRecord, folder: Path) -> list[Path]:
    """Draws what the record has data for: learning_curves.png, temperature.png, teacher_weights.png, class_weights.png,
    pipeline.png.

    Makes `folder` if needed; returns the files written, in that order. Plots of an earlier call that no longer have
    data are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[RunRecord], Figure | None]] = {
        "learning_curves.png": _learning_curves,
        "temperature.png": _temperature,
        "teacher_weights.png": _teacher_weights,
        "class_weights.png": _class_weights,
        "pipeline.png": _pipeline,
    }
    written = []
    for name, draw in drawings.items():
        path = folder / name
        with plain_names():
            if (figure := draw(record)) is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, dpi=120, metadata={"Software": None})
        written.append(path)
    return written


def series(record: RunRecord, run: str, key: str) -> Line:
    """(steps, values) of one logged number of one run; values may be NaN. Empty where it was not logged."""
    found = [
        (float(row["step"] or 0), float(row[key]))  # type: ignore[arg-type]
        for row in record.curves.get(run, [])
        if row.get("step") is not None and row.get(key) is not None
    ]
    return [step for step, _ in found], [value for _, value in found]


def taught_by(record: RunRecord) -> list[str]:
    """Names of what taught the student: teachers, and stages of the chain."""
    return record.taught_by or [teacher.name for teacher in record.teachers]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _dress(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel("optimizer step", fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(run: str, number: int) -> dict[str, Any]:
    if run == "student":
        return {"color": _STUDENT, "linewidth": 2.2, "zorder": 3, "marker": "o"}
    if run == "direct":
        return {"color": _DIRECT, "linewidth": 1.8, "linestyle": "--", "zorder": 2.5, "marker": "s"}
    return {
        "color": _TEACHERS[number % len(_TEACHERS)],
        "linestyle": _LINES[number // len(_TEACHERS) % len(_LINES)],
        "marker": _MARKERS[number // len(_TEACHERS) % len(_MARKERS)],
        "linewidth": 1.6,
    }


def _draw_lines(axes: Axes, lines: dict[str, Line]) -> None:
    others = [run for run in lines if run not in ("student", "direct")]
    for run, (steps, values) in lines.items():
        style = _style(run, others.index(run) if run in others else 0)
        if len(steps) > _MAX_MARKED_POINTS:
            style["marker"] = None
        axes.plot(steps, values, label=_shortened(run, 32), markersize=4, **style)


def _legend(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[0])
    if count > 6:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(fontsize=9, framealpha=0.85, edgecolor="none")


def _learning_curves(record: RunRecord) -> Figure | None:
    losses, accuracies = {}, {}
    for run in sorted(record.curves, key=lambda run: {"student": 0, "direct": 1}.get(run, 2)):
        # A student's `loss` mixes in the teachers' part, so its cross-entropy is what compares with the others.
        loss = series(record, run, "ce_loss")
        losses[run] = loss if loss[0] else series(record, run, "loss")
        accuracies[run] = series(record, run, "eval_accuracy")
    panels = [
        ("Cross-entropy with the labels, training batches", "nats per row", losses),
        ("Accuracy on validation rows", "accuracy (%)", accuracies),
    ]
    panels = [(title, ylabel, {run: line for run, line in lines.items() if line[0]}) for title, ylabel, lines in panels]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    figure, grid = _figure(5.8 * len(panels), 3.9, len(panels))
    best = record.best_teacher("validation")
    for axes, (title, ylabel, lines) in zip(grid, panels, strict=True):
        if ylabel == "accuracy (%)":
            lines = {run: (steps, [100 * value for value in values]) for run, (steps, values) in lines.items()}
            if best is not None:
                level = 100 * best.accuracy["validation"]
                axes.axhline(level, label=f"best teacher ({_shortened(best.name)})", **_REFERENCE)
        _draw_lines(axes, lines)
        _dress(axes, title, ylabel)
        _legend(axes)
    return figure


def _temperature(record: RunRecord) -> Figure | None:
    steps, values = series(record, "student", "temperature")
    if not steps:
        return None
    figure, (axes,) = _figure(6.4, 3.6)
    _draw_lines(axes, {"student": (steps, values)})
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        axes.set_ylim(0, 1.15 * max(finite))
    _dress(axes, "Distillation temperature during the student's training", "temperature T")
    return figure


def _teacher_weights(record: RunRecord) -> Figure | None:
    names = taught_by(record)
    lines = {name: series(record, "student", f"weight/{name}") for name in names}
    lines = {name: line for name, line in lines.items() if line[0]}
    if not lines:
        return None
    figure, (axes,) = _figure(7.2, 3.9)
    stages = [stage.name for stage in record.chain.stages] if record.chain is not None else []
    _draw_lines(axes, {name if name in stages else f"teacher {name}": line for name, line in lines.items()})
    if len(names) > 1:
        axes.axhline(1 / len(names), label="equal weights", **_REFERENCE)
    top = max((value for _, values in lines.values() for value in values if math.isfinite(value)), default=1.0)
    axes.set_ylim(0, min(1.02, max(1.3 * top, 0.1)))
    _dress(axes, "Weight of each teacher, mean over the training rows", "mean weight")
    _legend(axes)
    return figure


def _class_weights(record: RunRecord) -> Figure | None:
    if not record.class_weights or not record.class_weights[0]:
        return None
    weights = np.asarray(record.class_weights, dtype=float)
    count, classes = weights.shape
    empty = weights.sum(axis=0) == 0
    names = record.class_names if len(record.class_names) == classes else [str(index) for index in range(classes)]
    teachers = taught_by(record)
    if len(teachers) != count:
        teachers = [f"teacher {index}" for index in range(count)]
    figure, (axes,) = _figure(min(16.0, 3.6 + 0.62 * min(classes, 20)), 2.0 + 0.5 * count)
    axes.set_facecolor("#DDDDDD")
    shown = np.ma.masked_array(weights, np.broadcast_to(empty, weights.shape))
    # None is finite where the gate read a student that ended in NaN.
    top = float(weights[np.isfinite(weights)].max(initial=0.0)) or 1.0
    image = axes.imshow(shown, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    every = math.ceil(classes / _MAX_CLASS_NAMES)
    ticks = range(0, classes, every)
    slanted = max((len(names[tick]) for tick in ticks), default=0) > 5 or classes > 20
    axes.set_xticks(list(ticks), [_shortened(names[tick]) for tick in ticks], fontsize=9 if classes <= 20 else 7)
    if slanted:
        axes.tick_params(axis="x", rotation=45 if classes <= 20 else 90)
        for label in axes.get_xticklabels():
            label.set(ha="right" if classes <= 20 else "center", rotation_mode="anchor" if classes <= 20 else "default")
    axes.set_yticks(range(count), [_shortened(name) for name in teachers], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in np.arange(0.5, count - 1):
        axes.axhline(edge, color="white", linewidth=1.5)
    if weights.size <= _MAX_CELLS_WITH_NUMBERS and classes <= 20:
        for row, column in np.argwhere(~shown.mask):
            value = weights[row, column]
            colour = "black" if value > 0.55 * top else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    notes = [f"1 name in {every} shown"] if every > 1 else []
    notes += ["light grey: no guide rows"] if empty.any() else []
    axes.set_xlabel("class" + (f" ({'; '.join(notes)})" if notes else ""), fontsize=10)
    axes.set_title("Mean weight of each teacher on the guide rows of each class", fontsize=12, loc="left")
    figure.colorbar(image, ax=axes, label="mean weight", pad=0.015)
    return figure


def _pipeline(record: RunRecord) -> Figure | None:
    """Phases and jobs since the run was last begun, which is what its phase `data` tells."""
    begun = max((index for index, job in enumerate(record.jobs) if job.name == "data"), default=0)
    jobs = [job for job in record.jobs[begun:] if job.name != "pipeline"]
    if not jobs:
        return None
    bars = [
        Bar(job.name, job.kind.split()[0], "main" if job.worker == "main" else f"worker {job.worker}", *times)
        for job in jobs
        for times in [(float(job.started), float(job.ended))]
    ]
    return gantt(bars, "Who did what, and when")


def _shortened(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
