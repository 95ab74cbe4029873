"""What every task offers: rows that know their contents, and feeds that turn them into one model's inputs.

Teachers and student may each need their own preprocessing, yet have to see the same rows in the same augmented view.
So a batch is named by two numbers per row (its position and its view), the rows alone make the raw batch from them,
and a feed per model does the rest. Knows nothing of a model, a loss or a data source.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from datasets import Dataset
from torch import Tensor

UNAUGMENTED = -1
"""The view of a row that is not augmented."""


class Rows(ABC):
    """The rows of one part of a data set (train, guide, validation, test). Not changed after construction.

    dataset: the rows with all their columns; position i is row i here too. labels: `(rows,)` integers, index into
    class_names. Raises ValueError if lengths differ, a label lies outside 0..K-1, fewer than two classes are named, or
    a class name repeats.
    """

    task: str
    supports_views: bool = False
    keeps_labels: bool = True
    """Whether a view of a row is of the row's class for sure. Where not, views are for what teachers answer, and
    `train_or_load` takes the rows as they are for learning from labels alone."""
    max_length: int | None = None
    """Tokens that a network built for these rows reads of a text; None: as many as it can, up to 128."""

    def __init__(self, dataset: Dataset, labels: Sequence[int] | Tensor, class_names: Sequence[str]) -> None:
        self.dataset = dataset
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.class_names = [str(name) for name in class_names]
        if len(self.class_names) < 2 or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"A classifier needs at least two classes with distinct names, got {self.class_names}.")
        if self.labels.shape != (len(dataset),):
            raise ValueError(
                f"One label per row is needed, got {tuple(self.labels.shape)} labels for {len(dataset)} rows."
            )
        if len(dataset) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise ValueError(
                f"Labels must lie in 0..{len(self.class_names) - 1}, got {int(self.labels.min())} to "
                f"{int(self.labels.max())}. Unlabelled test splits often carry -1: use a split that has labels."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the contents and the order of the inputs, wherever the file lies. Labels and views are not
        in it.
        """
        digest = hashlib.sha256()
        self._hash_inputs(digest)
        return digest.hexdigest()

    def labelled_fingerprint(self, read: bool = True) -> str:
        """sha256 (hex) over the fingerprint and the labels, class names included. read: False leaves the rows out."""
        digest = hashlib.sha256(self.fingerprint.encode() if read else b"")
        digest.update(repr(self.class_names).encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def training_key(self, num_views: int) -> list[Any]:
        """All that a network trained on so many views of these rows reads; labels are not in it."""
        length = [] if self.max_length is None else [self.max_length]
        return [self.fingerprint, self.view_key() if num_views else None, num_views, *length]

    def raw(self, indices: Sequence[int] | Tensor, views: Tensor | None = None) -> dict[str, Any]:
        """The raw batch at these positions, in their order. views: `(batch,)`, UNAUGMENTED or 0..V-1; None leaves all
        unaugmented.

        Raises IndexError for a position outside 0..N-1 and ValueError for a view of rows that have no augmentation.
        """
        positions = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(self):
            raise IndexError(
                f"Positions must lie in 0..{len(self) - 1}, got {int(positions.min())}..{int(positions.max())}."
            )
        if views is None:
            return self._raw(positions, None)
        views = torch.as_tensor(views, dtype=torch.long).reshape(-1)
        if views.shape != positions.shape:
            raise ValueError(f"One view per row is needed, got {len(views)} views for {len(positions)} rows.")
        if bool((views == UNAUGMENTED).all()):
            return self._raw(positions, None)
        if not self.supports_views:
            raise ValueError(
                f"These rows have no augmentation, so every view must be {UNAUGMENTED}, got {views.tolist()}."
            )
        return self._raw(positions, views)

    @abstractmethod
    def _raw(self, positions: Tensor, views: Tensor | None) -> dict[str, Any]: ...

    @abstractmethod
    def _hash_inputs(self, digest: Any) -> None: ...

    @abstractmethod
    def subset(self, indices: Sequence[int] | Tensor) -> "Rows":
        """The rows at these positions, in their order, as rows of their own: positions start at 0 again."""

    def view_key(self) -> dict[str, Any]:
        """JSON-able description of the augmentation with its seed; {} if there is none."""
        return {}


class Feed(Protocol):
    """One model's own preprocessing. `processor` is saved beside the model (image processor, tokenizer, table
    processor) or None.
    """

    processor: Any

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        """Model inputs of a raw batch, without labels."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able and deterministic: two feeds with the same description give the same numbers."""
        ...


class Encoded(Protocol):
    """A whole part, already turned into model inputs."""

    def take(self, positions: Tensor) -> dict[str, Tensor]: ...


@runtime_checkable
class StaticFeed(Feed, Protocol):
    """A feed of inputs that need not change between epochs (text, tables): where no views are asked for, encode once,
    index afterwards."""

    def encode(self, raw: dict[str, Any]) -> Encoded: ...


def column_values(dataset: Dataset, column: str) -> list[Any]:
    """A whole column as Python values, in one read; iterating over it costs some thirty times as much."""
    return dataset.with_format(None).select_columns([column])[:][column]


def json_digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class FedDataset(torch.utils.data.Dataset):
    """Rows through one feed, whole batches at once (`__getitems__`), because row by row costs more than the model does.

    num_views: 0 never augments (view -1); V > 0 gives row i in epoch e the view (e + i) % V, so that every epoch mixes
    views and V epochs show each row in all of them. Raises ValueError if views are asked of rows that have no
    augmentation.
    """

    def __init__(self, rows: Rows, feed: Feed, num_views: int = 0) -> None:
        if num_views < 0:
            raise ValueError(f"`num_views` must be 0 (never augmented) or more, got {num_views}.")
        if num_views and not rows.supports_views:
            raise ValueError(
                f"`num_views` is {num_views}, but these rows have no augmentation. Use 0, or rows with one."
            )
        self.rows = rows
        self.feed = feed
        self.num_views = num_views
        # Shared memory: data-loader workers that live across epochs have to see the epoch too.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._encoded: Encoded | None = None
        if isinstance(feed, StaticFeed) and not num_views:
            self._encoded = feed.encode(rows.raw(torch.arange(len(rows))))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the views of the coming epoch. The trainer calls it at the start of each."""
        if epoch < 0:
            raise ValueError(f"`epoch` must be 0 or more, got {epoch}.")
        self._epoch.fill_(epoch)

    def views(self, positions: Tensor) -> Tensor:
        """The views of these rows in the current epoch."""
        if self.num_views == 0:
            return torch.full_like(positions, UNAUGMENTED)
        return (positions + self._epoch) % self.num_views

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        positions = torch.as_tensor(indices, dtype=torch.long)
        views = self.views(positions)
        inputs = self.feed(self.rows.raw(positions, views)) if self._encoded is None else self._encoded.take(positions)
        return {**inputs, "labels": self.rows.labels[positions], "hpmkd_row": positions, "hpmkd_view": views}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} does not exist: there are {len(self)} rows.")
        return {key: value[0] for key, value in self.__getitems__([index % len(self)]).items()}

    @staticmethod
    def collate(batch: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Passes a batch of `__getitems__` through, and stacks single rows. Raises ValueError for rows of unequal
        length: only the feed knows how to pad, and `__getitems__` asks it.
        """
        if isinstance(batch, Mapping):
            return dict(batch)
        ragged = [key for key in batch[0] if len({row[key].shape for row in batch}) > 1]
        if ragged:
            raise ValueError(
                f"Rows of unequal length cannot be stacked ({', '.join(ragged)}). Ask for the batch at once: "
                "`dataset.__getitems__(indices)`, as torch's DataLoader does by itself."
            )
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
