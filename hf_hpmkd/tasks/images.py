"""Images: rows kept decoded in memory where they fit, and the feeds of image models.

A raw batch is `{"image": uint8 (batch, channels, height, width)}`, or a list of uint8 `(channels, height, width)`
where sizes differ. Grey images keep their one channel; a feed repeats it where its model wants three.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers import ViTImageProcessor
from transformers.image_utils import PILImageResampling

from hf_hpmkd.tasks.augmentation import Augmentation, Images, augment, by_shape, stack_if_equal
from hf_hpmkd.tasks.base import Rows, column_values
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION

__all__ = ["Augmentation", "ImageFeed", "ImageRows", "ProcessorFeed", "augment"]

DEFAULT_MAX_BYTES = 4 * 2**30
_READ_ROWS = 1024  # stored images read at a time, when all are decoded or hashed
_GREY_MODES = ("1", "L")
_COLOUR_MODES = ("RGB", "P", "PA", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB")
_INTERPOLATIONS = {
    "bilinear": (tvF.InterpolationMode.BILINEAR, PILImageResampling.BILINEAR),
    "bicubic": (tvF.InterpolationMode.BICUBIC, PILImageResampling.BICUBIC),
}


def _decode(feature: Image, value: Mapping[str, Any] | None, row: int) -> Tensor:
    """uint8 (channels, height, width) of a stored image: one channel for grey pictures, three for all others."""
    if value is None:
        raise ValueError(
            f"Row {row} of this part has no image. Remove such rows first: "
            "`dataset.filter(lambda r: r[column] is not None)`."
        )
    try:
        return image_to_tensor(feature.decode_example(value), f"The image of {_place(value, row)}")
    except (OSError, SyntaxError) as error:  # Pillow's words for a damaged file
        raise ValueError(f"The image of {_place(value, row)} cannot be read: {error}") from error


def _place(value: Mapping[str, Any], row: int) -> str:
    return f"row {row} of this part ({value.get('path') or 'no path'})"


def image_to_tensor(image: Any, what: str) -> Tensor:
    """uint8 `(channels, height, width)` of a PIL image: one channel for grey pictures, three for all others. what: what
    it is called in the ValueError for one that has not 8 bits per channel.
    """
    if image.mode in _GREY_MODES:
        return torch.from_numpy(np.array(image.convert("L")))[None]
    if image.mode not in _COLOUR_MODES:
        raise ValueError(
            f"{what} has mode {image.mode!r}; 8 bits per channel are needed. Convert it, for instance by Pillow's "
            "`image.convert('RGB')`, and save it again."
        )
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _decode_all(stored: Dataset, column: str, max_bytes: int) -> Tensor | None:
    """All images as one uint8 (rows, channels, height, width); None if sizes differ or they would take more than
    max_bytes.

    A set that mixes grey and colour gets three channels.
    """
    feature = Image()
    images: Tensor | None = None
    for row in range(len(stored)):
        if row % _READ_ROWS == 0:
            values = stored[row : row + _READ_ROWS][column]
        image = _decode(feature, values[row % _READ_ROWS], row)
        if images is not None and image.shape[1:] != images.shape[2:]:
            return None
        if images is None or image.shape[0] > images.shape[1]:
            shape = (len(stored), *image.shape)
            if math.prod(shape) > max_bytes:
                return None
            grey, images = images, torch.empty(shape, dtype=torch.uint8)
            if grey is not None:
                images[:row] = grey[:row]
        images[row] = image
    return images


class ImageRows(Rows):
    """Rows with an image each. Build with `from_dataset`.

    images: all pixels, uint8 `(rows, channels, height, width)`, or None if each batch is decoded when asked for.
    image_size: (height, width) if known to be the same for all rows, else None.
    """

    task = IMAGE_CLASSIFICATION

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        labels: Sequence[int] | Tensor,
        class_names: Sequence[str],
        augmentation: Augmentation | None = None,
        images: Tensor | None = None,
    ) -> None:
        super().__init__(dataset, labels, class_names)
        self.column = column
        self.augmentation = augmentation if augmentation is not None and augmentation.policy != "none" else None
        self.supports_views = self.augmentation is not None
        self.images = images
        self._stored = _stored_images(dataset, column) if images is None else None

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        image_column: str,
        label_column: str,
        class_names: Sequence[str],
        augmentation: Augmentation | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> "ImageRows":
        """Decodes once into memory if all sizes agree and they take at most max_bytes; else each batch is decoded on
        demand, which is some twenty times slower for small images. 0 never keeps them in memory.

        Raises TypeError if the column is not of the Image type, ValueError for a missing image or one with 16 bits per
        channel.
        """
        images = _decode_all(_stored_images(dataset, image_column), image_column, max_bytes) if len(dataset) else None
        labels = column_values(dataset, label_column)
        return cls(dataset, image_column, labels, class_names, augmentation, images)

    @property
    def image_size(self) -> tuple[int, int] | None:
        return None if self.images is None else (self.images.shape[2], self.images.shape[3])

    @property
    def channels(self) -> int | None:
        """1 for grey, 3 for colour; None if unknown because the images are decoded on demand."""
        return None if self.images is None else self.images.shape[1]

    def _raw(self, positions: Tensor, views: Tensor | None) -> dict[str, Any]:
        images = self._gather(positions)
        if views is not None and self.augmentation is not None:
            images = augment(images, positions, views, self.augmentation)
        return {"image": images}

    def _gather(self, positions: Tensor) -> Images:
        if self.images is not None:
            return self.images.index_select(0, positions)
        assert self._stored is not None
        values = self._stored[positions.tolist()][self.column]
        feature = Image()
        return stack_if_equal([_decode(feature, v, row) for v, row in zip(values, positions.tolist(), strict=True)])

    def _hash_inputs(self, digest: Any) -> None:
        for start in range(0, len(self), _READ_ROWS):
            batch = self._gather(torch.arange(start, min(start + _READ_ROWS, len(self))))
            for image in batch:
                digest.update(np.asarray(image.shape, dtype="<i8").tobytes())
                digest.update(image.numpy())

    def subset(self, indices: Sequence[int] | Tensor) -> "ImageRows":
        positions = torch.as_tensor(indices, dtype=torch.long)
        images = None if self.images is None else self.images.index_select(0, positions)
        dataset = self.dataset.select(positions.tolist())
        return ImageRows(dataset, self.column, self.labels[positions], self.class_names, self.augmentation, images)

    def in_colour(self) -> "ImageRows":
        """The same rows with three channels, grey ones repeated. Images that are decoded on demand stay as they are."""
        if self.images is None:
            return self
        images = to_channels(self.images, 3).contiguous()
        return ImageRows(self.dataset, self.column, self.labels, self.class_names, self.augmentation, images)

    def view_key(self) -> dict[str, Any]:
        return {} if self.augmentation is None else self.augmentation.describe()


def _stored_images(dataset: Dataset, column: str) -> Dataset:
    """The image column alone, as stored bytes."""
    feature = dataset.features.get(column)
    if not isinstance(feature, Image):
        raise TypeError(
            f"Column {column!r} must be of the datasets type Image, got {feature}. "
            f"Cast it: `dataset.cast_column({column!r}, datasets.Image())`."
        )
    return dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Grey repeated to the number of channels that a model wants. images: `(..., channels, height, width)`."""
    if images.shape[-3] == channels:
        return images
    if images.shape[-3] != 1:
        raise ValueError(
            f"The model wants {channels} channel(s), the images have {images.shape[-3]}. Use a model for colour images."
        )
    return images.expand(*images.shape[:-3], channels, *images.shape[-2:])


class ImageFeed:
    """Resize, centre crop, rescale and normalise: `{"pixel_values": float (batch, channels, height, width)}`.

    size: (height, width) of the model's input. mean, std: one number per channel, of pixels in 0..1. crop_pct: share
    of the resized image that the crop keeps, in (0, 1]; 1 crops only what the aspect ratio asks for. The shorter side
    is resized to floor(size / crop_pct) (timm's "center"); for a height other than the width both sides are, whatever
    the aspect ratio. Images that have the wanted size already are not resampled. Raises ValueError for values out of
    range.

    `processor` gives the same numbers from PIL images inside a transformers `pipeline`. A pipeline turns every image
    into RGB, so a model to be published takes three channels: grey images are repeated here as they are there.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 3,
        interpolation: str = "bilinear",
        crop_pct: float = 1.0,
    ) -> None:
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {', '.join(_INTERPOLATIONS)}, got {interpolation!r}.")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"`crop_pct` must lie in (0, 1], got {crop_pct}.")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`size` must be (height, width), both at least 1, got {size}.")
        if channels not in (1, 3) or len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(
                f"`channels` must be 1 or 3, with a mean and a positive std for each, got {channels}, {list(mean)} "
                f"and {list(std)}."
            )
        self.size = (int(size[0]), int(size[1]))
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.channels = channels
        self.interpolation = interpolation
        self.crop_pct = float(crop_pct)
        # (x / 255 - mean) / std as one multiplication and one addition.
        std_column = torch.tensor(self.std, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (1 / (255 * std_column)).float()
        self._shift = (-torch.tensor(self.mean, dtype=torch.float64).view(-1, 1, 1) / std_column).float()
        self.processor = self._as_processor()

    @classmethod
    def from_timm(cls, pretrained_cfg: Mapping[str, Any]) -> "ImageFeed":
        """The evaluation preprocessing that a timm `pretrained_cfg` names. Raises ValueError where it asks for
        something else than timm's "center" crop or for an interpolation other than bilinear or bicubic.
        """
        cfg = dict(pretrained_cfg)
        if cfg.get("crop_mode", "center") != "center":
            raise ValueError(
                f"crop_mode {cfg['crop_mode']!r} is not supported. Use ProcessorFeed with the model's own processor."
            )
        channels, height, width = cfg.get("input_size", (3, 224, 224))
        return cls(
            size=(height, width),
            mean=cfg.get("mean", (0.485, 0.456, 0.406)),
            std=cfg.get("std", (0.229, 0.224, 0.225)),
            channels=channels,
            interpolation=cfg.get("interpolation", "bilinear"),
            crop_pct=cfg.get("crop_pct") or 0.875,
        )

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        images: Images = raw["image"]
        if not isinstance(images, Tensor):
            images = torch.stack(by_shape(images, lambda stack, _: self._resize(to_channels(stack, self.channels))))
        else:
            images = self._resize(to_channels(images, self.channels))
        return {
            "pixel_values": images.to(torch.float32, memory_format=torch.contiguous_format)
            .mul_(self._scale)
            .add_(self._shift)
        }

    def _scaled_size(self) -> dict[str, int]:
        """The size before the crop, in the words of transformers."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        return {"shortest_edge": height} if height == width else {"height": height, "width": width}

    def _resize(self, images: Tensor) -> Tensor:
        if self.crop_pct == 1 and tuple(images.shape[-2:]) == self.size:
            return images
        scaled = list(self._scaled_size().values())
        images = tvF.resize(images, scaled, interpolation=_INTERPOLATIONS[self.interpolation][0], antialias=True)
        top, left = (int((have - want) / 2) for have, want in zip(images.shape[-2:], self.size, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]

    def _as_processor(self) -> ViTImageProcessor:
        return ViTImageProcessor(
            do_resize=True,
            size=self._scaled_size(),
            resample=_INTERPOLATIONS[self.interpolation][1],
            do_center_crop=True,
            crop_size={"height": self.size[0], "width": self.size[1]},
            do_convert_rgb=self.channels == 3,
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=list(self.mean),
            image_std=list(self.std),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "feed": "image",
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }


class ProcessorFeed:
    """Calls a model's own transformers image processor, so it is right by definition; slower than ImageFeed.

    The processor sees what it would see inside a `pipeline`: RGB images, as PIL images unless it works on tensors
    itself. Raises TypeError if it is no image processor.
    """

    def __init__(self, processor: Any) -> None:
        if not callable(processor) or not hasattr(processor, "to_dict"):
            raise TypeError(f"`processor` must be a transformers image processor, got {type(processor).__name__}.")
        self.processor = processor
        # Only this backend reads uint8 tensors as pixels; timm's wrapper, say, takes a tensor for floats in 0..1.
        self._takes_tensors = getattr(processor, "backend", None) == "torchvision"

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        images = [to_channels(image, 3) for image in raw["image"]]
        if self._takes_tensors:
            outputs = self.processor(images=images, return_tensors="pt", input_data_format="channels_first")
        else:
            outputs = self.processor(images=[tvF.to_pil_image(image) for image in images], return_tensors="pt")
        return {key: value for key, value in outputs.items() if isinstance(value, Tensor)}

    def describe(self) -> dict[str, Any]:
        settings = json.loads(json.dumps(self.processor.to_dict(), sort_keys=True, default=str))
        return {"feed": "processor", "class": type(self.processor).__name__, "settings": settings}
