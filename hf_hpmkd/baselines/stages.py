"""Reads the feature maps that a ResNet's stages put out. Knows no method."""

import torch
from torch import nn

from hf_hpmkd.heads import OutputReader


def stages(model: nn.Module) -> list[nn.Module]:
    """The modules layer1, layer2, ... of a ResNet (ours, torchvision's, timm's).

    Raises ValueError where there are none, which is so for tables, texts and most other architectures.
    """
    found: list[nn.Module] = []
    while isinstance(module := getattr(model, f"layer{len(found) + 1}", None), nn.Module):
        found.append(module)
    if not found:
        raise ValueError(
            f"Feature maps are read after the stages layer1, layer2, ... of a ResNet; {type(model).__name__} has none. "
            "Leave the methods fitnets and at out of this comparison."
        )
    return found


def channels(stage: nn.Module) -> int:
    """Channels of a stage's output: those of its last convolution that is no shortcut's."""
    convolutions = [
        module for name, module in stage.named_modules() if isinstance(module, nn.Conv2d) and "downsample" not in name
    ]
    return convolutions[-1].out_channels


class StageReader(OutputReader):
    """Keeps what the stages of a model put out in its latest forward pass. Raises ValueError if it has no stages."""

    def __init__(self, model: nn.Module) -> None:
        self.stages = stages(model)
        super().__init__(self.stages)

    def read(self) -> list[torch.Tensor]:
        """The maps `(batch, channels, height, width)`, float32, of the forward pass just made; reading forgets them."""
        return [output.float() for output in super().read()]


def check_pair(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raises ValueError unless two maps have the same height and width."""
    if student.shape[-2:] != teacher.shape[-2:]:
        raise ValueError(
            f"Feature maps of student and teacher must have the same height and width, got {tuple(student.shape[-2:])} "
            f"and {tuple(teacher.shape[-2:])}. Compare students and teachers of one family, fed with one image size."
        )
