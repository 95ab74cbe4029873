"""A run whose teachers mislead keeps the student that did not listen; the other stays beside it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from safetensors.torch import load_file
from sklearn.datasets import load_wine

from hf_hpmkd.cli import main
from hf_hpmkd.configuration_examples import memory_examples
from hf_hpmkd.kept_student import Proof, judge
from hf_hpmkd.memory_records import memory_row
from hf_hpmkd.run_record import RunRecord
from hf_hpmkd.run_summary import summary


def bits(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_the_direct_student_is_kept_only_beyond_a_standard_error():
    direct = bits(*[1] * 60, *[0] * 40)
    assert judge(direct, direct).kept == "distilled"
    # 12 rows the one is right on alone, against 8: four in a hundred, with an error of about four and a half.
    close = bits(*[0] * 12, *[1] * 48, *[1] * 8, *[0] * 32)
    found = judge(direct, close)
    assert found.kept == "distilled" and found.gain == -4 and found.rows == 100
    differences = np.array([-1] * 12 + [1] * 8 + [0] * 80)
    assert found.standard_error == pytest.approx(100 * differences.std() / math.sqrt(100), abs=1e-4)
    # 16 against 8: eight in a hundred, which is more than the error of less than five.
    assert judge(direct, bits(*[0] * 16, *[1] * 44, *[1] * 8, *[0] * 32)).kept == "direct"
    assert judge(close, direct).kept == "distilled"


def test_where_it_was_chosen_the_distilled_student_has_to_prove_itself():
    direct, ahead = bits(*[1] * 60, *[0] * 40), bits(*[1] * 56, *[0] * 4, *[1] * 12, *[0] * 28)  # 12 against 4
    found = judge(direct, ahead, Proof(1.5))
    error = 100 * np.array([1] * 12 + [-1] * 4 + [0] * 84).std() / 10
    assert found.gain == 8 and found.needed == pytest.approx(1.5 * error, abs=1e-3)
    assert found.kept == "distilled" and judge(direct, ahead, Proof(2.5)).kept == "direct"
    assert judge(direct, direct, Proof(0.5)).kept == "direct"  # equal is not better


def test_pairs_of_the_tries_count_as_much_as_the_last_one():
    error = 100 * np.array([1] * 12 + [-1] * 4 + [0] * 84).std() / 10
    direct, ahead = bits(*[1] * 60, *[0] * 40), bits(*[1] * 56, *[0] * 4, *[1] * 12, *[0] * 28)  # 12 against 4
    # Three pairs that gained as much, as surely: the mean of four has to exceed 2.5 of their mean error, as one had.
    assert judge(direct, ahead, Proof(2.5, 3, 8.0, error)).kept == "direct"
    # Surer ones: 8 points against 2.5 times a mean of (error + 3 * 2) / 4.
    found = judge(direct, ahead, Proof(2.5, 3, 8.0, 2.0))
    assert found.kept == "distilled" and found.gain == 8
    assert found.needed == pytest.approx(2.5 * (error + 6) - 24, abs=1e-3)
    # Other pairs that lost count against it, and none of the others helps one that looks no better itself.
    assert judge(direct, ahead, Proof(0.5, 3, -4.0, 2.0)).kept == "direct"
    assert judge(direct, direct, Proof(1.5, 3, 40.0, 2.0)).kept == "direct"


@pytest.fixture(scope="module")
def misled(tmp_path_factory):
    """A run with one teacher, which takes each class for the next one and is listened to alone."""
    folder = tmp_path_factory.mktemp("misled")
    wine = load_wine()
    wrong = [[5.0 if name == (label + 1) % 3 else 0.0 for name in range(3)] for label in wine.target]
    numbers = {f"x{index}": column.tolist() for index, column in enumerate(wine.data.T)}
    rows = Dataset.from_dict({**numbers, "wrong": wrong, "label": wine.target.tolist()})
    (folder / "wine").mkdir()
    rows = rows.cast_column("label", ClassLabel(names=wine.target_names.tolist()))
    rows.to_parquet(folder / "wine" / "train.parquet")
    recipe = {
        "data": {"path": str(folder / "wine")},
        "teachers": [{"model": "column:wrong"}],
        "student": {"model": "mlp-8"},
        "distillation": {"alpha": 1.0, "calibrate_teachers": False, "gate": "uniform"},
        "training": {"epochs": 8, "batch_size": 16, "learning_rate": 0.01, "evaluations": 2},
        "memory": {"path": str(folder / "memory")},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HPMKD_CACHE", raising=False)
        assert main(["distill", str(folder / "recipe.yaml")]) == 0
    return folder


def same(one, other):
    mine, yours = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.equal(mine[key], yours[key]) for key in yours)


def test_the_direct_student_takes_the_place_of_the_distilled_one(misled):
    run = misled / "run"
    assert same(run / "student", run / "direct") and not same(run / "distilled", run / "direct")
    record = RunRecord.load(run / "run_record.json")
    assert record.kept.kept == "direct" and record.kept.gain < -record.kept.standard_error
    assert record.kept.rows == record.num_rows("validation")
    models = record.models
    assert models["student"].metrics == models["direct"].metrics
    assert models["student"].accuracy() > models["distilled"].accuracy() + 0.3
    assert record.distilled is models["distilled"]
    card = (run / "README.md").read_text()
    assert "trained on the labels alone" in card and "distilled from one teacher on" not in card
    assert "Kept: the directly trained student" in card and "base_model" not in card


def test_what_others_learn_from_the_run_is_that_distilling_lost(misled):
    record = RunRecord.load(misled / "run" / "run_record.json")
    (example,) = memory_examples([memory_row(record)])
    assert example.gain < -30
    cells = [cell.strip() for cell in summary([record]).splitlines()[2].strip("|").split("|")]
    direct, distilled, gain, kept = cells[4:8]
    assert kept == direct and float(gain) == pytest.approx(float(distilled) - float(direct), abs=0.011)


@pytest.mark.parametrize("lost", [("student",), ("student", "student.trained.json"), ()])
def test_stopped_while_they_change_places_it_ends_the_same(misled, tmp_path, lost, monkeypatch):
    monkeypatch.delenv("HPMKD_CACHE", raising=False)
    run = tmp_path / "run"
    shutil.copytree(misled / "run", run)
    for name in lost:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    tree = json.loads((run / "run_record.json").read_text())
    (run / "run_record.json").write_text(json.dumps({**tree, "status": "running"}))
    assert main(["distill", str(misled / "recipe.yaml"), f"output.dir={run}"]) == 0
    assert same(run / "student", run / "direct") and same(run / "distilled", misled / "run" / "distilled")
    record = RunRecord.load(run / "run_record.json")
    assert record.models["student"].metrics == record.models["direct"].metrics
    assert record.kept.kept == "direct"


def test_a_recipe_may_keep_the_distilled_student(misled, tmp_path, monkeypatch):
    monkeypatch.delenv("HPMKD_CACHE", raising=False)
    words = [f"output.dir={tmp_path / 'run'}", "distillation.keep=distilled"]
    assert main(["distill", str(misled / "recipe.yaml"), *words]) == 0
    assert not (tmp_path / "run" / "distilled").exists()
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert record.kept is None and same(tmp_path / "run" / "student", misled / "run" / "distilled")
