"""Tables: columns and their types, fingerprints, and the feed around a fitted processor."""

import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_hpmkd.models.tabular import TabularProcessor
from hf_hpmkd.tasks import FedDataset, TableFeed, TableRows

NAMES = ["no", "yes"]
TOWNS = Features({"town": Value("string"), "label": ClassLabel(names=NAMES)})
FEATURES = Features(
    {
        "age": Value("int32"),
        "label": ClassLabel(names=NAMES),
        "wage": Value("float64"),
        "town": Value("string"),
        "member": Value("bool"),
        "rank": ClassLabel(names=["low", "high"]),
    }
)
COLUMNS = {
    "age": [30, None, 25, 61],
    "label": [0, 1, 1, 0],
    "wage": [1.5, 2.0, None, 0.0],
    "town": ["Ulm", "Rom", None, "Ulm"],
    "member": [True, False, True, True],
    "rank": [0, 1, 1, 0],
}


def dataset_of(**changed):
    return Dataset.from_dict({**COLUMNS, **changed}, features=FEATURES)


def rows_of(columns=None, **changed):
    return TableRows.from_dataset(dataset_of(**changed), columns, "label", NAMES)


def test_selected_rows_are_kept_in_one_piece():
    """In a piece per row, as `datasets` hands them out, taking a few of 26,000 rows took 40 times as long."""
    dataset = Dataset.from_dict({"town": ["Ulm", "Rom"] * 50, "label": [0, 1] * 50}, features=TOWNS)
    rows = TableRows.from_dataset(dataset.select(range(99, -1, -1)), None, "label", NAMES)
    for one in (rows, rows.subset([5, 3, 1])):
        assert pa.Table.from_pandas(one.table)["town"].num_chunks == 1
    assert rows.table["town"].tolist() == ["Rom", "Ulm"] * 50


def test_rows_are_the_feature_columns():
    rows = rows_of()
    assert rows.feature_columns == ["age", "wage", "town", "member", "rank"]
    table = rows.raw([2, 0])["table"]
    assert table["wage"].isna().tolist() == [True, False] and table["age"].tolist() == [25, 30]
    assert table["rank"].tolist() == ["high", "low"]  # a class label is a category, not a number
    assert table.index.tolist() == [0, 1]
    assert rows.labels.tolist() == [0, 1, 1, 0]
    assert rows_of(["town", "age"]).feature_columns == ["town", "age"]


def test_unusable_columns_are_refused():
    dataset = dataset_of().add_column("logits", [[0.1, 0.9]] * 4, feature=List(Value("float32")))
    with pytest.raises(TypeError, match=r"something else: logits \(List"):
        TableRows.from_dataset(dataset, None, "label", NAMES)
    assert len(TableRows.from_dataset(dataset, ["age"], "label", NAMES).feature_columns) == 1
    for columns in ([], ["age", "label"]):
        with pytest.raises(ValueError, match="other than the label"):
            rows_of(columns)
    with pytest.raises(ValueError, match="a line per row, got 3 lines for 4 rows"):
        TableRows(dataset, pd.DataFrame({"age": [1, 2, 3]}), [0, 1, 1, 0], NAMES)


@pytest.mark.parametrize(
    "changed",
    [
        {"age": [30, 0, 25, 61]},  # a missing number is not 0
        {"town": ["Ulm", "Rom", "", "Ulm"]},  # nor a missing string the empty one
        {"town": ["Rom", "Ulm", None, "Ulm"]},
        {"wage": [1.5, 2.0, None, 1e-9]},
        {"rank": [0, 1, 1, 1]},
        {"member": [True, False, True, False]},
    ],
)
def test_the_fingerprint_is_of_the_contents(changed):
    assert rows_of(**changed).fingerprint != rows_of().fingerprint


def test_the_fingerprint_knows_columns_and_order_but_not_labels():
    base = rows_of().fingerprint
    assert rows_of(label=[1, 0, 0, 1]).fingerprint == base
    assert rows_of(["wage", "age", "town", "member", "rank"]).fingerprint != base
    renamed = dataset_of().rename_column("age", "years")
    assert TableRows.from_dataset(renamed, None, "label", NAMES).fingerprint != base
    assert rows_of().subset([1, 0, 2, 3]).fingerprint != base
    big = [2**60, 2**60 + 1]
    prints = set()
    for value in big:
        dataset = Dataset.from_dict({"id": [value], "label": [0]})
        prints.add(TableRows.from_dataset(dataset, ["id"], "label", NAMES).fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("indices", [[3, 1], [0, 3]])
def test_a_subset_equals_the_selected_rows(indices):
    """[0, 3] has no missing value any more, so that pandas reads its ages as integers."""
    rows = rows_of()
    picked = TableRows.from_dataset(rows.dataset.select(indices), None, "label", NAMES)
    part = rows.subset(indices)
    assert part.fingerprint == picked.fingerprint
    assert part.labels.tolist() == [COLUMNS["label"][i] for i in indices]
    assert part.raw([0])["table"]["wage"].tolist() == [COLUMNS["wage"][indices[0]]]


def test_the_feed_gives_the_processors_numbers():
    rows = rows_of()
    processor = TabularProcessor.fit(rows.table)
    feed = TableFeed(processor)
    expected = processor(rows.table)
    dataset = FedDataset(rows, feed)
    batch = dataset.__getitems__([3, 1])
    for key, dtype in (("numeric", torch.float32), ("categorical", torch.int64)):
        assert batch[key].dtype == dtype
        assert torch.equal(batch[key], expected[key][[3, 1]])
        assert torch.equal(feed(rows.raw([3, 1]))[key], batch[key])
    assert batch["labels"].tolist() == [0, 1]


def test_the_description_holds_what_was_learnt(tmp_path):
    rows = rows_of()
    feed = TableFeed(TabularProcessor.fit(rows.table))
    assert feed.describe() == TableFeed(TabularProcessor.fit(rows.table)).describe()
    assert feed.describe() != TableFeed(TabularProcessor.fit(rows.subset([0, 1]).table)).describe()
    feed.processor.save_pretrained(tmp_path)
    assert TableFeed(TabularProcessor.from_pretrained(tmp_path)).describe() == feed.describe()
