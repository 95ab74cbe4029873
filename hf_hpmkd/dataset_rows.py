"""Lets `HPMKDTrainer` take somebody's own dataset: adds row ids to its batches and shows it to teachers as `Rows`."""

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from datasets.utils.file_utils import xopen
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from hf_hpmkd.tasks.base import UNAUGMENTED, FedDataset, Rows, column_values
from hf_hpmkd.tasks.images import image_to_tensor
from hf_hpmkd.tasks.text import TEXT_COLUMNS, require_texts, usual_pair
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION

ROW_KEY, VIEW_KEY = "hpmkd_row", "hpmkd_view"
_CHUNK = 256
_STEADY = {
    "training": "Move the augmentation to a FedDataset with views, or set teacher_outputs=live with teachers passed as "
    "model objects.",
    "guide": "They are always stored, so pass it without augmentation.",
}
_ID = re.compile(r"(^|_)(id|idx|index)$", re.IGNORECASE)


class NumberedSample(NamedTuple):
    """A sample of somebody's dataset that is no mapping, as a tuple of image and label, with its position."""

    sample: Any
    row: int


class RowIdDataset(Dataset):
    """A map-style dataset whose samples carry their position as `hpmkd_row`, or are a `NumberedSample`."""

    def __init__(self, dataset: Any) -> None:
        streams = isinstance(dataset, IterableDataset)
        if streams or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                "Teacher outputs belong to rows, so the training dataset must have a length and be indexable, got "
                f"{type(dataset).__name__}. Use a map-style dataset instead of a streaming one."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | NumberedSample:
        return _numbered(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any] | NumberedSample]:
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = [self.dataset[index] for index in indices]
        return [_numbered(sample, index) for sample, index in zip(samples, indices, strict=True)]


def _numbered(sample: Any, row: int) -> dict[str, Any] | NumberedSample:
    return {**sample, ROW_KEY: row} if isinstance(sample, Mapping) else NumberedSample(sample, row)


class RowIdCollator:
    """Takes the row ids off the samples before somebody's collator sees them, and adds them to its batch.

    A batch that is collated already (from a `FedDataset`) passes unchanged.
    """

    def __init__(self, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Mapping[str, Any]:
        if isinstance(samples, Mapping):
            return samples
        if isinstance(samples[0], NumberedSample):
            ids = [sample.row for sample in samples]
            stripped = [sample.sample for sample in samples]
        elif ROW_KEY in samples[0]:
            ids = [sample[ROW_KEY] for sample in samples]
            stripped = [{key: value for key, value in sample.items() if key != ROW_KEY} for sample in samples]
        else:
            return self.collate(samples)
        batch = dict(self.collate(stripped))
        batch[ROW_KEY] = torch.tensor(ids)
        batch[VIEW_KEY] = torch.full((len(ids),), UNAUGMENTED)
        return batch


class SharedInputsFeed:
    """The feed of a teacher that takes the student's inputs: of those that the teachers take together its own.

    takes: names of a `forward`'s parameters; None takes all.
    """

    processor = None

    def __init__(self, takes: Collection[str] | None = None) -> None:
        self.takes = takes

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        inputs = raw["inputs"]
        own = {name: value for name, value in inputs.items() if self.takes is None or name in self.takes}
        return own or inputs  # one whose `forward` has another name for its only input

    def describe(self) -> dict[str, Any]:
        return {"feed": "the student's inputs"}


def parameters_of(module: nn.Module) -> tuple[list[str], bool]:
    """Names of what its `forward` takes, and whether it takes whatever else comes."""
    found = inspect.signature(module.forward).parameters
    named = [name for name, one in found.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    return named, any(one.kind is one.VAR_KEYWORD for one in found.values())


class DatasetRows(Rows):
    """Any map-style dataset with a collator, seen as `Rows`.

    One pass over it hashes the collated inputs (the fingerprint) and reads the labels. stored: teacher outputs are to
    be kept for these rows; raises ValueError where the dataset gives different inputs for the same row twice, because
    they would belong to neither. what: training or guide rows, for that error.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Mapping[str, Any]],
        class_names: Sequence[str] | None,
        stored: bool = True,
        what: str = "training",
    ) -> None:
        self.source = RowIdDataset(dataset)
        self._stored, self._what = stored, what
        self.collate = RowIdCollator(collate)
        # Columns that a transform reads, an image or a text, are still in the dataset behind it.
        columns = dataset.with_format(None) if isinstance(dataset, datasets.Dataset) else None
        self.task, self.raw_columns = _raw_columns(columns)
        fingerprint, labels = self._read()
        class_names = _label_names(columns) or class_names
        if class_names is None:
            raise ValueError(
                "The names of the classes are needed to align the teachers, and neither the dataset (a ClassLabel "
                "column) nor the student (config.id2label) says them. Give the student's config an id2label."
            )
        super().__init__(self.source if columns is None else columns, labels, class_names)
        self.fingerprint = fingerprint

    def batch(self, indices: Sequence[int] | torch.Tensor) -> Mapping[str, Any]:
        """The student's collated batch for these rows, labels and row ids included."""
        return self.collate(self.source.__getitems__([int(index) for index in indices]))

    def _raw(self, positions: torch.Tensor, views: torch.Tensor | None) -> dict[str, Any]:
        raw: dict[str, Any] = {"inputs": student_inputs(self.batch(positions))}
        if self.raw_columns:
            rows = self.dataset[positions.tolist()]
            values, *second = (rows[column] for column in self.raw_columns)
            if self.task == IMAGE_CLASSIFICATION:
                numbered = zip(positions.tolist(), values, strict=True)
                raw["image"] = [image_to_tensor(image, f"The image of row {row}") for row, image in numbered]
            else:
                raw["text"] = list(values)
                if second:
                    raw["text_pair"] = list(second[0])
        return raw

    def _hash_inputs(self, digest: Any) -> None:
        digest.update(self.fingerprint.encode())

    def will_be_read_raw(self) -> None:
        """To be called before a teacher reads the raw image or text: takes it into the fingerprint, because the student
        may be shown the same where it differs. Warns where the text is one, or a pair, of several columns.
        """
        columns = self.dataset
        if not self.raw_columns or not isinstance(columns, datasets.Dataset):
            return
        digest = hashlib.sha256(self.fingerprint.encode())
        for column in self.raw_columns:
            if self.task == TEXT_CLASSIFICATION:
                require_texts(column_values(columns, column), f" of column {column!r}")
            for value in _raw_values(columns, column):
                digest.update(len(value).to_bytes(8, "little") + value)
        self.fingerprint = digest.hexdigest()
        texts = [name for name, one in columns.features.items() if _is_text(one) and not _ID.search(name)]
        others = [name for name in texts if name not in self.raw_columns]
        if self.task == TEXT_CLASSIFICATION and others:
            warnings.warn(
                f"Teachers that read texts themselves are given {' and '.join(map(repr, self.raw_columns))} and not "
                f"{', '.join(map(repr, others))}. Where a text is made of several columns, join them in one called "
                "text; a pair is known by its names (premise and hypothesis, sentence1 and sentence2 and the like).",
                stacklevel=2,
            )

    def subset(self, indices: Sequence[int] | torch.Tensor) -> "DatasetRows":
        raise ValueError("Rows of somebody's own dataset are used whole; select rows from the dataset itself.")

    def _read(self) -> tuple[str, torch.Tensor]:
        digest, labels = hashlib.sha256(), []
        size = len(self.source)
        for start in range(0, size, _CHUNK):
            batch = self.batch(range(start, min(start + _CHUNK, size)))
            if "labels" not in batch:
                raise ValueError(
                    f"Every row needs a label: the collated batch has {', '.join(batch)} but no `labels`. Keep the "
                    "label column, named `label` or `labels`."
                )
            labels.append(torch.as_tensor(batch["labels"]).cpu())
            hashed = _hash(batch)
            if self._stored and start == 0 and hashed != _hash(self.batch(range(min(_CHUNK, size)))):
                raise ValueError(
                    f"The {self._what} dataset gives different inputs for the same row twice (random augmentation), so "
                    f"stored teacher outputs would belong to other inputs. {_STEADY[self._what]}"
                )
            digest.update(hashed)
        return digest.hexdigest(), torch.cat(labels)


def will_be_read_raw(rows: Rows, guide: Rows | None) -> None:
    """`DatasetRows.will_be_read_raw` of training and guide rows. Raises ValueError where a teacher would read other
    columns of the one than of the other: it would be trusted by answers to something else.
    """
    parts = [part for part in (rows, guide) if isinstance(part, DatasetRows)]
    read = [part.raw_columns for part in parts]
    if len(read) == 2 and read[0] != read[1]:
        told = " and of the guide rows ".join(", ".join(columns) or "none" for columns in read)
        raise ValueError(
            f"Teachers that read texts or images themselves must read the same columns of both data sets; they would "
            f"read {told}. Keep the same columns in both."
        )
    for part in parts:
        part.will_be_read_raw()


def student_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without labels and row ids."""
    return {key: value for key, value in batch.items() if key not in ("labels", ROW_KEY, VIEW_KEY)}


def as_rows(
    dataset: Any,
    collate: Callable[[Any], Mapping[str, Any]],
    class_names: Sequence[str] | None,
    stored: bool = True,
    what: str = "training",
) -> tuple[Rows, int]:
    """The rows behind a training or guide dataset and how many augmented views they have (0: none).

    class_names: the student's own, used where the dataset has no ClassLabel column. stored, what: see `DatasetRows`.
    """
    if isinstance(dataset, FedDataset):
        return dataset.rows, dataset.num_views
    return DatasetRows(dataset, collate, class_names, stored, what), 0


def fetcher(dataset: Any, rows: Rows) -> Callable[[torch.Tensor], dict[str, Any]]:
    """A function from row positions to the student's collated inputs."""
    if isinstance(dataset, FedDataset):
        return lambda chosen: student_inputs(dataset.__getitems__(chosen.tolist()))
    assert isinstance(rows, DatasetRows)
    return lambda chosen: student_inputs(rows.batch(chosen))


def _hash(batch: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for key in sorted(student_inputs(batch)):
        value = torch.as_tensor(batch[key]).cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _raw_values(columns: datasets.Dataset, name: str) -> Iterator[bytes]:
    """The raw images, as they are stored, or texts; nothing for a missing one."""
    rows = columns.select_columns([name])
    if isinstance(columns.features[name], datasets.Image):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    for value in (value for batch in rows.iter(_CHUNK) for value in batch[name]):
        if not isinstance(value, dict):
            yield str(value).encode()
        elif value["bytes"] is not None:
            yield value["bytes"]
        else:
            with xopen(value["path"], "rb") as file:  # also what lies in an archive or elsewhere
                yield file.read()


def _raw_columns(dataset: datasets.Dataset | None) -> tuple[str, list[str]]:
    """The task a dataset's raw columns speak of, and the columns that hold the image, the text or a pair of texts."""
    features = dataset.features if dataset is not None else {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return IMAGE_CLASSIFICATION, [name]
    texts = [name for name, feature in features.items() if _is_text(feature)]
    # Of several texts (an id beside it, two sentences) only well-known names tell which ones are meant.
    if pair := usual_pair(texts):
        return TEXT_CLASSIFICATION, pair
    named = [name for name in texts if name in TEXT_COLUMNS]
    if len(named) == 1 or len(texts) == 1:
        return TEXT_CLASSIFICATION, (named or texts)[:1]
    return "", []


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _label_names(dataset: datasets.Dataset | None) -> list[str] | None:
    """The names of a ClassLabel column called label or labels."""
    features = dataset.features if dataset is not None else {}
    for column in ("label", "labels"):
        if isinstance(features.get(column), datasets.ClassLabel):
            return list(features[column].names)
    return None
