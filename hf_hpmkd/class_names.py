"""Which output of a teacher belongs to which class of the data: told by the names of the classes."""

import json
import re
import warnings
from collections.abc import Sequence

_FEW_NAMES = 10  # that a message lists


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold()


def _are_generic(names: Sequence[str]) -> bool:
    """Whether the names only count: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(plain_name(name) in (f"label{i}", str(i)) for i, name in enumerate(names))


def align_labels(teacher_names: Sequence[str], data_names: Sequence[str]) -> list[int]:
    """For each class of the data the index of the teacher's output: by name, ignoring case, spaces, hyphens,
    underscores.

    Names that only count (LABEL_0, ...) and are not the data's are taken in order, with a warning. Raises ValueError
    that lists every class which only one side has, and every name that either side has twice.
    """
    if list(teacher_names) == list(data_names):
        return list(range(len(data_names)))
    exact = len(set(teacher_names)) == len(teacher_names) and set(teacher_names) == set(data_names)
    if not exact and len(teacher_names) == len(data_names) and _are_generic(teacher_names):
        warnings.warn(
            f"The teacher's classes have no names ({teacher_names[0]}, ...), so its outputs are taken in the data's "
            f"order: {', '.join(data_names[:5])}{', ...' if len(data_names) > 5 else ''}. Say `labels` to be sure.",
            stacklevel=2,
        )
        return list(range(len(data_names)))
    teacher = list(teacher_names) if exact else [plain_name(name) for name in teacher_names]
    data = list(data_names) if exact else [plain_name(name) for name in data_names]
    faults = [
        _listed(
            "missing from the teacher", [name for name, p in zip(data_names, data, strict=True) if p not in teacher]
        ),
        _listed("unknown to the data", [name for name, p in zip(teacher_names, teacher, strict=True) if p not in data]),
        _listed(
            "twice in the teacher", [n for n, p in zip(teacher_names, teacher, strict=True) if teacher.count(p) > 1]
        ),
        _listed("twice in the data", [n for n, p in zip(data_names, data, strict=True) if data.count(p) > 1]),
    ]
    if any(faults):
        way_out = "Fine-tune it on these classes first, or choose another teacher."
        if len(data_names) == len(teacher_names):
            quoted = json.dumps(list(data_names) if len(data_names) <= _FEW_NAMES else ["a", "b", "..."])
            way_out = (
                "If only the names differ, give the data's names in the teacher's order as `labels`, for "
                f"the first teacher 'teachers.0.labels={quoted}'; else choose another teacher."
            )
        raise ValueError(
            f"A teacher must know exactly the data's {len(data_names)} classes, by name; it has {len(teacher_names)}: "
            f"{'; '.join(fault for fault in faults if fault)}. {way_out}"
        )
    return [teacher.index(name) for name in data]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _FEW_NAMES:,} more" if len(names) > _FEW_NAMES else ""
    return f"{what}: {', '.join(names[:_FEW_NAMES])}{more}" if names else ""
