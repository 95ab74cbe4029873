"""The commands of `hpmkd memory`: each does its job and returns the text to print."""

import argparse
import json
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_hpmkd.components.optimization_memory import Gained, OptimizationMemory
from hf_hpmkd.memory_files import MANIFEST, folder_bytes, model_origin, shown
from hf_hpmkd.memory_hub import HubMemory, Names
from hf_hpmkd.memory_records import Row
from hf_hpmkd.run_record import last_name
from hf_hpmkd.teacher_cache import TeacherCache, readable_bytes


def run_command(job: str, args: argparse.Namespace) -> str:
    """The text of one command. Raises ValueError and OSError as its job does."""
    if job in ("push", "pull"):
        private = not getattr(args, "public", False)
        outputs_root = getattr(args, "cache_dir", None)
        shared = HubMemory(args.where, args.memory, outputs_root=outputs_root, private=private)
        return push(shared, args.ids, args.models, args.outputs) if job == "push" else pull(shared, args)
    memory = OptimizationMemory(args.memory)
    if job == "show":
        return show(memory, args.id)
    if job == "merge":
        return _gained(memory.merge(args.folder), str(args.folder))
    if job == "gc":
        return gc(memory, args.limit_gb)
    return {"ls": ls, "verify": verify, "stats": stats}[job](memory)


def ls(memory: OptimizationMemory) -> str:
    """The runs as a table, the latest first, and how much else there is."""
    rows, faults = memory.records()
    names = memory.known_names()
    lines = [f"{'id':12}  {'finished':20} {'data':20} {'student':20} {'compr.':>7} {'test':>7} {'gain':>6}  seed"]
    lines += [_line(row) for row in rows]
    if not rows:
        lines = ["No runs are remembered yet."]
    tail = (
        f"{len(rows)} runs, {len(names['models'])} models, {len(names['outputs'])} files of outputs, in {memory.root}"
    )
    return "\n".join([*lines, tail, *(f"Skipped: {fault}" for fault in faults)])


def _line(row: Row) -> str:
    test, direct = row["test_accuracy"], row["direct_test_accuracy"]
    gain = "-" if test is None or direct is None else f"{100 * (test - direct):+.2f}"
    compression = "-" if row["compression"] is None else f"{row['compression']:.1f}x"
    data, student = (_plain(last_name(str(row[key] or "-")))[:20] for key in ("data", "student"))
    return (
        f"{row['id'][:12]}  {_plain(row['finished'] or '-')[:20]:20} {data:20} {student:20} {compression:>7} "
        f"{'-' if test is None else f'{100 * test:.2f}':>7} {gain:>6}  {row['seed']}"
    )


def show(memory: OptimizationMemory, start: str) -> str:
    """One run or model, found by the beginning of its id or key. Raises ValueError if none or several begin so."""
    found: list[tuple[str, Any]] = [(row["id"], row) for row in memory.records()[0] if row["id"].startswith(start)]
    known = {name for name, _ in found}  # a run's student has the run's id; it is shown with the run
    found += [(key, None) for key in memory.known_names()["models"] if key.startswith(start) and key not in known]
    if len(found) != 1:
        these = ", ".join(name[:16] for name, _ in found[:5]) or "none"
        raise ValueError(f"`show` needs an id that one run or model begins with, {start!r} begins {these}. See `ls`.")
    name, row = found[0]
    lines = [] if row is None else [f"{key}: {_value(value)}" for key, value in row.items() if value is not None]
    folder = memory.root / "models" / name
    if folder.is_dir():
        files = ", ".join(path.name for path in sorted(folder.iterdir()) if path.name != MANIFEST)
        lines.append(f"model: {folder} ({readable_bytes(folder_bytes(folder))}: {files})")
    return "\n".join(lines)


def _value(value: Any) -> str:
    """A value for a terminal; JSON columns are opened up."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError, RecursionError):  # somebody else's may only look like JSON
            return _plain(json.dumps(json.loads(value), indent=1, ensure_ascii=False), keep="\n")
    return _plain(str(value))


def _plain(text: str, keep: str = "") -> str:
    """Text that others may have written, without what steers a terminal."""
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def push(memory: HubMemory, ids: list[str], models: bool, outputs: bool) -> str:
    """Sends runs (all, or those named) with their students if these are named too, and what else was asked for.
    Models that were fetched from another shared memory are sent only if they are named.
    """
    known = memory.known_names()
    chosen = {
        kind: [name for name in names if any(name.startswith(one) for one in ids)] for kind, names in known.items()
    }
    if lost := [one for one in ids if not any(name.startswith(one) for names in known.values() for name in names)]:
        raise ValueError(f"Nothing in {memory.root} begins with {', '.join(lost)}. See `hpmkd memory ls`.")
    origins = {key: model_origin(memory.root / "models" / key) for key in known["models"] if models}
    foreign = [
        key for key, origin in origins.items() if origin not in (None, memory.where) and key not in chosen["models"]
    ]
    names = Names(
        chosen["records"] if ids else known["records"],
        [key for key in known["models"] if key not in foreign] if models else chosen["models"],
        known["outputs"] if outputs else chosen["outputs"],
    )
    url = memory.push(names)
    lines = [f"Left out: models/{key}, fetched from {shown(str(origins[key]))}. Name it to push it." for key in foreign]
    count = (
        f"{len(names.records)} runs, {len(names.models)} models, {len(names.outputs)} files of outputs are in {url}."
    )
    return "\n".join([*lines, count])


def pull(memory: HubMemory, args: argparse.Namespace) -> str:
    return _gained(memory.pull(models=args.models, outputs=args.outputs), memory.where)


def _gained(gained: Gained, where: str) -> str:
    text = f"{gained.records} runs, {gained.models} models, {gained.outputs} files of outputs are new from {where}."
    return "\n".join([*(f"Skipped: {line}" for line in gained.skipped), text])


def verify(memory: OptimizationMemory) -> str:
    """Every damaged file, and how many were read. Raises ValueError if there are any, so that scripts notice."""
    outputs = TeacherCache(memory.outputs_root)
    faults = [*memory.faults(), *(f"teacher_outputs/{path.name}: {why}" for path, why in outputs.damaged().items())]
    count = sum(len(names) for names in memory.known_names().values())
    if not faults:
        return f"{count} records, models and files of outputs checked, all sound, in {memory.root}."
    raise ValueError(
        "\n".join([f"{len(faults)} of the files in {memory.root} are damaged or strange:", *faults])
        + "\nRuns skip such records and make such models and outputs again. Delete them, or restore them from a copy."
    )


def gc(memory: OptimizationMemory, limit_gb: float | None) -> str:
    if limit_gb is not None and not 0 <= limit_gb < math.inf:
        raise ValueError(f"--limit-gb must be a number from 0 on, got {limit_gb:g}.")
    freed = memory.evict(None if limit_gb is None else int(limit_gb * 1e9))
    text = f"{len(freed.names)} files and models deleted, {readable_bytes(freed.nbytes)} freed, in {memory.root}"
    return text + (f"; {readable_bytes(freed.over)} above the limit are in use." if freed.over else ".")


def stats(memory: OptimizationMemory) -> str:
    """Sizes, and hit rates over the runs that are remembered."""
    rows, faults = memory.records()
    sizes: Counter[str] = Counter()
    for item in memory.items():
        sizes["models" if item.name.startswith("models/") else _kind(item.path, memory)] += item.nbytes
    sums = {
        key: sum(row[key] or 0 for row in rows)
        for key in (
            "outputs_found",
            "outputs_computed",
            "models_found",
            "models_computed",
            "bytes_saved",
            "seconds_saved",
        )
    }
    records = folder_bytes(memory.root / "records")
    lines = [
        f"Memory in {memory.root}",
        f"runs: {len(rows)}, {readable_bytes(records)}" + (f"; {len(faults)} files are no records" if faults else ""),
        *(f"{kind}: {readable_bytes(sizes[kind])}" for kind in ("teacher outputs", "unchecked outputs", "models")),
        f"teacher outputs found: {_rate(sums['outputs_found'], sums['outputs_computed'])}",
        f"models found: {_rate(sums['models_found'], sums['models_computed'])}",
        f"spared: {readable_bytes(sums['bytes_saved'])} of teacher outputs, {sums['seconds_saved']:.0f} s",
    ]
    return "\n".join(lines)


def _kind(path: Path, memory: OptimizationMemory) -> str:
    return "unchecked outputs" if path.parent == memory.root / "unchecked" else "teacher outputs"


def _rate(found: int, computed: int) -> str:
    asked = found + computed
    return f"{found} of {asked} ({found / asked:.0%})" if asked else "none was asked for"
