"""A multilayer perceptron for tables of numbers and categories, and the processor that turns a table into its inputs.

Imports no other file of this package: a saved model folder carries a copy of this one, so that
`trust_remote_code=True` opens it where the package is not installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import FeatureExtractionMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

CLIP = 10.0
"""Standardised numbers are kept within ± this many standard deviations."""

_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class TabularProcessor(FeatureExtractionMixin):
    """Numbers standardised, categories as codes. Make one with `TabularProcessor.fit(table)`.

    numeric_columns, mean, std: one entry each per number column. indicator_columns: number columns that had missing
    values when fitted, which get a second input, 1 where the value is missing and 0 elsewhere. categories: the known
    values of each category column, in the order of their codes 1, 2, ...; code 0 is for unknown and missing ones.
    """

    model_input_names = ["numeric", "categorical"]

    def __init__(
        self,
        numeric_columns: Sequence[str] = (),
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        indicator_columns: Sequence[str] = (),
        categories: dict[str, list[str]] | None = None,
        categorical_columns: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.numeric_columns = list(numeric_columns)
        self.mean = list(mean)
        self.std = list(std)
        self.indicator_columns = list(indicator_columns)
        # JSON is written with sorted keys, so the order of the columns needs a list of its own.
        self.categorical_columns = list(categorical_columns)
        self.categories = dict(categories or {})
        super().__init__(**kwargs)
        # Saving would add it; set from the start, it leaves the description of a processor the same.
        self.auto_map = {"AutoFeatureExtractor": "tabular.TabularProcessor"}
        self.feature_extractor_type = type(self).__name__

    @classmethod
    def fit(cls, table: pd.DataFrame) -> "TabularProcessor":
        """Learns from the feature columns (no label) of training rows. Number columns are those of a numeric dtype;
        truth values, strings and pandas categories are categories.

        Raises ValueError for no rows, no columns, repeated names or infinite numbers, TypeError for other dtypes.
        """
        _check_table(table)
        if len(table) == 0 or len(table.columns) == 0:
            raise ValueError(f"A table with at least one row and one column is needed, got shape {table.shape}.")
        numeric = [column for column in table.columns if _is_number(table[column])]
        odd = [f"{c} ({table[c].dtype})" for c in table.columns if c not in numeric and not _is_category(table[c])]
        if odd:
            raise TypeError(
                f"Columns must hold numbers, truth values or strings; these do not: {', '.join(odd)}. Convert them, "
                "for instance a date to the number of days since a fixed one."
            )
        values = {column: _numbers(table[column]) for column in numeric}
        infinite = [column for column in numeric if np.isinf(values[column]).any()]
        if infinite:
            raise ValueError(
                f"Numbers must be finite; these columns hold infinite ones: {', '.join(infinite)}. Replace them by NaN "
                "(missing) or by a bound."
            )
        known = [values[column][~np.isnan(values[column])] for column in numeric]
        # Of a constant like 0.1 the standard deviation comes out as 1e-17.
        spreads = [float(v.std()) if len(v) and v.min() < v.max() else 0.0 for v in known]
        categorical = [column for column in table.columns if column not in numeric]
        return cls(
            numeric_columns=numeric,
            mean=[float(column.mean()) if len(column) else 0.0 for column in known],
            std=spreads,
            indicator_columns=[column for column in numeric if 0 < np.isnan(values[column]).mean() < 1],
            categorical_columns=categorical,
            categories={column: sorted({str(value) for value in table[column].dropna()}) for column in categorical},
        )

    @property
    def columns(self) -> list[str]:
        """All columns that a table must have."""
        return self.numeric_columns + self.categorical_columns

    @property
    def num_numeric(self) -> int:
        """Width of the `numeric` input."""
        return len(self.numeric_columns) + len(self.indicator_columns)

    @property
    def cardinalities(self) -> list[int]:
        """Number of codes of each category column, code 0 included."""
        return [len(self.categories[column]) + 1 for column in self.categorical_columns]

    def __call__(self, table: pd.DataFrame) -> dict[str, torch.Tensor]:
        """`{"numeric": float32 (rows, num_numeric) within ±10, "categorical": int64 (rows, category columns)}`.

        The order of the columns is free. Raises ValueError for missing or additional columns and for numbers that are
        none, TypeError for numbers in a column of categories.
        """
        _check_table(table)
        missing = [column for column in self.columns if column not in table.columns]
        extra = [column for column in table.columns if column not in self.columns]
        if missing or extra:
            raise ValueError(
                f"The table must have the columns of the fitted one: {', '.join(self.columns)}. Missing: "
                f"{', '.join(missing) or 'none'}. Not known: {', '.join(map(str, extra)) or 'none'}"
                f"{' (leave them out: table[processor.columns])' if extra and not missing else ''}."
                f"{' Those of a data set are named with data.input_column=[A,B,...].' if missing else ''}"
            )
        numbers = [_numbers(table[column]) for column in self.numeric_columns]
        inputs = [
            # What never varied taught nothing, so whatever it is now is left out: 0, as what is missing.
            np.where(np.isnan(values) | (std == 0), 0.0, np.clip((values - mean) / (std or 1.0), -CLIP, CLIP))
            for values, mean, std in zip(numbers, self.mean, self.std, strict=True)
        ]
        is_missing = {c: np.isnan(values) for c, values in zip(self.numeric_columns, numbers, strict=True)}
        inputs += [is_missing[column].astype(np.float64) for column in self.indicator_columns]
        codes = [self._codes(table[column]) for column in self.categorical_columns]
        rows = len(table)
        return {
            "numeric": torch.from_numpy(np.stack(inputs, axis=1) if inputs else np.zeros((rows, 0))).float(),
            "categorical": torch.from_numpy(np.stack(codes, axis=1) if codes else np.zeros((rows, 0), np.int64)),
        }

    def _codes(self, values: pd.Series) -> np.ndarray:
        known = values.notna().to_numpy()
        if _is_number(values) and known.any():
            raise TypeError(
                f"Column {values.name!r} holds categories, but arrives as numbers ({values.dtype}). Write them as they "
                f"were when fitted, for instance {', '.join(map(repr, self.categories[str(values.name)][:3]))}."
            )
        code_of = {value: code for code, value in enumerate(self.categories[str(values.name)], start=1)}
        pairs = zip(values, known, strict=True)
        return np.fromiter((code_of.get(str(v), 0) if k else 0 for v, k in pairs), np.int64, count=len(values))


def _check_table(table: Any) -> None:
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"A pandas DataFrame is needed, got {type(table).__name__}.")
    names = list(table.columns)
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Columns need distinct names that are strings, got {names}. Set `table.columns`.")


def _is_number(values: pd.Series) -> bool:
    is_bool, is_complex = pd.api.types.is_bool_dtype(values), pd.api.types.is_complex_dtype(values)
    return pd.api.types.is_numeric_dtype(values) and not is_bool and not is_complex


def _is_category(values: pd.Series) -> bool:
    if isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(values):
        return True
    return pd.api.types.infer_dtype(values, skipna=True) in ("string", "boolean", "empty")


def _numbers(values: pd.Series) -> np.ndarray:
    """float64, NaN where missing. A column without a value may have any dtype."""
    try:
        return pd.to_numeric(values, errors="raise").to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Column {values.name!r} must hold numbers, got dtype {values.dtype}: {error}.") from error


def embedding_size(cardinality: int) -> int:
    """Numbers that stand for a category: fast.ai's rule of thumb, round(1.6 n^0.56), at most 16."""
    return min(16, round(1.6 * cardinality**0.56))


class TabularConfig(PretrainedConfig):
    """hidden_sizes: widths of the hidden layers; [] is a linear model. num_numeric, cardinalities: width of the
    numeric input and number of codes per category column, as the processor has them. embedding_sizes: numbers per
    category column, None for `embedding_size` of each. dropout: share of hidden units dropped in training, in [0, 1).
    Raises ValueError for values out of range.
    """

    model_type = "hpmkd_tabular_mlp"

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (64,),
        num_numeric: int = 0,
        cardinalities: Sequence[int] = (),
        embedding_sizes: Sequence[int] | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.hidden_sizes = list(hidden_sizes)
        self.num_numeric = num_numeric
        self.cardinalities = list(cardinalities)
        self.embedding_sizes = [embedding_size(n) for n in cardinalities]
        if embedding_sizes is not None:
            self.embedding_sizes = list(embedding_sizes)
        self.dropout = dropout
        sizes = self.hidden_sizes + self.cardinalities + self.embedding_sizes
        if num_numeric < 0 or any(size < 1 for size in sizes) or not 0 <= dropout < 1:
            raise ValueError(
                "`num_numeric` must be 0 or more, all sizes and cardinalities at least 1 and `dropout` in [0, 1), got "
                f"{num_numeric}, {self.hidden_sizes}, {self.cardinalities}, {self.embedding_sizes} and {dropout}."
            )
        if len(self.embedding_sizes) != len(self.cardinalities):
            raise ValueError(
                f"One embedding size per category column is needed, got {len(self.embedding_sizes)} for "
                f"{len(self.cardinalities)} columns."
            )
        super().__init__(**kwargs)


class TabularForClassification(PreTrainedModel):
    """Embedded categories and numbers side by side, linear layers with ReLU, a linear classifier (the MLP of
    Gorishniy et al. 2021, section 3.1).

    `predict` and `predict_proba` take a DataFrame. They need the processor: `from_pretrained` loads it from the same
    folder, `attach_processor` sets one, `save_pretrained` saves it along.
    """

    config_class = TabularConfig
    main_input_name = "numeric"
    # `forward` takes no loss arguments: the Trainer then divides its mean loss by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        shapes = zip(config.cardinalities, config.embedding_sizes, strict=True)
        self.embeddings = nn.ModuleList([nn.Embedding(codes, size) for codes, size in shapes])
        widths = [config.num_numeric + sum(config.embedding_sizes), *config.hidden_sizes]
        if widths[0] == 0:
            raise ValueError("The model has no inputs: `num_numeric` is 0 and there are no `cardinalities`.")
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])
        self.classifier = nn.Linear(widths[-1], config.num_labels)  # type: ignore[arg-type]
        self.processor: TabularProcessor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # `from_pretrained` guards torch.nn.init, so that loaded weights stay.
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is self.classifier else "relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # A category then weighs about as much as one standardised number; an unknown one starts as nothing.
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[0])

    def get_input_embeddings(self) -> Any:
        """None: there is no vocabulary. (FSDP asks.)"""
        return None

    def forward(
        self, numeric: torch.Tensor, categorical: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """numeric: `(batch, num_numeric)`; categorical: codes `(batch, category columns)`; labels: `(batch,)`, or None.

        Returns logits `(batch, num_labels)` and, with labels, the mean cross-entropy in nats as loss.
        """
        x = self.embed(numeric, categorical)
        for layer in self.hidden:
            x = F.dropout(F.relu(layer(x)), self.config.dropout, self.training)
        logits = self.classifier(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def embed(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """What the first layer reads: numbers and embedded categories side by side, `(batch, width)`."""
        embedded = [embed(codes) for embed, codes in zip(self.embeddings, categorical.unbind(1), strict=True)]
        return torch.cat([numeric.to(self.dtype), *embedded], dim=1)

    def attach_processor(self, processor: TabularProcessor) -> "TabularForClassification":
        """Sets the processor that `predict` calls; returns the model. Raises ValueError if it is of another table."""
        theirs = (processor.num_numeric, processor.cardinalities)
        ours = (self.config.num_numeric, self.config.cardinalities)
        if theirs != ours:
            raise ValueError(
                "The processor must give what the model takes: num_numeric and cardinalities of the model are "
                f"{ours[0]} and {ours[1]}, of the processor {theirs[0]} and {theirs[1]}. Use the one "
                "that it was trained with."
            )
        self.processor = processor
        return self

    @torch.no_grad()
    def predict_proba(self, table: pd.DataFrame, batch_size: int = 8192) -> np.ndarray:
        """Class probabilities `(rows, num_labels)`, float32. table: columns that the model does not read are ignored,
        the label among them. Raises ValueError without a processor, and as that does.
        """
        if self.processor is None:
            raise ValueError(
                "The model has no processor, so it cannot read a table. Load it from a folder that holds "
                "preprocessor_config.json, or call `model.attach_processor(processor)`."
            )
        wanted = self.processor.columns
        if isinstance(table, pd.DataFrame) and table.columns.is_unique and set(wanted) <= set(table.columns):
            table = table[wanted]
        inputs = self.processor(table)
        was_training = self.training
        self.eval()
        batches = zip(inputs["numeric"].split(batch_size), inputs["categorical"].split(batch_size), strict=True)
        parts = [
            self(numeric.to(self.device), categorical.to(self.device)).logits.float().softmax(-1).cpu()
            for numeric, categorical in batches
        ]
        self.train(was_training)
        return torch.cat(parts).numpy()

    def predict(self, table: pd.DataFrame, batch_size: int = 8192) -> list[str]:
        """The most probable class name of each row."""
        names = self.config.id2label or {}
        return [names[label] for label in self.predict_proba(table, batch_size).argmax(1).tolist()]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the processor along, if there is one."""
        is_main = args[0] if args else kwargs.get("is_main_process", True)
        if self.processor is not None and is_main:
            self.processor.save_pretrained(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads the processor of the same folder or repository too, if there is one."""
        hub = {key: kwargs[key] for key in _HUB_KEYS if kwargs.get(key) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if isinstance(pretrained_model_name_or_path, (str, Path)):
            try:
                processor = TabularProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
            except OSError:  # weights alone, as in a Trainer's checkpoint
                return loaded
            (loaded[0] if isinstance(loaded, tuple) else loaded).attach_processor(processor)
        return loaded
