"""Opens a data set, from the Hub, a folder, files or scikit-learn, and makes sure that its labels are classes.

Knows nothing of parts, tasks or models. Runs no code that comes with a data set: `datasets` 4 and later cannot.
"""

import difflib
import gc
import glob
import re
import traceback
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import SPLIT_KEYWORDS
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_hpmkd.hub_client import card_license
from hf_hpmkd.tasks.base import column_values
from hf_hpmkd.vocabulary import DATA_FILES, SKLEARN_SETS

_READ_AS: dict[str, tuple[str, dict[str, str]]] = {  # a builder of `datasets` with what it is told
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
}
# `datasets` reads 10,000 rows at a time, takes the types of the first for all, and fails on a later row of another. So
# does pandas' faster parser with parts of a megabyte.
_CSV_WHOLE = {"chunksize": 2**31, "engine": "python"}
SKLEARN_LICENSE = "cc-by-4.0"  # all four are from the UCI repository, which states this licence
# The library's HTTP error and OSError, whichever HTTP library the Hub client is built on (httpx, httpx2).
_NO_ANSWER: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
_FEW_VALUES = 50  # that a column of classes or words always may have
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_SPLIT_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}  # as in a folder


@dataclass
class Source:
    """An opened data set. commit, license: None if unknown."""

    splits: dict[str, Dataset]
    kind: str  # "hub", "folder", "file" or "sklearn"
    commit: str | None = None
    license: str | None = None


def suggest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" if a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def open_source(path: str, name: str | None = None, revision: str | None = None) -> Source:
    """path: a Hub id, a folder, a Parquet, CSV, TSV, JSON Lines or JSON file or a glob of them, or "sklearn:digits".

    Raises FileNotFoundError if it is not there, ValueError if it cannot be read as one of these.
    """
    if path.startswith("sklearn:"):
        return _open_sklearn(path.removeprefix("sklearn:"))
    local = Path(path).expanduser()
    if any(sign in path for sign in "*?["):
        return _open_files(path, sorted(glob.glob(str(local), recursive=True)))
    if local.is_dir():
        return _open_folder(local, name)
    if local.is_file():
        return _open_files(path, [str(local)])
    if local.suffix in DATA_FILES or path.startswith((".", "/", "~")) or not _HUB_ID.match(path):
        beside = sorted(entry.name for entry in local.parent.iterdir()) if local.parent.is_dir() else []
        there = (
            f"{str(local.parent)!r} holds {', '.join(beside[:20]) or 'nothing'}" if beside else "nor does its folder"
        )
        raise FileNotFoundError(f"{path!r} does not exist; {there}.{suggest(local.name, beside)}")
    return _open_hub(path, name, revision)


def _plain(loaded: Dataset | DatasetDict) -> dict[str, Dataset]:
    return {"train": loaded} if isinstance(loaded, Dataset) else {str(split): rows for split, rows in loaded.items()}


def _open_files(path: str, files: list[str]) -> Source:
    if not files:
        raise FileNotFoundError(f"No file matches {path!r}.")
    kinds = {Path(file).suffix for file in files}
    if len(kinds) > 1 or not kinds <= {*_READ_AS}:
        raise ValueError(
            f"{path!r} must name files that all end alike, in {', '.join(DATA_FILES[:-1])} or {DATA_FILES[-1]}, got "
            f"{', '.join(files[:5])}."
        )
    named = [re.split(r"[^a-z]+", Path(file).stem.lower()) for file in files]
    of_files = [{_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS} for words in named]
    known = [splits for splits in of_files if splits]
    words = set[str]().union(*known)
    if known and not set.intersection(*known):  # car_evaluation_train.csv may be of two
        raise ValueError(
            f"{path!r} matches files of several splits ({', '.join(sorted(words))}), which would become one. "
            "Give the folder instead: its splits are then told apart by the file names."
        )
    kind, settings = _READ_AS[kinds.pop()]
    splits = _read(path, kind, data_files={"train": files}, **settings)
    rows = splits["train"]
    nested = not all(isinstance(feature, Value) for feature in rows.features.values())
    if kind == "json" and nested and len(rows) <= len(files):  # {"data": [...]}, or an object per column
        raise ValueError(
            f"{path!r} holds {len(rows)} rows in {len(files)} files, with lists or objects in them. A .jsonl file has "
            "one object per line, a .json file one list of them, each with the same keys: a row."
        )
    return Source(splits, "file")


def _open_folder(folder: Path, name: str | None) -> Source:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        if name is not None:
            raise ValueError(
                f"`name` chooses a configuration; {str(folder)!r} was written by save_to_disk and has none."
            )
        splits = _plain(load_from_disk(str(folder)))
    else:
        splits = _read(str(folder), str(folder), name)
    card = folder / "README.md"
    metadata = (metadata_load(card) if card.exists() else None) or {}
    return Source(splits, "folder", license=card_license(metadata))


def _read(where: str, *args: Any, **settings: Any) -> dict[str, Dataset]:
    """load_dataset of local files, with its errors in our words."""
    try:
        return _plain(load_dataset(*args, **settings))
    except StopIteration as error:  # of the JSON reader
        raise ValueError(f"A JSON file of {where!r} holds no rows. Remove it.") from error
    except datasets.exceptions.DatasetGenerationError as error:
        _close_files(error)
        reason = str(error.__cause__ or error).splitlines()[-1]
        if "BatchSize must be greater than 0" in reason:
            raise ValueError(f"A Parquet file of {where!r} holds no rows. Remove it.") from error
        if load_dataset_builder(*args, **settings).name == "csv":
            with suppress(datasets.exceptions.DatasetGenerationError):
                return _plain(load_dataset(*args, **settings, **_CSV_WHOLE))
        way_out = "Give the folder of one data set, whose files have the same columns."
        if "EOF inside string" in reason or "unexpected end of data" in reason:
            way_out = 'A quotation mark opens a value and is never closed: write each " inside values twice.'
        raise ValueError(f"The files of {where!r} cannot be read as one data set ({reason}). {way_out}") from error
    except datasets.exceptions.DataFilesNotFoundError as error:
        raise FileNotFoundError(
            f"{where!r} holds no files that `datasets` reads (Parquet, CSV, JSON, images)."
        ) from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"A split of {where!r} is empty: {error} Remove its files.") from error


def _close_files(error: BaseException) -> None:
    """`datasets` leaves a file that it failed to read open for as long as the frames of the error are there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        one: BaseException | None = error
        while one is not None:
            traceback.clear_frames(one.__traceback__)
            one = one.__cause__ or one.__context__
        gc.collect()


def _open_hub(path: str, name: str | None, revision: str | None) -> Source:
    """The commit is looked up first and then asked for, so that the one recorded is the one used."""
    commit, license_name = None, None
    if not datasets.config.HF_HUB_OFFLINE:
        commit, license_name = _hub_facts(path, revision)
    try:
        splits = _plain(load_dataset(path, name, revision=commit or revision))
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no folder {path!r}, and the Hub gives no data set of that name: {error} "
            "Check the name; for a private set, log in with `hf auth login`."
        ) from error
    return Source(splits, "hub", commit, license_name)


def _hub_facts(path: str, revision: str | None) -> tuple[str | None, str | None]:
    """(commit, licence) as the Hub states them; (None, None) if it cannot be reached, since a cached copy may still
    do.
    """
    try:
        info = HfApi().dataset_info(path, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"There is no folder {path!r} and no data set of that name{at} on the Hub. "
            "A private or gated one needs `hf auth login`."
        ) from error
    except _NO_ANSWER:
        return None, None
    return info.sha, card_license(info.card_data or {})


def _open_sklearn(name: str) -> Source:
    """One split, "train". digits: 8x8 grey images, 0..16 spread over 0..255; the others: tables."""
    if name not in SKLEARN_SETS:
        raise ValueError(
            f"`sklearn:` knows the sets that come with scikit-learn, {', '.join(SKLEARN_SETS)}, got {name!r}."
            f"{suggest(name, SKLEARN_SETS)}"
        )
    from PIL import Image as PILImage
    from sklearn import datasets as sklearn_datasets

    bunch = getattr(sklearn_datasets, f"load_{name}")()
    classes = ClassLabel(names=[str(label) for label in bunch.target_names])
    if name == "digits":
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
        features = Features({"image": datasets.Image(), "label": classes})
    else:
        names = [str(column) for column in bunch.feature_names]
        columns = {column: bunch.data[:, i].tolist() for i, column in enumerate(names)} | {
            "label": bunch.target.tolist()
        }
        features = Features({column: Value("float64") for column in names} | {"label": classes})
    return Source({"train": Dataset.from_dict(columns, features=features)}, "sklearn", license=SKLEARN_LICENSE)


def mostly_different(num_values: int, num_rows: int) -> bool:
    """Whether a column of so many values tells its rows apart, and not kinds of rows: a name, a date, a text."""
    return num_values > max(_FEW_VALUES, num_rows / 2)


def with_classes(splits: Mapping[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """The splits with a ClassLabel column, and its names in order. Checks every label.

    Whole numbers (also those that pandas made real), strings and booleans become classes, in numeric or alphabetic
    order of all splits together. Raises ValueError for missing labels, regression targets (real numbers, or more than
    50 whole ones that do not count from 0), several labels per row, splits of different kinds, and where most values
    occur once.
    """
    for split, rows in splits.items():
        _check_labels(split, rows, column)
    features = {split: rows.features[column] for split, rows in splits.items()}
    typed = next((split for split, feature in features.items() if isinstance(feature, ClassLabel)), None)
    if typed is not None:
        first = features[typed]
        for split, feature in features.items():
            if not isinstance(feature, ClassLabel) or feature.names != first.names:
                raise ValueError(
                    f"The splits must name the same classes in the same order: {typed!r} has {first.names}, "
                    f"{split!r} has {getattr(feature, 'names', feature)}. Cast both to one ClassLabel."
                )
        return dict(splits), list(first.names)
    kinds = {split: "words" if "string" in feature.dtype else "numbers" for split, feature in features.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{split!r} holds {kind} ({features[split].dtype})" for split, kind in kinds.items())
        raise ValueError(f"Column {column!r} must hold classes of one kind in all splits; {told}. Cast one of them.")
    labels = {split: [_whole(value) for value in column_values(rows, column)] for split, rows in splits.items()}
    found = {value for values in labels.values() for value in values}
    count = sum(len(rows) for rows in splits.values())
    quantities = "numbers" in kinds.values() and found != set(range(len(found)))
    if mostly_different(len(found), count) or (quantities and len(found) > _FEW_VALUES):
        raise ValueError(
            f"Column {column!r} holds {len(found):,} different values in {count:,} rows: that is a name or a quantity "
            "of each row, and no class. Choose another with `data.label_column`, or cast it to a ClassLabel if it is "
            "one."
        )
    ordered = sorted(found) if len({type(value) for value in found}) == 1 else sorted(found, key=str)
    names = [str(value) for value in ordered]
    codes = {value: code for code, value in enumerate(ordered)}
    coded = {}
    for split, rows in splits.items():
        place = rows.column_names.index(column)
        coded_labels = [codes[value] for value in labels[split]]
        kept = rows.remove_columns(column).add_column(column, coded_labels).cast_column(column, ClassLabel(names=names))
        order = [c for c in rows.column_names if c != column]
        coded[split] = kept.select_columns([*order[:place], column, *order[place:]])
    return coded, names


def _whole(value: Any) -> Any:
    """A whole number that pandas wrote as a real one, because some had been missing, as what it is."""
    return int(value) if isinstance(value, float) else value


def _check_labels(split: str, rows: Dataset, column: str) -> None:
    feature = rows.features[column]
    if not isinstance(feature, ClassLabel) and not isinstance(feature, Value):
        raise ValueError(
            f"Column {column!r} must hold one class per row, got {feature}. Several labels per row are not supported; "
            "choose another column with `data.label_column`."
        )
    values = column_values(rows, column)
    missing = [row for row, value in enumerate(values) if value is None or value != value]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} labels in split {split!r} are missing (first: row {missing[0]}). "
            f"Remove them: `dataset.filter(lambda r: r[{column!r}] is not None)`. In CSV files None, NA, null and nan "
            "are read as missing: give a class of such a name another one."
        )
    without = (
        "A split with -1 was published without labels: choose another one (for GLUE, `data.test_split: validation`)."
    )
    if isinstance(feature, ClassLabel):
        odd = [value for value in values if not 0 <= value < len(feature.names)]
        if odd:
            some = f"Remove these rows: `dataset.filter(lambda r: 0 <= r[{column!r}] < {len(feature.names)})`."
            raise ValueError(
                f"Labels of split {split!r} must lie in 0..{len(feature.names) - 1}, got {sorted(set(odd))[:5]} in "
                f"{len(odd):,} of {len(rows):,} rows. {without if len(odd) == len(rows) else some}"
            )
    elif set(values) == {-1}:
        raise ValueError(f"Labels of split {split!r} must be classes, and all are -1. {without}")
    elif "decimal" in feature.dtype or ("float" in feature.dtype and not all(value.is_integer() for value in values)):
        raise ValueError(
            f"Column {column!r} holds real numbers ({feature.dtype}): that is regression, which is not supported. If "
            "they are classes, cast them to integers."
        )
    elif not (feature.dtype.startswith(("int", "uint", "bool", "float")) or "string" in feature.dtype):
        raise ValueError(
            f"Column {column!r} must hold classes, got {feature.dtype}. Choose another with `data.label_column`."
        )
