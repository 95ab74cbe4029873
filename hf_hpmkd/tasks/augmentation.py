"""Image augmentation that can be replayed: the same seed, row and view give the same pixels (`draws`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from hf_hpmkd.tasks.draws import Draws

POLICIES = ("none", "crop", "crop_flip", "resized_crop_flip")
MIN_AREA = (
    0.25  # resized_crop: the smallest share of the picture kept; torchvision's default of 0.08 often loses the object
)
ASPECT = (3 / 4, 4 / 3)  # resized_crop: width/height relative to the picture's own (Szegedy et al. 2015, sec. 6)
REVISION = 1  # enters the cache key: raise it when the pixels of a view change

Images = Tensor | list[Tensor]
"""uint8 `(batch, channels, height, width)`, or a list of uint8 `(channels, height, width)` of unequal sizes."""


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied.

    policy: "none"; "crop" (shift by up to `padding` pixels over black); "crop_flip" (the same, and mirrored every
    other time); "resized_crop_flip" (a part of 25-100 % of the area, aspect ratio 3:4 to 4:3, resized, and mirrored
    every other time). size: side of the square that resized_crop_flip resizes to; None keeps each image's own size.
    seed: another seed, other views. Raises ValueError for an unknown policy or a value that the policy does not use.
    """

    policy: str = "crop_flip"
    padding: int = 4
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}, got {self.policy!r}.")
        if self.policy in ("crop", "crop_flip") and self.padding < 1:
            raise ValueError(f"`padding` must be at least 1 pixel for {self.policy}, got {self.padding}.")
        if self.size is not None and (self.policy != "resized_crop_flip" or self.size < 1):
            raise ValueError(f"`size` is for resized_crop_flip and at least 1, got {self.size} with {self.policy}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {self.seed}.")

    def describe(self) -> dict[str, Any]:
        """What decides the pixels of a view; {} for the policy "none"."""
        if self.policy == "none":
            return {}
        if self.policy == "resized_crop_flip":
            return {"policy": self.policy, "size": self.size, "seed": self.seed, "revision": REVISION}
        return {"policy": self.policy, "padding": self.padding, "seed": self.seed, "revision": REVISION}


def augment(images: Images, rows: Tensor, views: Tensor, augmentation: Augmentation) -> Images:
    """The given view of each image. rows, views: `(batch,)`; a view of -1 (UNAUGMENTED) passes the image unchanged.

    Returns a batch of the same form; a list only where sizes come to differ. The input is left as it was.
    """
    if augmentation.policy == "none":
        return images
    draw = Draws(augmentation.seed, rows, views)
    if augmentation.policy == "resized_crop_flip":
        return _resized_crop_flip(images, draw, augmentation)
    if isinstance(images, Tensor):
        return _crop_flip(images, draw, augmentation)
    return by_shape(images, lambda stack, members: _crop_flip(stack, draw.only(members), augmentation))


def by_shape(images: list[Tensor], function: Callable[[Tensor, np.ndarray], Tensor]) -> list[Tensor]:
    """Calls function(stack, positions) once per group of equally shaped images, and puts the results back in order."""
    groups: dict[torch.Size, list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image.shape, []).append(position)
    results: list[Tensor] = [None] * len(images)  # type: ignore[list-item]
    for members in groups.values():
        done = function(torch.stack([images[i] for i in members]), np.asarray(members))
        for position, image in zip(members, done, strict=True):
            results[position] = image
    return results


def _crop_flip(images: Tensor, draw: Draws, augmentation: Augmentation) -> Tensor:
    """Pads with black, cuts the original size out at a random place, mirrors half of them. One copy of the batch, no
    loop.
    """
    height, width = images.shape[-2:]
    pad = augmentation.padding
    padded = np.zeros((*images.shape[:2], height + 2 * pad, width + 2 * pad), dtype=np.uint8)
    padded[:, :, pad : pad + height, pad : pad + width] = images.numpy()
    top = np.where(draw.active, draw.uniform(0) * (2 * pad + 1), pad).astype(np.int64)
    left = np.where(draw.active, draw.uniform(1) * (2 * pad + 1), pad).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    result = windows[np.arange(len(images)), :, top, left]
    if augmentation.policy == "crop_flip":
        flipped = np.flatnonzero(draw.flip(2))
        result[flipped] = result[flipped][..., ::-1]
    return torch.from_numpy(result)


def _resized_crop_flip(images: Images, draw: Draws, augmentation: Augmentation) -> Images:
    """A loop over images: each is resized from its own part, and pictures of this size cost far more to decode than to
    resize.

    One draw per image, cut to the picture's bounds, instead of torchvision's up to ten attempts.
    """
    area = MIN_AREA + draw.uniform(0) * (1 - MIN_AREA)
    ratio = np.exp(np.log(ASPECT[0]) + draw.uniform(1) * (np.log(ASPECT[1]) - np.log(ASPECT[0])))
    down, across, flip = draw.uniform(2), draw.uniform(3), draw.flip(4)
    results = []
    for i, image in enumerate(images):
        if not draw.active[i]:
            results.append(image)
            continue
        height, width = image.shape[-2:]
        part_height = min(max(round(height * (area[i] / ratio[i]) ** 0.5), 1), height)
        part_width = min(max(round(width * (area[i] * ratio[i]) ** 0.5), 1), width)
        top = int(down[i] * (height - part_height + 1))
        left = int(across[i] * (width - part_width + 1))
        part = image[:, top : top + part_height, left : left + part_width]
        target = [augmentation.size] * 2 if augmentation.size else [height, width]
        part = tvF.resize(part, target, interpolation=tvF.InterpolationMode.BILINEAR, antialias=True)
        results.append(part.flip(-1) if flip[i] else part)
    return stack_if_equal(results)


def stack_if_equal(images: Sequence[Tensor]) -> Images:
    """One tensor if all shapes agree, else the list."""
    shapes = {image.shape for image in images}
    return torch.stack(list(images)) if len(shapes) == 1 else list(images)
