"""Jobs that need each other, placed on workers: the graph, the order, and a simulator of the schedule.

Times are estimates until a job has ended. Knows nothing of processes, models or files: `engines` runs the jobs, with
the same `Scheduler` that the simulator drives here.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Policy = Literal["critical-path", "first-come"]


@dataclass(frozen=True)
class Job:
    """One piece of work. seconds: estimated, on a worker of speed 1. needs: names of the jobs whose results it takes.

    key: what its result depends on, so that a finished one is found by it. kind: jobs whose estimates err alike.
    threads, memory (bytes) and device ("cpu", "cuda", ...; None: any) are what a worker must offer it. processes: that
    share it, each with a device of its own where there are any.
    """

    name: str
    seconds: float
    needs: tuple[str, ...] = ()
    key: str = ""
    kind: str = ""
    threads: int = 1
    memory: int = 0
    device: str | None = None
    processes: int = 1


@dataclass(frozen=True)
class Worker:
    """Something that does one job at a time. speed: 2 halves the seconds of every job."""

    name: str
    threads: int = 1
    memory: float = math.inf
    device: str = "cpu"
    speed: float = 1.0

    def fits(self, job: Job) -> bool:
        """Whether it offers what the job needs."""
        device = job.device in (None, self.device)
        return device and job.threads <= self.threads and job.memory <= self.memory


def equal_workers(count: int, threads: int = 1) -> list[Worker]:
    """So many workers that differ in nothing but their names, "1", "2", ..."""
    return [Worker(str(index + 1), threads) for index in range(count)]


class Graph:
    """Jobs in an order in which each stands behind those it needs; otherwise they keep the order they came in.

    Raises ValueError for two jobs of one name, a need that is no job, jobs that need each other in a circle, and
    seconds that are negative or not finite.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        given = list(jobs)
        self.jobs = {job.name: job for job in given}
        if len(self.jobs) < len(given):
            names = sorted({job.name for job in given if sum(other.name == job.name for other in given) > 1})
            raise ValueError(f"Every job needs a name of its own, but {', '.join(names)} is given more than once.")
        for job in given:
            if unknown := [name for name in job.needs if name not in self.jobs]:
                raise ValueError(f"Job {job.name!r} needs {', '.join(unknown)}, which is no job of this graph. Add it.")
            if not 0 <= job.seconds < math.inf:
                raise ValueError(f"Job {job.name!r} must take 0 or more seconds, got {job.seconds}.")
        self.jobs = {job.name: job for job in self._sorted()}
        self.needed_by: dict[str, list[str]] = {name: [] for name in self.jobs}
        for job in self.jobs.values():
            for name in job.needs:
                self.needed_by[name].append(job.name)

    def _sorted(self) -> list[Job]:
        done: dict[str, Job] = {}
        waiting = list(self.jobs.values())
        while waiting:
            ready = [job for job in waiting if all(name in done for name in job.needs)]
            if not ready:
                circle = _circle({job.name: job for job in waiting})
                raise ValueError(f"Jobs need each other in a circle: {' needs '.join(circle)}. Take one need out.")
            done |= {job.name: job for job in ready}
            waiting = [job for job in waiting if job.name not in done]
        return list(done.values())

    @cached_property
    def work(self) -> float:
        """Seconds of all jobs, one after the other."""
        return sum(job.seconds for job in self.jobs.values())

    def ranks(self, seconds: Mapping[str, float] | None = None) -> dict[str, float]:
        """Per job the seconds of the longest path from its start to the end of everything (the upward rank of Topcuoglu
        et al. 2002, with communication for free). seconds: estimates to use; None takes the jobs' own.
        """
        ranks: dict[str, float] = {}
        for job in reversed(self.jobs.values()):
            own = job.seconds if seconds is None else seconds[job.name]
            ranks[job.name] = own + max((ranks[name] for name in self.needed_by[job.name]), default=0.0)
        return ranks

    @cached_property
    def critical_path(self) -> list[str]:
        """The longest chain of jobs that need each other; no schedule is shorter, with however many workers."""
        ranks = self.ranks()
        path: list[str] = []
        following = [job.name for job in self.jobs.values() if not job.needs]
        while following:
            path.append(max(following, key=lambda name: ranks[name]))
            following = self.needed_by[path[-1]]
        return path

    def lower_bound(self, workers: int) -> float:
        """max(work / workers, critical path), in seconds; the shortest schedule may be longer than that."""
        path = sum(self.jobs[name].seconds for name in self.critical_path)
        return max(self.work / workers, path)

    def depending_on(self, name: str) -> set[str]:
        """All jobs that cannot be done without this one."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            new = [other for other in self.needed_by[waiting.pop()] if other not in found]
            found.update(new)
            waiting += new
        return found

    def without(self, finished: Iterable[str]) -> "Graph":
        """What is left to do; needs of finished jobs are met."""
        gone = set(finished)
        left = [job for job in self.jobs.values() if job.name not in gone]
        return Graph(_without_needs(job, gone) for job in left)


def _without_needs(job: Job, gone: set[str]) -> Job:
    return Job(**{**vars(job), "needs": tuple(name for name in job.needs if name not in gone)})


def _circle(jobs: Mapping[str, Job]) -> list[str]:
    """Names along a circle, the first one again at the end. jobs: each needs one of the others."""
    path = [next(iter(jobs))]
    while len(set(path)) == len(path):
        path.append(next(name for name in jobs[path[-1]].needs if name in jobs))
    return path[path.index(path[-1]) :]


# ---- who does what, when ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """A job on a worker. start, end: seconds since the first start."""

    job: str
    worker: str
    start: float
    end: float


@dataclass
class Schedule:
    """What ran where and when."""

    placements: list[Placement] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first job to the end of the last."""
        return max((one.end for one in self.placements), default=0.0)


class Estimates:
    """Estimated seconds of jobs, corrected as jobs end: by the ratio measured / estimated of their kind, where none of
    the kind has ended by that of all together.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._estimated: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def ended(self, job: Job, seconds: float) -> None:
        """Learns from a job that took so many seconds (on a worker of speed 1)."""
        for kind in (job.kind, ""):
            self._estimated[kind] = self._estimated.get(kind, 0.0) + job.seconds
            self._measured[kind] = self._measured.get(kind, 0.0) + seconds

    def seconds(self, job: Job) -> float:
        """The corrected estimate."""
        kind = job.kind if self._estimated.get(job.kind) else ""
        estimated = self._estimated.get(kind)
        return job.seconds * self._measured[kind] / estimated if estimated else job.seconds


class Scheduler:
    """Says which worker starts which job next, while jobs start and end: the critical path first, of equals the
    longest, each on the worker where it is estimated to end first. Whoever drives it keeps the clock.

    policy: "first-come" takes ready jobs in the order of the graph, and any idle worker. With the critical path, a job
    waits for a busy worker that would still end it sooner.

    Raises ValueError for a job that no worker can do.
    """

    def __init__(self, graph: Graph, workers: Sequence[Worker], policy: Policy = "critical-path") -> None:
        for job in graph.jobs.values():
            if not any(worker.fits(job) for worker in workers):
                raise ValueError(
                    f"Job {job.name!r} needs {job.threads} threads, {job.memory:,} bytes and device "
                    f"{job.device or 'any'}, which none of the {len(workers)} workers has. Give one of them more."
                )
        self.graph, self.workers, self.policy = graph, list(workers), policy
        self.estimates = Estimates(graph)
        self._order = {name: index for index, name in enumerate(graph.jobs)}
        self._open = {job.name: len(job.needs) for job in graph.jobs.values()}
        self._ready = {name for name, needs in self._open.items() if needs == 0}
        self._busy_until: dict[str, float] = {}
        self._running: dict[str, tuple[str, float]] = {}  # worker -> job, start
        self._ranks = self._corrected_ranks()

    @property
    def is_done(self) -> bool:
        """Whether nothing runs and nothing is ready."""
        return not self._running and not self._ready

    def next(self, now: float) -> list[tuple[Job, Worker]]:
        """The jobs that start now; they count as started."""
        started: list[tuple[Job, Worker]] = []
        for name in sorted(self._ready, key=self._by_priority):
            if len(self._running) == len(self.workers):
                break
            job = self.graph.jobs[name]
            worker = self._best_worker(job, now)
            if worker is not None:
                self._ready.remove(name)
                self._running[worker.name] = (name, now)
                self._busy_until[worker.name] = now + self.estimates.seconds(job) / worker.speed
                started.append((job, worker))
        return started

    def ended(self, worker: Worker, now: float) -> None:
        """The worker has finished its job."""
        name, start = self._running.pop(worker.name)
        self.estimates.ended(self.graph.jobs[name], (now - start) * worker.speed)
        for other in self.graph.needed_by[name]:
            self._open[other] -= 1
            if self._open[other] == 0:
                self._ready.add(other)
        self._ranks = self._corrected_ranks()

    def again(self, worker: Worker) -> None:
        """The worker has lost its job, which is ready again."""
        self._ready.add(self._running.pop(worker.name)[0])

    def failed(self, worker: Worker) -> set[str]:
        """The worker's job cannot be done; returns the jobs that are never ready because of it."""
        return self.graph.depending_on(self._running.pop(worker.name)[0])

    def _corrected_ranks(self) -> dict[str, float]:
        return self.graph.ranks({job.name: self.estimates.seconds(job) for job in self.graph.jobs.values()})

    def _by_priority(self, name: str) -> tuple[float, ...]:
        if self.policy == "first-come":
            return (self._order[name],)
        return (-self._ranks[name], -self.graph.jobs[name].seconds, self._order[name])

    def _best_worker(self, job: Job, now: float) -> Worker | None:
        """An idle worker, if none that is busy would end the job sooner."""
        fitting = [worker for worker in self.workers if worker.fits(job)]
        idle = [worker for worker in fitting if worker.name not in self._running]
        if not idle:
            return None
        if self.policy == "first-come":
            return idle[0]
        seconds = self.estimates.seconds(job)

        def end(worker: Worker) -> float:
            free = max(now, self._busy_until[worker.name]) if worker.name in self._running else now
            return free + seconds / worker.speed

        best = min(idle, key=end)
        return best if all(end(best) <= end(worker) for worker in fitting) else None


def simulate(
    graph: Graph,
    workers: Sequence[Worker],
    policy: Policy = "critical-path",
    *,
    actual: Mapping[str, float] | None = None,
) -> Schedule:
    """The schedule, without doing any of it. actual: what jobs really take, in seconds; None: what they are estimated.
    Starting a job takes no time.
    """
    scheduler = Scheduler(graph, workers, policy)
    schedule = Schedule()
    running: list[tuple[float, int, Worker]] = []  # end, tie-breaker
    now = 0.0
    while True:
        for job, worker in scheduler.next(now):
            seconds = job.seconds if actual is None else actual[job.name]
            end = now + seconds / worker.speed
            schedule.placements.append(Placement(job.name, worker.name, now, end))
            heapq.heappush(running, (end, len(schedule.placements), worker))
        if not running:
            return schedule
        now = running[0][0]
        while running and running[0][0] == now:
            scheduler.ended(heapq.heappop(running)[2], now)
