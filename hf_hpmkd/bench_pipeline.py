"""Measures what workers gain: whole runs of one recipe, done by one process or several, in turns; and the simulator.

Each run is a command of its own with an empty cache and no memory. Every figure goes into a JSON record.
"""

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_hpmkd.components.parallel_pipeline import Graph, Job, equal_workers, simulate
from hf_hpmkd.plan_schedule import estimated_graph, scaling
from hf_hpmkd.recipe import load_recipe
from hf_hpmkd.report import markdown
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.run_record import RECORD_FILE, RunRecord

GRAPHS = 1_000
SCALING = (1, 2, 4, 8, 64)
_CLOSE = 1.10
LIMITS = {
    "one_worker_of_one_thread_over_two": "at least 1.80",
    "auto_over_one_process_with_all_cores": "at most 1.00",
    "handing_over_jobs_over_the_run": "at most 0.02",
    "makespan_over_lower_bound": "at most 1.10",
}


def bench_pipeline(
    recipe: str, words: Sequence[str], output: Path | None = None, turns: int = 1, graphs: int = GRAPHS
) -> dict[str, Any]:
    """All comparisons; prints them and writes them to `output` (JSON) where given.

    recipe, words: as for `hpmkd distill`. turns: how often each side runs, in turn; 0 leaves the runs out and takes the
    estimates for the schedules on paper. Returns the record.
    """
    versions, hardware = environment()
    record: dict[str, Any] = {
        "format_version": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": code_commit(),
        "versions": versions,
        "hardware": hardware,
        "recipe": recipe,
        "setting": [word for word in words if not word.startswith(("data.path", "teachers."))],
        "turns": turns,
        "simulator": simulator(graphs),
    }
    graph = estimated_graph(load_recipe(recipe, [*words, "memory.use=false"]))
    if turns:
        found, measured = _runs(recipe, words, turns, int(hardware["cores"]))
        record |= found
        graph = Graph(dataclasses.replace(job, seconds=measured[job.name]) for job in graph.jobs.values())
    record["scaling"] = {"measured": bool(turns), "table": scaling(graph, SCALING)}
    print(pipeline_table(record))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def pipeline_table(record: dict[str, Any]) -> str:
    """A record of `bench_pipeline` as Markdown: the ratios with our limits, and the schedules on paper."""
    lines = []
    if record["turns"]:
        seconds = {name: statistics.median(found) for name, found in record["seconds"].items()}
        ratios = {
            "one_worker_of_one_thread_over_two": seconds["one_thread"] / seconds["two_workers"],
            "auto_over_one_process_with_all_cores": seconds["auto"] / seconds["all_cores"],
            "handing_over_jobs_over_the_run": record["handing_share"],
        }
        lines = [[name.replace("_", " "), f"{ratio:.3g}", LIMITS[name]] for name, ratio in ratios.items()]
    for policy, told in (("critical-path", "ours"), ("first-come", "first come, first served")):
        found = record["simulator"][policy]
        figures = f"{found['median']:.3f}, {found['mean']:.3f}, {found['percentile_95']:.3f}, {found['largest']:.3f}"
        name = f"makespan ÷ lower bound, {record['simulator']['graphs']:,} graphs, {told}: median, mean, 95 %, largest"
        limit = LIMITS["makespan_over_lower_bound"] if policy == "critical-path" else "-"
        lines.append([name, f"{figures}; {found['share_within_limit']:.1%} within {_CLOSE:.2f}", limit])
    table = markdown(("ratio", "found", "limit"), lines, left=1)
    source = "measured in the run above" if record["scaling"]["measured"] else "estimated"
    return f"{table}\n\nOn paper, each job as long as {source}:\n\n{record['scaling']['table']}"


# ---- the simulator ---------------------------------------------------------------------------------------------------


def simulator(count: int) -> dict[str, Any]:
    """How far schedules of random graphs on 2 to 8 workers are above max(work / workers, critical path), by policy."""
    ratios: dict[str, list[float]] = {"critical-path": [], "first-come": []}
    for seed in range(count):
        chance = random.Random(seed)
        graph, workers = random_graph(chance), chance.randint(2, 8)
        for policy, found in ratios.items():
            makespan = simulate(graph, equal_workers(workers), policy).makespan  # type: ignore[arg-type]
            found.append(makespan / graph.lower_bound(workers))
    return {"graphs": count} | {policy: _distribution(found) for policy, found in ratios.items()}


def _distribution(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(ratios),
        "mean": statistics.mean(ratios),
        "percentile_95": sorted(ratios)[int(0.95 * len(ratios))],
        "largest": max(ratios),
        "share_within_limit": sum(ratio <= _CLOSE for ratio in ratios) / len(ratios),
    }


def random_graph(chance: random.Random) -> Graph:
    """A graph of one of four kinds, in turn by chance: any, in layers, with barriers, and like a distillation's."""
    kind = chance.randrange(4)
    jobs: list[Job] = []
    if kind == 0:
        share = chance.choice([0.02, 0.05, 0.1, 0.2])
        for index in range(chance.randint(10, 60)):
            needs = tuple(str(other) for other in range(index) if chance.random() < share)
            jobs.append(Job(str(index), chance.lognormvariate(0, 1), needs))
        return Graph(jobs)
    if kind in (1, 2):
        above: list[str] = []
        for layer in range(chance.randint(3, 10)):
            names = [f"{layer}.{index}" for index in range(chance.randint(1, 10))]
            for name in names:
                some = chance.sample(above, min(len(above), chance.randint(1, 3))) if kind == 1 else above
                jobs.append(Job(name, chance.lognormvariate(0, 1), tuple(some)))
            above = names
        return Graph(jobs)
    outputs = []
    for teacher in range(chance.randint(2, 6)):
        trained = (f"train {teacher}",) if chance.random() < 0.5 else ()
        jobs += [Job(name, 10 * chance.lognormvariate(0, 0.7)) for name in trained]
        seconds = chance.lognormvariate(0, 1)
        views = [f"outputs {teacher}.{view}" for view in range(chance.randint(1, 8))]
        jobs += [Job(name, seconds, trained) for name in views]
        outputs += views
    student = 10 * chance.lognormvariate(0, 0.7)
    return Graph([*jobs, Job("direct", student), Job("student", 1.1 * student, tuple(outputs))])


# ---- real runs -------------------------------------------------------------------------------------------------------


def _runs(recipe: str, words: Sequence[str], turns: int, cores: int) -> tuple[dict[str, Any], dict[str, float]]:
    """What goes into the record: seconds of each side's runs, the share of two workers' runs that went into handing
    over jobs, how many workers `auto` took (0: none); and the seconds of each job on one of two workers.
    """
    sides = {
        "one_thread": (1, ["pipeline.engine=in-process"]),
        "two_workers": (1, ["pipeline.engine=local", "pipeline.workers=2"]),
        "all_cores": (cores, ["pipeline.engine=in-process"]),
        "auto": (cores, ["pipeline.engine=auto"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    shares: list[float] = []
    taken_workers: list[int] = []
    jobs: dict[str, float] = {}
    for turn in range(turns):
        for name, (threads, settings) in list(sides.items())[:: 1 if turn % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                taken, record = _run(Path(folder), [recipe, *words, *settings], threads)
            seconds[name].append(taken)
            if name == "two_workers":
                jobs = {job.name: float(job.ended - job.started) for job in record.jobs if job.worker != "main"}
                shares.append(record.pipeline["handing_seconds"] / taken)
            if name == "auto":
                taken_workers.append(record.pipeline.get("workers", 0))
    return {"seconds": seconds, "handing_share": statistics.median(shares), "auto_workers": taken_workers}, jobs


def _run(folder: Path, words: Sequence[str], threads: int) -> tuple[float, RunRecord]:
    where = [f"output.dir={folder / 'run'}", "memory.use=false", f"distillation.cache_dir={folder / 'cache'}"]
    command = [sys.executable, "-m", "hf_hpmkd", "distill", *words, *where]
    started = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ValueError(f"The run that was to be measured failed:\n{done.stderr[-2000:]}")
    return seconds, RunRecord.load(folder / "run" / RECORD_FILE)
