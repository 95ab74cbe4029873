"""Which output of a teacher belongs to which class of the data: told by the names of the classes."""

import re
import warnings
from collections.abc import Sequence

_FEW_NAMES = 10  # that a message lists


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold()


def are_generic(names: Sequence[str], numbers: bool = True) -> bool:
    """Whether the names only count: LABEL_0, LABEL_1, ..., or, with `numbers`, 0, 1, ..."""
    return all(plain_name(name) == f"label{i}" or (numbers and name.strip() == str(i)) for i, name in enumerate(names))


def align_labels(teacher_names: Sequence[str], data_names: Sequence[str]) -> list[int]:
    """For each class of the data the index of the teacher's output: by name, ignoring case, spaces, hyphens,
    underscores.

    Where the teacher's names only count (LABEL_0, or 0, ...), or the data's are LABEL_0, ..., as those of a student
    without names, outputs are taken in order, with a warning. Raises ValueError that lists every class which only one
    side has, and every name that one has twice.
    """
    if list(teacher_names) == list(data_names):
        return list(range(len(data_names)))
    exact = len(set(teacher_names)) == len(teacher_names) and set(teacher_names) == set(data_names)
    teacher = list(teacher_names) if exact else [plain_name(name) for name in teacher_names]
    data = list(data_names) if exact else [plain_name(name) for name in data_names]
    if len(teacher) == len(data) and set(teacher) != set(data):
        for whose, names, others, generic in (
            ("teacher", teacher_names, data_names, are_generic(teacher_names)),
            ("data", data_names, teacher_names, are_generic(data_names, numbers=False)),
        ):
            if generic:
                warnings.warn(
                    f"The {whose}'s classes have no names ({names[0]}, ...), so the teacher's outputs are taken in "
                    f"order: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}. Give names to both to be "
                    "sure: `labels` of a teacher, a ClassLabel of the data, `id2label` of a student.",
                    stacklevel=2,
                )
                return list(range(len(data_names)))
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
            outputs = ", ".join(teacher_names[:_FEW_NAMES]) + (", ..." if len(teacher_names) > _FEW_NAMES else "")
            way_out = (
                f"If only the names differ, give the data's as `labels`, in the order of the teacher's outputs "
                f'({outputs}), for instance \'teachers.0.labels=["A", "B"]\' of the first teacher in a recipe; else '
                "choose another teacher."
            )
        raise ValueError(
            f"A teacher must know exactly the data's {len(data_names)} classes, by name; it has {len(teacher_names)}: "
            f"{'; '.join(fault for fault in faults if fault)}. {way_out}"
        )
    return [teacher.index(name) for name in data]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _FEW_NAMES:,} more" if len(names) > _FEW_NAMES else ""
    return f"{what}: {', '.join(names[:_FEW_NAMES])}{more}" if names else ""


def require_same_classes(what: str, others: Sequence[str], train: Sequence[str]) -> None:
    """Raises ValueError where a label means another class to others than among the rows to train on: there are more or
    fewer, or one that both name has another number.
    """
    ours, theirs = ([plain_name(name) for name in names] for names in (train, others))
    moved = [name for name in theirs if name in ours and ours.index(name) != theirs.index(name)]
    if len(others) != len(train) or moved:
        raise ValueError(
            f"{what} must have the classes of the training rows, in the same order, got {_first(others)} and "
            f"{_first(train)}. Give all the same names in the same order: data sets by `align_labels_with_mapping`, a "
            "student by its `id2label` and `label2id`."
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW_NAMES]) + (f", ... ({len(names):,})" if len(names) > _FEW_NAMES else "")
