"""Real worker processes: killed, failing, interrupted. The jobs write files and load no libraries."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_hpmkd.components.parallel_pipeline import Graph, Job
from hf_hpmkd.engines import JobsFailedError, LocalWorkers, log_file, output_to, run_jobs, run_on_ray

ROOT = Path(__file__).parents[1]


class Write:
    """Adds a line with its process to a file of its name; what else it does, its name says."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, name):
        lines = self.folder / f"{name}.txt"
        with open(lines, "a") as file:
            file.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        print(f"this is {name}")
        if "dies" in name and len(lines.read_text().splitlines()) <= int(name[-1]):
            os.kill(os.getpid(), signal.SIGKILL)
        if "fails" in name and not (self.folder / "mended").exists():
            raise RuntimeError("no luck")
        return {"length": len(name)}


def pids(folder, name):
    return [line.split()[0] for line in (folder / f"{name}.txt").read_text().splitlines()]


def test_jobs_run_in_their_order_in_processes_of_their_own_with_their_threads(tmp_path):
    graph = Graph([Job("a", 1), Job("b", 1), Job("c", 1, ("a", "b"))])
    heard = []
    with LocalWorkers(2, threads=3) as pool:
        ended = run_jobs(graph, Write(tmp_path), pool, tmp_path / "logs", heard.append)
    assert ended == heard and {one.job for one in ended[:2]} == {"a", "b"} and ended[2].job == "c"
    assert all(one.handed <= one.started <= one.ended <= one.received for one in ended)
    assert max(one.ended for one in ended[:2]) <= ended[2].started
    assert {one.worker for one in ended[:2]} == {"1", "2"} and ended[2].value == {"length": 1}
    assert len({pids(tmp_path, name)[0] for name in "ab"}) == 2
    assert str(os.getpid()) not in pids(tmp_path, "a")
    assert (tmp_path / "a.txt").read_text().split()[1] == "3"
    assert log_file(tmp_path / "logs", "c").read_text() == "this is c\n"


KEPT = []


def grow(name):
    """Keeps 350 MB more than before, for longer than loky waits between two looks at a worker."""
    before = gc.get_stats()[2]["collections"]
    KEPT.append(b"x" * 350_000_000)
    time.sleep(1.2)
    return {"process": os.getpid(), "before": before, "after": gc.get_stats()[2]["collections"]}


def test_a_worker_that_grows_stays_and_does_not_look_for_garbage_after_every_job(tmp_path):
    graph = Graph([Job("a", 1), Job("b", 1, ("a",)), Job("c", 1, ("b",))])
    with LocalWorkers(1) as pool:
        _, b, c = (one.value for one in run_jobs(graph, grow, pool, tmp_path / "logs"))
    assert b["process"] == c["process"]
    assert c["before"] == b["after"]  # it does once, after the first


def test_a_job_whose_worker_is_killed_is_started_again_and_the_others_do_not_notice(tmp_path):
    graph = Graph([Job("dies 1", 1), Job("other", 1), Job("after", 1, ("dies 1",))])
    with LocalWorkers(2) as pool:
        ended = run_jobs(graph, Write(tmp_path), pool, tmp_path / "logs")
    assert {one.job: one.attempts for one in ended} == {"dies 1": 2, "other": 1, "after": 1}
    assert len(set(pids(tmp_path, "dies 1"))) == 2 and len(pids(tmp_path, "other")) == 1


def test_a_worker_that_is_killed_while_it_waits_ends_nothing(tmp_path):
    """Between two jobs, and noticed before the second is handed to it."""
    graph = Graph([Job("a", 1), Job("b", 1, ("a",))])
    with LocalWorkers(1) as pool:

        def kill(one):
            if one.job == "a":
                executor = pool._pools["1"]
                os.kill(int(pids(tmp_path, "a")[0]), signal.SIGKILL)
                while not executor._flags.broken:
                    time.sleep(0.01)

        ended = run_jobs(graph, Write(tmp_path), pool, tmp_path / "logs", kill)
    assert [(one.job, one.attempts, one.error) for one in ended] == [("a", 1, None), ("b", 1, None)]
    assert pids(tmp_path, "a") != pids(tmp_path, "b")


def test_a_failed_job_names_itself_and_the_rest_goes_on_and_the_next_time_it_continues(tmp_path):
    jobs = [Job("first", 1), Job("fails", 1, ("first",)), Job("after", 1, ("fails",)), Job("dies 9", 1), Job("last", 1)]
    graph = Graph(jobs)
    with LocalWorkers(2) as pool:
        with pytest.raises(JobsFailedError, match="2 jobs of 5 failed; 1 that need them") as caught:
            run_jobs(graph, Write(tmp_path), pool, tmp_path / "logs")
        told = str(caught.value)
        assert f"fails: RuntimeError: no luck (inputs: first; log: {tmp_path / 'logs' / 'fails.log'})" in told
        assert "dies 9: its worker died 3 times" in told and len(pids(tmp_path, "dies 9")) == 3
        assert "Traceback" in (tmp_path / "logs" / "fails.log").read_text()
        assert (tmp_path / "last.txt").exists() and not (tmp_path / "after.txt").exists()
        (tmp_path / "mended").touch()
        rest = graph.without(["dies 9", *(one.job for one in caught.value.ended if one.error is None)])
        ended = run_jobs(rest, Write(tmp_path), pool, tmp_path / "logs")
    assert [one.job for one in ended] == ["fails", "after"] and len(pids(tmp_path, "first")) == 1


_LONG = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
sys.argv = ["hpmkd"]  # as the command line, which does not load torch at once
from hf_hpmkd.components.parallel_pipeline import Graph, Job
from hf_hpmkd.engines import LocalWorkers, run_jobs

def sleep(name):
    (Path(FOLDER) / name).touch()
    time.sleep(600)

with LocalWorkers(2) as pool:
    run_jobs(Graph([Job("a", 1), Job("b", 1)]), sleep, pool, Path(FOLDER) / "logs")
"""


def processes_of(session):
    """Of a session, those that still run; a zombie's entry is left to whoever has adopted it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_no_process_is_left_behind(tmp_path, how):
    words = [sys.executable, "-c", _LONG.replace("FOLDER", repr(str(tmp_path)))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, env=environment, start_new_session=True, **quiet) as process:
        try:
            while not all((tmp_path / name).exists() for name in "ab"):
                assert process.poll() is None
                time.sleep(0.05)
            assert len(processes_of(process.pid)) >= 3
            process.send_signal(how)
            process.wait(60)
        finally:
            process.kill()
    for _ in range(600):
        if not processes_of(process.pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"left behind: {processes_of(process.pid)}")


def test_output_of_whatever_kind_goes_to_the_log(tmp_path, capfd):
    with output_to(tmp_path / "log"):
        os.write(1, b"from C\n")
        os.write(2, b"to stderr\n")
    os.write(1, b"back\n")
    assert (tmp_path / "log").read_text() == "from C\nto stderr\n" and capfd.readouterr().out == "back\n"


class Ray:
    """Stands for the library: notes what is asked of it, and does a job at once."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, node):
        self.node, self.asked, self.cpus, self.is_open = node, {}, None, False

    def init(self, address, num_cpus, log_to_driver):
        self.cpus, self.is_open = num_cpus, True
        self.node = self.node if address else {**self.node, "CPU": num_cpus}

    def shutdown(self):
        self.is_open = False

    def cluster_resources(self):
        return self.node

    def nodes(self):
        return [{"Alive": True, "Resources": self.node}, {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}]

    def remote(self, call):
        def options(**asked):
            self.asked[asked["name"]] = asked
            return SimpleNamespace(remote=lambda *words: (asked["name"], _Value(call(*words))))

        return SimpleNamespace(options=options)

    def wait(self, refs, num_returns):
        return refs[:1], refs[1:]

    def get(self, ref):
        return ref[1].value


class _Value(SimpleNamespace):
    def __init__(self, value):
        super().__init__(value=value)

    __hash__ = object.__hash__


def length(name):
    return {"length": len(name)}


def test_ray_gets_room_for_the_processes_of_every_job_and_their_threads(tmp_path, monkeypatch):
    graph = Graph([Job("a", 1, processes=2), Job("b", 1)])
    monkeypatch.setitem(sys.modules, "ray", ray := Ray({}))
    ended = run_on_ray(graph, length, tmp_path, num_workers=3, threads=4)
    assert [one.value for one in ended] == [{"length": 1}] * 2 and not ray.is_open
    assert ray.cpus == 6 and {name: asked["num_cpus"] for name, asked in ray.asked.items()} == {"a": 2, "b": 2}
    assert {asked["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] for asked in ray.asked.values()} == {"4"}
    assert {asked["num_gpus"] for asked in ray.asked.values()} == {0}


@pytest.mark.parametrize("node", [{"CPU": 1}, {"CPU": 8, "GPU": 1}])
def test_processes_that_no_node_of_ray_has_room_for_are_refused(tmp_path, monkeypatch, node):
    """Ray would wait for one forever."""
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(node))
    with pytest.raises(ValueError, match="pipeline.processes: a in 2 processes needs 2 CPUs and . GPUs on one node"):
        run_on_ray(Graph([Job("b", 1), Job("a", 1, processes=2)]), length, tmp_path, address="auto")
    assert ray.asked == {} and not ray.is_open
    assert run_on_ray(Graph([Job("b", 1)]), length, tmp_path, address="auto")
