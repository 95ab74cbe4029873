"""Finds a classifier's last linear layer, and reads what goes into it or comes out of other layers. Knows nothing of
distillation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_WAY_OUT = "Use gate=label or gate=uniform, a temperature schedule other than learned, and no feature term."


def find_classifier_head(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer with `num_classes` outputs, in the order of registration.

    Raises ValueError where there is none (a 1x1 convolution as head, another number of classes).
    """
    heads = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {num_classes} outputs, so its penultimate features "
            f"cannot be read. {_WAY_OUT}"
        )
    return heads[-1]


def require_outputs(student: nn.Module, named: int, classes: int) -> None:
    """Raises ValueError where a student whose config names another number of classes has no such layer either (of
    somebody's own model the config may say nothing).
    """
    try:
        find_classifier_head(student, classes)
    except ValueError:
        raise ValueError(
            f"The student must have an output per class of the training rows, it has {named} and they have {classes}. "
            f"Make it with num_labels={classes}."
        ) from None


class FeatureReader:
    """Keeps the penultimate features `(batch, width)` of a model's latest forward pass, with their gradient.

    It hooks the classifier head. A head that is applied to every token (decoders) has several vectors per sample; the
    features are those of the token whose output are the sample's logits. Call `close` to take the hook off.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.width = head.in_features
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._handle = head.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._seen = args[0], output.detach()

    def read(self, logits: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The features of the forward pass just made; reading forgets them.

        logits: `(batch, classes)`, as the model gave them for these inputs. Of several tokens that give them, as in 16
        bits some do by chance, it is the last that `attention_mask` does not hide. Raises ValueError if the head has
        seen nothing, or several vectors per sample of which none gives them.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise ValueError("The classifier head has seen no forward pass since the last read.")
        features, outputs = seen
        if features.dim() == 2:
            return features
        if features.dim() == 3 and len(features) == len(logits):
            given = (outputs.to(logits.dtype) == logits.detach()[:, None]).all(-1)
            mask = inputs.get("attention_mask")
            if mask is not None and mask.shape == given.shape:
                given = given & mask.bool()
            if bool(given.any(1).all()) or not bool(logits.isfinite().all()):
                last = given.shape[1] - 1 - given.flip(1).float().argmax(1)
                return features[torch.arange(len(features), device=features.device), last]
        raise ValueError(
            "The classifier head must see one vector per sample, (batch, width), or give a sample's logits for one of "
            f"its tokens, got shape {tuple(features.shape)}. {_WAY_OUT}"
        )

    def close(self) -> None:
        self._handle.remove()


class OutputReader:
    """Keeps what modules put out in the latest forward pass `(batch, ...)`, with their gradient; of a tuple the first.

    training: keeps it in training mode alone (True), in eval mode alone (False), in both (None). `close` takes the
    hooks off.
    """

    def __init__(self, modules: Sequence[nn.Module], training: bool | None = None) -> None:
        self._training = training
        self._outputs: list[torch.Tensor | None] = [None] * len(modules)
        self._handles = [module.register_forward_hook(self._keeper(place)) for place, module in enumerate(modules)]

    def _keeper(self, place: int) -> Any:
        def keep(module: nn.Module, args: object, output: Any) -> None:
            if self._training in (None, module.training):
                self._outputs[place] = output if isinstance(output, torch.Tensor) else output[0]

        return keep

    def read(self) -> list[torch.Tensor]:
        """The outputs of the forward pass just made; reading forgets them."""
        outputs = [output for output in self._outputs if output is not None]
        if len(outputs) < len(self._outputs):
            raise ValueError(
                f"{len(self._outputs) - len(outputs)} layers have seen no forward pass since the last read."
            )
        self._outputs = [None] * len(self._outputs)
        return outputs

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._outputs = [None] * len(self._outputs)
