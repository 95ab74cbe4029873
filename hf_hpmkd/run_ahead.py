"""Does the long jobs of a run before the run needs them, on several workers at a time, where that is faster.

The jobs leave their results where the run itself would: trainings in its folder, teacher outputs in the cache.
`distill` then goes through its steps as always and finds them finished, so it does not matter who did them.
"""

import atexit
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import TypeAdapter
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd.chain import FOLDER as CHAIN_FOLDER
from hf_hpmkd.chain import build_chain
from hf_hpmkd.chain_stages import WarmBuild, require_hints
from hf_hpmkd.classifier_training import student_schedule, train_or_load
from hf_hpmkd.components.parallel_pipeline import Graph, equal_workers, simulate
from hf_hpmkd.data import DataParts
from hf_hpmkd.engines import Ended, LocalWorkers, PipelineConfig, run_jobs, run_on_ray
from hf_hpmkd.evaluation import capture
from hf_hpmkd.job_graph import Task, corrected, has_chain, run_graph, run_tasks
from hf_hpmkd.kept_student import distilled_folder
from hf_hpmkd.model_cost import operations_per_second, thread_gain, training_flops
from hf_hpmkd.recipe import Recipe, read_recipe, recipe_tree
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import is_trained_here, teacher_names, uses_teachers
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_environment import environment
from hf_hpmkd.run_memory import RunMemory, run_memory
from hf_hpmkd.run_record import ChainRecord, JobRecord, plain_values
from hf_hpmkd.run_steps import get_teachers, load, student_builder, train
from hf_hpmkd.teacher_cache import Tally
from hf_hpmkd.teacher_kinds import Teacher
from hf_hpmkd.teacher_training import folders_done
from hf_hpmkd.training_folder import done_file, write_json

LOGS = "logs"
_DECIDED = "decided.json"
_START_SECONDS = 12.0  # of a worker: Python, torch, transformers
_MEASURED_SECONDS = 0.1  # of a training step with all threads
_MOST_WORKERS = 8  # that are taken unasked: each holds the data and a model
_WORTH_IT = 0.9  # estimates err, so workers must promise more than nothing,
_LEAST_SAVED = 60.0  # and more seconds than the start of workers may err by
_COUNTED = ("models_found", "models_computed", "model_seconds")


# ---- in the run's own process ----------------------------------------------------------------------------------------


def run_ahead(run: Run, parts: DataParts) -> None:
    """Does the run's unfinished jobs, if its recipe asks for workers, or leaves it to us and they are faster.

    Raises what loading a teacher raises, and JobsFailedError where a job failed, once all that can be done is done.
    """
    config, threads = run.recipe.pipeline, torch.get_num_threads()
    devices = _devices()
    if config.engine == "in-process" or PartialState().num_processes > 1:
        return
    if devices and config.engine == "local":
        devices = _groups(devices, config.processes)
    count = config.workers or len(devices) or max(1, min(threads, _MOST_WORKERS) // config.processes)
    if not devices and not config.address and config.processes > max(1, threads // count):
        raise ValueError(
            f"pipeline.processes: {config.processes} processes of a job need as many threads, but {count} workers "
            f"share {threads}. Take fewer workers or processes, or raise OMP_NUM_THREADS."
        )
    if config.engine == "auto" and (count < 2 or devices):
        return  # nothing to share out, or a GPU that one job at a time may fill
    raw = run_graph(run.recipe, parts)
    store = run.memory.store
    graph = corrected(raw, store.records()[0] if store is not None else [], environment()[1])
    if config.engine == "auto" and not _can_pay(run, graph, count):
        return
    done = _finished(run, parts)
    raw, graph = raw.without(done), graph.without(done)
    if not raw.jobs:
        return
    if config.engine == "auto" and all(name.split()[0] == "outputs" for name in raw.jobs):
        return  # what is left is a matter of moments
    reason = "as the recipe asks"
    if config.engine == "auto":
        faster = _faster(run, parts, graph, count, threads)
        if faster is None:
            return
        reason = faster
    _do(run, config, raw, graph, min(count, len(graph.jobs)), max(1, threads // count), devices, reason)


def _devices() -> list[str]:
    """The CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


def _groups(devices: list[str], size: int) -> list[str]:
    """Devices in groups for jobs of so many processes; those left over stay idle."""
    if len(devices) < size:
        raise ValueError(
            f"pipeline.processes: {size} processes of a job need as many GPUs, but {len(devices)} are seen. Take fewer "
            "processes, or show more in CUDA_VISIBLE_DEVICES."
        )
    return [",".join(devices[first : first + size]) for first in range(0, len(devices) - size + 1, size)]


def _faster(run: Run, parts: DataParts, graph: Graph, count: int, threads: int) -> str | None:
    """Why workers are worth it; None where one process with all threads is estimated to be as fast."""
    if not _can_pay(run, graph, count):
        return None
    build = student_builder(run.recipe, parts)
    rows = math.ceil(_MEASURED_SECONDS * operations_per_second() / training_flops(build(meta=True), parts.train))
    gain = thread_gain(build(), parts.train, min(rows, run.recipe.training.batch_size), threads, count)
    slower = count / gain  # seconds of a job on one of the workers, over those with all threads
    alone = Graph(dataclasses.replace(job, seconds=slower * job.seconds) for job in graph.jobs.values())
    together = _seconds_together(run, alone, count)
    told = f"estimated at {together:.0f} s, one process with {threads} threads at {graph.work:.0f} s"
    if together > _worth(graph):
        run.say(f"Pipeline: {count} workers are {told}, so one process does it all.")
        return None
    return told


def _can_pay(run: Run, graph: Graph, count: int) -> bool:
    """Whether workers would be worth it if one of their jobs took no longer than with all threads."""
    return _seconds_together(run, graph, count) <= _worth(graph)


def _seconds_together(run: Run, graph: Graph, count: int) -> float:
    start = _START_SECONDS + float(run.record.seconds.get("data", 0.0))  # every worker loads the data
    return simulate(graph, equal_workers(count)).makespan + start


def _worth(graph: Graph) -> float:
    """The most seconds that workers may be estimated at, to be preferred to one process."""
    return min(_WORTH_IT * graph.work, graph.work - _LEAST_SAVED)


def _do(
    run: Run,
    config: PipelineConfig,
    raw: Graph,
    graph: Graph,
    count: int,
    threads: int,
    devices: list[str],
    reason: str,
) -> None:
    engine = "ray" if config.engine == "ray" else "local"
    threads = 1 if config.address else threads  # a cluster's nodes are its own to share out
    expected = simulate(graph, equal_workers(count)).makespan
    run.record.pipeline = {"engine": engine, "workers": count, "threads": threads, "reason": reason}
    run.record.pipeline |= {"jobs": len(graph.jobs), "estimated_seconds": round(expected, 3)}
    run.record.pipeline |= {"begun": [], "starting_seconds": 0.0, "handing_seconds": 0.0}
    run.say(f"Pipeline: {len(graph.jobs)} jobs, {count} workers of {threads} threads ({engine}), {reason}.")
    if run.record.chain is not None and run.record.chain.reason:
        _keep_chain(run.folder, run.record.chain)
    launched = tuple(job.name for job in graph.jobs.values() if job.processes > 1)
    jobs = RunJobs(json.dumps(recipe_tree(run.recipe)), str(run.folder.absolute()), os.getcwd(), launched)
    logs = run.folder / LOGS
    done = 0

    def tell(one: Ended) -> None:
        nonlocal done
        done += 1
        outcome = f"{one.ended - one.started:.1f} s" if one.error is None else f"failed, {one.error}"
        run.say(f"[{done}/{len(graph.jobs)}] {one.job}: {outcome} (worker {one.worker})")
        _keep(run, raw, one)

    if config.engine == "ray":
        run_on_ray(graph, jobs, logs, config.address, count, threads, tell)
        return
    with LocalWorkers(count, threads, devices) as pool:
        run_jobs(graph, jobs, pool, logs, tell)


def _keep(run: Run, raw: Graph, one: Ended) -> None:
    """Writes down what a job did, as if the run had done it."""
    job = raw.jobs[one.job]
    run.record.jobs.append(JobRecord(one.job, one.worker, one.started, one.ended, job.kind, job.seconds, one.attempts))
    waited = one.received - one.handed - (one.ended - one.started)
    is_first = one.worker not in run.record.pipeline["begun"]  # its wait was for the worker's libraries
    run.record.pipeline["starting_seconds" if is_first else "handing_seconds"] += waited
    run.record.pipeline["begun"] += [one.worker] if is_first else []
    if one.error is None:
        if "chain" in one.value:
            run.record.chain = TypeAdapter(ChainRecord).validate_python(one.value["chain"])
            run.record.curves |= one.value["curves"]
            for warning in one.value["warnings"]:
                run.warn(warning)
        _count(run.memory, one.value)
    run.save()


def _count(memory: RunMemory, value: dict[str, Any]) -> None:
    """Adds what a job found in the memory to what the run did."""
    tally, found = memory.cache.tally, value["tally"]
    if set(found["names"]) - tally.names:
        for key in ("found", "computed", "found_bytes", "found_seconds"):
            setattr(tally, key, getattr(tally, key) + found[key])
        tally.names.update(found["names"])
    elif not found["names"]:
        tally.computed += found["computed"]  # outputs of stages of the chain
    if memory.store is not None:
        for key in _COUNTED:
            setattr(memory.store, key, getattr(memory.store, key) + value[key])


def _finished(run: Run, parts: DataParts) -> list[str]:
    """Names of the jobs whose results are there. Loads, and so checks, every teacher that is not trained here."""
    done = []
    teachers: dict[str, Teacher] = {}
    for name, config in zip(teacher_names(run.recipe), run.recipe.teachers, strict=True):
        if not is_trained_here(config.model):
            teachers[name] = load(run, name, config, parts)
        elif folders_done(config, run.folder / "teachers" / name):
            teachers[name] = train(run, name, config, parts)
    for task in run_tasks(run.recipe, parts.num_views):
        if task.what == "train":
            there = task.teacher in teachers
        elif task.what == "outputs":
            there = task.teacher in teachers and _has_outputs(run, task, teachers[task.teacher], parts)
        elif task.what == "chain":
            there = run.record.chain is not None and bool(run.record.chain.reason)
        else:
            folder = distilled_folder(run.folder) if task.what == "student" else run.folder / task.what
            there = done_file(folder).is_file()
        if there:
            done.append(task.name)
    return done


def _has_outputs(run: Run, task: Task, teacher: Teacher, parts: DataParts) -> bool:
    distillation = run.recipe.distillation
    mode = distillation.teacher_outputs if task.part == "train" else "full"
    return run.memory.cache.has(teacher, getattr(parts, task.part), task.view, mode, distillation.topk or 16)


def _keep_chain(folder: Path, chain: ChainRecord) -> None:
    (folder / CHAIN_FOLDER).mkdir(exist_ok=True)
    write_json(folder / CHAIN_FOLDER / _DECIDED, plain_values(dataclasses.asdict(chain), "chain"))


# ---- in a worker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunJobs:
    """The jobs of one run by their names, in whatever process. recipe: its tree as JSON. folder: the run's, absolute.
    where: the folder that relative paths of the recipe start from. launched: names of those that several processes
    share.
    """

    recipe: str
    folder: str
    where: str
    launched: tuple[str, ...] = ()

    def __call__(self, name: str) -> dict[str, Any]:
        return self._launch(name) if name in self.launched else self.here(name)

    def here(self, name: str) -> dict[str, Any]:
        """A job in this process, or its share of one that several do together."""
        return _place(self).do(name)

    def _launch(self, name: str) -> dict[str, Any]:
        processes = json.loads(self.recipe)["pipeline"]["processes"]
        threads = max(1, torch.get_num_threads() // processes)
        with tempfile.TemporaryDirectory() as folder:
            asked, answer = Path(folder) / "job.json", Path(folder) / "value.json"
            about = {"jobs": dataclasses.asdict(self), "name": name, "answer": str(answer), "parent": os.getpid()}
            write_json(asked, about)
            # Several processes on CPUs, too, are what accelerate calls multi_gpu; port 0 is any that is free.
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
            launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run([*launch, "-m", "hf_hpmkd.launched_job", str(asked)], cwd=self.where, env=env)
            if done.returncode or not answer.is_file():
                raise RuntimeError(f"accelerate launch of {processes} processes ended with {done.returncode}")
            return json.loads(answer.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _place(jobs: RunJobs) -> "_Place":
    """What the jobs of a run share inside a process."""
    os.chdir(jobs.where)
    return _Place(read_recipe(json.loads(jobs.recipe), "the recipe"), Path(jobs.folder))


class _WorkerRun(Run):
    """The run as a worker sees it; its record is the first process's to write."""

    def save(self) -> None:
        pass


class _Place:
    """Recipe, data and memory of a run inside a worker. Loaded once, when first needed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        state = PartialState(cpu=not torch.accelerator.is_available())
        disable_progress_bar()
        stack = ExitStack()
        atexit.register(stack.close)
        memory = stack.enter_context(run_memory(recipe, state.is_main_process))
        self.run = _WorkerRun(folder, new_record(recipe), memory)
        self.teachers: dict[str, Teacher] = {}

    @cached_property
    def parts(self) -> DataParts:
        return recipe_parts(self.run.recipe)

    def do(self, name: str) -> dict[str, Any]:
        """Does a job; returns what it found in the memory, and the chain where it decided on one."""
        run, task = self.run, {task.name: task for task in run_tasks(self.run.recipe, self.parts.num_views)}[name]
        run.memory.cache.tally = Tally()
        before = {key: getattr(run.memory.store, key, 0) for key in _COUNTED}
        value: dict[str, Any] = {}
        if task.what == "train":
            self.teacher(task.teacher)
        elif task.what == "outputs":
            teacher = self.teacher(task.teacher)
            capture(teacher, task.part, task.view, self.parts, run.recipe, run.memory.cache)
        elif task.what == "direct":
            self.train_student("direct", [], WarmBuild(student_builder(run.recipe, self.parts), [], self.parts.train))
        else:
            value = self.chain_or_student(task.what)
        tally = run.memory.cache.tally
        # What other jobs find is what these computed, or what the run itself will find and count.
        value["tally"] = {**vars(tally), "names": sorted(tally.names) if task.what == "outputs" else []}
        return value | {key: getattr(run.memory.store, key, 0) - before[key] for key in _COUNTED}

    def teacher(self, name: str) -> Teacher:
        """A teacher, loaded or trained; the last one is kept."""
        if name not in self.teachers:
            config = dict(zip(teacher_names(self.run.recipe), self.run.recipe.teachers, strict=True))[name]
            get = train if is_trained_here(config.model) else load
            self.teachers = {name: get(self.run, name, config, self.parts)}
        return self.teachers[name]

    def chain_or_student(self, what: str) -> dict[str, Any]:
        run, parts = self.run, self.parts
        build = student_builder(run.recipe, parts)
        decided = run.folder / CHAIN_FOLDER / _DECIDED
        run.record.chain = None
        if what == "student" and has_chain(run.recipe):
            run.record.chain = TypeAdapter(ChainRecord).validate_json(decided.read_text(encoding="utf-8"))
        chain = build_chain(run, parts, get_teachers(run, parts), build)
        if what == "chain":
            assert run.record.chain is not None
            if run.is_main:
                _keep_chain(run.folder, run.record.chain)
            told = {"curves": run.record.curves, "warnings": run.record.warnings}
            return {"chain": plain_values(dataclasses.asdict(run.record.chain), "chain"), **told}
        guides = chain.guides if uses_teachers(run.recipe) else []
        build_warm = WarmBuild(build, chain.above, self.parts.train)
        require_hints(run.recipe, build_warm)
        self.train_student("student", guides, build_warm)
        return {}

    def train_student(self, name: str, guides: list[Teacher], build: WarmBuild) -> None:
        run, parts = self.run, self.parts
        train_or_load(
            name,
            build,
            run.recipe,
            student_schedule(run.recipe),
            run.folder / name,
            parts.train,
            parts.validation,
            num_views=parts.num_views,
            teachers=guides,
            guide=parts.guide if guides else None,
            cache=run.memory.cache,
        )
