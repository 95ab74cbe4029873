"""Schedules as Gantt charts: who did which job when. Draws; knows nothing of where the times come from."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito's palette, told apart with every common colour blindness.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")
_LABELLED_SHARE = 0.06  # of the whole time; shorter bars carry no name


@dataclass(frozen=True)
class Bar:
    """One job. kind: jobs of a kind share a colour. start, end: seconds since any common moment."""

    job: str
    kind: str
    worker: str
    start: float
    end: float


def plain_names() -> AbstractContextManager[None]:
    """Names are drawn as they are: matplotlib would set what stands between two $ as mathematics, or fail at it."""
    return rc_context({"text.parse_math": False})


def gantt(bars: Sequence[Bar], title: str) -> Figure:
    """One line per worker, in the order of their first jobs, from the first start on. bars: at least one."""
    first = min(bar.start for bar in bars)
    whole = max(bar.end for bar in bars) - first
    workers = list(dict.fromkeys(bar.worker for bar in sorted(bars, key=lambda bar: (bar.start, bar.worker))))
    kinds = list(dict.fromkeys(bar.kind for bar in bars))
    figure = Figure(figsize=(9.0, 1.9 + 0.42 * len(workers)), layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    for bar in bars:
        height, colour = workers.index(bar.worker), _COLOURS[kinds.index(bar.kind) % len(_COLOURS)]
        axes.barh(height, bar.end - bar.start, left=bar.start - first, color=colour, edgecolor="white", linewidth=0.6)
        if bar.end - bar.start > _LABELLED_SHARE * whole:
            middle = (bar.start + bar.end) / 2 - first
            axes.text(middle, height, bar.job, ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(workers)), workers, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds", fontsize=10)
    axes.set_title(title, fontsize=12, loc="left")
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for kind, colour in zip(kinds, _COLOURS * len(kinds), strict=False):
        axes.barh(0, 0, color=colour, label=kind)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
