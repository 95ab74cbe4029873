"""All records of a memory side by side in one file, which is read in a small part of the time of thousands of files.

A cache: where it is gone or damaged, it is made again. Every row stands beside the size and the time of change
of the file that it was read from, so a record that was changed since is read, and checked, anew.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_hpmkd.memory_files import write_synced
from hf_hpmkd.memory_records import SCHEMA, Row

NAME = ".records.index"
"""The SHA-256 of what follows, which is a Parquet file."""

MOST_APART = 100
"""Records that may be missing from it before it is written again."""

_DIGEST = hashlib.sha256().digest_size
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
    """File name to row; {} where there is no sound index of this format."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
        return {}
    table = pq.read_table(BytesIO(content[_DIGEST:]))
    if not table.schema.equals(_SCHEMA):
        return {}
    found: dict[str, Indexed] = {}
    for row in table.to_pylist():
        name, nbytes, changed = (row.pop(key) for key in _SCHEMA.names[:3])
        found[name] = Indexed(nbytes, changed, row)
    return found


def write_index(path: Path, rows: Mapping[str, Indexed]) -> None:
    """In one step. The caller holds a lock, so that no other process writes it."""
    flat = [
        {**one.row, "file_name": name, "file_bytes": one.nbytes, "file_changed": one.changed}
        for name, one in rows.items()
    ]
    content = BytesIO()
    table = pa.Table.from_pylist(flat, schema=_SCHEMA)
    pq.write_table(table, content, compression="zstd")
    temporary = path.with_suffix(".tmp")
    write_synced(temporary, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    os.replace(temporary, path)
