"""Several runs of the same recipes with other seeds, as one table: means and spreads, from run records alone."""

import copy
import json
import statistics
from collections.abc import Sequence

from hf_hpmkd.report import markdown
from hf_hpmkd.run_record import RunRecord, last_name

HEADER = (
    "data",
    "student",
    "compression",
    "best teacher",
    "direct training",
    "distilled",
    "gain, points",
    "student kept",
    "retention",
    "seed numbers",
)


def summary(records: Sequence[RunRecord]) -> str:
    """A Markdown table, a row per recipe: test accuracies as mean ± standard deviation over its seeds.

    Runs belong together if their recipes differ in nothing but `training.seed` and where they lie. gain: the mean of
    the paired differences, distilled minus direct, ± their standard deviation. student kept, retention: of the one that
    validation rows chose. A dash stands for what was not measured.
    Raises ValueError if a record is not of a completed run.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status != "completed":
            raise ValueError(
                f"A summary is made of completed runs, got one with status {record.status}. Resume it first."
            )
        groups.setdefault(_recipe_key(record), []).append(record)
    return markdown(HEADER, [_line(group) for group in groups.values()], left=2)


def memory_table(records: Sequence[RunRecord]) -> str:
    """A Markdown table of what runs found in their memory, in the order given."""
    header = ("student", "seed", "run, s", "teacher outputs found", "bytes spared", "seconds of computing spared")
    lines = []
    for record in records:
        memory = record.memory
        lines.append(
            [
                record.recipe["student"]["model"],
                str(record.seed),
                f"{sum(record.seconds.values()):.0f}",
                f"{memory['outputs_found']} of {memory['outputs_found'] + memory['outputs_computed']} files",
                f"{memory['bytes_saved']:,}",
                f"{memory['seconds_saved']:.0f}",
            ]
        )
    return markdown(header, lines, left=1)


def _recipe_key(record: RunRecord) -> str:
    tree = copy.deepcopy(record.recipe)
    for section in ("output", "hub", "memory"):
        tree.pop(section, None)
    tree["training"].pop("seed", None)
    tree["distillation"].pop("cache_dir", None)
    return json.dumps(tree, sort_keys=True)


def _line(group: Sequence[RunRecord]) -> list[str]:
    first = group[0]
    best = [teacher.accuracy["test"] for record in group if (teacher := record.best_teacher()) is not None]
    students = [record.models["student"] for record in group]
    kept = [accuracy for student in students if (accuracy := student.accuracy()) is not None]
    taught = [one.accuracy() for record in group if (one := record.distilled) is not None]
    distilled = [accuracy for accuracy in taught if accuracy is not None]
    pairs = [
        (accuracy, direct.accuracy())
        for accuracy, record in zip(taught, group, strict=True)
        if (direct := record.models.get("direct")) is not None
    ]
    bases = [base for _, base in pairs if base is not None]
    gains = [mine - base for mine, base in pairs if mine is not None and base is not None]
    retention = [
        value for record, one in zip(group, students, strict=True) if (value := record.retention(one.accuracy()))
    ]
    compression = first.compression(students[0].num_params)
    return [
        last_name(first.recipe["data"]["path"]),
        f"{first.recipe['student']['model']} ({students[0].num_params:,} parameters)",
        "-" if compression is None else f"{compression:.1f}x",
        _spread(best),
        _spread(bases),
        _spread(distilled),
        _spread(gains, sign="+"),
        _spread(kept),
        "-" if not retention else f"{statistics.mean(retention):.1%}",
        ", ".join(str(record.seed) for record in sorted(group, key=lambda record: record.seed)),
    ]


def _spread(shares: Sequence[float], sign: str = "") -> str:
    """Percent, mean ± standard deviation; the mean alone of one value, a dash of none."""
    if not shares:
        return "-"
    mean = format(100 * statistics.mean(shares), f"{sign}.2f")
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares):.2f}"
