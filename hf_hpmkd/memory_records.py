"""One run as one row of Parquet: what an optimization memory remembers of it. Read with suspicion, written once.

A file's name is the hash of its row, so two memories merge by taking the union of their files, and a file that was
changed is told from one that was not. The rows hold numbers and text alone. Knows nothing of where files lie.
"""

import hashlib
import json
import math
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_hpmkd.public_record import named_sources
from hf_hpmkd.run_record import RunRecord

FORMAT_VERSION = 1
SUFFIX = ".parquet"
MAX_BYTES = 2**20
"""A record takes some tens of kB; a larger file is none."""

Row = dict[str, Any]

_NAME = re.compile(r"[0-9a-f]{64}\.parquet")
# Flat on purpose: one row without lists and without compression cannot unpack to more than the file's own size.
# `teachers`, `configuration`, `versions`, `hardware` and `details` are JSON.
SCHEMA = pa.schema(
    [
        ("format_version", pa.int64()),
        ("id", pa.string()),
        ("finished", pa.string()),
        # Meta-features: what is known before a run.
        ("task", pa.string()),
        ("data", pa.string()),
        ("data_commit", pa.string()),
        ("train_rows", pa.int64()),
        ("guide_rows", pa.int64()),
        ("validation_rows", pa.int64()),
        ("test_rows", pa.int64()),
        ("classes", pa.int64()),
        ("teachers", pa.string()),
        ("student", pa.string()),
        ("student_params", pa.int64()),
        ("compression", pa.float64()),
        # The configuration; the rest of it is in `configuration`.
        ("seed", pa.int64()),
        ("alpha", pa.float64()),
        ("kd_kind", pa.string()),
        ("temperature", pa.float64()),
        ("temperature_schedule", pa.string()),
        ("gate", pa.string()),
        ("epochs", pa.int64()),
        ("batch_size", pa.int64()),
        ("learning_rate", pa.float64()),
        ("weight_decay", pa.float64()),
        ("configuration", pa.string()),
        ("recipe_fingerprint", pa.string()),
        # Results; accuracies are shares of rows, 0 to 1.
        ("test_accuracy", pa.float64()),
        ("validation_accuracy", pa.float64()),
        ("direct_test_accuracy", pa.float64()),
        ("direct_validation_accuracy", pa.float64()),
        ("best_teacher_test_accuracy", pa.float64()),
        ("retention", pa.float64()),
        ("total_seconds", pa.float64()),
        ("student_seconds", pa.float64()),
        # What this run found in the memory, and what that spared it.
        ("outputs_found", pa.int64()),
        ("outputs_computed", pa.int64()),
        ("models_found", pa.int64()),
        ("models_computed", pa.int64()),
        ("bytes_saved", pa.int64()),
        ("seconds_saved", pa.float64()),
        # Where from.
        ("commit", pa.string()),
        ("versions", pa.string()),
        ("hardware", pa.string()),
        ("details", pa.string()),
    ]
)


class BadRecordError(ValueError):
    """A file that is no record that this version reads. The message tells why, without the file's name."""


def is_record_name(name: str) -> bool:
    """Whether a file name is one that a record can have."""
    return _NAME.fullmatch(name) is not None


def memory_row(record: RunRecord) -> Row:
    """The row of a finished run, without local paths and with its id. details: the record less its curves, as JSON.

    Raises ValueError for a run that is not completed.
    """
    if record.status != "completed":
        raise ValueError(f"Only completed runs are remembered, got one with status {record.status}. Resume it first.")
    record = named_sources(record.public())
    student, direct = record.models.get("student"), record.models.get("direct")
    chosen = record.auto.overrides if record.auto is not None else {}
    distillation, training = (
        {**record.recipe.get(section, {}), **chosen.get(section, {})} for section in ("distillation", "training")
    )
    best = record.best_teacher()
    details = record.to_dict()
    configuration = {
        key: value for key, value in details.pop("recipe").items() if key not in ("output", "hub", "memory", "pipeline")
    }
    for key in ("curves", "events"):
        details.pop(key)

    def accuracy(model: Any, part: str) -> float | None:
        return None if model is None else _number(model.accuracy(part))

    row: Row = {
        "format_version": FORMAT_VERSION,
        "finished": record.finished,
        "task": record.parts.get("task"),
        "data": record.parts.get("path") or record.recipe.get("data", {}).get("path"),
        "data_commit": record.commits.get("data"),
        **{f"{part}_rows": record.num_rows(part) for part in ("train", "guide", "validation", "test")},
        "classes": len(record.class_names) or None,
        "teachers": _json(
            [{key: one[key] for key in ("source", "num_params", "accuracy")} for one in details["teachers"]]
        ),
        "student": record.recipe.get("student", {}).get("model"),
        "student_params": None if student is None else student.num_params,
        "compression": None if student is None else _number(student.compression),
        "seed": record.seed,
        **{key: _number(distillation.get(key)) for key in ("alpha", "temperature")},
        **{key: distillation.get(key) for key in ("kd_kind", "temperature_schedule", "gate")},
        **{key: training.get(key) for key in ("epochs", "batch_size")},
        **{key: _number(training.get(key)) for key in ("learning_rate", "weight_decay")},
        "configuration": _json(configuration),
        "recipe_fingerprint": record.recipe_fingerprint,
        "test_accuracy": accuracy(student, "test"),
        "validation_accuracy": accuracy(student, "validation"),
        "direct_test_accuracy": accuracy(direct, "test"),
        "direct_validation_accuracy": accuracy(direct, "validation"),
        "best_teacher_test_accuracy": None if best is None else _number(best.accuracy["test"]),
        "retention": None if student is None else _number(student.retention),
        "total_seconds": _number(sum(value for value in record.seconds.values() if _number(value) is not None)),
        "student_seconds": None if student is None else _number(student.seconds),
        **{key: record.memory.get(key) for key in ("outputs_found", "outputs_computed", "models_found")},
        **{key: record.memory.get(key) for key in ("models_computed", "bytes_saved")},
        "seconds_saved": _number(record.memory.get("seconds_saved")),
        "commit": record.commits.get("hf_hpmkd"),
        "versions": _json(record.versions),
        "hardware": _json(record.hardware),
        "details": _json(details),
    }
    return {"format_version": FORMAT_VERSION, "id": row_id(row), **row}


def row_id(row: Row) -> str:
    """SHA-256 (hex) over all of a row but its id."""
    text = json.dumps({key: value for key, value in row.items() if key != "id"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def row_bytes(row: Row) -> bytes:
    """The Parquet file of a row."""
    buffer = BytesIO()
    metadata = {"hf_hpmkd_memory_format": str(FORMAT_VERSION)}
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA.with_metadata(metadata)), buffer, compression="none")
    return buffer.getvalue()


def read_named_row(path: Path) -> Row:
    """As `read_row`; BadRecordError also for a file whose name no record can have."""
    if not is_record_name(path.name):
        raise BadRecordError("its name is not that of a record")
    return read_row(path)


def read_row(path: Path) -> Row:
    """The row of a file, be it from whom it may. Nothing in it is run or unpacked.

    Raises FileNotFoundError, and BadRecordError for another form, size or number of rows, for another format, and where
    the contents do not give the id that the file's name says.
    """
    size = path.stat().st_size
    if path.is_symlink() or size > MAX_BYTES:
        raise BadRecordError(f"a record is a file of at most {MAX_BYTES:,} bytes, this one has {size:,} or is a link")
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise BadRecordError(_other_schema(file.schema_arrow))
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            if file.metadata.num_rows != 1 or [group.num_rows for group in groups] != [1]:
                raise BadRecordError(f"it holds {file.metadata.num_rows} rows, a record has one")
            if any(groups[0].column(index).compression != "UNCOMPRESSED" for index in range(len(SCHEMA))):
                raise BadRecordError("it is compressed, which a record is not")
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, (BadRecordError, FileNotFoundError)):
            raise
        raise BadRecordError(f"it cannot be read ({type(error).__name__})") from error
    row = rows[0]
    if row["format_version"] != FORMAT_VERSION:
        raise BadRecordError(f"it has format {row['format_version']}, this version of hf_hpmkd reads {FORMAT_VERSION}")
    try:
        found = row_id(row)
    except ValueError:
        found = "?"  # NaN, which no record has
    if found != row["id"] or found != path.stem:
        raise BadRecordError("its contents are not those that its name stands for")
    return row


def _other_schema(found: pa.Schema) -> str:
    version = (found.metadata or {}).get(b"hf_hpmkd_memory_format", b"1")
    if version.isdigit() and int(version[:9]) > FORMAT_VERSION:
        return f"it has format {int(version[:9])}, this version of hf_hpmkd reads up to {FORMAT_VERSION}: update it"
    return "its columns are not those of a record"


def _number(value: Any) -> float | None:
    """A finite float, or None: NaN and infinity are kept in `details` alone."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
