"""Images: augmentation against a second implementation, rows against PIL, feeds against transformers and timm."""

import io

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor, ViTImageProcessor
from transformers.models.timm_wrapper import TimmWrapperImageProcessor

from hf_hpmkd.tasks import Augmentation, ImageFeed, ImageRows, ProcessorFeed, augment
from hf_hpmkd.tasks.draws import Draws

NAMES = ["cat", "dog"]
MASK = 2**64 - 1
MEAN, STD = (0.48, 0.45, 0.4), (0.23, 0.22, 0.225)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def dataset_of(pictures):
    """pictures: uint8 arrays or PIL images."""
    images = [PILImage.fromarray(p) if isinstance(p, np.ndarray) else p for p in pictures]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": images, "label": [i % 2 for i in range(len(images))]}, features=features)


def rows_of(pictures, **settings):
    return ImageRows.from_dataset(dataset_of(pictures), "image", "label", NAMES, **settings)


# --- augmentation -----------------------------------------------------------------------------------------------------


def mix(x):
    """splitmix64's finaliser on Python integers (Vigna's splitmix64.c)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(seed, row, view, stream):
    golden, state = 0x9E3779B97F4A7C15, 0
    for word in (seed, row, view):
        state = mix(((state ^ word) + golden) & MASK)
    return (mix((state + (stream + 1) * golden) & MASK) >> 11) / 2**53


def crop_flip_by_hand(image, seed, row, view, padding, flip):
    """image: (channels, height, width). Pixel by pixel."""
    channels, height, width = image.shape
    down = int(uniform(seed, row, view, 0) * (2 * padding + 1)) - padding
    right = int(uniform(seed, row, view, 1) * (2 * padding + 1)) - padding
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                result[:, y, x] = image[:, y + down, x + right]
    return result[:, :, ::-1] if flip and uniform(seed, row, view, 2) < 0.5 else result


@pytest.mark.parametrize("policy", ["crop", "crop_flip"])
def test_crop_and_flip_equal_a_loop_over_pixels(policy):
    images = torch.from_numpy(pixels(40, 3, 6, 7))
    rows, views = torch.arange(40) * 1000, torch.arange(40) % 5
    result = augment(images, rows, views, Augmentation(policy, padding=2, seed=11))
    for i in range(40):
        expected = crop_flip_by_hand(images[i].numpy(), 11, int(rows[i]), int(views[i]), 2, policy == "crop_flip")
        assert np.array_equal(result[i].numpy(), expected), i


@pytest.mark.parametrize("size", [None, 12])
def test_resized_crop_equals_torchvision_on_hand_made_boxes(size):
    images = torch.from_numpy(pixels(20, 3, 24, 30))
    rows, views = torch.arange(20) + 5, torch.arange(20) % 3
    result = augment(images, rows, views, Augmentation("resized_crop_flip", size=size, seed=2))
    areas = []
    for i in range(20):
        u = [uniform(2, i + 5, i % 3, stream) for stream in range(5)]
        area, ratio = 0.25 + 0.75 * u[0], 0.75 * (16 / 9) ** u[1]
        height = min(round(24 * (area / ratio) ** 0.5), 24)
        width = min(round(30 * (area * ratio) ** 0.5), 30)
        top, left = int(u[2] * (25 - height)), int(u[3] * (31 - width))
        target = [size, size] if size else [24, 30]
        expected = tvF.resized_crop(images[i], top, left, height, width, target, antialias=True)
        assert torch.equal(result[i], expected.flip(-1) if u[4] < 0.5 else expected), i
        areas.append(height * width / (24 * 30))
    assert 0.2 < min(areas) < max(areas) <= 1


@pytest.mark.parametrize("policy", ["crop", "crop_flip", "resized_crop_flip"])
def test_a_view_depends_on_seed_row_and_view_alone(policy):
    images = torch.from_numpy(pixels(1, 3, 16, 16)).expand(30, -1, -1, -1)
    rows, views = torch.arange(30), torch.arange(30) % 4
    augmentation = Augmentation(policy, padding=4, seed=3)
    whole = augment(images, rows, views, augmentation)
    torch.manual_seed(5)
    np.random.seed(5)
    order = torch.randperm(30)
    shuffled = augment(images[order], rows[order], views[order], augmentation)
    assert torch.equal(shuffled, whole[order])
    one = augment(images[7:8], rows[7:8], views[7:8], augmentation)
    assert torch.equal(one[0], whole[7])
    for other_rows, other_views, seed in ((rows + 1, views, 3), (rows, views + 1, 3), (rows, views, 4)):
        other = augment(images, other_rows, other_views, Augmentation(policy, padding=4, seed=seed))
        same = sum(torch.equal(a, b) for a, b in zip(other, whole, strict=True))
        assert same < 10


def test_unaugmented_rows_pass_unchanged_and_the_input_is_left_alone():
    images = torch.from_numpy(pixels(6, 3, 8, 8))
    before = images.clone()
    views = torch.tensor([-1, 0, -1, 1, -1, 2])
    for policy in ("none", "crop", "crop_flip", "resized_crop_flip"):
        result = augment(images, torch.arange(6), views, Augmentation(policy, padding=3))
        assert torch.equal(result[views == -1], images[views == -1])
        assert torch.equal(images, before)
        assert torch.equal(result, images) == (policy == "none")


def test_lists_get_the_same_views_as_batches():
    small, large = torch.from_numpy(pixels(3, 3, 8, 8)), torch.from_numpy(pixels(3, 3, 12, 9))
    mixed = [small[0], large[0], large[1], small[1], small[2], large[2]]
    rows, views = torch.tensor([10, 20, 21, 11, 12, 22]), torch.tensor([0, 1, -1, 2, 3, 0])
    for policy in ("crop_flip", "resized_crop_flip"):
        augmentation = Augmentation(policy, padding=2)
        result = augment(mixed, rows, views, augmentation)
        assert isinstance(result, list)
        for members, stack in (([0, 3, 4], small), ([1, 2, 5], large)):
            expected = augment(stack, rows[members], views[members], augmentation)
            assert all(torch.equal(result[place], image) for place, image in zip(members, expected, strict=True))


def test_a_resized_batch_with_untouched_rows_becomes_a_list():
    images = torch.from_numpy(pixels(2, 3, 8, 8))
    augmentation = Augmentation("resized_crop_flip", size=5)
    result = augment(images, torch.arange(2), torch.tensor([-1, 0]), augmentation)
    assert [tuple(image.shape) for image in result] == [(3, 8, 8), (3, 5, 5)]
    assert augment(images, torch.arange(2), torch.tensor([1, 0]), augmentation).shape == (2, 3, 5, 5)


def test_random_numbers_are_uniform_and_independent():
    rows, views = torch.arange(60_000) // 6, torch.arange(60_000) % 6
    draws = Draws(0, rows, views)
    streams = np.stack([draws.uniform(stream) for stream in range(5)])
    assert streams.min() >= 0 and streams.max() < 1
    shares = np.stack([np.bincount((s * 9).astype(int), minlength=9) for s in streams]) / 60_000
    # 5 standard errors of a share of 1/9 among 60,000 draws.
    assert np.abs(shares - 1 / 9).max() < 5 * (1 / 9 * 8 / 9 / 60_000) ** 0.5
    assert np.abs(np.corrcoef(streams) - np.eye(5)).max() < 5 / 60_000**0.5
    neighbours = np.corrcoef(streams[0][:-1], streams[0][1:])[0, 1]
    assert abs(neighbours) < 5 / 60_000**0.5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"policy": "mixup"}, "one of none, crop"),
        ({"policy": "crop", "padding": 0}, "at least 1 pixel"),
        ({"policy": "crop", "size": 8}, "`size` is for resized_crop_flip"),
        ({"policy": "resized_crop_flip", "size": 0}, "at least 1, got 0"),
        ({"seed": -1}, "`seed` must be 0 or more"),
    ],
)
def test_augmentation_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        Augmentation(**settings)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_hold_the_pixels_in_memory():
    pictures = pixels(5, 6, 7, 3)
    rows = rows_of(pictures)
    assert (rows.image_size, rows.channels, rows.supports_views, rows.view_key()) == ((6, 7), 3, False, {})
    assert np.array_equal(rows.raw([3, 0])["image"].numpy(), pictures[[3, 0]].transpose(0, 3, 1, 2))
    assert rows.labels.tolist() == [0, 1, 0, 1, 0]


def test_decoding_on_demand_gives_the_same_rows():
    pictures = pixels(5, 6, 6, 3)
    memory, demand = rows_of(pictures), rows_of(pictures, max_bytes=0)
    assert demand.images is None and demand.image_size is None
    for indices in ([4, 1, 1], [0]):
        assert torch.equal(demand.raw(indices)["image"], memory.raw(indices)["image"])
    assert demand.fingerprint == memory.fingerprint
    assert demand.subset([3, 1]).fingerprint == memory.subset([3, 1]).fingerprint
    # One byte less than the pixels need.
    assert rows_of(pictures, max_bytes=5 * 108 - 1).images is None
    assert rows_of(pictures, max_bytes=5 * 108).images is not None


def test_unequal_sizes_are_decoded_on_demand():
    pictures = [pixels(6, 6, 3), pixels(6, 8, 3), pixels(6, 6, 3, seed=1)]
    rows = rows_of(pictures, augmentation=Augmentation("crop", 1))
    assert rows.images is None and rows.supports_views
    batch = rows.raw([1, 0], torch.tensor([-1, -1]))["image"]
    assert np.array_equal(batch[0].numpy(), pictures[1].transpose(2, 0, 1))
    assert torch.equal(rows.raw([0, 2])["image"][1], torch.from_numpy(pictures[2].transpose(2, 0, 1)))
    views = rows.raw([0, 1], torch.tensor([0, 1]))["image"]
    assert [tuple(image.shape) for image in views] == [(3, 6, 6), (3, 6, 8)]


def test_grey_images_keep_one_channel_and_mixed_sets_get_three():
    grey, colour = pixels(4, 5), pixels(4, 5, 3)
    rows = rows_of([grey, 255 - grey])
    assert rows.channels == 1 and np.array_equal(rows.raw([0])["image"][0, 0].numpy(), grey)
    mixed = rows_of([grey, colour, grey])
    assert mixed.channels == 3
    assert np.array_equal(mixed.raw([0])["image"][0].numpy(), np.stack([grey] * 3))
    assert np.array_equal(mixed.raw([1])["image"][0].numpy(), colour.transpose(2, 0, 1))
    assert np.array_equal(mixed.raw([2])["image"][0].numpy(), np.stack([grey] * 3))


def test_other_modes_become_colour_and_deep_ones_are_refused():
    colour = PILImage.fromarray(pixels(4, 4, 3))
    for mode in ("RGBA", "P", "CMYK"):
        stored = io.BytesIO()
        colour.convert(mode).save(stored, "TIFF")
        rows = rows_of([PILImage.open(stored), colour])
        assert np.array_equal(rows.raw([0])["image"][0].numpy().transpose(1, 2, 0), colour.convert(mode).convert("RGB"))
    with pytest.raises(ValueError, match=r"The image of row 1 of this part \(no path\) has mode 'I;16'"):
        rows_of([colour, PILImage.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))])


def test_missing_images_and_wrong_types_are_refused():
    with pytest.raises(ValueError, match="Row 1 of this part has no image"):
        rows_of([pixels(4, 4, 3), None])
    damaged = io.BytesIO()
    PILImage.fromarray(pixels(40, 40, 3)).save(damaged, "PNG")
    stored = {"path": "cat/7.png", "bytes": damaged.getvalue()[:-200]}
    dataset = Dataset.from_dict({"image": [stored], "label": [0]}).cast_column("image", Image())
    with pytest.raises(ValueError, match="image of row 0 of this part .cat/7.png. cannot be read: .*truncated"):
        ImageRows.from_dataset(dataset, "image", "label", NAMES)
    dataset = Dataset.from_dict({"image": [[1, 2]], "label": [0]})
    with pytest.raises(TypeError, match="cast_column"):
        ImageRows.from_dataset(dataset, "image", "label", NAMES)


def test_the_fingerprint_is_of_contents_and_order(tmp_path):
    pictures = pixels(4, 6, 6, 3)
    dataset = dataset_of(pictures)
    dataset.save_to_disk(str(tmp_path / "copy"))
    copy = ImageRows.from_dataset(Dataset.load_from_disk(str(tmp_path / "copy")), "image", "label", NAMES)
    rows = ImageRows.from_dataset(dataset, "image", "label", NAMES)
    assert copy.fingerprint == rows.fingerprint == rows_of(pictures, augmentation=Augmentation()).fingerprint
    assert len(rows.fingerprint) == 64
    changed = pictures.copy()
    changed[2, 0, 0, 0] ^= 1
    # The same bytes in another shape, too.
    reshaped = pictures.reshape(4, 4, 9, 3)
    others = {rows_of(p).fingerprint for p in (changed, pictures[::-1], pictures[:3], reshaped)}
    assert len(others | {rows.fingerprint}) == 5
    picked = ImageRows.from_dataset(dataset.select([3, 1]), "image", "label", NAMES)
    assert rows.subset([3, 1]).fingerprint == picked.fingerprint


def test_a_subset_counts_from_zero_and_keeps_its_columns():
    dataset = dataset_of(pixels(6, 5, 5, 3)).add_column("extra", list("abcdef"))
    rows = ImageRows.from_dataset(dataset, "image", "label", NAMES, Augmentation("crop_flip", 2))
    part = rows.subset(torch.tensor([4, 1]))
    assert len(part) == 2 and part.labels.tolist() == [0, 1] and part.dataset["extra"][:] == ["e", "b"]
    assert torch.equal(part.raw([0])["image"], rows.raw([4])["image"])
    assert part.view_key() == rows.view_key() == Augmentation("crop_flip", 2).describe() != {}
    assert rows_of(pixels(2, 4, 4, 3), augmentation=Augmentation("none")).supports_views is False


def test_a_set_format_is_ignored():
    dataset = dataset_of(pixels(3, 4, 4, 3))
    formatted = ImageRows.from_dataset(dataset.with_format("torch"), "image", "label", NAMES)
    assert formatted.fingerprint == ImageRows.from_dataset(dataset, "image", "label", NAMES).fingerprint


# --- feeds ------------------------------------------------------------------------------------------------------------


def as_pil(image):
    return tvF.to_pil_image(image)


def test_the_feed_is_rescaling_and_normalising():
    images = torch.from_numpy(pixels(3, 3, 6, 5))
    feed = ImageFeed((6, 5), MEAN, STD)
    values = feed({"image": images})["pixel_values"]
    expected = (images.numpy() / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert values.dtype == torch.float32 and values.is_contiguous()
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "crop_pct", "interpolation"),
    [
        ((32, 32), (32, 32), 1.0, "bilinear"),
        ((28, 40), (16, 16), 1.0, "bilinear"),
        ((40, 28), (24, 24), 0.875, "bicubic"),
        ((9, 9), (20, 20), 0.9, "bicubic"),
        ((30, 30), (12, 20), 1.0, "bilinear"),
    ],
)
def test_the_saved_processor_gives_the_same_numbers_from_pil(tmp_path, shape, size, crop_pct, interpolation):
    images = torch.from_numpy(pixels(3, 3, *shape))
    feed = ImageFeed(size, MEAN, STD, interpolation=interpolation, crop_pct=crop_pct)
    feed.processor.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor([as_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    values = feed({"image": images})["pixel_values"]
    assert values.shape == (3, 3, *size)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(feed({"image": list(images)})["pixel_values"], values, atol=0, rtol=0)


def test_grey_images_are_repeated_as_a_pipeline_does():
    images = torch.from_numpy(pixels(2, 1, 8, 8))
    feed = ImageFeed((8, 8), MEAN, STD)
    expected = feed.processor([as_pil(i).convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(feed({"image": images})["pixel_values"], expected, atol=1e-5, rtol=0)
    one = ImageFeed((8, 8), (0.5,), (0.5,), channels=1)
    assert one({"image": images})["pixel_values"].shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"wants 1 channel\(s\), the images have 3"):
        one({"image": images.expand(-1, 3, -1, -1)})


def test_lists_of_unequal_images_come_out_in_order():
    images = [torch.from_numpy(pixels(c, h, w)) for c, h, w in ((3, 8, 8), (1, 10, 12), (3, 8, 8), (3, 20, 9))]
    feed = ImageFeed((8, 8), MEAN, STD)
    values = feed({"image": images})["pixel_values"]
    for image, value in zip(images, values, strict=True):
        assert torch.equal(feed({"image": image[None]})["pixel_values"][0], value)


@pytest.mark.parametrize(("shape", "crop_pct"), [((24, 24), 1.0), ((40, 32), 0.8)])
def test_from_timm_equals_timms_own_transform(shape, crop_pct):
    cfg = {
        "input_size": (3, 24, 24),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center",
    }
    transform = timm.data.create_transform(**timm.data.resolve_data_config(cfg, model=None), is_training=False)
    # Smooth pictures, because torchvision's and PIL's resampling of uint8 round differently.
    images = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4) * 255, shape, mode="bilinear").to(torch.uint8)
    expected = torch.stack([transform(as_pil(image)) for image in images])
    values = ImageFeed.from_timm(cfg)({"image": images})["pixel_values"]
    rounding = 1e-5 if crop_pct == 1 else 2.01 / 255 / min(STD)
    assert (values - expected).abs().max() < rounding


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"interpolation": "lanczos"}, "one of bilinear, bicubic"),
        ({"crop_pct": 0.0}, r"\(0, 1\], got 0.0"),
        ({"size": (0, 8)}, "both at least 1"),
        ({"mean": (0.5,)}, "a mean and a positive std for each"),
        ({"std": (0.5, 0.0, 0.5)}, "a mean and a positive std for each"),
        ({"channels": 2}, "must be 1 or 3"),
    ],
)
def test_image_feed_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        ImageFeed(**{"size": (8, 8), "mean": MEAN, "std": STD, **settings})
    with pytest.raises(ValueError, match="crop_mode 'squash'"):
        ImageFeed.from_timm({"input_size": (3, 8, 8), "crop_mode": "squash"})


def test_a_torchvision_processor_gets_what_pil_images_would_give():
    images = [torch.from_numpy(pixels(3, 20, 30)), torch.from_numpy(pixels(1, 12, 12))]
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    expected = processor([as_pil(image).convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ProcessorFeed(processor)({"image": images})["pixel_values"], expected)


def test_a_timm_processor_gets_pil_images():
    images = torch.from_numpy(pixels(2, 3, 24, 24))
    cfg = {"input_size": (3, 16, 16), "mean": MEAN, "std": STD, "crop_pct": 0.9, "interpolation": "bicubic"}
    processor = TimmWrapperImageProcessor(cfg)
    values = ProcessorFeed(processor)({"image": images})["pixel_values"]
    expected = torch.stack([processor.val_transforms(as_pil(image)) for image in images])
    assert torch.equal(values, expected)
    assert values.abs().max() < 10  # pixels of 0..255 taken for floats would be some hundreds


def test_feeds_describe_what_changes_their_numbers():
    base = {"size": (8, 8), "mean": MEAN, "std": STD}
    variants = [{}, {"size": (9, 8)}, {"mean": STD}, {"std": MEAN}, {"interpolation": "bicubic"}, {"crop_pct": 0.9}]
    described = [ImageFeed(**{**base, **variant}).describe() for variant in variants]
    assert described[0] == ImageFeed(**base).describe()
    assert all(described.count(one) == 1 for one in described)
    first, second = ViTImageProcessor(), ViTImageProcessor(size={"height": 8, "width": 8})
    assert ProcessorFeed(first).describe() == ProcessorFeed(ViTImageProcessor()).describe()
    assert ProcessorFeed(first).describe() != ProcessorFeed(second).describe()
    with pytest.raises(TypeError, match="image processor, got str"):
        ProcessorFeed("vit")


def test_value_columns_are_not_images():
    features = Features({"image": Value("string"), "label": ClassLabel(names=NAMES)})
    dataset = Dataset.from_dict({"image": ["a.png"], "label": [0]}, features=features)
    with pytest.raises(TypeError, match="of the datasets type Image, got Value"):
        ImageRows.from_dataset(dataset, "image", "label", NAMES)
