"""What earlier runs say about configurations: the rows of a memory, and the prior that comes with the package.

A prior is one Parquet file, a row per short run: numbers and names, nothing of the data itself. How it is made is in
`prior_build`.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_hpmkd.components.adaptive_configuration import DIRECT, EARLY, Configuration, Example
from hf_hpmkd.memory_records import Row
from hf_hpmkd.meta_features import FEATURES

FORMAT_VERSION = 2
MAX_BYTES = 2_000_000

_LARGEST = 1e30  # of a feature or setting: a regression takes what float32 cannot hold for infinite
_EARLY_COLUMNS = tuple(f"early_{at:.0%}".rstrip("%") for at in EARLY)
_FIELDS = tuple(field.name for field in fields(Configuration))
_TYPES = {"str": pa.string(), "float": pa.float64(), "bool": pa.bool_()}
SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("data", "student", "taught_by")],
        *[(name, pa.int64()) for name in ("seed", "steps", "judged_rows")],
        ("base_learning_rate", pa.float64()),
        *[(field.name, _TYPES[type(field.default).__name__]) for field in fields(Configuration)],
        *[(name, pa.float64()) for name in ("accuracy", "direct_accuracy", "gain", "noise", *_EARLY_COLUMNS)],
        *[(f"feature_{name}", pa.float32()) for name in FEATURES],
    ]
)


def shipped_prior() -> Path:
    """The prior that comes with the package."""
    return Path(__file__).resolve().parent / "prior" / "prior.parquet"


def prior_row(example: Example, about: dict[str, Any]) -> dict[str, Any]:
    """An example as a row of a prior. about: the columns of SCHEMA that an example does not have."""
    early = dict(zip(_EARLY_COLUMNS, example.early, strict=True))
    features = {f"feature_{name}": example.features.get(name) for name in FEATURES}
    known = {"data": example.data, "gain": example.gain, "noise": example.noise, **early, **features}
    row = {**about, **asdict(example.configuration), **known}
    return {name: None if row[name] != row[name] else row[name] for name in SCHEMA.names}  # NaN is no value


def write_prior(rows: Sequence[dict[str, Any]], provenance: dict[str, Any], path: Path) -> None:
    """Raises ValueError if the file would be larger than a package should carry (MAX_BYTES)."""
    metadata = {"hf_hpmkd_prior_format": str(FORMAT_VERSION), "provenance": json.dumps(provenance)}
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    if temporary.stat().st_size > MAX_BYTES:
        temporary.unlink()
        raise ValueError(f"A prior may have {MAX_BYTES:,} bytes, this one of {len(rows):,} rows has more. Take fewer.")
    temporary.replace(path)


def read_prior(path: Path | None = None, leave_out: Collection[str] = ()) -> list[Example]:
    """The examples of a prior file; None: the shipped one, or none where the package came without it.

    leave_out: names of data sets whose rows are skipped. Raises FileNotFoundError, and ValueError for another format.
    """
    if path is None and not shipped_prior().is_file():
        return []
    table = pq.read_table(path or shipped_prior())
    found = (table.schema.metadata or {}).get(b"hf_hpmkd_prior_format", b"none").decode()
    if found != str(FORMAT_VERSION) or not table.schema.equals(SCHEMA):
        raise ValueError(
            f"{path} must be a prior of format {FORMAT_VERSION}, as `hpmkd prior build` writes it, got format {found}. "
            "Build it again, or leave `auto.prior` out."
        )
    return [_example(row) for row in table.to_pylist() if row["data"] not in leave_out]


def provenance(path: Path | None = None) -> dict[str, Any]:
    """How a prior was made; None: the shipped one. Raises FileNotFoundError if there is none."""
    path = path or shipped_prior()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no prior at {path}. Make one: hpmkd prior build --data DIR --output FILE, and name it: "
            "hpmkd prior show FILE."
        )
    about = (pq.read_schema(path).metadata or {}).get(b"provenance")
    if about is None:
        raise ValueError(f"{path} is no prior: it does not say how it was made. Name a file of `hpmkd prior build`.")
    return json.loads(about)


def _example(row: dict[str, Any]) -> Example:
    return Example(
        features={name: value for name in FEATURES if (value := row[f"feature_{name}"]) is not None},
        configuration=Configuration(**{name: row[name] for name in _FIELDS}),
        gain=row["gain"],
        noise=row["noise"],
        early=tuple(math.nan if row[name] is None else row[name] for name in _EARLY_COLUMNS),
        data=row["data"],
    )


# ---- the memory ------------------------------------------------------------------------------------------------------


def memory_examples(rows: Iterable[Row]) -> list[Example]:
    """What the rows of a memory show: runs that measured direct training beside the student, without a chain
    and without layer hints.

    The gain is that on validation rows: test rows are for judging, not for choosing. Rows whose JSON columns are not
    as this version writes them, which somebody else's may be, show nothing.
    """
    found = []
    for row in rows:
        with suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
            found.append(_example_of_run(row))
    return [example for example in found if example is not None]


def _example_of_run(row: Row) -> Example | None:
    details = json.loads(row["details"])
    accuracy, direct = row["validation_accuracy"], row["direct_validation_accuracy"]
    if "distilled" in details["models"]:  # the run kept the direct student
        accuracy = details["models"]["distilled"]["metrics"].get("validation", {}).get("accuracy")
    chain = details.get("chain") or {}
    if accuracy is None or direct is None or not row["validation_rows"] or chain.get("stages"):
        return None
    asked = json.loads(row["configuration"]).get("distillation", {})
    if asked.get("hint_weight"):  # of which a Configuration says nothing
        return None
    auto = details.get("auto")
    if auto is not None:
        if auto["configuration"].keys() - set(_FIELDS):  # of a later version: it says something else
            return None
        configuration = _sound(Configuration(**auto["configuration"]))
        known = {**_start_and_rate(row, details, configuration.distils), **auto["features"]}
        features = {name: value for name, value in known.items() if name in FEATURES}
    else:
        if row["alpha"] is None or not row["alpha"] > 0:
            return None
        names = ("alpha", "temperature", "temperature_schedule", "kd_kind", "gate")
        configuration = _sound(Configuration(**{name: row[name] for name in names}))
        features = _features_of_run(row, details)
    if not all(_is_number(value) for value in features.values()):
        raise ValueError(f"Features are numbers within {_LARGEST:g}.")
    if not (0 <= accuracy <= 1 and 0 <= direct <= 1):
        raise ValueError("Accuracies are shares of rows.")
    noise = 100 * math.sqrt(max(accuracy * (1 - accuracy), 0.01) / row["validation_rows"])
    return Example(features, configuration, 100 * (accuracy - direct), noise, data=row["data"] or "", own=True)


def _sound(configuration: Configuration) -> Configuration:
    """Raises ValueError for values of no configuration, which somebody else's record may hold."""
    for name in _FIELDS:
        value, default = getattr(configuration, name), getattr(DIRECT, name)
        if not (_is_number(value) if isinstance(default, float) else type(value) is type(default)):
            raise ValueError(f"{name} cannot be {value!r}.")
    return configuration


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _features_of_run(row: Row, details: dict[str, Any]) -> dict[str, float]:
    """What can be told of a run that computed no meta-features."""
    on_guide = [one["accuracy"]["guide"] for one in details["teachers"] if "guide" in one["accuracy"]]
    known = {
        "log_rows": row["train_rows"] and math.log10(row["train_rows"]),
        "log_classes": row["classes"] and math.log10(row["classes"]),
        "log_student_params": row["student_params"] and math.log10(row["student_params"]),
        "log_capacity_gap": row["compression"] and math.log10(row["compression"]),
        "teachers": float(len(details["teachers"])),
        "teacher_accuracy": max(on_guide, default=None),
    }
    known |= _start_and_rate(row, details, distils=True)
    return {name: value for name, value in known.items() if value is not None}


def _start_and_rate(row: Row, details: dict[str, Any], distils: bool) -> dict[str, float]:
    """What records of before these were meta-features tell of them: where students that hear teachers begin, and the
    recipe's learning rate (not the row's, which is what was chosen).
    """
    rate = json.loads(row["configuration"] or "{}").get("training", {}).get("learning_rate")
    found = {} if not rate else {"log_learning_rate": math.log10(rate)}
    if distils:
        found["warm_start"] = float((details.get("chain") or {}).get("student_warm_start", 0) > 0)
    return found
