"""scikit-learn classifiers as teachers: trained on the spot, saved with skops and read back, never pickled.

Images come to an estimator as flattened pixels (channels, height, width) in 0..1, texts as strings, tables as a
DataFrame of the feature columns. All other preprocessing is part of the estimator, so that its file is all there is.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
import torch
from sklearn.base import BaseEstimator, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from torch import Tensor

from hf_hpmkd.sklearn_estimators import ESTIMATORS, KnownEstimator
from hf_hpmkd.tasks.base import Rows, json_digest
from hf_hpmkd.teacher_kinds import FoldedTeacher, Teacher
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TABULAR_CLASSIFICATION, TEXT_CLASSIFICATION

PREFIX = "sklearn:"
PROBABILITY_FLOOR = 1e-4
_PIPELINE_VERSION = 1
_FORMAT_VERSION = 1


# Plain Python classes inside the estimators above, and NumPy's dtype, that skops does not know by itself.
_HARMLESS = frozenset(
    {
        "numpy.dtype",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    }
)

SAVED_TYPES = (
    *sorted(_HARMLESS),
    "scipy.sparse._csr.csr_matrix",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.tree._tree.Tree",
)
"""`trusted_types` that opens every file written by `SklearnTeacher.save`. For files of your own only: skops does not
trust the trees, because scikit-learn follows the indices stored in them without checking bounds."""


def sklearn_inputs(raw: Mapping[str, Any]) -> Any:
    """What an estimator sees of a raw batch: pixels `(batch, channels * height * width)` float32 in 0..1, list of
    strings (of a pair both, with a space between), or DataFrame (truth values as numbers, other values as strings).
    Raises ValueError for images of unequal size."""
    if "image" in raw:
        images = raw["image"]
        if not isinstance(images, Tensor) and len({image.shape for image in images}) > 1:
            raise ValueError(
                "A scikit-learn teacher needs images of one size, because it sees them flattened. Resize the images of "
                "the data set first, or use a torch teacher."
            )
        stacked = images if isinstance(images, Tensor) else torch.stack(images)
        return stacked.flatten(1).numpy().astype(np.float32) / 255
    if "text_pair" in raw:
        return [f"{first} {second}" for first, second in zip(raw["text"], raw["text_pair"], strict=True)]
    if "text" in raw:
        return list(raw["text"])
    if "table" not in raw:
        raise ValueError(f"A scikit-learn teacher needs images, texts or a table, got a batch of {', '.join(raw)}.")
    table: pd.DataFrame = raw["table"]
    return pd.DataFrame({column: _column(table[column]) for column in table.columns})


def _column(values: pd.Series) -> pd.Series:
    """Numbers and truth values as floats, all else as strings; gaps as NaN."""
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    there = values.dropna()
    if len(there) and all(isinstance(value, bool) for value in there):  # pandas holds truth values with gaps as objects
        return values.astype(np.float64)
    # As objects again: pandas makes floats of a column without a value, which an encoder of strings refuses.
    return values.astype(object).map(str, na_action="ignore").where(values.notna(), np.nan).astype(object)


class SklearnTeacher(Teacher):
    """A fitted scikit-learn classifier. Its logits are the logs of its probabilities, floored at 1e-4.

    columns: for each column of `predict_proba` its place in class_names; classes without one get the floor. (A fold of
    the data may lack a rare class.) Raises ValueError if the estimator gives no probabilities.
    """

    kind = "sklearn"
    min_batch = 4096  # a forest takes a second for 256 rows, and little more for these

    def __init__(
        self,
        estimator: BaseEstimator,
        *,
        name: str,
        source: str,
        class_names: Sequence[str],
        data_names: Sequence[str],
        fingerprint: str,
        columns: Sequence[int] | None = None,
        license: str | None = None,
    ) -> None:
        super().__init__(name, source, class_names, data_names, license=license)
        _require_probabilities(estimator, name)
        self.estimator = estimator
        self._fingerprint = fingerprint
        self._columns = list(range(len(self.class_names))) if columns is None else [int(c) for c in columns]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def describe_inputs(self) -> dict[str, Any]:
        return {"feed": "sklearn", "probability_floor": PROBABILITY_FLOOR}

    def _outputs(self, rows: Rows, indices: Tensor, views: Tensor | None) -> Tensor:
        inputs = sklearn_inputs(rows.raw(indices, views))
        fitted_on = getattr(self.estimator, "feature_names_in_", None)
        if isinstance(inputs, pd.DataFrame) and fitted_on is not None:
            if missing := [str(column) for column in fitted_on if column not in inputs.columns]:
                raise ValueError(
                    f"Teacher {self.name!r} was fitted on columns that the table lacks: {', '.join(missing)}. If the "
                    "data have them, name all columns of the table: data.input_column=[A,B,...]."
                )
            inputs = inputs[list(fitted_on)]
        expected = getattr(self.estimator, "n_features_in_", None)
        if isinstance(inputs, np.ndarray) and expected not in (None, inputs.shape[1]):
            raise ValueError(
                f"Teacher {self.name!r} was fitted on {expected} pixel values per image, the data's images have "
                f"{inputs.shape[1]} (channels x height x width). Resize the images as they were when it was fitted."
            )
        try:
            found = np.asarray(self.estimator.predict_proba(inputs))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Teacher {self.name!r} ({self.source}) cannot answer these rows: {error}") from error
        if found.ndim != 2 or found.shape[1] != len(self._columns):
            raise ValueError(
                f"Teacher {self.name!r} must give one probability for each of {len(self._columns)} classes, got an "
                f"array of shape {found.shape}. Give the names of all its classes, in their order, as `labels`."
            )
        probabilities = np.zeros((len(indices), len(self.class_names)))
        probabilities[:, self._columns] = found
        return torch.from_numpy(np.log(np.maximum(probabilities, PROBABILITY_FLOOR)).astype(np.float32))

    def save(self, path: str | Path) -> Path:
        """Writes `path` (.skops) and a JSON of the same name beside it, with the class names; `load_teacher` reads
        both."""
        import skops.io

        path = Path(path).with_suffix(".skops")
        path.parent.mkdir(parents=True, exist_ok=True)
        skops.io.dump(self.estimator, path)
        about = {
            "format_version": _FORMAT_VERSION,
            "class_names": self.class_names,
            "columns": self._columns,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "file_sha256": _file_sha256(path),
            "license": self.license,
            "scikit_learn": sklearn.__version__,
        }
        path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        return path


def load_skops(
    path: str | Path,
    rows: Rows,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    trusted_types: Sequence[str] = (),
) -> SklearnTeacher:
    """A classifier from a .skops file. labels: class names in the order of its `predict_proba`; None takes those of the
    JSON beside the file, else the classes it was fitted on.

    trusted_types: types beyond scikit-learn's that the file may hold. Raises FileNotFoundError for a missing file,
    ValueError that lists the types of the file that are not trusted, if it holds any, for a newer format version, and
    for what is no skops file or no classifier.
    """
    import skops.io

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no scikit-learn teacher at {path}. Check the path.")
    try:
        types = skops.io.get_untrusted_types(file=path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no skops file. Save the estimator with `skops.io.dump`.") from error
    untrusted = [kind for kind in types if kind not in _HARMLESS and kind not in trusted_types]
    if untrusted:
        raise ValueError(
            f"{path.name} holds types that are not known to be safe: {', '.join(untrusted)}. Loading them may run "
            "code of whoever wrote the file. If you know where it comes from, list them as the teacher's "
            f"`trusted_types`; for the first teacher 'teachers.0.trusted_types=[{','.join(untrusted)}]'."
        )
    estimator = skops.io.load(path, trusted=[*_HARMLESS, *trusted_types])
    beside = path.with_suffix(".json")
    about = json.loads(beside.read_text()) if beside.is_file() else {}
    if about.get("format_version", 1) > _FORMAT_VERSION:
        raise ValueError(
            f"{beside.name} has format version {about['format_version']}, this version reads up to {_FORMAT_VERSION}. "
            "Update hf_hpmkd."
        )
    _require_probabilities(estimator, path.name)
    sha256 = _file_sha256(path)
    class_names, columns = about.get("class_names"), about.get("columns")
    if labels is not None or class_names is None:
        class_names, columns = labels or list(map(_class_name, estimator.classes_)), None
    # skops files of equal models differ in their bytes, so a file of ours says what went into the training.
    trained_here = about.get("file_sha256") == sha256
    return SklearnTeacher(
        estimator,
        name=name or about.get("name") or path.stem,
        source=str(path),
        class_names=class_names,
        data_names=rows.class_names,
        columns=columns,
        fingerprint=about["fingerprint"] if trained_here else sha256,
        license=about.get("license") or (about.get("source") or {}).get("license"),
    )


def _class_name(value: Any) -> str:
    """As the data calls the class: pandas makes real numbers of whole ones where some are missing."""
    return str(int(value)) if isinstance(value, (float, np.floating)) and value.is_integer() else str(value)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_probabilities(estimator: Any, name: str) -> None:
    if not hasattr(estimator, "predict_proba"):
        if is_regressor(estimator):
            raise ValueError(f"{name} is a regression model, and a teacher must classify. Choose a classifier.")
        kind = type(estimator[-1] if isinstance(estimator, Pipeline) else estimator).__name__
        raise ValueError(
            f"A teacher must give probabilities, but {name} ({kind}) has no `predict_proba` with these settings. "
            "Trained on the spot: add `calibrate: true` to its `params`, or use LogisticRegression or "
            "RandomForestClassifier. Loaded: wrap it in sklearn.calibration.CalibratedClassifierCV, fit and save that."
        )


def _build(name: str, params: Mapping[str, Any], task: str, seed: int, table: pd.DataFrame | None) -> Pipeline:
    """The unfitted pipeline of an estimator for a task. table: feature columns, for tables."""
    known = ESTIMATORS.get(name)
    if known is None:
        close = difflib.get_close_matches(name, ESTIMATORS, n=1, cutoff=0.5)
        raise ValueError(
            f"{name!r} is no scikit-learn classifier that can be trained on the spot. "
            + (f"Did you mean {close[0]}? " if close else "")
            + f"Possible are {', '.join(ESTIMATORS)}. Train others yourself and pass their .skops file."
        )
    if task == TEXT_CLASSIFICATION and not known.takes_sparse:
        possible = ", ".join(n for n, k in ESTIMATORS.items() if k.takes_sparse)
        raise ValueError(f"{name} cannot read the sparse word counts of texts. For texts use one of {possible}.")
    if task == TABULAR_CLASSIFICATION and not known.takes_negative:
        raise ValueError(f"{name} needs counts, a table has negative numbers. Use GaussianNB or another estimator.")
    classifier = _estimator(name, known, params, seed)
    if task == TEXT_CLASSIFICATION:
        return make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), classifier)
    if task == IMAGE_CLASSIFICATION:
        return make_pipeline(classifier)
    assert table is not None
    return make_pipeline(_table_columns(known, table), classifier)


def _estimator(name: str, known: KnownEstimator, params: Mapping[str, Any], seed: int) -> BaseEstimator:
    kind = getattr(importlib.import_module(f"sklearn.{known.module}"), name)
    given = dict(params)
    calibrate = given.pop("calibrate", False)
    possible = set(inspect.signature(kind).parameters)
    unknown = sorted(set(given) - possible)
    if unknown:
        raise ValueError(
            f"{name} has no parameter {', '.join(unknown)}. It has {', '.join(sorted(possible))}, and `calibrate`."
        )
    # One core unless the user asks for more: several trainings may share the machine.
    defaults = {**known.defaults, "random_state": seed, "n_jobs": 1}
    if name == "LogisticRegression":  # there n_jobs has no effect since scikit-learn 1.8, and warns
        del defaults["n_jobs"]
    settings = {key: value for key, value in defaults.items() if key in possible} | given
    estimator = kind(**settings)
    if calibrate:
        return CalibratedClassifierCV(estimator, ensemble=False)
    _require_probabilities(estimator, PREFIX + name)
    return estimator


def _table_columns(known: KnownEstimator, table: pd.DataFrame) -> ColumnTransformer:
    """Columns without any value in these rows are left out: nothing can be learnt from them."""
    filled = [column for column in table.columns if table[column].notna().any()]
    numeric = [column for column in filled if table[column].dtype.kind == "f"]
    categorical = [column for column in filled if column not in numeric]
    numbers: Any = "passthrough" if known.takes_missing else SimpleImputer(strategy="median")
    if known.trees:
        codes: Any = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    else:
        numbers = make_pipeline(numbers, StandardScaler())
        codes = OneHotEncoder(handle_unknown="ignore", sparse_output=known.takes_sparse)
    missing = SimpleImputer(strategy="constant", fill_value="(missing)")
    return ColumnTransformer(
        [("numeric", numbers, numeric), ("categorical", make_pipeline(missing, codes), categorical)]
    )


def train_sklearn(
    name: str, params: Mapping[str, Any] | None, rows: Rows, seed: int = 0, folds: int = 5
) -> tuple[SklearnTeacher, FoldedTeacher | None]:
    """Trains `sklearn:NAME` on rows: the model for all other parts, and the out-of-fold models for the rows themselves.

    name: one of ESTIMATORS, with or without "sklearn:". params: arguments of the estimator; `random_state` is the seed
    and `n_jobs` 1 unless given here; `calibrate: true` wraps it in CalibratedClassifierCV, for estimators without
    probabilities. folds: 0 gives no out-of-fold models (then None is returned), else at least 2; the folds are
    stratified and depend on the seed alone. Costs folds + 1 trainings.

    Raises ValueError for an unknown estimator or parameter, one that gives no probabilities or cannot read the task's
    inputs, for more folds than the largest class has rows, and for rows that it cannot be fitted on, as those of fewer
    than two classes.
    """
    short = name.removeprefix(PREFIX)
    if folds != 0 and not 2 <= folds <= len(rows):
        raise ValueError(f"`folds` must be 0 (none) or between 2 and the number of rows, {len(rows)}, got {folds}.")
    labels = rows.labels.numpy()
    if len(np.unique(labels)) < 2:
        raise ValueError(f"{PREFIX}{short} needs rows of at least two classes, got {len(rows)} rows of one or none.")
    params = dict(params or {})
    inputs = sklearn_inputs(rows.raw(torch.arange(len(rows))))
    recipe = {
        "estimator": short,
        "params": params,
        "seed": seed,
        "rows": rows.fingerprint,
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        "pipeline": _PIPELINE_VERSION,
        "scikit_learn": sklearn.__version__,
    }

    def fit(positions: np.ndarray, role: dict[str, Any]) -> SklearnTeacher:
        part = _take(inputs, positions)
        model = _build(short, params, rows.task, seed, part if isinstance(part, pd.DataFrame) else None)
        try:
            model.fit(part, labels[positions])
        except ValueError as error:
            rarest = np.unique(labels[positions], return_counts=True)[1].min()
            raise ValueError(
                f"{PREFIX}{short} cannot be trained on {len(positions)} rows, {rarest} of the rarest class: {error} "
                "Change its `params`, or choose another estimator."
            ) from error
        return SklearnTeacher(
            model,
            name=short,
            source=PREFIX + short,
            class_names=rows.class_names,
            data_names=rows.class_names,
            columns=model.classes_,
            fingerprint=json_digest(recipe | role),
        )

    full = fit(np.arange(len(rows)), {})
    if folds == 0:
        return full, None
    fold_of_row = stratified_folds(labels, folds, seed)
    parts = [fit(np.flatnonzero(fold_of_row != fold), {"folds": folds, "fold": fold}) for fold in range(folds)]
    return full, FoldedTeacher(full, parts, torch.from_numpy(fold_of_row), rows)


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold, 0..folds-1, that each row belongs to; each fold has about the same share of every class. `(rows,)`,
    long."""
    most = np.unique(labels, return_counts=True)[1].max()
    if folds > most:
        raise ValueError(
            f"`folds` must not exceed the {most} rows of the largest class, got {folds}. Lower it, or set it to 0 "
            f"for no out-of-fold outputs; for the first teacher 'teachers.0.folds={most if most > 1 else 0}'."
        )
    fold_of_row = np.zeros(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        # A class with fewer rows than folds is missing from some; its probability there is the floor.
        warnings.filterwarnings("ignore", message="The least populated class in y has only")
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
        for fold, (_, held_out) in enumerate(splits):
            fold_of_row[held_out] = fold
    return fold_of_row


def _take(inputs: Any, positions: np.ndarray) -> Any:
    if isinstance(inputs, pd.DataFrame):
        return inputs.iloc[positions]
    return [inputs[position] for position in positions] if isinstance(inputs, list) else inputs[positions]
