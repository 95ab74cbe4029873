"""Tables: rows of numeric and categorical columns, and the feed that calls a table processor once per part.

A raw batch is `{"table": pandas.DataFrame of the feature columns}`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from hf_hpmkd.tasks.base import Rows, column_values, json_digest
from hf_hpmkd.vocabulary import TABULAR_CLASSIFICATION


def is_table_feature(feature: Any) -> bool:
    """Whether a table can hold this column: numbers, truth values, strings and class labels."""
    if isinstance(feature, ClassLabel):
        return True
    kinds = ("int", "uint", "float", "bool", "string", "large_string")
    return isinstance(feature, Value) and feature.dtype.rstrip("0123456789") in kinds


class TableRows(Rows):
    """Rows of a table. Build with `from_dataset`. table: the feature columns, one line per row."""

    task = TABULAR_CLASSIFICATION

    def __init__(
        self, dataset: Dataset, table: pd.DataFrame, labels: Sequence[int] | Tensor, class_names: Sequence[str]
    ) -> None:
        super().__init__(dataset, labels, class_names)
        if len(table) != len(dataset):
            raise ValueError(f"The table must have a line per row, got {len(table)} lines for {len(dataset)} rows.")
        self.table = table.reset_index(drop=True)

    @property
    def feature_columns(self) -> list[str]:
        return list(self.table.columns)

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, feature_columns: Sequence[str] | None, label_column: str, class_names: Sequence[str]
    ) -> "TableRows":
        """feature_columns: None takes all but the label. Class-label columns among the features become their names.

        Raises TypeError for a column that is no number, truth value or string, ValueError if no feature is left.
        """
        features = dataset.features  # a deep copy at every access, which takes seconds for some hundred columns
        if feature_columns is None:
            feature_columns = [column for column in dataset.column_names if column != label_column]
        if not feature_columns or label_column in feature_columns:
            raise ValueError(
                f"At least one feature column other than the label is needed, got {list(feature_columns)}."
            )
        odd = [f"{c} ({features[c]})" for c in feature_columns if not is_table_feature(features[c])]
        if odd:
            raise TypeError(
                f"A table holds numbers, truth values and strings; these columns are something else: {', '.join(odd)}. "
                "Name the feature columns to use, or cast these."
            )
        # In one piece: each selected row is a chunk of its own, and taking rows would look through all of them.
        table = dataset.with_format("arrow").select_columns(list(feature_columns))[:].combine_chunks().to_pandas()
        for column in feature_columns:
            feature = features[column]
            if isinstance(feature, ClassLabel):
                table[column] = table[column].map(dict(enumerate(feature.names)))
        return cls(dataset, table[list(feature_columns)], column_values(dataset, label_column), class_names)

    def _raw(self, positions: Tensor, views: Tensor | None) -> dict[str, Any]:
        return {"table": self.table.iloc[positions.numpy()].reset_index(drop=True)}

    def _hash_inputs(self, digest: Any) -> None:
        for column in self.table.columns:
            values = self.table[column]
            missing = values.isna().to_numpy()
            kind, content = _column_bytes(values, missing)
            digest.update(f"{column!r} {kind} {len(values)} {len(content)};".encode())
            digest.update(missing.tobytes())
            digest.update(content)

    def subset(self, indices: Sequence[int] | Tensor) -> "TableRows":
        positions = torch.as_tensor(indices, dtype=torch.long)
        table = self.table.iloc[positions.numpy()]
        return TableRows(self.dataset.select(positions.tolist()), table, self.labels[positions], self.class_names)


def _column_bytes(values: pd.Series, missing: np.ndarray) -> tuple[str, bytes]:
    """Kind and contents of a column. Integers count as the real numbers they are, because one missing value makes them
    such.
    """
    if values.dtype.kind in "iuf":
        numbers = np.where(missing, 0, values.to_numpy())
        if numbers.dtype.kind == "f" or not len(numbers) or np.abs(numbers.astype(np.float64)).max() <= 2**53:
            return "real", numbers.astype("<f8").tobytes()
        return "integer", numbers.astype("<u8" if numbers.dtype == np.uint64 else "<i8").tobytes()
    # The quotation marks of repr keep ["a", "b"] apart from ["a', 'b"].
    return "string", repr(["" if gone else str(v) for v, gone in zip(values, missing, strict=True)]).encode()


class EncodedTable:
    """The tensors of a whole part."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def take(self, positions: Tensor) -> dict[str, Tensor]:
        return {key: value.index_select(0, positions) for key, value in self._tensors.items()}


class TableFeed:
    """Calls a fitted table processor: `{"numeric": float (batch, numeric columns), "categorical": long (batch,
    categorical ones)}`.

    processor: called with a DataFrame, gives these two; `to_dict()` holds all that it learnt.
    """

    def __init__(self, processor: Callable[[pd.DataFrame], Any]) -> None:
        self.processor: Any = processor

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        outputs = self.processor(raw["table"])
        return {
            "numeric": torch.as_tensor(outputs["numeric"], dtype=torch.float32),
            "categorical": torch.as_tensor(outputs["categorical"], dtype=torch.long),
        }

    def encode(self, raw: dict[str, Any]) -> EncodedTable:
        return EncodedTable(self(raw))

    def describe(self) -> dict[str, Any]:
        return {
            "feed": "table",
            "class": type(self.processor).__name__,
            "processor": json_digest(self.processor.to_dict()),
        }
