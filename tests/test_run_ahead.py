"""A run whose jobs other processes do ends as the run that does them itself: bit by bit, and with the same record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_hpmkd import run_ahead
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.cli import main
from hf_hpmkd.components.parallel_pipeline import Graph, Job
from hf_hpmkd.data import load_parts
from hf_hpmkd.job_graph import corrected, run_graph, run_tasks
from hf_hpmkd.memory_records import memory_row
from hf_hpmkd.model_cost import thread_gain
from hf_hpmkd.recipe import RecipeError, read_recipe
from hf_hpmkd.run_ahead import _groups
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_memory import run_memory
from hf_hpmkd.run_record import JobRecord, RunRecord

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("whole_runs")  # as the workers' runs are


def recipe_tree(folder, **sections):
    return {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "mlp-16", "epochs": 2}, {"model": "sklearn:LogisticRegression", "folds": 2}],
        "student": {"model": "mlp-2"},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "evaluations": 2},
        "output": {"dir": str(folder / "run")},
        "memory": {"path": str(folder / "memory")},
        **sections,
    }


def distill(folder, *words, **sections):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(folder, **sections)))
    return main(["distill", str(folder / "recipe.yaml"), *words])


@pytest.fixture(scope="module")
def one_thread(whole_runs):
    """Bits are those of one thread, here and in each worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HPMKD_CACHE", raising=False)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("alone")
    assert distill(folder, "chain.length=1") == 0
    return folder


def require_same_models(one, other):
    for model in ("student", "direct", "chain/stage-1", "teachers/mlp-16"):
        mine, yours = (load_file(folder / "run" / model / "model.safetensors") for folder in (one, other))
        assert mine.keys() == yours.keys() and all(torch.equal(mine[key], yours[key]) for key in mine), model


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_change_nothing_in_the_result(tmp_path, alone, workers):
    words = ["chain.length=1", "pipeline.engine=local", f"pipeline.workers={workers}"]
    assert distill(tmp_path, *words) == 0
    require_same_models(tmp_path, alone)
    record, expected = (RunRecord.load(folder / "run" / "run_record.json") for folder in (tmp_path, alone))
    assert record.recipe_fingerprint == expected.recipe_fingerprint
    for name, model in expected.models.items():
        assert record.models[name].metrics == model.metrics
        assert [row["step"] for row in record.curves[name]] == [row["step"] for row in expected.curves[name]]
    assert [one.accuracy for one in record.teachers] == [one.accuracy for one in expected.teachers]
    assert record.class_weights == expected.class_weights and record.taught_by == expected.taught_by
    assert [one.guides for one in record.chain.stages] == [one.guides for one in expected.chain.stages]
    found = {key: value for key, value in record.memory.items() if not key.endswith(("seconds", "saved"))}
    assert found == {key: expected.memory[key] for key in found}

    jobs = {job.name: job for job in record.jobs if job.worker != "main"}
    parts = ("train", "guide", "validation", "test")
    outputs = {f"outputs {name} {part}" for name in ("mlp-16", "LogisticRegression") for part in parts}
    assert set(jobs) == {"train mlp-16", "train LogisticRegression", "direct", "chain", "student"} | outputs
    assert {job.worker for job in jobs.values()} == {str(index + 1) for index in range(workers)}
    heard = [job.ended for name, job in jobs.items() if name in outputs and name.endswith(("train", "guide"))]
    tested = [job.started for name, job in jobs.items() if name.endswith("test")]
    assert min(tested) >= max(jobs["student"].ended, jobs["direct"].ended)
    assert max(heard) <= jobs["chain"].started and jobs["chain"].ended <= jobs["student"].started
    assert all(job.started < job.ended and job.estimated > 0 for job in jobs.values())
    assert (tmp_path / "run" / "plots" / "pipeline.png").stat().st_size > 5000
    assert "student" in (tmp_path / "run" / "logs" / "student.log").read_text()
    assert not [job for job in expected.jobs if job.worker != "main"]


@pytest.mark.slow
def test_jobs_of_two_processes_give_what_one_gives(tmp_path, one_thread):
    """accelerate launch, with the processes sharing each batch: as near as sums in another order are, if the rows fill
    the batches."""
    whole = ["data.max_train_rows=96"]
    words = ["chain.length=1", "pipeline.engine=local", "pipeline.workers=1", "pipeline.processes=2", *whole]
    alone = tmp_path / "alone"
    assert distill(alone, "chain.length=1", *whole) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(tmp_path)))
    command = [sys.executable, "-m", "hf_hpmkd", "distill", str(tmp_path / "recipe.yaml"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("student", "direct", "chain/stage-1", "teachers/mlp-16"):
        mine, expected = (load_file(folder / "run" / name / "model.safetensors") for folder in (tmp_path, alone))
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        steps = [
            json.loads((folder / "run" / f"{name}.trained.json").read_text())["steps"] for folder in (tmp_path, alone)
        ]
        assert steps[0] == steps[1]
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert {job.name for job in record.jobs if job.worker != "main"} >= {"train mlp-16", "direct", "chain", "student"}
    assert (tmp_path / "run" / "logs" / "student.log").stat().st_size > 0


def _stop(*words, **options):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_failed_job_is_told_and_the_same_command_goes_on(tmp_path, alone, capsys, monkeypatch):
    """Its folder cannot be written: the job fails, the direct student is trained all the same."""
    words = ["chain.length=1", "pipeline.engine=local", "pipeline.workers=2"]
    blocked = tmp_path / "run" / "teachers" / "mlp-16"
    with monkeypatch.context() as patch:
        patch.setattr("hf_hpmkd.distill.recipe_parts", _stop)
        assert distill(tmp_path, *words) == 130  # the folder is this run's now
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder should be")
    capsys.readouterr()
    assert distill(tmp_path, *words) == 2
    told = capsys.readouterr().err
    assert "train mlp-16: " in told and "logs/train-mlp-16.log" in told and "goes on" in told
    assert (tmp_path / "run" / "direct.trained.json").is_file()
    assert not (tmp_path / "run" / "student.trained.json").exists()
    blocked.unlink()
    direct = (tmp_path / "run" / "direct" / "model.safetensors").stat().st_mtime_ns
    assert distill(tmp_path, *words) == 0
    assert (tmp_path / "run" / "direct" / "model.safetensors").stat().st_mtime_ns == direct
    require_same_models(tmp_path, alone)


@pytest.mark.slow
def test_ray_changes_nothing_in_the_result(tmp_path, alone):
    pytest.importorskip("ray")
    words = ["distill", str(tmp_path / "recipe.yaml"), "chain.length=1", "pipeline.engine=ray", "pipeline.workers=2"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(tmp_path)))
    # In a process of its own: Ray leaves sockets and threads behind that warnings would be made of.
    subprocess.run([sys.executable, "-m", "hf_hpmkd", *words], check=True, timeout=280)
    require_same_models(tmp_path, alone)
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert record.pipeline["engine"] == "ray" and {"train mlp-16", "student"} <= {job.name for job in record.jobs}


# ---- the graph -------------------------------------------------------------------------------------------------------


def digits(*words, teachers=("cifar-resnet-14x8", "sklearn:SVC")):
    tree = {
        "data": {"path": "sklearn:digits", "views": 3, "max_train_rows": 200},
        "teachers": [{"model": model} for model in teachers],
        "student": {"model": "cifar-resnet-8x4"},
    }
    return read_recipe(tree, "test", words)


def test_several_processes_share_trainings_of_networks_alone():
    jobs = graph_of(digits("pipeline.processes=2", "pipeline.engine=local")).jobs
    shared = {"train cifar-resnet-14x8", "direct", "student"}
    assert {name for name, job in jobs.items() if job.processes == 2} == shared
    assert all(job.processes in (1, 2) for job in jobs.values())


def graph_of(recipe):
    return run_graph(recipe, load_parts(recipe.data, teachers_saw_train=False))


def test_the_graph_of_a_run():
    graph = graph_of(digits())
    outputs = [f"outputs cifar-resnet-14x8 train view {view}" for view in range(3)]
    assert all(graph.jobs[name].needs == ("train cifar-resnet-14x8",) for name in outputs)
    assert set(outputs) < set(graph.jobs["student"].needs) and graph.jobs["direct"].needs == ()
    assert not [name for name in graph.jobs["student"].needs if name.endswith(("validation", "test"))]
    assert {"student", "direct"} < set(graph.jobs["outputs SVC test"].needs)
    assert len({job.key for job in graph.jobs.values()}) == len(graph.jobs) == 2 + 2 * 6 + 2
    assert graph_of(digits("chain.length=2")).jobs["student"].needs == ("chain",)
    live = graph_of(digits("distillation.teacher_outputs=live"))
    assert set(live.jobs["student"].needs) >= {"train cifar-resnet-14x8", "train SVC"}
    assert not [name for name in live.jobs if "view" in name]
    deaf = graph_of(digits("distillation.alpha=0"))  # it may still start from a teacher's weights
    assert set(deaf.jobs["student"].needs) == {"train cifar-resnet-14x8", "train SVC"}
    assert "direct" not in graph_of(digits("distillation.direct=false")).jobs


def test_estimates_grow_with_what_is_to_be_done():
    once, twice = graph_of(digits("training.epochs=2")), graph_of(digits("training.epochs=4"))
    assert twice.jobs["student"].seconds == pytest.approx(2 * once.jobs["student"].seconds)
    folded = graph_of(digits("training.epochs=2", "teachers.0.folds=2"))
    name = "train cifar-resnet-14x8"
    assert folded.jobs[name].seconds == pytest.approx(3 * once.jobs[name].seconds)
    outputs = [once.jobs[f"outputs cifar-resnet-14x8 {part}"].seconds for part in ("train view 0", "guide")]
    parts = load_parts(digits().data, teachers_saw_train=False)
    assert outputs[0] / outputs[1] == pytest.approx(len(parts.train) / len(parts.guide))


@pytest.mark.parametrize("about", [{}, {"classes": list("abc"), "architecture": {"depth": 20}, "input": {}}])
def test_a_teacher_whose_file_tells_nothing_has_an_estimate_all_the_same(tmp_path, about):
    """What is wrong with it is told when it is loaded."""
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    (tmp_path / "teacher.json").write_text(json.dumps(about))
    tree = {"data": {"path": "sklearn:digits"}, "student": {"model": "cifar-resnet-8x4"}}
    recipe = read_recipe({**tree, "teachers": [{"model": str(tmp_path / "teacher.safetensors")}]}, "a test")
    assert all(job.seconds > 0 for job in graph_of(recipe).jobs.values())


def test_estimates_are_corrected_by_runs_on_like_hardware():
    graph = Graph([Job("student", 10, kind="student a"), Job("direct", 10, kind="direct a")])
    record = RunRecord(status="completed", hardware={"cores": 2})
    job = {"worker": "1", "started": 100.0, "ended": 140.0, "kind": "student a", "estimated": 20.0}
    record.jobs = [JobRecord("student", **job)]
    rows = [memory_row(record)]
    seconds = {name: one.seconds for name, one in corrected(graph, rows, {"cores": 2}).jobs.items()}
    assert seconds == {"student": 20, "direct": 20}  # nothing is known of direct, so it errs as the rest did
    assert corrected(graph, rows, {"cores": 8}).jobs["student"].seconds == 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ended", 99.76),  # a clock was set back
        ("ended", 1e300),
        pytest.param("ended", 10**400, id="ended-huge"),
        pytest.param("estimated", 10**400, id="estimated-huge"),
        ("estimated", -1.0),
        ("estimated", 5e-324),
        ("estimated", float("nan")),
        pytest.param("kind", "[" * 100_000, id="deep"),
    ],
)
def test_records_of_impossible_jobs_correct_nothing(key, value):
    graph = Graph([Job("student", 10, kind="student a")])
    job = {"name": "student", "started": 100.0, "ended": 140.0, "kind": "student a", "estimated": 20.0, key: value}
    details = value if key == "kind" else json.dumps({"jobs": [job]})
    assert corrected(graph, [{"hardware": "{}", "details": details}], {}).jobs["student"].seconds == 10


@pytest.mark.parametrize("num_views", [0, 3])
def test_task_names_tell_jobs_apart(num_views):
    names = [task.name for task in run_tasks(digits("chain.length=auto"), num_views)]
    assert len(set(names)) == len(names) == 2 + 2 * (3 + max(num_views, 1)) + 3
    # How the student is trained is decided by tries, so all but the teachers' part is left to the run.
    tried = [task.name for task in run_tasks(digits("chain.length=auto", "auto.mode=fast"), num_views)]
    assert tried == [name for name in names if name.split()[0] in ("train", "outputs") and not name.endswith("test")]


def test_measuring_leaves_the_threads_and_the_model_as_they_were(one_thread):
    parts = load_parts(digits().data, teachers_saw_train=False)
    torch.set_num_threads(2)
    built = build_classifier("cifar-resnet-8x4", parts.train)
    before = {key: value.clone() for key, value in built.model.state_dict().items()}
    assert thread_gain(built, parts.train, 16, 2, 2) > 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert all(torch.equal(value, before[key]) for key, value in built.model.state_dict().items())
    assert all(weight.grad is None for weight in built.model.parameters())


@pytest.mark.parametrize(
    ("seconds", "gain", "taken"),
    [
        (1_000, 1.0, False),  # threads share one job as well as workers share jobs
        (1_000, 1.6, True),
        (1_000, 1.1, False),  # within what estimates may err by
        (25, 2.0, False),  # saves less than a minute, so nothing is measured
    ],
)
def test_workers_are_taken_where_they_save_more_than_a_minute(tmp_path, monkeypatch, seconds, gain, taken):
    measured = []
    monkeypatch.setattr(run_ahead, "thread_gain", lambda *about: measured.append(about) or gain)
    recipe = read_recipe(recipe_tree(tmp_path, memory={"use": False}), "test")
    parts = load_parts(recipe.data, teachers_saw_train=False)
    graph = Graph([Job(name, seconds) for name in "abcd"])
    with run_memory(recipe, is_main=True) as memory:
        run = Run(tmp_path / "run", new_record(recipe), memory)
    reason = run_ahead._faster(run, parts, graph, count=2, threads=2)
    assert (reason is not None) == taken and bool(measured) == (seconds == 1_000)
    if taken:  # 4 jobs of 1,000 s, each 2 / 1.6 times as long, two at a time; and the start
        assert reason == "estimated at 2512 s, one process with 2 threads at 4000 s"


@pytest.mark.parametrize(
    ("engine", "left", "taken"),
    [
        ("local", "outputs", True),  # as the recipe asks
        ("auto", "outputs", False),  # a matter of moments
        ("auto", "outputs and training", True),
        ("local", "nothing", False),
    ],
)
def test_outputs_alone_are_for_workers_where_the_recipe_asks_for_them(tmp_path, monkeypatch, engine, left, taken):
    recipe = read_recipe(
        recipe_tree(tmp_path, memory={"use": False}), "test", [f"pipeline.engine={engine}", "pipeline.workers=2"]
    )
    parts, given = load_parts(recipe.data, teachers_saw_train=False), []
    jobs = list(run_graph(recipe, parts).jobs)
    done = {
        "outputs": [name for name in jobs if not name.startswith("outputs")],
        "outputs and training": jobs[:1],
        "nothing": jobs,
    }[left]
    monkeypatch.setattr(run_ahead, "_devices", list)
    monkeypatch.setattr(run_ahead, "_finished", lambda run, parts: done)
    monkeypatch.setattr(run_ahead, "_can_pay", lambda run, graph, count: True)
    monkeypatch.setattr(run_ahead, "_faster", lambda *about: "estimated so")
    monkeypatch.setattr(run_ahead, "_do", lambda run, config, raw, *more: given.append(set(raw.jobs)))
    with run_memory(recipe, is_main=True) as memory:
        run_ahead.run_ahead(Run(tmp_path / "run", new_record(recipe), memory), parts)
    assert given == ([set(jobs) - set(done)] if taken else [])


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [("-1", 0, []), ("", 0, []), (None, 0, []), (None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("1,-1,0", 1, ["1"])],
)
def test_devices_are_those_that_are_seen_and_there(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert run_ahead._devices() == expected


def test_settings_that_do_not_go_together_are_told():
    with pytest.raises(RecipeError, match="pipeline.address: is for engine ray, got engine local"):
        digits("pipeline.engine=local", "pipeline.address=auto")
    with pytest.raises(RecipeError, match="one process does one job at a time, got 2 workers"):
        digits("pipeline.engine=in-process", "pipeline.workers=2")
    with pytest.raises(RecipeError, match="pipeline.processes: engine auto starts none, got 2"):
        digits("pipeline.processes=2")
    odd = ["pipeline.processes=2", "pipeline.engine=local", "training.batch_size=33", "teachers.0.batch_size=7"]
    with pytest.raises(RecipeError, match="teachers.0.batch_size: must be a multiple of pipeline.processes") as told:
        digits(*odd)
    assert "training.batch_size: must be a multiple of pipeline.processes, which share a batch, got 33 and 2" in str(
        told.value
    )


@pytest.mark.parametrize(("words", "threads"), [([], 4), (["pipeline.address=there:1"], 1)])
def test_jobs_on_ray_have_the_threads_that_are_told(tmp_path, one_thread, capsys, monkeypatch, words, threads):
    """Those of a worker here; of a cluster that is elsewhere these threads say nothing."""

    def stop(graph, jobs, logs, address, count, each, tell):
        raise ValueError(f"{count} workers of {each}")

    monkeypatch.setattr(run_ahead, "run_on_ray", stop)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert distill(tmp_path, "pipeline.engine=ray", "pipeline.workers=2", *words) == 2
    told = capsys.readouterr()
    assert f"2 workers of {threads}" in told.err and f"2 workers of {threads} threads (ray)" in told.out


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_processes_need_threads_or_gpus(tmp_path, one_thread, capsys, engine):
    words = [f"pipeline.engine={engine}", "pipeline.workers=1", "pipeline.processes=2"]
    assert distill(tmp_path, *words) == 2
    told = capsys.readouterr().err
    assert "2 processes of a job need as many threads, but 1 workers share 1." in told
    assert _groups(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="3 processes of a job need as many GPUs, but 2 are seen"):
        _groups(["0", "1"], 3)
