"""How long the jobs of a recipe would take on so many workers, told and drawn before any of them is run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hf_hpmkd.components.parallel_pipeline import Graph, Schedule, equal_workers, simulate
from hf_hpmkd.gantt import Bar, gantt, plain_names
from hf_hpmkd.job_graph import corrected, run_graph
from hf_hpmkd.plan import on_this_disk
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.report import markdown
from hf_hpmkd.run_environment import environment
from hf_hpmkd.run_memory import open_memory

_LONGEST_LIST = 40


def plan_schedule(recipe: Recipe, workers: Sequence[int], picture: Path | None = None) -> str:
    """The simulated schedule of a run from its beginning on each number of workers, as text; that on the last number
    also job by job, and as a Gantt chart into `picture` (PNG). Opens the data.

    A worker counts as fast as this machine with this process's threads, and starting a job as free. Raises ValueError
    for data that are not on this disk: a plan downloads none.
    """
    if not on_this_disk(recipe):
        raise ValueError(
            f"A schedule is estimated from the rows, which must be on this disk; {recipe.data.path} is not. Give a "
            "folder as data.path, or leave --workers out."
        )
    graph = estimated_graph(recipe)
    last = simulate(graph, equal_workers(workers[-1]))
    lines = [f"Pipeline: {len(graph.jobs)} jobs, {graph.work:,.0f} s of work (estimated)", "", scaling(graph, workers)]
    if recipe.auto.mode != "off":
        lines += ["", _told_of_the_rest(recipe, graph, last)]
    lines += ["", f"On {workers[-1]} workers:", *_listed(last)]
    if picture is not None:
        bars = [
            Bar(one.job, graph.jobs[one.job].kind.split()[0], f"worker {one.worker}", one.start, one.end)
            for one in last.placements
        ]
        picture.parent.mkdir(parents=True, exist_ok=True)
        title = f"{recipe.student.model} on {workers[-1]} workers, estimated"
        with plain_names():
            gantt(bars, title).savefig(picture, dpi=120, metadata={"Software": None})
        lines.append(f"Drawn into {picture}.")
    return "\n".join(lines)


def estimated_graph(recipe: Recipe) -> Graph:
    """The jobs of a recipe with the seconds that its memory suggests for this machine."""
    graph = run_graph(recipe, recipe_parts(recipe))
    past = open_memory(recipe).records()[0] if recipe.memory.use else []
    return corrected(graph, past, environment()[1])


def _told_of_the_rest(recipe: Recipe, graph: Graph, schedule: Schedule) -> str:
    """What an adaptive run does behind these jobs, and how much faster it becomes as a whole."""
    whole = estimated_graph(dataclasses.replace(recipe, auto=dataclasses.replace(recipe.auto, mode="off")))
    rest = sum(job.seconds for name, job in whole.jobs.items() if name not in graph.jobs)
    faster = (graph.work + rest) / (schedule.makespan + rest)
    return (
        "These jobs come before the tries of auto. The tries, direct training and the student follow in one "
        f"process: about {rest:,.0f} s and those of the tries. So the whole run is at most {faster:.2f}x faster than "
        "in one process."
    )


def scaling(graph: Graph, workers: Sequence[int]) -> str:
    """Simulated seconds on each number of workers, as Markdown: the bound is max(work / workers, critical path)."""
    rows = []
    for count in workers:
        seconds = simulate(graph, equal_workers(count)).makespan
        first_come = simulate(graph, equal_workers(count), "first-come").makespan
        bound = graph.lower_bound(count)
        figures = (f"{seconds:,.0f}", f"{graph.work / seconds:.2f}x", f"{bound:,.0f}", f"{first_come:,.0f}")
        rows.append([str(count), *figures, f"{graph.work / seconds / count:.0%}"])
    header = ("workers", "seconds", "faster than one", "lower bound, s", "first come, first served, s", "busy")
    return markdown(header, rows, left=0)


def _listed(schedule: Schedule) -> list[str]:
    placed = sorted(schedule.placements, key=lambda one: (one.start, one.worker))
    lines = [f"  {one.start:8,.1f} to {one.end:8,.1f} s  worker {one.worker}  {one.job}" for one in placed]
    more = [f"  ... and {len(lines) - _LONGEST_LIST} more"] if len(lines) > _LONGEST_LIST else []
    return lines[:_LONGEST_LIST] + more
