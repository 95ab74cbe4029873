"""Runs the jobs of a graph: on worker processes of this machine, one job each at a time, or on a Ray cluster.

A job is a call with its name that leaves its result on the disk, where it finds it the next time; so a job that was
lost is simply called again, and nothing but small values travels. Knows nothing of what the jobs do.
"""

import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from hf_hpmkd.components.parallel_pipeline import Graph, Job, Scheduler, Worker

Do = Callable[[str], dict[str, Any]]
"""A job by its name; picklable, and safe to be called again after it was lost."""

Called = tuple[float, float, dict[str, Any], str | None]
"""Of a call: seconds since 1970 at its start and its end, what it returned, and what went wrong."""

_ATTEMPTS = 3
_POLL_SECONDS = 1.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@checked_dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True), kw_only=True)
class PipelineConfig:
    """Who does the jobs of a run: teachers' trainings and outputs, the direct student, the chain, the student."""

    engine: Literal["in-process", "auto", "local", "ray"] = Field(
        "auto",
        description="in-process: one job after the other, with all threads; local: worker processes on this machine; "
        "ray: a Ray cluster that sees this folder; auto: local where that saves minutes by estimate, else in-process.",
    )
    workers: int | None = Field(
        None, ge=1, description="Jobs at a time; null: one per GPU, without GPUs one per thread of the run."
    )
    processes: int = Field(
        1,
        ge=1,
        description="Processes of one network's training, as accelerate launch starts them, on as many GPUs, without "
        "GPUs with the worker's threads shared out. They share a batch.",
    )
    address: str | None = Field(
        None, min_length=1, description="Ray cluster, as ray.init takes it (auto, HOST:PORT); null starts one here."
    )


@dataclass(frozen=True)
class Ended:
    """A job that ended. started, ended: of the job itself, seconds since 1970. handed, received: when it was given away
    and known to have ended. attempts: how often it was started. error: why it failed; None where it did not.
    """

    job: str
    worker: str
    started: float
    ended: float
    handed: float
    received: float
    attempts: int
    value: dict[str, Any]
    error: str | None = None


class JobsFailedError(ValueError):
    """Some jobs failed, and all that does not depend on them is done. ended: every job that ended, in that order."""

    def __init__(self, graph: Graph, ended: Sequence[Ended], logs: Path) -> None:
        self.ended = list(ended)
        failed = [one for one in ended if one.error is not None]
        left_out = {name for one in failed for name in graph.depending_on(one.job)}
        lines = []
        for one in failed:
            inputs = ", ".join(graph.jobs[one.job].needs) or "none"
            lines.append(f"  - {one.job}: {one.error} (inputs: {inputs}; log: {log_file(logs, one.job)})")
        after = f"; {len(left_out)} that need them were left out" if left_out else ""
        count = "1 job" if len(failed) == 1 else f"{len(failed)} jobs"
        super().__init__(
            f"{count} of {len(graph.jobs)} failed{after}; the rest is done and kept, and the same command goes on:\n"
            + "\n".join(lines)
        )


def log_file(logs: Path, job: str) -> Path:
    """Where a job's output goes."""
    return logs / f"{job.replace(' ', '-').replace('/', '-')}.log"


def run_jobs(
    graph: Graph, do: Do, pool: "LocalWorkers", logs: Path, tell: Callable[[Ended], None] = lambda one: None
) -> list[Ended]:
    """Does all jobs of a graph on the workers of an open pool; returns them in the order in which they ended.

    tell: hears of each at once. A job whose worker dies is started again on a fresh one, twice at most. Raises
    JobsFailedError at the end if a job failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    scheduler = Scheduler(graph, pool.workers)
    running: dict[Future[Any], tuple[Job, Worker, float]] = {}
    attempts: Counter[str] = Counter()
    ended: list[Ended] = []
    while True:
        for job, worker in scheduler.next(time.time()):
            attempts[job.name] += 1
            words = (worker, _call, do, job.name, log_file(logs, job.name))
            handed = time.time()  # before: an idle worker begins at once
            try:
                future = pool.submit(*words)
            except BrokenProcessPool:  # it died while it waited
                pool.renew(worker)
                future = pool.submit(*words)
            running[future] = (job, worker, handed)
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, worker, handed = running.pop(future)
            now, count = time.time(), attempts[job.name]
            try:
                one = _ended(job.name, worker.name, future.result(), handed, now, count)
            except BrokenProcessPool as error:
                pool.renew(worker)
                if count < _ATTEMPTS:
                    scheduler.again(worker)
                    continue
                told = f"its worker died {count} times, for want of memory perhaps ({type(error).__name__})"
                one = Ended(job.name, worker.name, handed, now, handed, now, count, {}, told)
            if one.error is None:
                scheduler.ended(worker, now)
            else:
                scheduler.failed(worker)
            ended.append(one)
            tell(one)
    if any(one.error is not None for one in ended):
        raise JobsFailedError(graph, ended, logs)
    return ended


class LocalWorkers:
    """Worker processes on this machine, each with so many threads; to be used as a context.

    Each is a loky pool of one process: a worker that dies takes no other with it, and it is known who did what. Threads
    are limited, not tied to cores, so that two programs do not crowd on the same ones. devices: per worker those it
    sees, as CUDA_VISIBLE_DEVICES takes them, shared out in turn; without any, workers see none. Whatever ends this
    process ends the workers.
    """

    def __init__(self, count: int, threads: int = 1, devices: Sequence[str] = ()) -> None:
        self.threads, self.devices = threads, list(devices)
        device = "cuda" if devices else "cpu"
        self.workers = [Worker(str(index + 1), threads, device=device) for index in range(count)]
        self._pools: dict[str, Any] = {}

    def __enter__(self) -> "LocalWorkers":
        for worker in self.workers:
            self._pools[worker.name] = self._new(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=True, kill_workers=kind is not None)

    def submit(self, worker: Worker, call: Callable[..., Any], *words: Any) -> "Future[Any]":
        """Starts a call on a worker, which is idle."""
        return self._pools[worker.name].submit(call, *words)

    def renew(self, worker: Worker) -> None:
        """Puts a fresh process in the place of one that died."""
        self._pools[worker.name].shutdown(wait=True, kill_workers=True)
        self._pools[worker.name] = self._new(worker)

    def _new(self, worker: Worker) -> Any:
        from loky.process_executor import ProcessPoolExecutor

        env = dict.fromkeys(_THREAD_VARIABLES, str(self.threads))  # read by the libraries when they are loaded
        # loky restarts a worker that has grown, taking it for a leak; ours keep data and models.
        env["LOKY_MAX_MEMORY_LEAK_SIZE"] = "1e18"
        if self.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.devices[self.workers.index(worker) % len(self.devices)]
        return ProcessPoolExecutor(1, env=env, initializer=_begin, initargs=(self.threads,))


def _begin(threads: int) -> None:
    """The first thing in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the first process ends the others
    parent = os.getppid()
    end_when(lambda: os.getppid() != parent)


def end_when(is_over: Callable[[], bool]) -> None:
    """Ends this process, whatever it does, once that holds: a process that was killed could not end its own."""

    def watch() -> None:
        while not is_over():
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ended(job: str, worker: str, called: Called, handed: float, received: float, attempts: int) -> Ended:
    started, ended, value, error = called
    return Ended(job, worker, started, ended, handed, received, attempts, value, error)


def _call(do: Do, name: str, log: Path) -> Called:
    """A job in a worker: when it started and ended, its value, and what went wrong."""
    with output_to(log):
        started = time.time()
        try:
            value, error = do(name), None
        except Exception as problem:  # whatever it is, other jobs are not concerned
            traceback.print_exc()
            value, error = {}, f"{type(problem).__name__}: {problem}"
        return started, time.time(), value, error


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Everything that is printed, warnings and progress bars included, goes to a file: processes would mix theirs."""
    kept = [os.dup(1), os.dup(2)]
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for target, old in zip((1, 2), kept, strict=True):
            os.dup2(old, target)
            os.close(old)


# ---- Ray -------------------------------------------------------------------------------------------------------------


def run_on_ray(
    graph: Graph,
    do: Do,
    logs: Path,
    address: str | None = None,
    num_workers: int | None = None,
    threads: int = 1,
    tell: Callable[[Ended], None] = lambda one: None,
) -> list[Ended]:
    """`run_jobs` on a Ray cluster, whose are resources, retries and scheduling: all jobs are handed over at once.

    address: as `ray.init` takes it; None starts a cluster on this machine, where num_workers is given with CPUs for so
    many of the largest jobs. threads: of a job. Every node must see the folders that the jobs read and write. Raises
    ImportError without Ray, and ValueError where no node has room for the processes of a job: Ray would wait forever.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('pipeline.engine: ray needs Ray. Install it: pip install "hf_hpmkd[ray]"') from error

    logs.mkdir(parents=True, exist_ok=True)
    size = max((_num_cpus(job) for job in graph.jobs.values()), default=1)
    cpus = None if address or num_workers is None else num_workers * size
    ray.init(address=address, num_cpus=cpus, log_to_driver=False)
    try:
        remote = ray.remote(_call_on_ray)
        handed = time.time()
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        env = {"env_vars": dict.fromkeys(_THREAD_VARIABLES, str(threads))}
        options_of: dict[str, dict[str, Any]] = {}
        for job in graph.jobs.values():
            # On one machine a job stands for a worker, however little of it: else more of them would share its threads.
            room = _num_cpus(job) if cpus is None else size
            options: dict[str, Any] = {"num_cpus": room, "max_retries": _ATTEMPTS - 1, "name": job.name}
            gpus = job.processes if has_gpus and job.device != "cpu" else 0
            options_of[job.name] = options | {"num_gpus": gpus, "memory": job.memory or None, "runtime_env": env}
            fits = any(node.get("CPU", 0) >= _num_cpus(job) and node.get("GPU", 0) >= gpus for node in nodes)
            if job.processes > 1 and not fits:
                raise ValueError(
                    f"pipeline.processes: {job.name} in {job.processes} processes needs {_num_cpus(job)} CPUs and "
                    f"{gpus} GPUs on one node, but no node of the Ray cluster has them. Take fewer processes."
                )
        refs: dict[str, Any] = {}
        for job in graph.jobs.values():
            needed = [refs[name] for name in job.needs]
            refs[job.name] = remote.options(**options_of[job.name]).remote(
                do, job.name, log_file(logs, job.name), *needed
            )
        names = {ref: name for name, ref in refs.items()}
        ended: list[Ended] = []
        waiting = list(names)
        while waiting:
            (ref, *_), waiting = ray.wait(waiting, num_returns=1)
            one = _ended_on_ray(ray, ref, names[ref], handed)
            if one is not None:
                ended.append(one)
                tell(one)
    finally:
        ray.shutdown()
    if any(one.error is not None for one in ended):
        raise JobsFailedError(graph, ended, logs)
    return ended


def _num_cpus(job: Job) -> int:
    """CPUs that a job asks of Ray."""
    return job.threads * job.processes


def _ended_on_ray(ray: Any, ref: Any, name: str, handed: float) -> Ended | None:
    """What became of a job; None where something it needs had failed."""
    try:
        found: Mapping[str, Any] | None = ray.get(ref)
    except ray.exceptions.RayError as error:
        now = time.time()
        told = f"Ray gave it up ({type(error).__name__}: {str(error).splitlines()[0]})"
        return Ended(name, "ray", now, now, handed, now, _ATTEMPTS, {}, told)
    if found is None:
        return None
    return _ended(name, found["worker"], found["call"], handed, time.time(), 1)


def _call_on_ray(do: Do, name: str, log: Path, *needed: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A job on a node. needed: what the jobs before it gave."""
    if any(one is None or one["call"][3] is not None for one in needed):
        return None
    return {"worker": f"pid {os.getpid()}", "call": _call(do, name, log)}
