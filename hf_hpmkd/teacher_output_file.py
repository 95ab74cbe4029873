"""One file of teacher outputs: what decides its name, how it is laid out, written in one piece and checked when read.

A safetensors file. Its metadata holds the fields of the key, what `hpmkd cache ls` shows, and a sha256 over both and
every tensor byte. It is written beside its place and then renamed, so a stopped process leaves no half file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_hpmkd.tasks.base import json_digest

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
MODES = ("full", "topk")

Stored = Mapping[str, Tensor]

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFTOVER = re.compile(r"[0-9a-f]{64}\.(\d+\.tmp|lock)")
_LARGEST = 65504.0  # of float16
_EXACT = 64.0  # up to here float16 is good to a sixtieth, at 3,000 to one
_SMALLEST_LOG = -1e4


class DamagedFileError(ValueError):
    """A file of teacher outputs whose contents are not what was written."""


@dataclass(frozen=True)
class Layout:
    """How outputs `(rows, classes)` are stored.

    full: float16 logits. topk: float16 log-probabilities of the `topk` most probable classes, these classes, and the
    log of the remaining mass, which is spread evenly over the rest when read; a `topk` that leaves no class out is
    full. Raises ValueError for another mode, or for topk below 1.
    """

    mode: str
    topk: int | None
    rows: int
    classes: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.mode == "topk" and (self.topk is None or self.topk < 1):
            raise ValueError(
                f"`topk` must be at least 1 class, got {self.topk}. To keep all use teacher_outputs: full."
            )
        if self.mode == "full" or (self.topk is not None and self.topk >= self.classes):
            object.__setattr__(self, "mode", "full")
            object.__setattr__(self, "topk", None)

    @property
    def keys(self) -> list[str]:
        return list(self._columns)

    @property
    def _columns(self) -> dict[str, tuple[int, torch.dtype]]:
        """Numbers per row and their type, by tensor."""
        if self.topk is None:
            return {"logits": (self.classes, torch.float16)}
        # int16 reaches 32,767 classes; index_select and scatter want int32 or int64 later anyway.
        index = torch.int16 if self.classes <= 2**15 else torch.int32
        return {"values": (self.topk, torch.float16), "classes": (self.topk, index), "rest": (1, torch.float16)}

    @property
    def nbytes(self) -> int:
        return self.rows * sum(width * dtype.itemsize for width, dtype in self._columns.values())

    def empty(self, leading: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Unset tensors `(*leading, numbers per row)`; leading None: one line per row."""
        shape = (self.rows,) if leading is None else tuple(leading)
        return {key: torch.empty(*shape, width, dtype=dtype) for key, (width, dtype) in self._columns.items()}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Float logits `(batch, classes)` as they are stored, on their device. NaN and +inf come out as NaN."""
        if self.topk is None:
            return {"logits": to_half(logits)}
        logs = logits.log_softmax(1)
        values, classes = logs.topk(self.topk, dim=1)
        rest = logs.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
        return {
            "values": values.clamp_min(_SMALLEST_LOG).half(),
            "classes": classes.to(self._columns["classes"][1]),
            "rest": rest.clamp_min(_SMALLEST_LOG).half(),
        }

    def decode(self, stored: Stored) -> Tensor:
        """float32 logits `(..., classes)` of stored tensors; log-probabilities for topk."""
        if self.topk is None:
            return stored["logits"].float()
        rest = stored["rest"].float() - torch.log(torch.tensor(float(self.classes - self.topk)))
        spread = rest.expand(*rest.shape[:-1], self.classes).clone()
        return spread.scatter_(-1, stored["classes"].long(), stored["values"].float())

    def first_nan(self, tensors: Stored) -> int | None:
        """The first row with a NaN, or None."""
        broken = tensors["logits" if self.topk is None else "values"].isnan().any(1)
        return int(broken.nonzero()[0]) if bool(broken.any()) else None


def to_half(logits: Tensor) -> Tensor:
    """float16, which is coarse for large numbers: rows that reach far are moved so that their largest logit is 0, which
    no softmax notices, and cut off below. NaN and +inf give NaN."""
    peak = logits.amax(1, keepdim=True)
    too_large = logits.abs().amax(1, keepdim=True) > _EXACT
    return torch.where(too_large, logits - peak, logits).clamp_min(-_LARGEST).half()


@dataclass(frozen=True)
class Wanted:
    """A file that ought to be there. identity: of the teacher (see `Teacher.identity`). teacher: its name, for
    people."""

    root: Path
    identity: Mapping[str, Any]
    rows_fingerprint: str
    view_key: Mapping[str, Any]
    view: int
    layout: Layout
    teacher: str

    @cached_property
    def fields(self) -> dict[str, Any]:
        """All that decides the contents. JSON-able."""
        return {
            "format": FORMAT_VERSION,
            "teacher": dict(self.identity),
            "rows": self.rows_fingerprint,
            "augmentation": dict(self.view_key),
            "view": self.view,
            "mode": self.layout.mode,
            "topk": self.layout.topk,
        }

    @cached_property
    def key(self) -> str:
        return json_digest(self.fields)

    @property
    def path(self) -> Path:
        return self.root / f"{self.key}{SUFFIX}"

    @property
    def about(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher,
            "view": self.view,
            "mode": self.layout.mode,
            "rows": self.layout.rows,
            "classes": self.layout.classes,
        }


def _checksum(fields: str, about: str, tensors: Stored) -> str:
    digest = hashlib.sha256(f"{fields}\n{about}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(file: Wanted, tensors: dict[str, Tensor], seconds: float | None = None) -> None:
    """Puts the file in its place in one step. Call it with the file's lock held: leftovers of stopped writers go
    then. seconds: what computing it took, so that whoever finds it knows what was spared."""
    for leftover in file.root.glob(f"{file.key}.*.tmp"):
        leftover.unlink(missing_ok=True)
    fields = json.dumps(file.fields, sort_keys=True)
    about = json.dumps({**file.about, **({} if seconds is None else {"seconds": round(seconds, 3)})}, sort_keys=True)
    metadata = {"fields": fields, "about": about, "checksum": _checksum(fields, about, tensors)}
    unfinished = file.root / f"{file.key}.{os.getpid()}.tmp"
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, file.path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(file: Wanted | Path, path: Path | None = None) -> Stored:
    """The memory-mapped tensors. A path is checked against its own name and metadata, a wanted file also in its shapes.
    path: where the wanted file lies, if not in its place.

    Raises FileNotFoundError, and DamagedFileError where contents, name and checksum do not agree.
    """
    path = path or (file if isinstance(file, Path) else file.path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no teacher outputs at {path}.")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"it cannot be read: {error}") from error
    if {"fields", "about", "checksum"} - metadata.keys():
        raise DamagedFileError("its metadata is incomplete")
    if _checksum(metadata["fields"], metadata["about"], tensors) != metadata["checksum"]:
        raise DamagedFileError("its checksum is wrong")
    try:
        digest = json_digest(json.loads(metadata["fields"]))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("its metadata cannot be read") from error
    if digest != (path.stem if isinstance(file, Path) else file.key):
        raise DamagedFileError("it holds the outputs of something else than its name says")
    if isinstance(file, Wanted):
        wanted = {name: (value.shape, value.dtype) for name, value in file.layout.empty().items()}
        if {name: (value.shape, value.dtype) for name, value in tensors.items()} != wanted:
            raise DamagedFileError("its tensors have other shapes than the rows and classes ask for")
    return tensors


def read_about(path: Path) -> dict[str, Any]:
    """What `ls` shows of a file, from its header alone. Raises DamagedFileError if that cannot be read."""
    try:
        with safe_open(path, "pt") as opened:
            about = json.loads((opened.metadata() or {})["about"])
        return {key: about[key] for key in ("teacher", "view", "mode", "rows", "classes")}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"it cannot be read: {error}") from error


def read_seconds(path: Path) -> float | None:
    """What computing the file took; None where it does not say."""
    try:
        with safe_open(path, "pt") as opened:
            seconds = json.loads((opened.metadata() or {})["about"]).get("seconds")
    except (SafetensorError, OSError, KeyError, AttributeError, ValueError, RecursionError):
        return None
    known = isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0
    return float(seconds) if known else None


def list_files(root: Path, with_leftovers: bool = False) -> list[Path]:
    """The files that are ours by name, in order; with_leftovers: also locks and what stopped writers left."""
    if not root.is_dir():
        return []
    return sorted(
        path
        for path in root.iterdir()
        if _NAME.fullmatch(path.name) or (with_leftovers and _LEFTOVER.fullmatch(path.name))
    )
