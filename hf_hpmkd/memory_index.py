"""All records of a memory side by side in one file, which is read in a small part of the time of thousands of files.

A cache: where it is gone or cannot be read, it is made again. Every row stands beside the size and the time of change
of the file that it was read from, so a record that was changed since is read, and checked, anew.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_hpmkd.memory_records import SCHEMA, Row

NAME = ".records.parquet"
MOST_APART = 100
"""Records that may be missing from it before it is written again."""

_SCHEMA = pa.schema([("file_name", pa.string()), ("file_bytes", pa.int64()), ("file_changed", pa.int64()), *SCHEMA])


@dataclass(frozen=True)
class Indexed:
    """A row, and the size (bytes) and time of change (ns since 1970) of its file."""

    nbytes: int
    changed: int
    row: Row

    @classmethod
    def of(cls, status: os.stat_result, row: Row) -> "Indexed":
        """status: of the file before it was read."""
        return cls(status.st_size, status.st_mtime_ns, row)

    def is_of(self, status: os.stat_result) -> bool:
        """Whether a file is still the one that was read."""
        return (self.nbytes, self.changed) == (status.st_size, status.st_mtime_ns)


def read_index(path: Path) -> dict[str, Indexed]:
    """File name to row; {} where there is no index of this format."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return {}
    if not table.schema.equals(_SCHEMA):
        return {}
    found: dict[str, Indexed] = {}
    for row in table.to_pylist():
        name, nbytes, changed = (row.pop(key) for key in _SCHEMA.names[:3])
        found[name] = Indexed(nbytes, changed, row)
    return found


def write_index(path: Path, rows: Mapping[str, Indexed]) -> None:
    """The caller writes to a place of its own and moves it."""
    flat = [
        {**one.row, "file_name": name, "file_bytes": one.nbytes, "file_changed": one.changed}
        for name, one in rows.items()
    ]
    pq.write_table(pa.Table.from_pylist(flat, schema=_SCHEMA), path, compression="zstd")
