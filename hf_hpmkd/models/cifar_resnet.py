"""The ResNet of He et al. 2015, section 4.2, for small images. Imports no other file of this package: a saved model
folder carries a copy of this one, so that `trust_remote_code=True` opens it where the package is not installed.

Neither timm nor transformers has it: the shortcuts are of option A (no parameters), the stem has no pooling.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class CifarResNetConfig(PretrainedConfig):
    """depth: 6n + 2 weighted layers, n blocks in each of three stages; 8 is the smallest, the paper has 20 to 110.
    width: channels of the first stage, doubled by the second and again by the third; 16 in the paper. num_channels:
    colours of the input. Raises ValueError for other depths and for widths or channels below 1.
    """

    model_type = "hpmkd_cifar_resnet"

    def __init__(self, depth: int = 20, width: int = 16, num_channels: int = 3, **kwargs: Any) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"`depth` must be 6n + 2 with n at least 1 (8, 14, 20, 26, 32, 44, 56, 110), got {depth}.")
        if width < 1 or num_channels < 1:
            raise ValueError(f"`width` and `num_channels` must be at least 1, got {width} and {num_channels}.")
        self.depth = depth
        self.width = width
        self.num_channels = num_channels
        super().__init__(**kwargs)


def option_a_shortcut(x: torch.Tensor, channels: int, stride: int) -> torch.Tensor:
    """Every stride-th pixel, with zero channels added on both sides (He et al. 2015, section 3.3, option A).

    x: `(batch, c, height, width)` with c <= channels. Where an odd number of channels is missing, the last side gets
    one more. Returns `(batch, channels, ceil(height / stride), ceil(width / stride))`.
    """
    missing = channels - x.shape[1]
    if stride == 1 and missing == 0:
        return x
    # Pooling over one pixel takes every stride-th; the backward pass of a slice would lose the memory layout, which
    # makes a training step a fifth slower.
    taken = F.avg_pool2d(x, 1, stride) if stride > 1 else x
    return F.pad(taken, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation, and the shortcut added before the last ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + option_a_shortcut(x, self.channels, self.stride), inplace=True)


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))


class CifarResNetForImageClassification(PreTrainedModel):
    """Parameter names are those of github.com/akamaster/pytorch_resnet_cifar10, so its weights load as they are."""

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"
    # `forward` takes no loss arguments: the Trainer then divides its mean loss by the accumulation steps.
    accepts_loss_kwargs = False
    _no_split_modules = ["BasicBlock"]

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        num_blocks, width = (config.depth - 2) // 6, config.width
        self.conv1 = nn.Conv2d(config.num_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, num_blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, num_blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, num_blocks, stride=2)
        self.linear = nn.Linear(4 * width, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # He et al. 2015b, eq. 10. `from_pretrained` guards torch.nn.init, so that loaded weights stay.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> Any:
        """None: there is no vocabulary. (FSDP asks.)"""
        return None

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """pixel_values: `(batch, num_channels, height, width)` of any size, normalised. labels: `(batch,)`, or None.

        Returns logits `(batch, num_labels)` and, with labels, the mean cross-entropy in nats as loss.
        """
        # On a CPU this layout makes a training step a fifth faster, in fp32 and in bf16.
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits = self.linear(x.mean(dim=(2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def read_cifar_resnet_card(path: str | Path) -> dict[str, Any]:
    """The JSON beside a weights file, same name: `architecture.depth`, `classes`, `input.mean`, `input.std`, `source`.

    Raises FileNotFoundError if the weights or the JSON are missing, ValueError if the JSON lacks depth or classes.
    """
    path = Path(path)
    card = path.with_suffix(".json")
    for file in (path, card):
        if not file.is_file():
            raise FileNotFoundError(
                f"A CIFAR ResNet needs {path.name} and {card.name} beside it; {file} does not exist. The JSON names "
                'the "architecture": {"depth": ...} and the "classes" in the order of the outputs.'
            )
    content = json.loads(card.read_text(encoding="utf-8"))
    depth = content.get("architecture", {}).get("depth") if isinstance(content, dict) else None
    if not isinstance(depth, int) or not content.get("classes"):
        raise ValueError(
            f'{card} must hold {{"architecture": {{"depth": 6n + 2}}, "classes": [names in output order]}}, '
            f"got depth {depth!r} and classes {content.get('classes') if isinstance(content, dict) else None!r}."
        )
    return content


def load_cifar_resnet_file(path: str | Path) -> CifarResNetForImageClassification:
    """A model from a safetensors state dict with the JSON of `read_cifar_resnet_card` beside it; in eval mode.

    Width and colours follow from the weights. Raises ValueError if weights and JSON do not agree in depth, number of
    classes or any tensor's name or shape.
    """
    from safetensors.torch import load_file

    path = Path(path)
    card = read_cifar_resnet_card(path)
    classes = [str(name) for name in card["classes"]]
    state = load_file(path)
    if "conv1.weight" not in state or state["conv1.weight"].dim() != 4:
        raise ValueError(
            f"{path} holds no CIFAR ResNet: there is no 4-dimensional tensor conv1.weight among {len(state)} tensors."
        )
    width, num_channels = state["conv1.weight"].shape[:2]
    config = CifarResNetConfig(
        depth=card["architecture"]["depth"],
        width=width,
        num_channels=num_channels,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    model = CifarResNetForImageClassification(config)
    wanted = model.state_dict()
    faults = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    faults += [f"{name} is unknown" for name in state.keys() - wanted.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if faults:
        raise ValueError(
            f"{path.name} does not fit its JSON (depth {config.depth}, {len(classes)} classes): "
            f"{'; '.join(sorted(faults)[:8])}{f'; {len(faults)} in all' if len(faults) > 8 else ''}."
        )
    model.load_state_dict(state)
    return model.eval()
