"""From a data section to four parts: sources, splits, columns, labels, draws, and the faults that are named."""

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image as PILImage
from pydantic import ValidationError

import hf_hpmkd.data_source as data_source
from hf_hpmkd.data import PARTS, carve, check_disjoint, load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.data_source import open_source, with_classes
from hf_hpmkd.vocabulary import DATA_FILES

NAMES = ["bad", "good", "odd"]
TEXT = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def texts(rows, prefix="row"):
    """Classes in shares of about 1/2, 1/3, 1/6, every text different."""
    labels = [(0, 1, 0, 2, 1, 0)[i % 6] for i in range(rows)]
    return Dataset.from_dict({"text": [f"{prefix} {i}" for i in range(rows)], "label": labels}, features=TEXT)


def saved(folder, **splits):
    """A folder of Parquet files, one per split, as it would be downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, dataset in splits.items():
        dataset.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder)


def sizes(parts):
    return {part: len(getattr(parts, part)) for part in PARTS}


def contents(parts):
    return {part: set(getattr(parts, part).texts) for part in PARTS}


@pytest.fixture
def two_splits(tmp_path):
    return saved(tmp_path / "two", train=texts(120), test=texts(60, "test"))


@pytest.fixture
def three_splits(tmp_path):
    return saved(tmp_path / "three", train=texts(120), validation=texts(60, "val"), test=texts(60, "test"))


# --- where parts come from --------------------------------------------------------------------------------------------


def test_teachers_from_elsewhere_move_guide_and_validation_off_the_training_split(two_splits, three_splits):
    parts = load_parts(DataConfig(path=two_splits), teachers_saw_train=True)
    assert sizes(parts) == {"train": 120, "guide": 6, "validation": 6, "test": 48}
    found = contents(parts)
    assert all(text.startswith("test") for text in found["guide"] | found["validation"] | found["test"])
    parts = load_parts(DataConfig(path=three_splits, guide_size=0.5, validation_size=0.5), teachers_saw_train=True)
    assert sizes(parts) == {"train": 120, "guide": 30, "validation": 30, "test": 60}
    assert all(text.startswith("val") for text in contents(parts)["guide"] | contents(parts)["validation"])
    assert parts.provenance["unused_rows"] == {"train": 0, "validation": 0, "test": 0}


def test_teachers_trained_here_leave_the_test_split_whole(two_splits, three_splits):
    for path in (two_splits, three_splits):
        parts = load_parts(DataConfig(path=path, guide_size=12, validation_size=0.2), teachers_saw_train=False)
        assert sizes(parts) == {"train": 84, "guide": 12, "validation": 24, "test": 60}
        assert set.union(*[contents(parts)[p] for p in ("train", "guide", "validation")]) == set(texts(120)["text"])


def test_named_origins_and_splits_win(three_splits):
    config = DataConfig(path=three_splits, guide_from="test", validation_from="validation", validation_size=60)
    parts = load_parts(config, teachers_saw_train=False)
    assert sizes(parts) == {"train": 120, "guide": 6, "validation": 60, "test": 54}
    config = DataConfig(path=three_splits, test_split="validation", guide_from="train", validation_from="train")
    parts = load_parts(config)
    assert {text.split()[0] for text in parts.test.texts} == {"val"} and len(parts.test) == 60
    config = DataConfig(path=three_splits, train_split="test", test_split="train")
    assert load_parts(config).train.texts[0] == "test 0"


def test_without_a_test_split_the_test_rows_are_drawn_first(tmp_path):
    path = saved(tmp_path / "one", train=texts(120))
    here = load_parts(DataConfig(path=path), teachers_saw_train=False)
    assert sizes(here) == {"train": 72, "guide": 12, "validation": 12, "test": 24}
    assert not any("seen" in warning for warning in here.provenance["warnings"])
    elsewhere = load_parts(DataConfig(path=path), teachers_saw_train=True)  # who may have seen any of these rows
    assert contents(elsewhere) == contents(here)
    seen = [warning[:14] for warning in elsewhere.provenance["warnings"] if "may have seen" in warning]
    assert seen == ["The guide rows", "The test rows "]
    for parts in (here, elsewhere):
        found = contents(parts)
        assert sum(len(rows) for rows in found.values()) == len(set.union(*found.values())) == 120


@pytest.mark.parametrize("saw_train", [True, False])
@pytest.mark.parametrize("origins", [("auto", "auto"), ("train", "test"), ("validation", "train")])
def test_no_row_is_in_two_parts(three_splits, origins, saw_train):
    config = DataConfig(path=three_splits, guide_from=origins[0], validation_from=origins[1], max_train_rows=50)
    found = list(contents(load_parts(config, teachers_saw_train=saw_train)).values())
    assert sum(len(rows) for rows in found) == len(set.union(*found))


def test_check_disjoint_notices_a_shared_row():
    check_disjoint({"train": ("train", np.array([0, 1])), "test": ("test", np.array([0, 1]))})
    with pytest.raises(RuntimeError, match="train split are in two parts"):
        check_disjoint({"train": ("train", np.array([0, 1])), "guide": ("train", np.array([1, 2]))})


def test_a_faulty_draw_stops_the_run(two_splits, monkeypatch):
    monkeypatch.setattr("hf_hpmkd.data.carve", lambda labels, sizes, *_, **__: {part: np.arange(3) for part in sizes})
    with pytest.raises(RuntimeError, match="in two parts"):
        load_parts(DataConfig(path=two_splits))


def test_the_seed_alone_decides(two_splits, tmp_path):
    np.random.seed(1)
    first = load_parts(DataConfig(path=two_splits), teachers_saw_train=False)
    np.random.seed(2)
    copy = saved(tmp_path / "copy", train=texts(120), test=texts(60, "test"))
    again = load_parts(DataConfig(path=copy), teachers_saw_train=False)
    other = load_parts(DataConfig(path=two_splits, seed=1), teachers_saw_train=False)
    for part in ("train", "guide", "validation"):
        assert getattr(first, part).fingerprint == getattr(again, part).fingerprint
        assert getattr(first, part).fingerprint != getattr(other, part).fingerprint
    assert first.guide.texts == sorted(first.guide.texts, key=lambda text: int(text.split()[1]))


def test_max_train_rows_is_a_stratified_subset(two_splits):
    parts = load_parts(DataConfig(path=two_splits, max_train_rows=30))
    assert np.bincount(parts.train.labels).tolist() == [15, 10, 5]
    assert parts.provenance["unused_rows"]["train"] == 90
    assert parts.provenance["parts"]["train"]["how"] == "30 of 120 rows, stratified, seed 0"
    assert len(load_parts(DataConfig(path=two_splits, max_train_rows=500)).train) == 120


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_draws_keep_the_proportions():
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    drawn = carve(labels, {"guide": 100, "test": 55}, 0, keep_one=True)
    assert np.bincount(labels[drawn["guide"]]).tolist() == [50, 30, 20]
    counts = np.bincount(labels[drawn["test"]])
    assert counts.sum() == 55 and np.abs(counts - [27.5, 16.5, 11]).max() <= 0.5
    assert not set(drawn["guide"]) & set(drawn["test"])
    # Not the first rows of each class.
    assert not np.array_equal(drawn["guide"][:50], np.arange(50))


def test_tiny_classes_keep_a_row_where_most_rows_are():
    labels = np.array([0] * 50 + [1] * 2 + [2] * 1 + [3] * 3)
    for seed in range(5):
        drawn = carve(labels, {"test": 20, "guide": 15, "validation": 15}, seed, keep_one=True)
        taken = np.concatenate(list(drawn.values()))
        left = np.setdiff1d(np.arange(len(labels)), taken)
        assert len(taken) == len(set(taken)) == 50
        assert set(labels[left]) == {0, 1, 2, 3}


def test_a_draw_of_everything_is_possible_only_if_nothing_must_stay():
    labels = np.array([0, 0, 0, 1, 1, 1])
    drawn = carve(labels, {"guide": 3, "validation": 3}, 0, keep_one=False)
    assert sorted(np.concatenate(list(drawn.values()))) == list(range(6))
    with pytest.raises(ValueError, match=r"guide 3, validation 3.*allow 4 in all, with a row of every class staying"):
        carve(labels, {"guide": 3, "validation": 3}, 0, keep_one=True)


def test_classes_missing_from_a_part_are_told(tmp_path):
    dataset = Dataset.from_dict({"text": [str(i) for i in range(41)], "label": [0, 1] * 20 + [2]}, features=TEXT)
    parts = load_parts(DataConfig(path=saved(tmp_path / "rare", train=dataset)), teachers_saw_train=False)
    missing = [f"Part {part} has no row of 1 classes: odd." for part in ("guide", "validation", "test")]
    assert parts.provenance["warnings"][:3] == missing
    assert 2 in parts.train.labels


def test_classes_that_may_be_one_are_told(tmp_path):
    table = {"x": [0.1 * i for i in range(60)], "label": ["low", "high", "High "] * 20}
    parts = load_parts(DataConfig(path=saved(tmp_path / "d", train=Dataset.from_dict(table))), teachers_saw_train=False)
    assert (
        "Classes 'High ' and 'high' differ in case or outer spaces alone. Are they one?" in parts.provenance["warnings"]
    )


def test_parts_too_small_to_choose_by_are_told(tmp_path):
    dataset = Dataset.from_dict({"text": [str(i) for i in range(400)], "label": [0, 1] * 200}, features=TEXT)
    path, two = saved(tmp_path / "few", train=dataset), saved(tmp_path / "two", train=dataset, test=dataset)
    for place, saw_train, drawn_there in ((path, False, True), (path, True, True), (two, True, False)):
        few = load_parts(DataConfig(path=place, validation_size=29, guide_size=30), teachers_saw_train=saw_train)
        told = few.provenance["warnings"][-1]
        assert told.startswith("29 validation rows are too few") and "with data.validation_size" in told
        assert ("data.validation_from=train" in told) != drawn_there
    enough = load_parts(DataConfig(path=path, guide_size=30, validation_size=30), teachers_saw_train=False)
    assert not any("too few" in warning for warning in enough.provenance["warnings"])


# --- tasks and columns ------------------------------------------------------------------------------------------------


def pictures(size, mode, rows=20):
    shape = (rows, *size) if mode == "L" else (rows, *size, 3)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [PILImage.fromarray(v) for v in values], "label": [0, 1] * (rows // 2)}
    return Dataset.from_dict(columns, features=features)


def test_one_colour_image_gives_all_parts_three_channels(tmp_path):
    """Else what is fitted on grey parts fails at the last one that is opened."""
    (tmp_path / "data").mkdir()
    pictures((8, 8), "L", 40).to_parquet(tmp_path / "data" / "train.parquet")
    pictures((8, 8), "RGB", 2).to_parquet(tmp_path / "data" / "test.parquet")
    parts = load_parts(DataConfig(path=str(tmp_path / "data")), teachers_saw_train=False)
    assert {part: getattr(parts, part).channels for part in PARTS} == dict.fromkeys(PARTS, 3)
    image = parts.train.raw(torch.arange(1))["image"][0]
    assert torch.equal(image[0], image[1]) and parts.train.supports_views


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((32, 32), "RGB", {"policy": "crop_flip", "padding": 4}),
        ((28, 28), "L", {"policy": "crop", "padding": 3}),
        ((8, 8), "RGB", {"policy": "crop", "padding": 1}),
        ((64, 48), "RGB", {"policy": "crop_flip", "padding": 8}),
        ((65, 30), "RGB", {"policy": "resized_crop_flip", "size": None}),
        ((30, 300), "L", {"policy": "resized_crop_flip", "size": 256}),
    ],
)
def test_augmentation_follows_the_images(tmp_path, size, mode, expected):
    path = saved(tmp_path / "images", train=pictures(size, mode))
    parts = load_parts(DataConfig(path=path, seed=4, views=3), teachers_saw_train=False)
    assert parts.task == "image-classification" and parts.num_views == 3
    assert expected | {"seed": 4} == {k: v for k, v in parts.train.view_key().items() if k != "revision"}
    assert not any(getattr(parts, part).supports_views for part in ("guide", "validation", "test"))
    plain = load_parts(DataConfig(path=path, augmentation="none"), teachers_saw_train=False)
    assert plain.num_views == 0 and plain.train.view_key() == {}
    fixed = {"teachers_saw_train": False, "fixed_answers": True}
    unvaried = load_parts(DataConfig(path=path), **fixed)
    assert unvaried.num_views == 0 and any("one answer per row" in line for line in unvaried.provenance["warnings"])
    asked = DataConfig(path=path, augmentation="crop")  # which a teacher with one answer per row then refuses
    assert load_parts(asked, **fixed).num_views == 6


def test_digits_come_with_scikit_learn():
    source = open_source("sklearn:digits")
    dataset = source.splits["train"]
    assert dataset.features["label"].names == [str(i) for i in range(10)]
    image = dataset[0]["image"]
    assert (image.size, image.mode) == ((8, 8), "L")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert np.array_equal(np.asarray(dataset[7]["image"]), np.rint(bunch.images[7] * 255 / 16))
    assert dataset["label"][:] == bunch.target.tolist()


def test_scikit_learn_tables_load():
    parts = load_parts(DataConfig(path="sklearn:iris"), teachers_saw_train=False)
    assert parts.task == "tabular-classification" and parts.class_names == ["setosa", "versicolor", "virginica"]
    assert sizes(parts) == {"train": 90, "guide": 15, "validation": 15, "test": 30}
    assert parts.train.table.shape == (90, 4)


def test_tables_take_all_usable_columns(tmp_path):
    features = Features(
        {"x": Value("float32"), "town": Value("string"), "label": ClassLabel(names=NAMES), "z": List(Value("float32"))}
    )
    columns = {"x": list(range(60)), "town": ["a", "b"] * 30, "label": [0, 1, 2] * 20, "z": [[0.0, 1.0]] * 60}
    path = saved(tmp_path / "table", train=Dataset.from_dict(columns, features=features))
    parts = load_parts(DataConfig(path=path), teachers_saw_train=False)
    assert parts.task == "tabular-classification" and parts.train.feature_columns == ["x", "town"]
    assert parts.provenance["warnings"][0] == "Columns left out of the table, by their type: z."
    assert "z" in parts.train.dataset.column_names  # teacher columns stay within reach
    named = load_parts(DataConfig(path=path, input_column=["town"]), teachers_saw_train=False)
    assert named.task == "tabular-classification"
    assert named.train.feature_columns == ["town"]
    text = load_parts(DataConfig(path=path, input_column="town"), teachers_saw_train=False)
    assert text.task == "text-classification"
    with pytest.raises(ValueError, match=r"numbers, truth values or words that come again, got z"):
        load_parts(DataConfig(path=path, input_column=["x", "z"]))


def test_whole_numbers_that_pandas_made_real_are_classes(tmp_path):
    """As it does where some were missing once."""
    splits = {
        name: plain(labels, Value("float64")) for name, labels in (("train", [3.0, 4.0] * 20), ("test", [4.0] * 9))
    }
    classes, names = with_classes(splits, "label")
    assert names == ["3", "4"] and classes["train"]["label"][:2] == [0, 1] and classes["test"]["label"][:1] == [1]


def test_a_missing_text_is_told_by_its_place_in_the_file(tmp_path):
    texts = [f"text {i}" for i in range(60)]
    texts[37] = None
    pd.DataFrame({"text": texts, "label": [0, 1] * 30}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(
        ValueError, match=r"1 of 60 rows of split 'train' .column text. have none \(first: row 37, counted from 0"
    ):
        load_parts(DataConfig(path=str(tmp_path / "t.csv")), teachers_saw_train=False)


def test_an_index_that_was_written_along_is_no_feature(tmp_path):
    rows = {"Unnamed: 0": range(7, 47), "count": range(3, 43), "age": [20 + i % 9 for i in range(40)]}
    rows |= {"year": [1990 + i % 20 for i in range(40)], "label": [i % 2 for i in range(40)]}
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    parts = load_parts(DataConfig(path=str(tmp_path / "t.csv")), teachers_saw_train=False)
    assert parts.train.feature_columns == ["age", "year"]
    assert "because they only count the rows: Unnamed: 0, count." in parts.provenance["warnings"][0]
    named = DataConfig(path=str(tmp_path / "t.csv"), input_column=["count", "age"])
    assert load_parts(named, teachers_saw_train=False).train.feature_columns == ["count", "age"]


@pytest.mark.parametrize("different", [40, 600])  # of many different ones the column is left out besides
def test_a_quantity_with_a_word_among_it_is_told(tmp_path, different):
    ages = [*(f"{20 + i % different}.5" for i in range(599)), "?"]
    table = {"age": ages, "kind": ["a", "b", "7"] * 200, "label": [i % 2 for i in range(600)]}
    pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    parts = load_parts(DataConfig(path=str(tmp_path / "t.csv")), teachers_saw_train=False)
    told = " ".join(parts.provenance["warnings"])
    assert "Column age is read as words, because of 1 of its" in told and "no numbers: '?'." in told
    assert "Column kind" not in told and ("age" in parts.train.feature_columns) == (different == 40)


def test_a_file_without_rows_is_told(tmp_path):
    rows = pd.DataFrame({"x": [1.0] * 9, "label": [0, 1, 0] * 3})
    rows.to_parquet(tmp_path / "train.parquet")
    rows[:0].to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="holds no rows"):
        open_source(str(tmp_path))


def test_text_columns_are_found_by_name_or_alone(tmp_path):
    base = texts(30)
    several = base.rename_column("text", "sentence").add_column("idx", list(range(30))).add_column("note", ["n"] * 30)
    parts = load_parts(DataConfig(path=saved(tmp_path / "a", train=several)), teachers_saw_train=False)
    assert parts.task == "text-classification" and parts.provenance["input_columns"] == ["sentence"]
    alone = saved(tmp_path / "b", train=base.rename_column("text", "utterance"))
    assert load_parts(DataConfig(path=alone), teachers_saw_train=False).task == "text-classification"
    two = saved(tmp_path / "c", train=base.rename_column("text", "question").add_column("answer", ["x"] * 30))
    assert load_parts(DataConfig(path=two), teachers_saw_train=False).task == "tabular-classification"
    with pytest.raises(ValueError, match="column, or two that make a pair, got question .*Name it with `data.inp"):
        load_parts(DataConfig(path=two), task="text-classification")
    named = load_parts(DataConfig(path=two, input_column="question"), teachers_saw_train=False)
    assert named.train.texts[0].startswith("row") and named.train.pairs is None


def test_pairs_of_texts_are_found_by_name_or_named(tmp_path):
    """Two columns that a list names may be of a table: theirs come again, a text does not."""

    def columns_of(task="auto", **columns):
        data = texts(60).remove_columns("text")
        for name, values in columns.items():
            data = data.add_column(name, values)
        path = saved(tmp_path / str(len(list(tmp_path.iterdir()))), train=data)
        parts = load_parts(DataConfig(path=path, input_column=named), task=task, teachers_saw_train=False)
        return parts, parts.task, parts.provenance["input_columns"]

    first, second = [f"one {row}" for row in range(60)], [f"two {row}" for row in range(60)]
    named, kinds = None, ["a", "b", "c"] * 20
    parts, *found = columns_of(hypothesis=second, idx=list(range(60)), premise=first)
    assert found == ["text-classification", ["premise", "hypothesis"]] and not parts.provenance["warnings"][1:]
    for part in (parts.train, parts.guide, parts.validation, parts.test):
        assert part.texts == [text.replace("two", "one") for text in part.pairs]
    warned = columns_of(question=first, sentence=second, topic=kinds)[0].provenance["warnings"][0]
    assert "question and sentence are read, as a pair, and not topic" in warned and "of two" not in warned
    joined = columns_of(question=first, passage=second, text=[f"{row} both" for row in first])
    assert joined[1:] == ("text-classification", ["text"])  # somebody has joined them
    assert columns_of(question1=kinds, question2=kinds, age=list(range(60)))[1] == "tabular-classification"
    crossed = {"premise": first[:10] * 6, "hypothesis": [text for text in second[:6] for _ in range(10)]}
    assert columns_of(**crossed)[1] == "text-classification"  # each with each
    with pytest.raises(
        ValueError, match=r"column hypothesis\) have none .* data.input_column=premise reads that text alone"
    ):
        columns_of(premise=first, hypothesis=[None, *second[1:]])
    assert columns_of(premise=kinds, hypothesis=second)[1] == "text-classification"  # one premise, several hypotheses
    assert "data.input_column=[question,sentence] says that this is meant" in warned
    named = ["b", "a"]
    parts, *found = columns_of(a=first, b=second)
    assert found == ["text-classification", named] and parts.kind == "text-classification of pairs (b, a)"
    assert "task.type=tabular-classification makes a table of them" in parts.provenance["warnings"][0]
    assert columns_of(a=first, b=kinds)[1:] == ("tabular-classification", named)
    assert columns_of("text-classification", a=first, b=kinds)[1:] == ("text-classification", named)
    with pytest.raises(ValueError, match="text-classification cannot read a .*int64.*which `data.input_column` names"):
        columns_of("text-classification", a=list(range(60)), b=first)
    named = ["sentence2", "sentence1"]
    assert columns_of(sentence1=kinds, sentence2=kinds)[1:] == ("text-classification", named)
    with pytest.raises(ValueError, match=r"1 of 60 rows of split 'train' .column sentence2. have none \(first: row 7"):
        columns_of(sentence1=kinds, sentence2=[*kinds[:7], None, *kinds[8:]])


# --- labels -----------------------------------------------------------------------------------------------------------


def csv(folder, name, labels):
    folder.mkdir(exist_ok=True)
    pd.DataFrame({"text": [f"{name} {i}" for i in range(len(labels))], "label": labels}).to_csv(
        folder / f"{name}.csv", index=False
    )
    return str(folder)


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (["spam", "ham"] * 15, ["ham", "eggs"] * 5, ["eggs", "ham", "spam"]),
        ([10, 9] * 15, [2, 9] * 5, ["2", "9", "10"]),
        ([True, False] * 15, [False, True] * 5, ["False", "True"]),
    ],
)
def test_csv_labels_become_classes_of_all_splits(tmp_path, train, test, names):
    csv(tmp_path / "set", "train", train)
    path = csv(tmp_path / "set", "test", test)
    parts = load_parts(DataConfig(path=path, guide_size=2, validation_size=2))
    assert parts.class_names == names
    assert [names[label] for label in parts.train.labels] == [str(label) for label in train]
    assert parts.train.dataset.column_names == ["text", "label"]


def test_a_single_csv_file_is_a_training_split(tmp_path):
    path = csv(tmp_path / "set", "reviews", ["yes", "no"] * 30)
    parts = load_parts(DataConfig(path=f"{path}/reviews.csv"), teachers_saw_train=False)
    assert sizes(parts) == {"train": 36, "guide": 6, "validation": 6, "test": 12}
    assert parts.provenance["kind"] == "file"


def plain(labels, feature):
    return Dataset.from_dict(
        {"text": [str(i) for i in range(len(labels))], "label": labels},
        features=Features({"text": Value("string"), "label": feature}),
    )


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (plain(range(101, 201), Value("int64")), "100 different values in 100 rows: that is a name or a quantity"),
        (plain([f"person {i % 60}" for i in range(100)], Value("string")), "60 different values in 100 rows"),
        (plain([-1] * 20, Value("int64")), "published without labels"),
        (plain([20 + i % 60 for i in range(6000)], Value("int64")), "60 different values in 6,000 rows"),  # ages
        (plain([0.5, 1.5] * 10, Value("float32")), "regression, which is not supported"),
        (
            plain([0, None] * 10, ClassLabel(names=["a", "b"])),
            "10 of 20 labels in split 'train' are missing .first: row 1",
        ),
        (plain([-1, -1] * 10, ClassLabel(names=["a", "b"])), "published without labels"),
        (plain([[0], [1]] * 10, List(ClassLabel(names=["a", "b"]))), "Several labels per row"),
        (plain([0] * 20, ClassLabel(names=["a"])), "at least two classes"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, dataset, match):
    path = tmp_path / "set"
    DatasetDict({"train": dataset}).save_to_disk(str(path))
    with pytest.raises(ValueError, match=match):
        load_parts(DataConfig(path=str(path)), teachers_saw_train=False)


@pytest.mark.parametrize(
    ("train", "test", "feature", "names"),
    [
        ([10, 9] * 20, [9, 11] * 5, Value("int64"), ["9", "10", "11"]),
        (["b", "a"] * 20, ["a", "c"] * 5, Value("large_string"), ["a", "b", "c"]),
        ([True, False] * 20, [True, False] * 5, Value("bool"), ["False", "True"]),
        ([i % 60 for i in range(240)], [0] * 5, Value("int64"), [str(i) for i in range(60)]),  # codes of classes
        ([f"{i % 60:02}" for i in range(240)], ["00"] * 5, Value("string"), [f"{i:02}" for i in range(60)]),
    ],
)
def test_plain_values_of_a_typed_set_become_classes(tmp_path, train, test, feature, names):
    path = tmp_path / "set"
    DatasetDict({"train": plain(train, feature), "test": plain(test, feature)}).save_to_disk(str(path))
    parts = load_parts(DataConfig(path=str(path), guide_size=2, validation_size=2))
    assert parts.class_names == names
    assert [names[label] for label in parts.train.labels] == [str(label) for label in train]


def test_texts_that_students_will_not_read_to_their_end_are_told(tmp_path):
    long = [f"{i} " + "word " * (200 if i < 4 else 20) for i in range(40)]
    rows = Dataset.from_dict({"text": long, "label": ["a", "b"] * 20})
    DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "set"))

    def told(**more):
        config = DataConfig(path=str(tmp_path / "set"), guide_size=2, validation_size=2, test_size=2, **more)
        parts = load_parts(config, teachers_saw_train=False)
        return parts.train.max_length, [text for text in parts.provenance["warnings"] if "max_length" in text]

    length, (text,) = told()
    assert length is None and "of the training texts have more than 128 words" in text
    assert told(max_length=256) == (256, [])
    with pytest.raises(ValueError, match="is for texts, and this is tabular-classification. Leave it out"):
        load_parts(DataConfig(path="sklearn:wine", max_length=256))


def test_columns_of_names_are_left_out_of_a_table(tmp_path):
    columns = {"name": [f"person {i}" for i in range(120)], "town": ["a", "b"] * 60, "label": ["x", "y"] * 60}
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(tmp_path / "set"))

    def load(**more):
        return load_parts(DataConfig(path=str(tmp_path / "set"), **more), teachers_saw_train=False)

    parts = load()
    assert parts.train.feature_columns == ["town"]
    assert "most rows have a value of their own there: name." in parts.provenance["warnings"][0]
    assert load(input_column=["name", "town"]).train.feature_columns == ["name", "town"]
    assert load(input_column="name").task == "text-classification"
    columns["town"] = [f"street {i}" for i in range(120)]
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(tmp_path / "names"))
    with pytest.raises(ValueError, match="If one holds texts to classify, name it: data.input_column=COLUMN"):
        load_parts(DataConfig(path=str(tmp_path / "names")), teachers_saw_train=False)


def test_types_of_a_csv_are_told_from_all_its_rows(tmp_path):
    """`datasets` reads 10,000 rows at a time, and takes the types of the first."""
    size = ["1"] * 12_000 + ["1.5"] * 10
    folder = tmp_path / "set"
    folder.mkdir()
    pd.DataFrame({"size": size, "label": ["x", "y"] * 6005}).to_csv(folder / "rows.csv", index=False)
    for path in (folder, folder / "rows.csv"):
        parts = load_parts(DataConfig(path=str(path)), teachers_saw_train=False)
        assert parts.train.table["size"].max() == 1.5
    # Words after numbers, farther apart than pandas' fast parser looks at a time.
    wide = {f"c{column}": [1234567] * 60_000 for column in range(12)} | {"label": ["x", "y"] * 30_000}
    wide["c5"] = [*wide["c5"][:-1], "7A"]
    pd.DataFrame(wide).to_csv(folder / "rows.csv", index=False)
    parts = load_parts(DataConfig(path=str(folder)), teachers_saw_train=False)
    assert parts.train.dataset.features["c5"].dtype.endswith("string")
    gc.collect()  # a file that was left open would be told of


def test_an_image_folder_may_hold_csv_files(tmp_path):
    """`datasets` reads a metadata.csv itself."""
    for number in range(40):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        PILImage.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "cat" / "sizes.csv").write_text("size\n3\n")
    parts = load_parts(DataConfig(path=str(tmp_path)), teachers_saw_train=False)
    assert parts.task == "image-classification" and parts.class_names == ["cat", "dog"]


def test_an_empty_split_is_refused(tmp_path):
    path = saved(tmp_path / "set", train=texts(30), test=texts(0))
    with pytest.raises(ValueError, match="A split of .* is empty"):
        load_parts(DataConfig(path=path))


def test_an_empty_split_of_a_saved_set_is_refused(monkeypatch):
    splits = {"train": texts(30), "test": texts(30).select([])}
    monkeypatch.setattr("hf_hpmkd.data.open_source", lambda *_: data_source.Source(splits, "folder"))
    with pytest.raises(ValueError, match="Split 'test' of 'x' is empty"):
        load_parts(DataConfig(path="x"))


def test_splits_must_agree_on_the_classes(tmp_path):
    numbers, words = plain([0, 1] * 10, Value("int64")), plain(["0", "1"] * 10, Value("string"))
    DatasetDict({"train": numbers, "test": words}).save_to_disk(str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="one kind in all splits; 'train' holds numbers .int64., 'test' holds words"):
        load_parts(DataConfig(path=str(tmp_path / "mixed")))
    path = tmp_path / "set"
    other = plain([0, 1] * 10, ClassLabel(names=["b", "a"]))
    DatasetDict({"train": plain([0, 1] * 10, ClassLabel(names=["a", "b"])), "test": other}).save_to_disk(str(path))
    with pytest.raises(ValueError, match="same classes in the same order: 'train' has"):
        load_parts(DataConfig(path=str(path)))


# --- faults that are named before any work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"label_column": "lable"}, "has text, label; got 'lable'. Did you mean 'label'"),
        ({"input_column": "txt"}, "got 'txt'. Did you mean 'text'"),
        ({"input_column": "label"}, "must not be the label"),
        ({"train_split": "trian"}, "which has train, test; got 'trian'. Did you mean 'train'"),
        ({"validation_split": "dev"}, "`validation_split` must be a split of"),
        ({"test_split": "train"}, "must be different splits"),
        ({"guide_from": "validation"}, "`guide_from` is validation, but there is no validation split"),
        ({"guide_size": 61}, "`data.guide_size` must give between 1 and 60 rows"),
        ({"guide_size": 0.001}, r"got 0.001 \(0 rows\)"),
        ({"guide_size": 40, "validation_size": 20}, "Too many rows are asked for .guide 40, validation 20"),
        ({"augmentation": "crop"}, "one of auto, none, word_dropout for text-classification, got 'crop'"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(two_splits, settings, match):
    with pytest.raises(ValueError, match=match):
        load_parts(DataConfig(path=two_splits, **settings))


def test_texts_have_views_where_they_are_asked_for(two_splits):
    parts = load_parts(DataConfig(path=two_splits, augmentation="word_dropout", views=4, seed=7))
    assert parts.num_views == 4 and parts.train.view_key()["seed"] == 7
    assert parts.provenance["augmentation"]["policy"] == "word_dropout"
    assert not any(part.supports_views for part in (parts.guide, parts.validation, parts.test))
    for policy in ("auto", "none"):
        assert load_parts(DataConfig(path=two_splits, augmentation=policy)).num_views == 0


def test_the_task_is_checked(two_splits):
    with pytest.raises(ValueError, match="Did you mean 'image-classification'"):
        load_parts(DataConfig(path=two_splits), task="image-clasification")
    with pytest.raises(ValueError, match="exactly one image column, got text"):
        load_parts(DataConfig(path=two_splits), task="image-classification")


@pytest.mark.parametrize(
    "settings",
    [
        {"guide_size": 1.0},
        {"guide_size": 0},
        {"test_size": -3},
        {"validation_size": True},
        {"views": 0},
        {"guide_from": "somewhere"},
        {"augmentation": "mixup"},
        {"trust_remote_code": True},
        {"gide_size": 0.1},
        {"path": ""},
        {"max_train_rows": 1},
    ],
)
def test_the_config_refuses(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        DataConfig(**{"path": "x", **settings})


def test_sizes_stay_whole_numbers_or_shares():
    config = DataConfig(path="x", guide_size=50, validation_size=0.5)
    assert isinstance(config.guide_size, int) and isinstance(config.validation_size, float)


def test_missing_sources_are_named(tmp_path, two_splits):
    for path in (f"{tmp_path}/twoo", "./nowhere.csv"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_source(path)
    with pytest.raises(FileNotFoundError, match="Did you mean 'two'"):
        open_source(f"{tmp_path}/twoo")
    with pytest.raises(FileNotFoundError, match="No file matches"):
        open_source(f"{tmp_path}/*.parquet")
    with pytest.raises(FileNotFoundError, match="no folder 'user/nothing', and the Hub gives no data set"):
        open_source("user/nothing")
    with pytest.raises(ValueError, match="several splits .test, train., which would become one"):
        open_source(f"{two_splits}/*.parquet")
    for name in ("training", "val"):
        (tmp_path / f"{name}.csv").write_text("a,label\n1,0\n")
    with pytest.raises(ValueError, match="several splits .train, validation., which would become one"):
        open_source(f"{tmp_path}/*.csv")
    (tmp_path / "training.csv").rename(tmp_path / "car_evaluation_train.csv")
    assert open_source(f"{tmp_path}/car*.csv").splits["train"].num_rows == 1  # Car Evaluation, a well-known table
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(ValueError, match="all end alike, in .parquet, .csv, .tsv, .jsonl, .ndjson or .json, got"):
        open_source(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        open_source("sklearn:digit")


@pytest.mark.parametrize("ending", DATA_FILES)
def test_a_table_is_the_same_in_every_kind_of_file(tmp_path, ending):
    assert tuple(data_source._READ_AS) == DATA_FILES
    folder = tmp_path / "set"
    folder.mkdir()
    rows = pd.DataFrame({"size": [0.5, 2.25, 4.0], "town": ["Ulm, old", 'a "b"', "c\td"], "label": ["x", "y", "x"]})
    write = {
        ".parquet": rows.to_parquet,
        ".csv": lambda file: rows.to_csv(file, index=False),
        ".tsv": lambda file: rows.to_csv(file, index=False, sep="\t"),
        ".jsonl": lambda file: rows.to_json(file, orient="records", lines=True),
        ".ndjson": lambda file: rows.to_json(file, orient="records", lines=True),
        ".json": lambda file: rows.to_json(file, orient="records"),
    }
    write[ending](folder / f"rows{ending}")
    for path in (f"{folder}/rows{ending}", f"{folder}/*{ending}", str(folder)):
        assert open_source(path).splits["train"].to_dict() == rows.to_dict("list")
    with pytest.raises(FileNotFoundError, match=f"does not exist.*Did you mean 'rows{ending}'"):
        open_source(f"{folder}/row{ending}")


@pytest.mark.parametrize(
    ("ending", "separator", "told"),
    [
        (
            ".csv",
            ";",
            "got 'label'. This one column looks like several with ';'.* commas between columns, and points in",
        ),
        (".csv", "|", "got 'label'. This one column looks like several with '|'"),
        (".csv", "\t", "got 'label'. This one column looks like several with tabs.* Name the file .tsv"),
        (".tsv", ",", "got 'label'. This one column looks like several with commas.* Name the file .csv"),
    ],
)
def test_another_separator_is_told(tmp_path, ending, separator, told):
    file = tmp_path / f"rows{ending}"
    file.write_text(f"size{separator}label\n1{separator}x\n")
    with pytest.raises(ValueError, match=told.replace("|", "\\|")):
        load_parts(DataConfig(path=str(file)))
    mended = "," if ending == ".csv" else "\t"
    file.write_text(f"si{separator}ze{mended}labels\n1{mended}x\n")  # columns may have such names
    with pytest.raises(ValueError, match="got 'label'. Did you mean 'labels'. Name it with data.label_column=COLUMN"):
        load_parts(DataConfig(path=str(file)))


@pytest.mark.parametrize("ending", DATA_FILES)
def test_files_without_rows_are_refused(tmp_path, ending):
    rows = pd.DataFrame({"size": [], "label": []})
    (rows.to_parquet if ending == ".parquet" else lambda file: Path(file).write_text(""))(tmp_path / f"rows{ending}")
    with pytest.raises(ValueError, match="no rows|cannot be read as one data set|is empty"):
        load_parts(DataConfig(path=f"{tmp_path}/rows{ending}"))


@pytest.mark.parametrize("text", ['{"data": [{"a": 1, "label": "x"}]}', '{"a": {"0": 1, "1": 2}, "label": {"0": "x"}}'])
def test_json_that_is_no_list_of_rows_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="1 rows in 1 files.*one list of them, each with the same keys"):
        open_source(f"{tmp_path}/rows.json")


def test_each_row_may_be_a_json_file_of_its_own(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.json").write_text(f'{{"size": {number}, "label": "x"}}')
    assert open_source(f"{tmp_path}/*.json").splits["train"]["size"][:] == [0, 1, 2]


def test_a_quotation_mark_that_is_never_closed_is_told(tmp_path):
    (tmp_path / "rows.tsv").write_text('text\tlabel\n"Never closed\tx\nb\ty\n')
    with pytest.raises(ValueError, match="A quotation mark opens a value and is never closed"):
        open_source(f"{tmp_path}/rows.tsv")


def test_a_glob_of_one_split_is_read_whole(tmp_path):
    saved(tmp_path / "shards", **{"train_a": texts(12), "train_b": texts(6, "more")})
    splits = open_source(f"{tmp_path}/shards/train*.parquet").splits
    assert list(splits) == ["train"] and len(splits["train"]) == 18


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_a_licence_of_its_own_goes_by_its_name(two_splits):
    (data_source.Path(two_splits) / "README.md").write_text("---\nlicense: other\nlicense_name: ours-1\n---\n")
    assert open_source(two_splits).license == "ours-1"


def test_provenance_tells_how_each_part_was_drawn(two_splits):
    (data_source.Path(two_splits) / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nA set.\n")
    provenance = load_parts(DataConfig(path=two_splits, seed=3)).provenance
    assert provenance["license"] == "cc-by-4.0" and provenance["commit"] is None and provenance["kind"] == "folder"
    half = {"commonest_class": 0.5}
    assert provenance["splits"] == {"train": 120, "test": 60}
    assert provenance["parts"] == {
        "train": {"split": "train", "rows": 120, "how": "the whole split", **half},
        "guide": {"split": "test", "rows": 6, "how": "6 of 60 rows, stratified, seed 3", **half},
        "validation": {"split": "test", "rows": 6, "how": "6 of 60 rows, stratified, seed 3", **half},
        "test": {"split": "test", "rows": 48, "how": "what guide and validation left", **half},
    }


class Hub:
    """Stands for the Hub client and for load_dataset: one data set at one commit."""

    def __init__(self, monkeypatch, answer):
        self.answer, self.loaded = answer, None
        monkeypatch.setattr(data_source.datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(data_source, "HfApi", lambda: self)
        monkeypatch.setattr(data_source, "load_dataset", self.load_dataset)

    def dataset_info(self, path, revision=None):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def load_dataset(self, path, name, revision):
        self.loaded = (path, name, revision)
        return DatasetDict({"train": texts(60)})


def test_the_commit_that_is_recorded_is_the_one_that_is_loaded(monkeypatch):
    hub = Hub(monkeypatch, SimpleNamespace(sha="abc123", card_data={"license": ["mit", "cc0-1.0"]}))
    source = open_source("user/set", "plain", "main")
    assert hub.loaded == ("user/set", "plain", "abc123")
    assert (source.commit, source.license, source.kind) == ("abc123", "mit, cc0-1.0", "hub")


@pytest.mark.parametrize("error", [ConnectionError("offline"), HfHubHTTPError.__bases__[0]("no answer")])
def test_without_the_hub_a_cached_copy_has_no_commit(monkeypatch, error):
    hub = Hub(monkeypatch, error)
    source = open_source("user/set", None, "v1")
    assert hub.loaded == ("user/set", None, "v1") and source.commit is None and source.license is None


def test_a_split_without_the_second_text_is_told(tmp_path):
    both = texts(60).rename_column("text", "premise").add_column("hypothesis", [f"two {row}" for row in range(60)])
    DatasetDict({"train": both, "test": both.remove_columns("hypothesis")}).save_to_disk(str(tmp_path / "pairs"))
    with pytest.raises(ValueError, match="split 'test' has .*premise.*; got 'hypothesis'"):
        load_parts(DataConfig(str(tmp_path / "pairs")))


def test_another_column_of_texts_is_told_where_it_is_left_out(tmp_path):
    columns = {"topic": ["who?", "when?"] * 30, "sentence": ["he", "now"] * 30, "label": [0, 1] * 30}
    features = Features({"topic": Value("string"), "sentence": Value("string"), "label": ClassLabel(names=["n", "y"])})
    path = saved(tmp_path / "pairs", train=Dataset.from_dict(columns, features=features))
    warned = " ".join(load_parts(DataConfig(path)).provenance["warnings"])
    assert "sentence alone is read, and not topic" in warned and "data.input_column=sentence" in warned
    assert "alone is read" not in str(load_parts(DataConfig(path, input_column="sentence")).provenance["warnings"])


def test_labels_that_stand_for_none_are_told(tmp_path):
    some = [-1 if row == 7 else row % 3 for row in range(60)]
    data = Dataset.from_dict({"text": [f"row {row}" for row in range(60)], "label": some}, features=TEXT)
    with pytest.raises(ValueError, match=r"got \[-1\] in 1 of 60 rows\. Remove these rows: `dataset\.filter"):
        load_parts(DataConfig(saved(tmp_path / "some", train=data)))
    words = [("", "good", "bad")[row % 3] for row in range(60)]
    for name, labels in (("number", [row % 3 - 1 for row in range(60)]), ("word", words)):
        plain = Dataset.from_dict({"text": [f"row {row}" for row in range(60)], "label": labels})
        warned = " ".join(load_parts(DataConfig(saved(tmp_path / name, train=plain))).provenance["warnings"])
        assert f"One class is called {'-1' if name == 'number' else ''!r}" in warned


def test_images_that_are_stored_undecoded_are_read(tmp_path):
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    data = pictures((8, 8), "RGB").cast(features)
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "set"))
    assert load_parts(DataConfig(str(tmp_path / "set"))).train.image_size == (8, 8)
