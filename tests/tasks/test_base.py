"""Rows and FedDataset: what every task shares."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_hpmkd.tasks import Augmentation, FedDataset, ImageFeed, ImageRows, TextFeed, TextRows, train_tokenizer
from hf_hpmkd.tasks.base import StaticFeed, column_values, json_digest

NAMES = ["cat", "dog", "owl"]


def text_rows(rows=7):
    texts = [" ".join(["word"] * (1 + i % 4)) + f" {i}" for i in range(rows)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    dataset = Dataset.from_dict({"text": texts, "label": [i % 3 for i in range(rows)]}, features=features)
    return TextRows.from_dataset(dataset, "text", "label", NAMES)


def image_rows(rows=7, augmentation=None):
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    columns = {"image": [PILImage.fromarray(p) for p in pixels], "label": [i % 3 for i in range(rows)]}
    return ImageRows.from_dataset(Dataset.from_dict(columns, features=features), "image", "label", NAMES, augmentation)


@pytest.fixture
def feed():
    return ImageFeed((8, 8), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("labels", "names", "match"),
    [
        ([0, 1, 3], NAMES, "0..2, got 0 to 3"),
        ([-1, -1, -1], NAMES, "Unlabelled test splits"),
        ([0, 1], NAMES, "One label per row"),
        ([0, 0, 0], ["only"], "at least two classes"),
        ([0, 1, 0], ["same", "same"], "distinct names"),
    ],
)
def test_rows_refuse_labels_that_name_no_class(labels, names, match):
    dataset = Dataset.from_dict({"text": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=match):
        TextRows(dataset, ["a", "b", "c"], labels, names)


def test_raw_checks_positions_and_views():
    rows = text_rows()
    assert rows.raw([2, 0])["text"] == [rows.texts[2], rows.texts[0]]
    assert rows.raw(torch.tensor([2]), torch.tensor([-1]))["text"] == [rows.texts[2]]
    for beyond in ([7], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.6"):
            rows.raw(beyond)
    with pytest.raises(ValueError, match="have no augmentation"):
        rows.raw([0], torch.tensor([0]))
    with pytest.raises(ValueError, match="One view per row"):
        rows.raw([0, 1], torch.tensor([-1]))


def test_views_follow_row_and_epoch(feed):
    dataset = FedDataset(image_rows(augmentation=Augmentation("crop_flip", 2)), feed, num_views=3)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__([5, 0, 2])
        assert batch["hpmkd_row"].tolist() == [5, 0, 2]
        assert batch["hpmkd_view"].tolist() == [(epoch + row) % 3 for row in (5, 0, 2)]
        raw = dataset.rows.raw([5, 0, 2], batch["hpmkd_view"])
        assert torch.equal(batch["pixel_values"], feed(raw)["pixel_values"])
        assert batch["labels"].tolist() == [2, 0, 2]


def test_no_views_means_unaugmented(feed):
    rows = image_rows(augmentation=Augmentation("crop_flip", 2))
    batch = FedDataset(rows, feed).__getitems__([1, 2])
    assert batch["hpmkd_view"].tolist() == [-1, -1]
    assert torch.equal(batch["pixel_values"], feed(rows.raw([1, 2]))["pixel_values"])
    assert not torch.equal(batch["pixel_values"], FedDataset(rows, feed, 2).__getitems__([1, 2])["pixel_values"])


def test_views_without_augmentation_are_refused(feed):
    with pytest.raises(ValueError, match="`num_views` is 2"):
        FedDataset(image_rows(), feed, num_views=2)
    with pytest.raises(ValueError, match="0 .never augmented. or more, got -1"):
        FedDataset(image_rows(), feed, num_views=-1)


def test_living_workers_see_the_epoch(feed):
    dataset = FedDataset(image_rows(augmentation=Augmentation("crop", 1)), feed, num_views=4)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, num_workers=1, persistent_workers=True, collate_fn=FedDataset.collate
    )
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        views = torch.cat([batch["hpmkd_view"] for batch in loader])
        assert views.tolist() == [(epoch + row) % 4 for row in range(7)]


def test_a_loader_gives_whole_batches_and_every_row_once(feed):
    rows = image_rows()
    loader = torch.utils.data.DataLoader(FedDataset(rows, feed), batch_size=3, collate_fn=FedDataset.collate)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), rows.labels)
    assert torch.equal(torch.cat([b["pixel_values"] for b in batches]), feed({"image": rows.images})["pixel_values"])


def test_one_row_is_the_batch_without_its_first_dimension(feed):
    dataset = FedDataset(image_rows(), feed)
    stacked = FedDataset.collate([dataset[4], dataset[1]])
    batch = dataset.__getitems__([4, 1])
    assert stacked.keys() == batch.keys()
    assert all(torch.equal(stacked[key], batch[key]) for key in batch)
    assert torch.equal(dataset[-1]["pixel_values"], dataset[6]["pixel_values"])
    with pytest.raises(IndexError, match="7 rows"):
        dataset[7]


def test_collate_refuses_ragged_rows():
    rows = text_rows()
    dataset = FedDataset(rows, TextFeed(train_tokenizer(rows.texts, 100), 16))
    with pytest.raises(ValueError, match="__getitems__"):
        FedDataset.collate([dataset[0], dataset[1]])


def test_static_feeds_encode_a_part_once():
    rows = text_rows()

    class Counting(TextFeed):
        calls = 0

        def encode(self, raw):
            type(self).calls += 1
            return super().encode(raw)

    counting = Counting(train_tokenizer(rows.texts, 100), 16)
    assert isinstance(counting, StaticFeed)
    dataset = FedDataset(rows, counting)
    for _ in range(3):
        dataset.__getitems__([0, 1, 2])
    assert Counting.calls == 1


def test_column_values_ignores_format_and_follows_selection():
    dataset = Dataset.from_dict({"a": [1, 2, 3], "b": [4, 5, 6]}).select([2, 0]).with_format("torch")
    assert column_values(dataset, "a") == [3, 1]


def test_json_digest_ignores_the_order_of_keys_alone():
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    assert json_digest({"a": 1}) != json_digest({"a": 2})
    assert json_digest([1, 2]) != json_digest([2, 1])
