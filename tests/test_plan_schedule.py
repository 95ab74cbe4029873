"""Schedules told and drawn before a run, and what the bench says of the simulator."""

import random
import re

import pytest
import yaml

from hf_hpmkd.bench_pipeline import pipeline_table, random_graph, simulator
from hf_hpmkd.cli import main
from hf_hpmkd.components.parallel_pipeline import Graph, Job
from hf_hpmkd.gantt import Bar, gantt
from hf_hpmkd.plan_schedule import plan_schedule, scaling
from hf_hpmkd.recipe import read_recipe


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_is_right_where_it_can_be_counted_by_hand():
    """Four captures of 10 s, then the student of 30 s beside a direct one of 30 s, which comes first but may wait."""
    captures = [Job(str(index), 10) for index in range(4)]
    graph = Graph([Job("direct", 30), *captures, Job("student", 30, ("0", "1", "2", "3"))])
    found = {line[0]: line[1:] for line in cells(scaling(graph, [1, 2, 64]))}
    assert found["1"][:3] == ["100", "1.00x", "100"] and found["1"][-1] == "100%"
    assert found["2"] == ["50", "2.00x", "50", "70", "100%"]
    assert found["64"][:3] == ["40", "2.50x", "40"]


def test_a_recipe_is_planned_and_drawn(tmp_path, capsys):
    words = ["plan", "quickstart", "memory.use=false", "--workers", "1,3", "--gantt", str(tmp_path / "new" / "g.png")]
    assert main(words) == 0
    told = capsys.readouterr().out
    one, three = cells(re.search(r"\| workers.*?\n\n", told, re.DOTALL)[0].strip())
    assert one[2] == "1.00x" and 1 <= float(three[2].rstrip("x")) <= 3
    assert "worker 3" in told and "student" in told
    assert (tmp_path / "new" / "g.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "quickstart", "--workers", "0"]) == 2
    assert main(["plan", "quickstart", "--gantt", "g.png"]) == 2
    assert "from 1 on" in capsys.readouterr().err


def test_what_follows_the_jobs_of_an_adaptive_run_is_told(capsys):
    told = {}
    for mode in ("off", "fast"):
        assert main(["plan", "quickstart", "memory.use=false", f"auto.mode={mode}", "--workers", "1,3"]) == 0
        told[mode] = capsys.readouterr().out
    assert "tries of auto" not in told["off"]
    text = " ".join(told["fast"].split())
    assert "The tries, direct training and the student follow in one process" in text
    rest, whole = (float(re.search(words, text)[1]) for words in (r"about ([\d.]+) s and", r"most ([\d.]+)x faster"))
    works = [float(re.search(r"jobs, ([\d,]+) s of work", told[mode])[1]) for mode in ("off", "fast")]
    assert rest == pytest.approx(works[0] - works[1], abs=2)
    of_jobs = float(cells(re.search(r"\| workers.*?\n\n", told["fast"], re.DOTALL)[0].strip())[1][2].rstrip("x"))
    assert 1 <= whole < of_jobs


def test_a_chart_has_a_bar_per_job_where_it_was():
    bars = [Bar("a", "train", "worker 1", 105, 110), Bar("b", "train", "worker 2", 100, 130)]
    axes = gantt(bars, "title").axes[0]
    drawn = [(patch.get_x(), patch.get_width(), patch.get_y()) for patch in axes.patches if patch.get_width()]
    assert [(x, width) for x, width, _ in drawn] == [(5, 5), (0, 30)] and drawn[0][2] != drawn[1][2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 2", "worker 1"]


def test_the_simulator_is_mostly_at_the_lower_bound_and_ahead_of_first_come():
    found = simulator(150)
    ours, theirs = found["critical-path"], found["first-come"]
    assert 1 <= ours["median"] <= 1.05 and ours["share_within_limit"] >= 0.85
    assert ours["mean"] < theirs["mean"] - 0.02 and ours["percentile_95"] < theirs["percentile_95"]
    table = pipeline_table({"turns": 0, "simulator": found, "scaling": {"measured": False, "table": "TABLE"}})
    assert f"{ours['median']:.3f}, {ours['mean']:.3f}" in table and table.endswith("TABLE")


def test_a_benched_run_is_told_with_its_limits():
    seconds = {"one_thread": [20.0, 22.0], "two_workers": [10.5, 10.5], "auto": [12.0], "all_cores": [16.0]}
    record = {"turns": 2, "seconds": seconds, "handing_share": 0.012, "simulator": simulator(20)}
    table = pipeline_table(record | {"scaling": {"measured": True, "table": "TABLE"}})
    assert "| one worker of one thread over two | 2 | at least 1.80 |" in table
    assert "| auto over one process with all cores | 0.75 | at most 1.00 |" in table
    assert "| handing over jobs over the run | 0.012 | at most 0.02 |" in table


def test_random_graphs_are_of_all_kinds_and_repeatable():
    graphs = [random_graph(random.Random(seed)) for seed in range(40)]
    assert [graph.work for graph in graphs] == [random_graph(random.Random(seed)).work for seed in range(40)]
    assert {("student" in graph.jobs, "0.0" in graph.jobs) for graph in graphs} >= {
        (True, False),
        (False, True),
        (False, False),
    }


def test_data_that_is_not_here_is_told():
    tree = {"data": {"path": "./nowhere"}, "teachers": [{"model": "mlp-4"}], "student": {"model": "mlp-2"}}
    with pytest.raises((ValueError, OSError), match="nowhere"):
        plan_schedule(read_recipe(tree, "test"), [2])


def test_data_on_the_hub_is_not_opened_for_a_schedule(tmp_path, capsys, monkeypatch):
    def opened(*words, **settings):
        raise AssertionError("the data were opened")

    monkeypatch.setattr("hf_hpmkd.recipe_parts.load_parts", opened)
    monkeypatch.chdir(tmp_path)
    tree = {"data": {"path": "USER/DATA"}, "teachers": [{"model": "cifar-resnet-14"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**tree, "student": {"model": "cifar-resnet-8"}}))
    assert main(["plan", "r.yaml"]) == 0
    assert main(["plan", "r.yaml", "--workers", "2", "--gantt", "g.png"]) == 2
    assert "the rows, which must be on this disk; USER/DATA is not" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "g.png").exists()
