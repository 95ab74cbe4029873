"""Schedules against brute force, limits and laws; durations are made up, so nothing here looks at a clock."""

import dataclasses
import itertools
import random

import pytest

from hf_hpmkd.components.parallel_pipeline import (
    Graph,
    Job,
    Schedule,
    Scheduler,
    Worker,
    equal_workers,
    simulate,
)


def random_jobs(seed, count, share=0.3):
    chance = random.Random(seed)
    return [
        Job(f"job {i}", chance.uniform(1, 9), tuple(f"job {k}" for k in range(i) if chance.random() < share))
        for i in range(count)
    ]


def optimum(graph, num_workers):
    """The shortest schedule there is: every order of the jobs, each as early as its needs and a worker allow."""
    best = float("inf")
    for order in itertools.permutations(graph.jobs.values()):
        free, ends = [0.0] * num_workers, {}
        for job in order:
            if any(name not in ends for name in job.needs):
                break
            worker = free.index(min(free))
            start = max([free[worker], *(ends[name] for name in job.needs)])
            free[worker] = ends[job.name] = start + job.seconds
        else:
            best = min(best, max(ends.values()))
    return best


def require_sound(schedule: Schedule, graph: Graph):
    """Every job once, behind its needs, and no worker with two jobs at a time."""
    placed = {one.job: one for one in schedule.placements}
    assert len(schedule.placements) == len(placed) == len(graph.jobs)
    for job in graph.jobs.values():
        assert all(placed[name].end <= placed[job.name].start + 1e-9 for name in job.needs)
    for one, other in itertools.combinations(schedule.placements, 2):
        assert one.worker != other.worker or one.end <= other.start + 1e-9 or other.end <= one.start + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_close_to_the_optimum_of_brute_force_and_never_below_the_bound(seed):
    graph = Graph(random_jobs(seed, 6))
    schedule = simulate(graph, equal_workers(2))
    require_sound(schedule, graph)
    best = optimum(graph, 2)
    assert graph.lower_bound(2) <= best + 1e-9 <= schedule.makespan + 2e-9
    assert schedule.makespan <= 1.2 * best


def test_mostly_optimal_and_shorter_than_first_come():
    ratios, first_come = [], []
    for seed in range(30):
        graph = Graph(random_jobs(1000 + seed, 6))
        best = optimum(graph, 2)
        ratios.append(simulate(graph, equal_workers(2)).makespan / best)
        first_come.append(simulate(graph, equal_workers(2), "first-come").makespan / best)
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 22
    assert sum(ratios) / 30 < 1.02 < sum(first_come) / 30 - 0.04


@pytest.mark.parametrize("seed", range(20))
def test_limits_and_laws(seed):
    graph = Graph(random_jobs(seed, 25, share=0.1))
    path = sum(graph.jobs[name].seconds for name in graph.critical_path)
    assert simulate(graph, equal_workers(1)).makespan == pytest.approx(graph.work)
    assert simulate(graph, equal_workers(25)).makespan == pytest.approx(path)
    assert path == pytest.approx(max(graph.ranks().values()))
    # Graham (1969): no list schedule is longer than work / workers + (1 - 1 / workers) * critical path.
    for policy in ("critical-path", "first-come"):
        schedule = simulate(graph, equal_workers(3), policy)
        require_sound(schedule, graph)
        assert schedule.makespan <= graph.work / 3 + 2 / 3 * path + 1e-9
    # All jobs twice as long, or all workers half as fast: twice the time.
    double = Graph(dataclasses.replace(job, seconds=2 * job.seconds) for job in graph.jobs.values())
    slow = [dataclasses.replace(worker, speed=0.5) for worker in equal_workers(3)]
    once = simulate(graph, equal_workers(3)).makespan
    assert simulate(double, equal_workers(3)).makespan == pytest.approx(2 * once)
    assert simulate(graph, slow).makespan == pytest.approx(2 * once)


@pytest.mark.parametrize(("jobs", "workers"), [(12, 3), (10, 4), (1, 5)])
def test_equal_independent_jobs_fill_rounds(jobs, workers):
    graph = Graph(Job(str(index), 2.0) for index in range(jobs))
    assert simulate(graph, equal_workers(workers)).makespan == pytest.approx(2 * -(-jobs // workers))


def test_the_longest_goes_first():
    """Graham's rule (LPT)."""
    jobs = [Job(str(index), seconds) for index, seconds in enumerate((1, 1, 1, 1, 4))]
    assert simulate(Graph(jobs), equal_workers(2)).makespan == 4
    assert simulate(Graph(jobs), equal_workers(2), "first-come").makespan == 6


def test_the_critical_path_goes_before_longer_jobs_that_nothing_waits_for():
    jobs = [Job("direct", 5), Job("outputs a", 3), Job("outputs b", 3), Job("student", 5, ("outputs a", "outputs b"))]
    schedule = simulate(Graph(jobs), equal_workers(2))
    assert {one.job for one in schedule.placements if one.start == 0} == {"outputs a", "outputs b"}
    assert schedule.makespan == 8
    assert simulate(Graph(jobs), equal_workers(2), "first-come").makespan == 11


def test_estimates_are_corrected_as_jobs_end():
    """A kind that was thought short and is long comes first, once one of its jobs has ended."""
    jobs = [Job("a1", 1, kind="a"), *(Job(f"b{i}", 2, kind="b") for i in range(2)), Job("a2", 1, kind="a")]
    jobs.append(Job("c", 1.5, ("a1",), kind="c"))
    graph = Graph(jobs)
    scheduler = Scheduler(graph, equal_workers(1))
    (first, worker), *none = scheduler.next(0.0)
    assert first.name == "a1" and not none  # 1 + 1.5 seconds hang on it
    scheduler.ended(worker, 8.0)
    assert scheduler.estimates.seconds(graph.jobs["a2"]) == 8
    assert scheduler.estimates.seconds(graph.jobs["b0"]) == 16  # nothing of its kind: as all that ended
    scheduler.next(8.0)
    scheduler.ended(worker, 9.0)
    known = scheduler.estimates
    assert known.seconds(graph.jobs["b1"]) == 1 and known.seconds(graph.jobs["a2"]) == 8
    assert scheduler.next(9.0)[0][0].name in ("a2", "c")


def test_each_job_goes_where_it_ends_first():
    graph = Graph([Job("long", 10), Job("short", 1)])
    schedule = simulate(graph, [Worker("slow"), Worker("fast", speed=10)])
    assert [(one.job, one.worker) for one in schedule.placements] == [("long", "fast"), ("short", "slow")]
    # Waiting a second for the fast worker beats ten on the slow one.
    graph = Graph([Job("long", 10), Job("next", 9)])
    schedule = simulate(graph, [Worker("slow"), Worker("fast", speed=10)])
    assert {one.worker for one in schedule.placements} == {"fast"} and schedule.makespan == pytest.approx(1.9)


def test_needs_are_met():
    workers = [Worker("cpu", threads=2, memory=100), Worker("gpu", device="cuda", memory=1000)]
    jobs = [Job("big", 1, memory=500), Job("wide", 1, threads=2), Job("there", 1, device="cuda"), Job("any", 1)]
    where = {one.job: one.worker for one in simulate(Graph(jobs), workers).placements}
    assert where["big"] == where["there"] == "gpu" and where["wide"] == "cpu"
    with pytest.raises(ValueError, match=r"'huge' needs 1 threads, 5,000 bytes and device any, which none of the 2"):
        simulate(Graph([Job("huge", 1, memory=5000)]), workers)


def test_wrong_estimates_still_give_a_sound_schedule():
    graph = Graph(random_jobs(3, 20, 0.1))
    chance = random.Random(0)
    actual = {name: chance.uniform(0, 30) for name in graph.jobs}
    schedule = simulate(graph, equal_workers(3), actual=actual)
    require_sound(schedule, graph)
    assert all(one.end - one.start == pytest.approx(actual[one.job]) for one in schedule.placements)


def test_a_lost_job_is_ready_again_and_a_failed_one_takes_what_needs_it():
    graph = Graph([Job("a", 1), Job("b", 1), Job("c", 1, ("a",)), Job("d", 1, ("c", "b"))])
    scheduler = Scheduler(graph, equal_workers(2))
    (a, first), (b, second) = scheduler.next(0)
    scheduler.again(first)
    assert [job.name for job, _ in scheduler.next(1)] == ["a"]
    assert scheduler.failed(first) == {"c", "d"}
    scheduler.ended(second, 2)
    assert scheduler.next(2) == [] and scheduler.is_done


def test_what_is_finished_is_left_out():
    graph = Graph(random_jobs(5, 8)).without(["job 0", "job 1"])
    assert "job 0" not in graph.jobs and all("job 1" not in job.needs for job in graph.jobs.values())


@pytest.mark.parametrize(
    ("jobs", "told"),
    [
        ([Job("a", 1), Job("a", 2)], "a name of its own, but a is given"),
        ([Job("a", 1, ("b",))], "'a' needs b, which is no job"),
        ([Job("x", 1), Job("a", 1, ("c", "x")), Job("b", 1, ("a",)), Job("c", 1, ("b",))], "circle: a needs c needs b"),
        ([Job("a", 1, ("a",))], "circle: a needs a"),
        ([Job("a", -1)], "0 or more seconds, got -1"),
        ([Job("a", float("nan"))], "0 or more seconds, got nan"),
    ],
)
def test_graphs_that_cannot_be(jobs, told):
    with pytest.raises(ValueError, match=told):
        Graph(jobs)
