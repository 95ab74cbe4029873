"""What a teacher is: something frozen that answers rows with logits in the data's class order.

Knows nothing of where teachers are loaded from (`teachers`) nor of where their outputs are kept (`teacher_cache`).
"""

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from hf_hpmkd.class_names import align_labels
from hf_hpmkd.heads import FeatureReader, find_classifier_head
from hf_hpmkd.model_identity import architecture
from hf_hpmkd.tasks.base import UNAUGMENTED, Feed, Rows, json_digest

_WORTH_A_WARNING = 0.05
_STANDARD_ERRORS = 2.0
_LEAST_PACKED = 0.5
_RARE_REST = 0.9  # share of the commonest class above which the others are rare


class Teacher(ABC):
    """A frozen classifier of rows.

    class_names: its own, in the order of its outputs. data_names: the data's; `alignment[k]` is the output that belongs
    to the data's class k (see `align_labels` for what fails). num_params, license and commit are None where unknown.
    """

    kind: str
    is_live: bool = False
    """Whether it is a torch module that can run inside the training loop on inputs (`forward_inputs`)."""
    answers_views: bool = True
    """Whether it can answer augmented views of a row."""
    min_batch: int = 1
    """Rows that it should be asked about at once at least, because each call has a price of its own."""

    def __init__(
        self,
        name: str,
        source: str,
        class_names: Sequence[str],
        data_names: Sequence[str],
        *,
        num_params: int | None = None,
        license: str | None = None,
        commit: str | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.class_names = [str(class_name) for class_name in class_names]
        self.alignment = align_labels(self.class_names, data_names)
        self.num_params = num_params
        self.license = license
        self.commit = commit
        self._in_order = self.alignment == list(range(len(self.alignment)))
        self._order = torch.tensor(self.alignment, dtype=torch.long)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) over what decides the outputs, apart from the feed: weights and config, a file, a column."""

    @abstractmethod
    def _outputs(self, rows: Rows, indices: Tensor, views: Tensor | None) -> Tensor:
        """`(batch, own classes)` in the teacher's own class order."""

    def logits(self, rows: Rows, indices: Tensor, views: Tensor | None = None) -> Tensor:
        """Logits `(batch, classes)` of these rows in these views (None: unaugmented), float32, in the data's class
        order, on the teacher's device.

        Raises ValueError if the teacher gives another number of classes than it has names.
        """
        with torch.no_grad():
            return self._aligned(self._outputs(rows, indices, views))

    def _aligned(self, outputs: Tensor) -> Tensor:
        if outputs.dim() != 2 or outputs.shape[1] != len(self.class_names):
            raise ValueError(
                f"Teacher {self.name!r} must answer with (batch, {len(self.class_names)}) logits, one per class name, "
                f"got shape {tuple(outputs.shape)}. Give the names of all its outputs, in their order, as `labels`."
            )
        if not self._in_order:
            if self._order.device != outputs.device:
                self._order = self._order.to(outputs.device)
            outputs = outputs.index_select(1, self._order)
        return outputs.float()

    def describe_inputs(self) -> dict[str, Any]:
        """JSON-able: how raw rows become what the teacher sees."""
        return {}

    def identity(self, rows: Rows) -> dict[str, Any]:
        """JSON-able: all on the teacher's side that decides its logits on these rows. Part of the cache key."""
        return {"fingerprint": self.fingerprint, "alignment": self.alignment, "inputs": self.describe_inputs()}

    def to(self, device: torch.device | str) -> Self:
        """Moves the teacher where it has anything to move; returns it."""
        return self


def pack_linear_layers(model: nn.Module, name: str) -> None:
    """Keeps the weights of linear layers as 8-bit integers with a scale per row; arithmetic stays as it is.

    Raises ImportError without torchao, and ValueError where linear layers hold less than half of the parameters.
    """
    linear = {part.weight for part in model.modules() if isinstance(part, nn.Linear)}
    share = sum(weight.numel() for weight in linear) / max(1, sum(weight.numel() for weight in model.parameters()))
    if share < _LEAST_PACKED:
        raise ValueError(
            f"Teacher {name}: precision int8 packs linear layers, which must hold at least half of the parameters; "
            f"here they hold {share:.0%}. Take bf16."
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError('Teachers in 8 bits need torchao. Install it: pip install "hf_hpmkd[int8]"') from error
    quantize_(model, Int8WeightOnlyConfig())


class TorchTeacher(Teacher):
    """A torch classifier with its own feed, put into eval mode and frozen here.

    model: returns logits `(batch, classes)` or an output that holds them as `logits`. dtype: e.g. torch.bfloat16 for a
    teacher that runs live on a GPU; torch.int8 packs the weights of linear layers into 8 bits (torchao); None keeps all
    as it is. class_names: None takes the config's id2label; where there is no config, the data's names in their
    order, with a warning.
    """

    is_live = True

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        *,
        name: str,
        data_names: Sequence[str],
        class_names: Sequence[str] | None = None,
        source: str | None = None,
        kind: str = "transformers",
        license: str | None = None,
        commit: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        names = class_names if class_names is not None else own_class_names(model)
        if names is None:
            names = [f"LABEL_{index}" for index in range(len(data_names))]
        super().__init__(
            name,
            source or name,
            names,
            data_names,
            num_params=sum(p.numel() for p in model.parameters()),
            license=license,
            commit=commit,
        )
        self.kind = kind
        packed = dtype is torch.int8
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=None if packed else dtype)
        if packed:
            self.fingerprint = json_digest([self.fingerprint, "int8"])  # while the weights can be read byte by byte
            pack_linear_layers(self.model, name)
        self.feed = feed
        self.device = torch.device(device)
        floats = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        self._dtype = floats[0] if floats else torch.float32
        self._parameters = inspect.signature(model.forward).parameters
        self._reader: FeatureReader | None = None

    @classmethod
    def of(cls, name: str, classifier: Any, rows: Rows, device: torch.device | str = "cpu", **kwargs: Any) -> Self:
        """Of anything with a `model` and its `feed`, as `build_classifier` gives it, for the classes of rows."""
        return cls(classifier.model, classifier.feed, name=name, data_names=rows.class_names, device=device, **kwargs)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json_digest(architecture(self.model)).encode())
        for key, tensor in self.model.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def describe_inputs(self) -> dict[str, Any]:
        return self.feed.describe()

    def _outputs(self, rows: Rows, indices: Tensor, views: Tensor | None) -> Tensor:
        return self._forward(self.feed(rows.raw(indices, views)))

    def _forward(self, inputs: Mapping[str, Any]) -> Tensor:
        # A module whose forward calls its input otherwise (timm: x) gets the only input there is by position.
        moved = {key: self._moved(value) for key, value in inputs.items()}
        by_position = len(moved) == 1 and not set(moved) & set(self._parameters)
        outputs = self.model(*moved.values()) if by_position else self.model(**moved)
        if isinstance(outputs, Tensor):
            return outputs
        return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self._dtype if value.is_floating_point() else None
        return value.to(device=self.device, dtype=dtype, non_blocking=True)

    @torch.no_grad()
    def forward_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits as of `logits`, of inputs that are fed already."""
        return self._aligned(self._forward(inputs))

    @torch.no_grad()
    def forward_inputs(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits as of `logits` and penultimate features `(batch, width)`, float32, of inputs that are fed already.

        Raises ValueError where the model has no linear head, or one that sees several vectors per sample and gives the
        logits for none of them.
        """
        if self._reader is None:
            self._reader = FeatureReader(find_classifier_head(self.model, len(self.class_names)))
        logits = self._forward(inputs)
        return self._aligned(logits), self._reader.read(logits, inputs).float()

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        self.device = torch.device(device)
        return self


def own_class_names(model: nn.Module) -> list[str] | None:
    """Class names of a model's config in the order of its outputs, which count from 0 or 1; None where it has none."""
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    return [str(id2label[index]) for index in sorted(id2label, key=int)] if id2label else None


class ColumnTeacher(Teacher):
    """Logits that the data set brings along: a column with a list of K numbers per row, of the unaugmented row.

    class_names: None takes the data's order. Raises ValueError if the column does not exist or does not hold K numbers
    in every row, and when asked for an augmented view.
    """

    kind = "column"
    answers_views = False

    def __init__(
        self, column: str, rows: Rows, *, name: str | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(name or column, f"column:{column}", class_names or rows.class_names, rows.class_names)
        self.column = column
        self._read: tuple[Rows, Tensor, str] | None = None
        self._values(rows)

    @property
    def fingerprint(self) -> str:
        """Of the part read last; `identity` takes the part it is asked about."""
        assert self._read is not None
        return self._read[2]

    def identity(self, rows: Rows) -> dict[str, Any]:
        self._values(rows)
        return super().identity(rows)

    def require_answers(self, rows: Rows) -> None:
        """Raises ValueError where a row of a part has none."""
        self._values(rows)

    def _values(self, rows: Rows) -> Tensor:
        if self._read is None or self._read[0] is not rows:
            values = self._read_column(rows)
            self._read = (rows, values, hashlib.sha256(values.numpy().tobytes()).hexdigest())
        return self._read[1]

    def _read_column(self, rows: Rows) -> Tensor:
        if self.column not in rows.dataset.column_names:
            raise ValueError(
                f"Teacher {self.name!r} reads the column {self.column!r}, which the data does not have. Its columns "
                f"are {', '.join(rows.dataset.column_names)}."
            )
        stored = list(rows.dataset.with_format(None).select_columns([self.column])[self.column])
        size = len(self.class_names)
        for row, value in enumerate(stored):
            if not isinstance(value, list) or len(value) != size or None in value:
                raise ValueError(
                    f"Column {self.column!r} must hold a list of {size} logits, one per class, in every row; row "
                    f"{row} of the part holds {str(value)[:80]}. Remove the row, or fill in the outputs of the teacher."
                )
        return torch.from_numpy(np.asarray(stored, dtype=np.float32).reshape(len(stored), size))

    def _outputs(self, rows: Rows, indices: Tensor, views: Tensor | None) -> Tensor:
        if views is not None and bool((views != UNAUGMENTED).any()):
            raise ValueError(
                f"Teacher {self.name!r} has one answer per row, for the unaugmented input, so it cannot answer "
                "augmented views. Switch augmentation off (`data.augmentation: none`), or load the model behind the "
                "column."
            )
        return self._values(rows)[indices]


class FoldedTeacher(Teacher):
    """Several copies of a teacher, each trained without some of the training rows, which are the ones it answers.

    Teachers trained on the rows they then teach on know the labels by heart; these do not. full: the one model trained
    on all rows; it answers every other part, and its name and size are reported. fold_of_row: `(rows,)`, the index in
    `folds` that answers each row. rows: the training part, whole: a subset of it counts as another part.
    """

    def __init__(self, full: Teacher, folds: Sequence[Teacher], fold_of_row: Tensor, rows: Rows) -> None:
        fold_of_row = torch.as_tensor(fold_of_row, dtype=torch.long)
        if fold_of_row.shape != (len(rows),) or not set(fold_of_row.tolist()) <= set(range(len(folds))):
            raise ValueError(
                f"`fold_of_row` must name one of {len(folds)} folds for each of {len(rows)} rows, got shape "
                f"{tuple(fold_of_row.shape)} with values {sorted(set(fold_of_row.tolist()))[:10]}."
            )
        super().__init__(
            full.name,
            full.source,
            rows.class_names,
            rows.class_names,
            num_params=full.num_params,
            license=full.license,
            commit=full.commit,
        )
        self.kind = full.kind
        self.full = full
        self.folds = list(folds)
        self.fold_of_row = fold_of_row
        self.answers_views = full.answers_views
        self.min_batch = full.min_batch * len(self.folds)
        self._rows_fingerprint = rows.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        return json_digest(
            {
                "folds": [[fold.fingerprint, fold.alignment] for fold in self.folds],
                "fold_of_row": hashlib.sha256(self.fold_of_row.numpy().tobytes()).hexdigest(),
            }
        )

    def describe_inputs(self) -> dict[str, Any]:
        return self.full.describe_inputs()

    def answers_by_folds(self, rows: Rows) -> bool:
        """Whether these are the rows it was trained on."""
        return rows.fingerprint == self._rows_fingerprint

    def identity(self, rows: Rows) -> dict[str, Any]:
        return super().identity(rows) if self.answers_by_folds(rows) else self.full.identity(rows)

    def _outputs(self, rows: Rows, indices: Tensor, views: Tensor | None) -> Tensor:
        if not self.answers_by_folds(rows):
            return self.full.logits(rows, indices, views)
        fold_of = self.fold_of_row[indices]
        outputs = torch.empty(len(indices), len(self.class_names))
        for fold in fold_of.unique().tolist():
            chosen = (fold_of == fold).nonzero()[:, 0]
            part = self.folds[fold].logits(rows, indices[chosen], None if views is None else views[chosen])
            outputs[chosen] = part.to(outputs.device)
        return outputs

    def to(self, device: torch.device | str) -> Self:
        for teacher in (self.full, *self.folds):
            teacher.to(device)
        return self


def _way_out(accuracy: float, labels: Tensor) -> str:
    commonest = float(labels.bincount().max()) / len(labels)
    if commonest > _RARE_REST and accuracy >= 2 * commonest - 1:  # else it is wrong about the common class
        return f"{commonest:.0%} of these rows are of one class, so accuracy says little; macro F1 says more."
    return "Check its preprocessing and, where it was trained elsewhere, the order of its classes (`labels`)."


def check_teacher(
    teacher: Teacher, guide_logits: Tensor, guide_labels: Tensor, train_accuracy: float | None = None
) -> list[str]:
    """What speaks against a teacher, judged on rows it has not seen; [] if nothing does.

    guide_logits: `(rows, classes)` in the data's class order. guide_labels: `(rows,)`. train_accuracy: share in 0..1 of
    training rows it answers right. Warned of: agreement with the labels no better than chance (the agreement expected
    of the same answers dealt out at random, as in Cohen's kappa), and more than 5 points better on training rows than
    here, where either is beyond two standard errors. Raises ValueError for NaN or a wrong number of classes or rows.
    """
    classes = len(teacher.alignment)
    if guide_logits.shape != (len(guide_labels), classes):
        raise ValueError(
            f"Teacher {teacher.name!r} must give ({len(guide_labels)}, {classes}) logits, one per row and class, got "
            f"{tuple(guide_logits.shape)}."
        )
    if bool(guide_logits.isnan().any()):
        raise ValueError(
            f"Teacher {teacher.name!r} answers {int(guide_logits.isnan().any(1).sum())} of {len(guide_labels)} rows "
            "with NaN. Check its weights and its preprocessing, or load it in float32."
        )
    if not len(guide_labels):
        return []
    answers, labels = guide_logits.argmax(1).cpu(), guide_labels.cpu()
    accuracy = float((answers == labels).double().mean())
    shares = torch.bincount(answers, minlength=classes).double() * torch.bincount(labels, minlength=classes).double()
    chance = float(shares.sum()) / len(labels) ** 2
    found = []
    if chance < 1 and accuracy - chance <= _STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / len(labels)):
        found.append(
            f"Teacher {teacher.name!r} is no better than chance: accuracy {accuracy:.3f} on {len(labels)} guide rows, "
            f"{chance:.3f} expected of random answers. {_way_out(accuracy, labels)}"
        )
    if train_accuracy is not None:
        gap = train_accuracy - accuracy
        error = math.sqrt(max(accuracy * (1 - accuracy), 1 / len(labels)) / len(labels))
        if gap > _WORTH_A_WARNING and gap > _STANDARD_ERRORS * error:
            found.append(
                f"Teacher {teacher.name!r} knows its training rows better than others: accuracy {train_accuracy:.3f} "
                f"there, {accuracy:.3f} on {len(labels)} guide rows. Its answers to training rows then say little "
                "beyond the labels: use out-of-fold outputs (`folds`), or a teacher trained on other rows."
            )
    return found
