"""From a data section of a recipe to four parts: train, guide, validation, test.

train teaches the student; guide, rows that no teacher was trained on, tunes temperature and teacher weights;
validation chooses the checkpoint; test is read once, at the end. Every draw is stratified, `seed` alone decides it,
and no row is in two parts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Image

from hf_hpmkd.data_columns import choose_input, require_columns
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.data_source import Source, open_source, suggest, with_classes
from hf_hpmkd.tasks.base import Rows, column_values
from hf_hpmkd.tasks.images import Augmentation, ImageRows
from hf_hpmkd.tasks.tables import TableRows
from hf_hpmkd.tasks.text import TextRows, require_texts
from hf_hpmkd.tasks.word_dropout import WordDropout
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TASKS, TEXT_CLASSIFICATION

WHOLE = "the whole split"
PARTS = ("train", "guide", "validation", "test")
_FEW_ROWS = 30  # of which one is three points and more
_FEW_LONG = 0.05  # of the texts
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
LARGE_SIDE = 64  # auto augmentation: images up to this side are shifted, larger ones cropped and resized
SMALL_SIDE = 16  # auto augmentation: below this side mirroring is left out; such images are mostly signs and digits
RESIZED_SIDE = 256  # auto augmentation: larger images are not resized back to their full size


@dataclass
class DataParts:
    """The four parts. num_views: augmented views of a training row, 0 if there is no augmentation.

    provenance: JSON-able; where the rows come from, how each part was drawn, licence and commit (None if unknown),
    warnings.
    """

    task: str
    class_names: list[str]
    train: Rows
    guide: Rows
    validation: Rows
    test: Rows
    num_views: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The task in words: of pairs of texts also the columns that they are read from."""
        columns = self.provenance.get("input_columns", [])
        is_pair = self.task == TEXT_CLASSIFICATION and len(columns) == 2
        return f"{self.task} of pairs ({', '.join(columns)})" if is_pair else self.task

    def fingerprints(self, unread: Collection[str] = (), parts: Sequence[str] = PARTS) -> dict[str, str]:
        """Part -> fingerprint (hex) of its rows and labels; of those in `unread`, whose rows are many and are not read
        before they are needed, of the labels alone.
        """
        return {part: getattr(self, part).labelled_fingerprint(read=part not in unread) for part in parts}


def _share_colour(parts: dict[str, Rows]) -> None:
    """Gives all parts three channels where one has a colour image and another none: models and teachers that count
    pixels are made for one of them and asked about all.
    """
    images = {name: part for name, part in parts.items() if isinstance(part, ImageRows) and part.channels}
    if len({part.channels for part in images.values()}) > 1:
        parts |= {name: part.in_colour() for name, part in images.items()}


def load_parts(
    config: DataConfig, *, task: str = "auto", teachers_saw_train: bool = True, fixed_answers: bool = False
) -> DataParts:
    """Opens the data set, checks it, draws the parts.

    task: one of the three, or "auto" to tell it from the columns. teachers_saw_train: whether some teacher was trained
    elsewhere, so that the training split may be known to it; False if every teacher is trained here, on the rows of
    `train` alone. fixed_answers: whether some teacher has one answer per row, so that `augmentation` auto is none.
    Raises FileNotFoundError for a missing data set, ValueError for splits, columns, labels or sizes that cannot be
    used.
    """
    if task != "auto" and task not in TASKS:
        raise ValueError(f"`task` must be auto, {', '.join(TASKS)}, got {task!r}.{suggest(task, TASKS)}")
    source = open_source(config.path, config.name, config.revision)
    chosen = _choose_splits(config, source)
    splits = {split: source.splits[split] for split in chosen.values()}
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"Split {split!r} of {config.path!r} is empty.")
        require_columns(config.path, config.label_column, config.input_column, split, rows)
    task, columns, notes = choose_input(config.label_column, config.input_column, task, splits[chosen["train"]])
    for split, rows in splits.items():
        require_columns(config.path, config.label_column, columns, split, rows)
    splits, class_names = with_classes(splits, config.label_column)
    if task == TEXT_CLASSIFICATION:
        for split, rows in splits.items():  # in a part, which is drawn, nobody would find the row
            for column in columns:
                if rows.data.column(column).null_count:
                    told = config.input_column is None and len(columns) == 2
                    alone = f" data.input_column={columns[0]} reads that text alone." if told else ""
                    require_texts(column_values(rows, column), f" of split {split!r} (column {column})", alone)
    if config.max_length is not None and task != TEXT_CLASSIFICATION:
        raise ValueError(f"`data.max_length` is for texts, and this is {task}. Leave it out.")
    augmentation = _choose_augmentation(config, task, splits[chosen["train"]], columns)
    if augmentation is not None and fixed_answers and config.augmentation == "auto":
        augmentation = None
        notes = [*notes, "Training rows are not augmented, because a teacher has one answer per row (a column)."]

    labels = {role: np.asarray(column_values(splits[split], config.label_column)) for role, split in chosen.items()}
    drawn, how = _draw_parts(config, labels, teachers_saw_train)
    parts: dict[str, Rows] = {}
    for part, (role, indices) in drawn.items():
        rows = splits[chosen[role]]
        picked = rows if len(indices) == len(rows) else rows.select(indices)
        parts[part] = _make_rows(config, task, columns, class_names, picked, augmentation if part == "train" else None)
    _share_colour(parts)
    warnings = notes + _odd_classes(parts)
    if teachers_saw_train and drawn["guide"][0] == "train":
        warnings.append("The guide rows come from the training split, which a teacher trained elsewhere may have seen.")
    if teachers_saw_train and "test" not in chosen:
        warnings.append("The test rows come from the training split, which a teacher trained elsewhere may have seen.")
    warnings += _few_rows(drawn, parts, teachers_saw_train) + _long_texts(parts["train"])
    provenance = {
        "path": config.path,
        "name": config.name,
        "revision": config.revision,
        "kind": source.kind,
        "commit": source.commit,
        "license": source.license,
        "task": task,
        "input_columns": columns,
        "label_column": config.label_column,
        "splits": {split: len(rows) for split, rows in source.splits.items()},
        "parts": {
            part: {
                "split": chosen[drawn[part][0]],
                "rows": len(parts[part]),
                "how": how[part],
                "commonest_class": parts[part].labels.bincount().max().item() / len(parts[part]),
            }
            for part in PARTS
        },
        "unused_rows": {
            split: len(splits[split]) - sum(len(rows) for role, rows in drawn.values() if chosen[role] == split)
            for split in splits
        },
        "augmentation": parts["train"].view_key(),
        "seed": config.seed,
        "warnings": warnings,
    }
    num_views = config.views if parts["train"].supports_views else 0
    return DataParts(task, class_names, **parts, num_views=num_views, provenance=provenance)


def _choose_splits(config: DataConfig, source: Source) -> dict[str, str]:
    """Which split plays train, validation and test; the last two only if there is one."""
    known = list(source.splits)
    named = {"train": config.train_split, "test": config.test_split, "validation": config.validation_split}
    for role, split in named.items():
        if split is not None and split not in known:
            raise ValueError(
                f"`{role}_split` must be a split of {config.path!r}, which has {', '.join(known)}; got {split!r}."
                f"{suggest(split, known)}"
            )
    chosen = {role: split for role, split in named.items() if split is not None}
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(f"train, validation and test must be different splits, got {chosen}. Leave out one of them.")
    if "test" not in chosen and "test" in known and "test" not in chosen.values():
        chosen["test"] = "test"
    free = [split for split in VALIDATION_SPLITS if split in known and split not in chosen.values()]
    if "validation" not in chosen and free:
        chosen["validation"] = free[0]
    return chosen


_Augmentation = Augmentation | WordDropout


def _choose_augmentation(config: DataConfig, task: str, train: Dataset, columns: list[str]) -> _Augmentation | None:
    policy = config.augmentation
    of_task = {IMAGE_CLASSIFICATION: ("crop", "crop_flip", "resized_crop_flip"), TEXT_CLASSIFICATION: ("word_dropout",)}
    possible = ("auto", "none", *of_task.get(task, ()))
    if policy not in possible:
        raise ValueError(f"`data.augmentation` must be one of {', '.join(possible)} for {task}, got {policy!r}.")
    if policy == "word_dropout":
        return WordDropout(seed=config.seed)
    if policy == "none" or task != IMAGE_CLASSIFICATION:
        return None
    try:
        image = train.with_format(None).select([0]).cast_column(columns[0], Image())[0][columns[0]]
    except (OSError, SyntaxError) as error:
        raise ValueError(f"The image of row 0 of the training split cannot be read: {error}") from error
    if image is None:
        raise ValueError(f"Row 0 of the training split has no image in column {columns[0]!r}. Remove such rows first.")
    side = max(image.size)
    if policy == "auto":
        grey = image.mode in ("1", "L")
        policy = "resized_crop_flip" if side > LARGE_SIDE else "crop" if grey or side < SMALL_SIDE else "crop_flip"
    if policy == "resized_crop_flip":
        return Augmentation(policy, size=RESIZED_SIDE if side > RESIZED_SIDE else None, seed=config.seed)
    return Augmentation(policy, padding=max(1, side // 8), seed=config.seed)


def _make_rows(
    config: DataConfig,
    task: str,
    columns: list[str],
    class_names: list[str],
    rows: Dataset,
    augmentation: _Augmentation | None,
) -> Rows:
    if task == IMAGE_CLASSIFICATION:
        assert not isinstance(augmentation, WordDropout)
        return ImageRows.from_dataset(rows, columns[0], config.label_column, class_names, augmentation)
    if task == TEXT_CLASSIFICATION:
        assert not isinstance(augmentation, Augmentation)
        text, *second = columns
        return TextRows.from_dataset(
            rows, text, config.label_column, class_names, augmentation, config.max_length, *second
        )
    return TableRows.from_dataset(rows, columns, config.label_column, class_names)


Drawn = dict[str, tuple[str, np.ndarray]]
"""For each part: the role of its split, and the rows of it."""


def _draw_parts(config: DataConfig, labels: Mapping[str, np.ndarray], saw_train: bool) -> tuple[Drawn, dict[str, str]]:
    auto = "validation" if "validation" in labels else "test"
    if not saw_train or len(labels) == 1:  # of one split the test rows are no safer from teachers than the others
        auto = "train"
    origins = {
        "guide": auto if config.guide_from == "auto" else config.guide_from,
        "validation": auto if config.validation_from == "auto" else config.validation_from,
    }
    for part, origin in origins.items():
        if origin == "validation" and "validation" not in labels:
            raise ValueError(f"`{part}_from` is validation, but there is no validation split. Use train or test.")
    sizes: dict[str, dict[str, int | float]] = {role: {} for role in ("train", "test", "validation")}
    if "test" not in labels:
        sizes["train"]["test"] = config.test_size
    for part, origin in origins.items():
        sizes[origin][part] = config.guide_size if part == "guide" else config.validation_size

    drawn: Drawn = {}
    how: dict[str, str] = {}

    def take(role: str, split_role: str, pool: np.ndarray, kept_as: str | None) -> np.ndarray:
        """Draws the parts that come from one pool of rows; the rest is returned, as the part kept_as if it is one."""
        pool_labels = labels[split_role][pool]
        counts = {part: _count(part, size, len(pool)) for part, size in sizes[role].items()}
        order = ("train", "test", "validation").index(role)
        picked = carve(pool_labels, counts, [config.seed, order], keep_one=kept_as is not None)
        for part, indices in picked.items():
            drawn[part] = (split_role, pool[indices])
            how[part] = f"{len(indices)} of {len(pool)} rows, stratified, seed {config.seed}"
        rest = np.setdiff1d(pool, np.concatenate([pool[i] for i in picked.values()])) if picked else pool
        if kept_as is not None:
            drawn[kept_as] = (split_role, rest)
            before = f"{how[kept_as]}; then " if kept_as in how else ""
            how[kept_as] = f"{before}what {' and '.join(picked)} left" if picked else how.get(kept_as, WHOLE)
        return rest

    train = take("train", "train", np.arange(len(labels["train"])), "train")
    if "validation" in labels:
        take("validation", "validation", np.arange(len(labels["validation"])), None)
    test_role, test_pool = drawn["test"] if "test" in drawn else ("test", np.arange(len(labels["test"])))
    take("test", test_role, test_pool, "test")
    if config.max_train_rows is not None and config.max_train_rows < len(train):
        kept = carve(labels["train"][train], {"train": config.max_train_rows}, [config.seed, 3], keep_one=False)[
            "train"
        ]
        drawn["train"] = ("train", train[kept])
        subset = f"{len(kept)} of {len(train)} rows, stratified, seed {config.seed}"
        how["train"] = subset if how["train"] == WHOLE else f"{how['train']}; then {subset}"
    check_disjoint(drawn)
    return drawn, how


def _count(part: str, size: int | float, available: int) -> int:
    count = size if isinstance(size, int) else int(size * available + 1e-9)  # down, so that shares of 1 in all fit
    if not 1 <= count <= available:
        raise ValueError(
            f"`data.{part}_size` must give between 1 and {available} rows of the split they are drawn from, got {size} "
            f"({count} rows). Give a number of rows, `data.{part}_size=N`."
        )
    return count


def carve(labels: np.ndarray, sizes: Mapping[str, int], seed: int | list[int], keep_one: bool) -> dict[str, np.ndarray]:
    """Disjoint stratified draws: sorted positions of each part.

    labels: `(rows,)` class of each row. sizes: rows per part. Each part gets every class in proportion, by largest
    remainder. keep_one: leave at least one row of every class behind, so that a tiny class stays where most rows are.
    Raises ValueError if the parts ask for more rows than may be taken.
    """
    random = np.random.default_rng(seed)
    classes, per_class = np.unique(labels, return_counts=True)
    waiting = [random.permutation(np.flatnonzero(labels == label)) for label in classes]
    free = per_class - int(keep_one)
    if sum(sizes.values()) > free.sum():
        asked = ", ".join(f"{part} {size}" for part, size in sizes.items())
        raise ValueError(
            f"Too many rows are asked for ({asked}): {len(labels)} rows of {len(classes)} classes allow {free.sum()} "
            f"in all{', with a row of every class staying behind' if keep_one else ''}. Lower the sizes, or "
            "draw guide and validation rows from a larger split (data.guide_from, data.validation_from)."
        )
    parts = {}
    for part, size in sizes.items():
        counts = _proportional(per_class, size, free)
        parts[part] = np.sort(np.concatenate([rows[:count] for rows, count in zip(waiting, counts, strict=True)]))
        waiting = [rows[count:] for rows, count in zip(waiting, counts, strict=True)]
        free = free - counts
    return parts


def _proportional(per_class: np.ndarray, size: int, free: np.ndarray) -> np.ndarray:
    """Rows per class that sum to size, as near to its proportions as `free` allows (largest remainder; ties: first
    class).
    """
    wanted = size * per_class / per_class.sum()
    counts = np.minimum(np.floor(wanted + 1e-9).astype(np.int64), free)
    while counts.sum() < size:
        lacking = np.where(counts < free, wanted - counts, -np.inf)
        order = np.argsort(-lacking, kind="stable")[: size - counts.sum()]
        counts[order] += counts[order] < free[order]
    return counts


def check_disjoint(drawn: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Raises RuntimeError if a row is in two parts, or twice in one."""
    for role in {role for role, _ in drawn.values()}:
        rows = np.concatenate([indices for other, indices in drawn.values() if other == role])
        if len(np.unique(rows)) < len(rows):
            raise RuntimeError(f"Rows of the {role} split are in two parts; the parts must be disjoint. This is a bug.")


def _odd_classes(parts: Mapping[str, Rows]) -> list[str]:
    warnings = []
    for part in PARTS:
        present = set(parts[part].labels.tolist())
        missing = [name for label, name in enumerate(parts[part].class_names) if label not in present]
        if missing:
            named = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            warnings.append(f"Part {part} has no row of {len(missing)} classes: {named}.")
    spellings: dict[str, str] = {}
    for name in parts["train"].class_names:
        other = spellings.setdefault(name.strip().casefold(), name)
        if other != name:
            warnings.append(f"Classes {other!r} and {name!r} differ in case or outer spaces alone. Are they one?")
    for name in parts["train"].class_names:
        if not name.strip() or (name == "-1" and len(parts["train"].class_names) > 2):  # -1 and 1 are two classes
            warnings.append(f"One class is called {name!r}. If that stands for no label, remove its rows.")
    return warnings


def _few_rows(drawn: "Drawn", parts: Mapping[str, Rows], teachers_saw_train: bool) -> list[str]:
    few = {part: len(parts[part]) for part in ("guide", "validation") if len(parts[part]) < _FEW_ROWS}
    if not few:
        return []
    told = " and ".join(f"{count} {part} rows" for part, count in few.items())
    asked = " and ".join(f"data.{part}_size" for part in few)
    way_out = f"Ask for more with {asked}"
    elsewhere = [f"data.{part}_from=train" for part in few if drawn[part][0] != "train"]
    if teachers_saw_train and elsewhere:  # else they are drawn from there anyway
        way_out += f", or draw them from the training rows, which loaded teachers may know: {' '.join(elsewhere)}"
    return [f"{told} are too few to choose by: chance decides much of what the run keeps. {way_out}."]


def _long_texts(rows: Rows) -> list[str]:
    if not isinstance(rows, TextRows) or rows.share_too_long < _FEW_LONG:
        return []
    return [
        f"{rows.share_too_long:.0%} of the training texts have more than {rows.read_length} words, and students read "
        f"{rows.read_length} tokens of one alone. `data.max_length` lets them read more, in more time."
    ]
