"""Finished runs as a memory holds them. Imports no model library, so that a process that needs them starts quickly."""

from hf_hpmkd.memory_records import memory_row
from hf_hpmkd.run_record import ModelRecord, RunRecord, TeacherRecord


def run_record(seed=0, **changes):
    record = RunRecord(
        status="completed",
        seed=seed,
        recipe={"student": {"model": "mlp-2"}, "output": {"dir": "/home/jane/out"}},
        parts={"path": "/home/jane/wine.csv", "task": "tabular-classification", "parts": {"train": {"rows": 90}}},
        teachers=[TeacherRecord("big", "/home/jane/teachers/big", "transformers", 1000, accuracy={"test": 0.9})],
        models={"student": ModelRecord("student", 100, metrics={"test": {"accuracy": 0.8, "loss": "NaN"}})},
        finished="2026-01-01T00:00:00Z",
    )
    for key, value in changes.items():
        setattr(record, key, value)
    return record


def row(seed=0, **changes):
    return memory_row(run_record(seed, **changes))
