"""Rows of priors and memories as examples."""

import dataclasses
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_hpmkd.components.adaptive_configuration import Configuration, Example
from hf_hpmkd.configuration_examples import (
    MAX_BYTES,
    SCHEMA,
    memory_examples,
    prior_row,
    provenance,
    read_prior,
    shipped_prior,
    write_prior,
)
from hf_hpmkd.memory_records import memory_row
from hf_hpmkd.run_record import AutoRecord, ChainRecord, ModelRecord, RunRecord, TeacherRecord

SOFT = Configuration(alpha=0.9, temperature=8.0, gate="label", learning_rate=2.0)
EXAMPLE = Example({"log_rows": 3.0, "overfit": 0.25}, SOFT, 1.5, 0.5, (0.25, 0.5, math.nan, 1.25), data="letter")
ABOUT = dict.fromkeys(SCHEMA.names)


def test_a_file_that_is_no_prior_says_so(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no prior"):
        provenance(tmp_path / "other.parquet")


def test_a_prior_is_read_as_it_was_written(tmp_path: Path) -> None:
    other = dataclasses.replace(EXAMPLE, data="yeast")
    write_prior([prior_row(one, ABOUT) for one in (EXAMPLE, other)], {"runs": 2}, tmp_path / "a" / "prior.parquet")
    found = read_prior(tmp_path / "a" / "prior.parquet", leave_out=["yeast"])
    assert len(found) == 1 and math.isnan(found[0].early[2])
    assert dataclasses.replace(found[0], early=()) == dataclasses.replace(EXAMPLE, early=())
    assert (found[0].early[1], found[0].early[3]) == (0.5, 1.25)
    assert provenance(tmp_path / "a" / "prior.parquet") == {"runs": 2}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["prior.parquet"]


def test_the_shipped_prior_is_whole_and_says_where_it_comes_from() -> None:
    path = shipped_prior()
    assert path.stat().st_size <= MAX_BYTES
    rows = pq.read_table(path).to_pylist()
    names = {row["data"] for row in rows}
    assert len(rows) >= 1_000 and len(names) >= 30 and len({row["student"] for row in rows}) >= 4
    assert {row["alpha"] == 0 for row in rows} == {True, False}
    assert all(math.isfinite(row["gain"]) and row["noise"] > 0 for row in rows)
    assert not any(row[name] is None for row in rows for name in (*dataclasses.asdict(SOFT), "feature_warm_start"))
    assert all(row["feature_log_learning_rate"] == pytest.approx(math.log10(row["base_learning_rate"])) for row in rows)
    about = provenance()
    assert set(about["data"]) == names and about["runs"] == len(rows)
    assert len(read_prior(leave_out=["letter"])) == len(rows) - sum(row["data"] == "letter" for row in rows)


def test_another_table_is_no_prior(tmp_path: Path) -> None:
    pq.write_table(pa.table({"data": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="must be a prior of format 2"):
        read_prior(tmp_path / "other.parquet")


def test_a_package_without_a_prior_knows_nothing_and_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_hpmkd.configuration_examples.shipped_prior", lambda: tmp_path / "prior.parquet")
    assert read_prior() == []
    with pytest.raises(FileNotFoundError, match="Make one: hpmkd prior build"):
        provenance()


def test_a_prior_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_hpmkd.configuration_examples.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="may have 100 bytes"):
        write_prior([prior_row(EXAMPLE, ABOUT)], {}, tmp_path / "prior.parquet")
    assert MAX_BYTES <= 2_000_000 and not list(tmp_path.iterdir())


def finished(**changes: object) -> RunRecord:
    """A run that gained 3 points on 400 validation rows and lost 20 on test rows."""
    record = RunRecord(
        status="completed",
        recipe={"distillation": {"alpha": 0.5, "temperature": 2.0, "temperature_schedule": "constant",
                                 "kd_kind": "dkd", "gate": "uniform"}},
        parts={"parts": {"train": {"rows": 1000}, "validation": {"rows": 400}}, "path": "letter"},
        class_names=["a", "b"],
        teachers=[TeacherRecord("one", "sklearn:X", "sklearn", num_params=500, accuracy={"guide": 0.75})],
        models={
            "student": ModelRecord(
                "student", 50, {"validation": {"accuracy": 0.83}, "test": {"accuracy": 0.6}}, compression=10.0
            ),
            "direct": ModelRecord("direct", 50, {"validation": {"accuracy": 0.8}, "test": {"accuracy": 0.8}}),
        },
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def test_a_run_of_the_memory_counts_by_its_validation_rows() -> None:
    [found] = memory_examples([memory_row(finished())])
    assert found.gain == pytest.approx(3.0) and found.own and found.data == "letter"
    assert found.noise == pytest.approx(100 * math.sqrt(0.83 * 0.17 / 400))
    assert found.configuration == Configuration(alpha=0.5, temperature=2.0, kd_kind="dkd", gate="uniform")
    assert found.features == pytest.approx({
        "log_rows": 3.0, "log_classes": math.log10(2), "log_student_params": math.log10(50), "log_capacity_gap": 1.0,
        "teachers": 1.0, "teacher_accuracy": 0.75, "warm_start": 0.0,
    })  # fmt: skip


def test_a_run_that_chose_counts_as_what_it_chose() -> None:
    auto = AutoRecord(
        "because", "by nothing", [], dataclasses.asdict(SOFT), {"distillation": {"alpha": 0.9}, "training": {}},
        {"log_rows": 2.5}, [], 10, 5, 3, 1.0, 0.1,
    )  # fmt: skip
    row = memory_row(finished(auto=auto))
    assert row["alpha"] == 0.9 and row["temperature"] == 2.0
    [found] = memory_examples([row])
    assert found.configuration == SOFT and found.features == {"log_rows": 2.5, "warm_start": 0.0}


def test_records_of_before_tell_where_the_student_began_and_the_recipes_learning_rate() -> None:
    """A regression takes what is not known for less than any value."""
    recipe = {"distillation": {"alpha": 0.5, "kd_kind": "dkd", "gate": "uniform", "temperature": 2.0,
                               "temperature_schedule": "constant"}, "training": {"learning_rate": 0.01}}  # fmt: skip
    chain = ChainRecord(student_warm_start=0.75, student_origin="one")
    [found] = memory_examples([memory_row(finished(recipe=recipe, chain=chain))])
    assert (found.features["warm_start"], found.features["log_learning_rate"]) == (1.0, pytest.approx(-2))
    auto = AutoRecord(
        "because", "by nothing", [], dataclasses.asdict(SOFT),
        {"distillation": {}, "training": {"learning_rate": 0.02}}, {"log_rows": 2.5}, [], 10, 5, 3, 1.0, 0.1,
    )  # fmt: skip
    row = memory_row(finished(recipe=recipe, chain=chain, auto=auto))
    assert row["learning_rate"] == 0.02
    [found] = memory_examples([row])
    assert found.features == {"log_rows": 2.5, "warm_start": 1.0, "log_learning_rate": pytest.approx(-2)}
    told = dataclasses.replace(auto, features={"warm_start": 0.0, "log_learning_rate": -3.0})
    [found] = memory_examples([memory_row(finished(recipe=recipe, chain=chain, auto=told))])
    assert found.features == {"warm_start": 0.0, "log_learning_rate": -3.0}


def test_a_run_with_layer_hints_tells_nothing_of_the_same_without() -> None:
    recipe = {"distillation": {"alpha": 0.5, "kd_kind": "dkd", "gate": "uniform", "temperature": 2.0,
                               "temperature_schedule": "constant", "hint_weight": 0.0}}  # fmt: skip
    hinted = {"distillation": {**recipe["distillation"], "hint_weight": 4.0}}
    assert len(memory_examples([memory_row(finished(recipe=recipe))])) == 1
    assert memory_examples([memory_row(finished(recipe=hinted))]) == []


@pytest.mark.parametrize(
    "details",
    [
        "{}",
        "[]",
        "null",
        "{",
        '{"models": 3}',
        '{"models": {}, "teachers": [1]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_records_of_another_form_stop_nobody(details: str) -> None:
    odd = {**memory_row(finished()), "details": details}
    assert [one.data for one in memory_examples([odd, memory_row(finished())])] == ["letter"]


@pytest.mark.parametrize("place", ["configuration", "features"])
@pytest.mark.parametrize(
    "value", [None, "x", [], True, math.nan, math.inf, 1e308, -1e308, pytest.param(10**400, id="huge")]
)
def test_records_with_odd_values_stop_nobody(place: str, value: object) -> None:
    auto = AutoRecord(
        "because", "by nothing", [], dataclasses.asdict(SOFT), {"distillation": {}, "training": {}}, {"log_rows": 2.5},
        [], 10, 5, 3, 1.0, 0.1,
    )  # fmt: skip
    row = memory_row(finished(auto=auto))
    details = json.loads(row["details"])
    details["auto"][place]["temperature" if place == "configuration" else "log_rows"] = value
    assert memory_examples([{**row, "details": json.dumps(details)}]) == []


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, 1e308, pytest.param(10**400, id="huge")])
def test_accuracies_that_are_no_shares_show_nothing(accuracy: float) -> None:
    row = memory_row(finished())
    assert memory_examples([{**row, "validation_accuracy": accuracy}]) == []
    assert memory_examples([{**row, "direct_validation_accuracy": accuracy}]) == []


def test_runs_of_a_later_version_stop_nobody() -> None:
    auto = AutoRecord(
        "because", "by nothing", [], dataclasses.asdict(SOFT), {"distillation": {"alpha": 0.9}, "training": {}},
        {"log_rows": 2.5, "shoe_size": 43.0}, [], 10, 5, 3, 1.0, 0.1,
    )  # fmt: skip
    [found] = memory_examples([memory_row(finished(auto=auto))])
    assert found.features == {"log_rows": 2.5, "warm_start": 0.0}
    later = dataclasses.replace(auto, configuration={**auto.configuration, "mood": "good"})
    assert memory_examples([memory_row(finished(auto=later))]) == []


def test_runs_that_prove_nothing_are_left_out() -> None:
    without_direct = {"student": finished().models["student"]}
    direct = {"distillation": {"alpha": 0.0}}
    assert memory_examples([memory_row(finished(models=without_direct)), memory_row(finished(recipe=direct))]) == []
