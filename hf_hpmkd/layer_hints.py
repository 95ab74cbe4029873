"""Layer hints: a student that begins with layers of a larger model is told what that model's layers go on to put out.

A warm start takes a few of many layers, and each then has to do the work of several. So in the first part of the
training the last layer of every row of layers is drawn towards the last one of the row above: the hint of FitNets
(Romero et al. 2015, eq. 3) without a regressor, because the student's channels are those of the larger model already,
as in DistilBERT (Sanh et al. 2019). Trains nothing beside the student.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """As `hint_points`. Raises ValueError where there are none, and for a text whose tokens mean something else above.
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
    return points


def hint_loss(student: Tensor, above: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference per sample `(batch,)`, in variances of what is above: 1 is as far off as its mean is.

    student, above: outputs of one shape, the batch first. mask: `(batch, positions)`, 1 for the tokens of a text that
    count, 0 for padding.
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
    of all hints, added to the loss, above 0. share: of the training, from its beginning, in (0, 1].

    Raises ValueError where the two have no row of layers in common, where their outputs are of other shapes, and for a
    text whose tokens mean something else above.
    """

    def __init__(
        self, student: nn.Module, above: TorchTeacher, rows: Rows, feed: Feed, weight: float, share: float
    ) -> None:
        self.weight, self.share, self.above = weight, share, above
        self.points = required_points(student, feed, above)
        self._texts = rows.task == TEXT_CLASSIFICATION
        self._outputs = LiveOutputs([above], rows, feed)
        self._channels: Channels = channels_between(student, above.model)
        self._home: torch.device | None = None
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._handles = [
            *(_keep(student, point.path, self._ours, training=True) for point in self.points),
            *(_keep(above.model, point.path_above, self._theirs, training=False) for point in self.points),
        ]

    def applies(self, progress: float) -> bool:
        """Whether there are hints at this share, 0 to 1, of the training."""
        return progress < self.share

    def term(self, rows: Tensor, views: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Weight times the mean of the hints, per sample `(batch,)`, of the batch whose forward pass was just made."""
        self._theirs.clear()
        device = next(iter(self._ours.values())).device
        if self.above.device != device:
            self._home = self.above.device
            self.above.to(device)
        if self._texts:
            self.above.forward_logits(inputs)
        else:
            self._outputs.lookup(rows, views, inputs)
        mask = inputs.get("attention_mask") if self._texts else None
        losses = []
        for point in self.points:
            ours, theirs = self._aligned(point, self._ours[point.path], self._theirs[point.path_above])
            tokens = mask is not None and ours.dim() == 3 and ours.shape[:2] == mask.shape
            losses.append(hint_loss(ours, theirs, mask if tokens else None))
        self._ours.clear()
        self._theirs.clear()
        return self.weight * torch.stack(losses).mean(0)

    def _aligned(self, point: HintPoint, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Both with the channels that they share."""
        if ours.shape == theirs.shape:
            return ours, theirs
        other = [dim for dim, (a, b) in enumerate(zip(ours.shape, theirs.shape, strict=False)) if a != b]
        if ours.dim() != theirs.dim() or len(other) != 1 or other == [0]:
            raise ValueError(
                f"A layer hint needs outputs of one shape but for their channels, got {tuple(ours.shape)} of "
                f"{point.path} and {tuple(theirs.shape)} of {point.path_above} in {self.above.name}. {_WAY_OUT}"
            )
        mine, its = self._channels(ours.shape[other[0]], theirs.shape[other[0]], 1)
        return ours.index_select(other[0], mine.to(ours.device)), theirs.index_select(other[0], its.to(theirs.device))

    def close(self) -> None:
        """Takes the hooks off, and puts the model above back to where it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._ours.clear()
        if self._home is not None:
            self.above.to(self._home)


def _keep(model: nn.Module, path: str, kept: dict[str, Tensor], training: bool) -> Any:
    """Hooks the output of a module in, in training or in eval mode."""

    def keep(module: nn.Module, args: object, output: Any) -> None:
        if module.training == training:
            kept[path] = output if isinstance(output, Tensor) else output[0]

    return model.get_submodule(path).register_forward_hook(keep)
