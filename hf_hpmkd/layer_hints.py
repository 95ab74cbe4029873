"""Layer hints: a student that begins with layers of a larger model is told what that model's layers go on to put out.

A warm start takes a few of many layers, and each then has to do the work of several. So in the first part of its
training each is drawn towards the last of those above whose work it does: the hint of FitNets (Romero et al. 2015,
eq. 3) without a regressor, because the student's channels are those of the larger model already, as in DistilBERT
(Sanh et al. 2019). Trains nothing beside the student.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_hpmkd.heads import OutputReader
from hf_hpmkd.tasks.base import Feed, Rows
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.teacher_outputs import LiveOutputs
from hf_hpmkd.vocabulary import TEXT_CLASSIFICATION
from hf_hpmkd.warm_start import Channels, channels_between, numbered_rows, same_vocabulary

_WAY_OUT = "Set distillation.hint_weight to 0."


@dataclass(frozen=True)
class HintPoint:
    """A layer of the student and the one above that its output is drawn to: names of the modules."""

    path: str
    path_above: str


def hint_points(model: nn.Module, above: nn.Module) -> list[HintPoint]:
    """The pairs of layers, from the input on; none where the two share no row of layers.

    Of every outermost row of numbered layers (the blocks of a stage, the layers of an encoder) both are cut into as
    many parts as the shorter row has layers, as equal as can be; the last layers of the parts are a pair.
    """
    return list(_points(model, above, "", ""))


def _points(module: nn.Module, above: nn.Module, path: str, path_above: str) -> Iterator[HintPoint]:
    if type(module) is not type(above):
        return
    rows = numbered_rows(list(module._modules), list(above._modules))
    for ours, theirs in rows:
        parts = min(len(ours), len(theirs))
        for part in range(parts):
            one, other = (row[_last_of(part, parts, len(row))] for row in (ours, theirs))
            if len(module._modules[one]._modules):  # type: ignore[union-attr]  # no bare linear map or activation
                yield HintPoint(path + one, path_above + other)
    numbered = {name for ours, _ in rows for name in ours}
    for name, child in module._modules.items():
        partner = above._modules.get(name)
        if name not in numbered and child is not None and partner is not None:
            yield from _points(child, partner, f"{path}{name}.", f"{path_above}{name}.")


def _last_of(part: int, parts: int, count: int) -> int:
    """The last of the layers, of `count`, that belong to a part: round((part + 1) count / parts) - 1, halves up."""
    return int((part + 1) * count / parts + 0.5) - 1


def required_points(student: nn.Module, feed: Feed, above: TorchTeacher) -> list[HintPoint]:
    """As `hint_points`. Raises ValueError where there are none, and for texts of which the two read other tokens.

    feed: makes the student's inputs. The student may be on the meta device.
    """
    points = hint_points(student, above.model)
    if not points:
        raise ValueError(
            f"Layer hints are for models with rows of layers, {type(student).__name__} and {above.name} have none in "
            f"common. {_WAY_OUT}"
        )
    if not same_vocabulary(feed, above.feed):
        raise ValueError(
            f"Layer hints need one tokenizer: {above.name} reads other tokens than the student. {_WAY_OUT}"
        )
    lengths = [getattr(one, "max_length", 0) for one in (feed, above.feed)]
    if lengths[0] > lengths[1]:
        raise ValueError(
            f"Layer hints need a teacher that reads all tokens that the student reads, {lengths[0]}; {above.name} "
            f"reads {lengths[1]}. Set data.max_length to {lengths[1]}, or distillation.hint_weight to 0."
        )
    return points


def layer_hint_loss(student: Tensor, above: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference per sample `(batch,)`, in variances of what is above: 1 is as far off as its mean is.

    student, above: outputs of one shape, the batch first. mask: `(batch, positions)`, 1 for the tokens of a text that
    count, 0 for padding. The variance is that of these rows.
    """
    student, above = student.float(), above.float()
    if mask is None:
        variance = above.var(correction=0)
        return (student - above).pow(2).flatten(1).mean(1) / variance.clamp_min(1e-6)
    seen = mask.bool()
    variance = above[seen].var(correction=0)
    squared = (student - above).pow(2).flatten(2).mean(2) * seen
    return squared.sum(1) / seen.sum(1).clamp_min(1) / variance.clamp_min(1e-6)


class LayerHints:
    """The hints that one student gets from the model whose layers it began with.

    above: that model. rows, feed: the training rows, and what makes the student's inputs of them. weight: of the mean
    of all hints, added to the loss, above 0. share: of the training, from its beginning, in (0, 1]. `close` ends it.

    Raises ValueError as `required_points` does, and where outputs differ in more than their channels.
    """

    def __init__(
        self, student: nn.Module, above: TorchTeacher, rows: Rows, feed: Feed, weight: float, share: float
    ) -> None:
        self.weight, self.share, self.above = weight, share, above
        self.points = required_points(student, feed, above)
        self._texts = rows.task == TEXT_CLASSIFICATION
        self._outputs = LiveOutputs([above], rows, feed)
        self._channels: Channels = channels_between(student, above.model)
        self._home: torch.device | None = None  # of the model above, where it has been moved
        self._ours = OutputReader([student.get_submodule(point.path) for point in self.points], training=True)
        theirs = [above.model.get_submodule(point.path_above) for point in self.points]
        self._theirs = OutputReader(theirs, training=False)

    def applies(self, progress: float) -> bool:
        """Whether there are hints at this share, 0 to 1, of the training."""
        return progress < self.share

    def losses(self, rows: Tensor, views: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Mean of the hints, per sample `(batch,)`, of the batch that the student has just answered; see
        `layer_hint_loss`.
        """
        ours = self._ours.read()
        if self.above.device != ours[0].device:
            self._home = self.above.device
            self.above.to(ours[0].device)
        if self._texts:
            self.above.forward_logits(inputs)
        else:
            self._outputs.lookup(rows, views, inputs)
        mask = inputs.get("attention_mask") if self._texts else None
        found = []
        for point, student, above in zip(self.points, ours, self._theirs.read(), strict=True):
            student, above = self._same_channels(point, student, above)
            tokens = mask is not None and student.dim() == 3 and student.shape[:2] == mask.shape
            found.append(layer_hint_loss(student, above, mask if tokens else None))
        return torch.stack(found).mean(0)

    def _same_channels(self, point: HintPoint, student: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """Both with the channels that they share: the last dimension, of maps it may be the second."""
        if student.shape == above.shape:
            return student, above
        rank = student.dim()
        other = [dim for dim, (a, b) in enumerate(zip(student.shape, above.shape, strict=False)) if a != b]
        if above.dim() != rank or other not in ([[rank - 1], [1]] if rank == 4 else [[rank - 1]]):
            raise ValueError(
                f"A layer hint needs outputs of one shape but for their channels, got {tuple(student.shape)} of "
                f"{point.path} and {tuple(above.shape)} of {point.path_above} in {self.above.name}. {_WAY_OUT}"
            )
        places = self._channels(student.shape[other[0]], above.shape[other[0]], 1)
        mine, its = (place.to(student.device) for place in places)
        return student.index_select(other[0], mine), above.index_select(other[0], its)

    def close(self) -> None:
        """Takes the hooks off, and puts the model above back to where it was."""
        self._ours.close()
        self._theirs.close()
        if self._home is not None:
            self.above.to(self._home)
            self._home = None
