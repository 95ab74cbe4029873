"""Which columns of a data set are read: those that the recipe names, else told from their types and names."""

from typing import Any

import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset, Image, Value

from hf_hpmkd.data_source import mostly_different, suggest
from hf_hpmkd.tasks.base import column_values
from hf_hpmkd.tasks.tables import is_table_feature
from hf_hpmkd.tasks.text import PAIR_COLUMNS, TEXT_COLUMNS, usual_pair
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TABULAR_CLASSIFICATION, TEXT_CLASSIFICATION

Columns = str | list[str] | None
_TWO = "data.input_column=[A,B] task.type=text-classification"
_INDEX_NAMES = ("Unnamed: 0", "__index_level_0__")  # pandas' for an index that was written along
_FEW_ROWS = 20  # whose numbers may count them by chance, and of whose words nothing can be said
_FEW_ODD = 0.1  # of the different values of a column


def require_columns(path: str, label_column: str, input_column: Columns, split: str, rows: Dataset) -> None:
    """Raises ValueError if a split lacks a column that is named, or the label is named as an input."""
    wanted = {"label_column": [label_column], "input_column": input_column or []}
    for key, columns in wanted.items():
        for column in [columns] if isinstance(columns, str) else columns:
            if column not in rows.column_names:
                raise ValueError(
                    f"`data.{key}` must be a column of {path!r}; split {split!r} has {', '.join(rows.column_names)}; "
                    f"got {column!r}.{_way_out(key, column, rows.column_names, path)}"
                )
            if key == "input_column" and column == label_column:
                raise ValueError(f"`data.input_column` must not be the label, got {column!r} for both.")


def _way_out(key: str, column: str, columns: list[str], path: str) -> str:
    if len(columns) == 1 and not path.endswith((".parquet", ".json", ".jsonl", ".ndjson")):
        only = columns[0]
        if "\t" in only:
            return " This one column looks like several with tabs between them. Name the file .tsv instead of .csv."
        if path.endswith(".tsv") and "," in only:
            return " This one column looks like several with commas between them. Name the file .csv instead of .tsv."
        if sign := next((sign for sign in ";|" if sign in only), None):
            return (
                f" This one column looks like several with {sign!r} between them. Save the file with commas between "
                "columns, and points in numbers."
            )
    return f"{suggest(column, columns)} Name it with data.{key}=COLUMN."


def choose_input(
    label_column: str, input_column: Columns, task: str, rows: Dataset
) -> tuple[str, list[str], list[str]]:
    """(task, input columns, notes). What was not named is told from the types and names of the columns.

    task: one of the three, or "auto". rows: of the training split. Raises ValueError where nothing fits.
    """
    features = {name: feature for name, feature in rows.features.items() if name != label_column}
    named = [input_column] if isinstance(input_column, str) else input_column
    candidates = features if named is None else {name: features[name] for name in named}
    images = [name for name, feature in candidates.items() if isinstance(feature, Image)]
    texts = [name for name, feature in candidates.items() if _is_string(feature)]
    usual = [name for name in TEXT_COLUMNS if name in texts and named is None]
    pair = _pair(texts, named, task, rows)
    notes = []
    if task == "auto" and pair and named is not None:
        notes = ["The two columns are read as a pair of texts; task.type=tabular-classification makes a table of them."]
    if task == "auto":
        text = usual or pair or (texts and not isinstance(input_column, list) and len(candidates) == 1)
        task = IMAGE_CLASSIFICATION if images else TEXT_CLASSIFICATION if text else TABULAR_CLASSIFICATION
    if task == TABULAR_CLASSIFICATION:
        return task, *_table_columns(candidates, rows, chosen=named is not None)
    found = images if task == IMAGE_CLASSIFICATION else pair or usual[:1] or texts
    if len(found) != (2 if found is pair else 1):
        listed = ", ".join(f"{name} ({feature})" for name, feature in candidates.items()) or "no column"
        kind = "image column" if task == IMAGE_CLASSIFICATION else "string column, or two that make a pair"
        raise ValueError(
            f"{task} needs exactly one {kind}, got {listed}. Name it with `data.input_column`"
            f"{'' if task == IMAGE_CLASSIFICATION else ', or both: data.input_column=[A,B]; join more of them'}."
        )
    if named is not None and set(found) != set(named):
        odd = ", ".join(f"{name} ({feature})" for name, feature in candidates.items() if name not in found)
        raise ValueError(f"{task} cannot read {odd}, which `data.input_column` names. Leave it out, or convert it.")
    left_out = [name for name in texts if task == TEXT_CLASSIFICATION and name not in found]
    if not left_out:
        return task, found, notes
    if found is pair:
        told, meant, more = f"{found[0]} and {found[1]} are read, as a pair,", f"[{','.join(found)}]", ""
    else:
        told, meant, more = f"{found[0]} alone is read,", found[0], f"two, name both ({_TWO}); of "
    return (
        task,
        found,
        [
            f"Of the columns of texts {told} and not {', '.join(left_out)}. If a row's text is made of {more}more, "
            f"join them first. data.input_column={meant} says that this is meant."
        ],
    )


def _pair(texts: list[str], named: list[str] | None, task: str, rows: Dataset) -> list[str]:
    """The two columns, if there are such, that make a pair of texts: two that are named, or the usual ones. Words that
    come again are of a table, unless the names or the task say otherwise: where most rows have the same two of the
    usual ones as others have, or where one of two others is not different in most rows (the other may be a name of each
    row). texts: the columns of strings, of the named ones where there are some.
    """
    found = usual_pair(texts) if named is None else named
    if len(set(found)) != 2 or not set(found) <= set(texts):
        return []
    meant = named is not None and any(set(named) == set(pair) for pair in PAIR_COLUMNS)
    if task == "auto" and not meant:
        values = [column_values(rows, name) for name in found]
        if named is None and len(set(zip(*values, strict=True))) <= len(rows) / 2:
            return []
        if named is not None and not all(mostly_different(len(set(one)), len(rows)) for one in values):
            return []
    return list(found)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _table_columns(candidates: dict[str, Any], rows: Dataset, chosen: bool) -> tuple[list[str], list[str]]:
    """(columns, notes). chosen: by the recipe, so that none is left out."""
    usable = [name for name, feature in candidates.items() if is_table_feature(feature)]
    left_out = [name for name in candidates if name not in usable]
    notes = [f"Columns left out of the table, by their type: {', '.join(left_out)}."] if left_out else []
    words = {name: set(column_values(rows, name)) for name in usable if _is_string(candidates[name])}
    if not chosen:
        named = [name for name, values in words.items() if mostly_different(len(values), len(rows))]
        counting = [name for name in usable if _counts_rows(candidates[name], rows, name)]
        keep = "Name all columns of the table with data.input_column=[A,B,...] to keep them"
        if named:
            notes.append(
                "Columns left out of the table, because most rows have a value of their own there: "
                f"{', '.join(named)}. {keep}; if one holds the texts to classify, name it alone, and of a pair "
                "of texts these two."
            )
        if counting:
            notes.append(
                f"Columns left out of the table, because they only count the rows: {', '.join(counting)}. {keep}."
            )
        usable = [name for name in usable if name not in (*named, *counting)]
        left_out += [*named, *counting]
    notes += [note for name, values in words.items() if (note := _told_of_numbers(name, values))]
    if not usable or (chosen and left_out):
        odd = ", ".join(f"{name} ({candidates[name]})" for name in left_out) or "no column"
        raise ValueError(
            f"A table needs feature columns of numbers, truth values or words that come again, got {odd}. If one holds "
            f"texts to classify, name it: data.input_column=COLUMN; two that make a pair: {_TWO}."
        )
    return usable, notes


def _counts_rows(feature: Any, rows: Dataset, column: str) -> bool:
    """Whether whole numbers go through a range, each once: an index that was written along, or a number of each row."""
    if not (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))):
        return False
    values = rows.with_format("arrow").select_columns([column])[:].column(0)
    if len(values) <= _FEW_ROWS or values.null_count:
        return False
    if column in _INDEX_NAMES:
        return pc.count_distinct(values).as_py() == len(values)
    ends = pc.min_max(values)
    in_a_row = ends["max"].as_py() - ends["min"].as_py() + 1 == len(values)
    return in_a_row and pc.count_distinct(values).as_py() == len(values)


def _told_of_numbers(column: str, values: set[Any]) -> str | None:
    """What to say of a column of strings that nearly all read as numbers: a cell or two made it one of words."""
    known = [value for value in values if value is not None]
    if len(known) <= _FEW_ROWS:
        return None
    each = pd.Series(sorted(known), dtype=object)
    odd = each[pd.to_numeric(each, errors="coerce").isna()].tolist()
    if not 0 < len(odd) < _FEW_ODD * len(known):
        return None
    told = ", ".join(map(repr, odd[:3]))
    return (
        f"Column {column} is read as words, because of {len(odd)} of its {len(known):,} different values, which are no "
        f"numbers: {told}{', ...' if len(odd) > 3 else ''}. If it is a quantity, empty those cells."
    )
