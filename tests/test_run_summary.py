"""The summary table against means and deviations worked out here; runs of one recipe come together, others do not."""

import copy
import statistics

import pytest

from hf_hpmkd.run_record import ModelRecord, RunRecord, TeacherRecord
from hf_hpmkd.run_summary import summary

RECIPE = {
    "data": {"path": "/somewhere/digits"},
    "student": {"model": "mlp-4"},
    "training": {"seed": 0},
    "distillation": {"alpha": 0.9, "cache_dir": None},
    "output": {"dir": "a"},
    "hub": {},
}


def record(seed, direct, student, teacher=0.9, **distillation):
    recipe = copy.deepcopy(RECIPE)
    recipe["training"]["seed"] = seed
    recipe["output"]["dir"] = f"run{seed}"
    recipe["distillation"] |= distillation
    if seed:  # records of older versions know no memory
        recipe["memory"] = {"use": True, "path": f"memory{seed}"}
    models = {"student": ModelRecord("student", 100, {"test": {"accuracy": student}})}
    if direct is not None:
        models["direct"] = ModelRecord("direct", 100, {"test": {"accuracy": direct}})
    teachers = [TeacherRecord("t", "t", "timm", num_params=1500, accuracy={"test": teacher})]
    return RunRecord(status="completed", recipe=recipe, seed=seed, models=models, teachers=teachers)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_and_deviations_over_the_seeds():
    direct, student = [0.70, 0.74, 0.72], [0.75, 0.76, 0.80]
    table = summary([record(seed, direct[seed], student[seed]) for seed in (2, 0, 1)]).splitlines()
    assert len(table) == 3
    gains = [100 * (a - b) for a, b in zip(student, direct, strict=True)]
    assert cells(table[2]) == [
        "digits",
        "mlp-4 (100 parameters)",
        "15.0x",
        "90.00 ± 0.00",
        f"{100 * statistics.mean(direct):.2f} ± {100 * statistics.stdev(direct):.2f}",
        f"{100 * statistics.mean(student):.2f} ± {100 * statistics.stdev(student):.2f}",
        f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}",
        f"{100 * statistics.mean(student):.2f} ± {100 * statistics.stdev(student):.2f}",
        f"{statistics.mean(student) / 0.9:.1%}",
        "0, 1, 2",
    ]


def test_another_recipe_is_another_line_and_one_seed_has_no_spread():
    table = summary([record(0, 0.7, 0.65), record(1, 0.7, 0.65), record(0, None, 0.8, alpha=0.5)]).splitlines()
    assert len(table) == 4
    assert cells(table[2])[6] == "-5.00 ± 0.00"
    assert cells(table[3])[4:7] == ["-", "80.00", "-"]


def test_unfinished_runs_are_refused():
    unfinished = record(0, 0.7, 0.8)
    unfinished.status = "interrupted"
    with pytest.raises(ValueError, match="status interrupted"):
        summary([unfinished])
