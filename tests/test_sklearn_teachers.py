"""scikit-learn teachers: honest about rows they have seen, saved without pickle, safe to open."""

import json

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder
from sklearn.svm import LinearSVC

from hf_hpmkd.sklearn_estimators import ESTIMATORS
from hf_hpmkd.sklearn_teachers import (
    SAVED_TYPES,
    SklearnTeacher,
    load_skops,
    sklearn_inputs,
    stratified_folds,
    train_sklearn,
)
from hf_hpmkd.tasks.augmentation import Augmentation
from hf_hpmkd.tasks.images import ImageRows
from hf_hpmkd.tasks.tables import TableRows
from hf_hpmkd.tasks.text import TextRows
from hf_hpmkd.teachers import load_teacher

NAMES = ["cat", "dog", "emu"]
FLOOR = np.log(1e-4)


def table_rows(count=60, seed=0):
    """Numbers with gaps, truth values, strings with gaps and a column without any value."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    columns = {
        "size": [None if i % 9 == 8 else float(y + rng.normal(0, 0.4)) for i, y in enumerate(labels)],
        "wild": [bool(y == 2) for y in labels],
        "food": [None if i % 7 == 6 else ["fish", "meat", "corn"][y] for i, y in enumerate(labels)],
        "empty": [None] * count,
        "legs": [int(n) for n in rng.integers(2, 5, count)],
        "label": labels.tolist(),
    }
    kinds = {"size": "float64", "wild": "bool", "food": "string", "empty": "float64", "legs": "int64"}
    features = Features({**{k: Value(v) for k, v in kinds.items()}, "label": ClassLabel(names=NAMES)})
    return TableRows.from_dataset(Dataset.from_dict(columns, features=features), None, "label", NAMES)


def text_rows(count=30):
    labels = [i % 3 for i in range(count)]
    texts = [f"the {NAMES[y]} of house {i}" for i, y in enumerate(labels)]
    return TextRows(Dataset.from_dict({"t": texts}), texts, labels, NAMES)


def image_rows(count=30, augmentation=None):
    labels = torch.arange(count) % 3
    images = torch.randint(0, 80, (count, 3, 4, 4), dtype=torch.uint8)
    images[torch.arange(count), labels] += 100
    dataset = Dataset.from_dict({"label": labels.tolist()})
    return ImageRows(dataset, "image", labels, NAMES, augmentation, images)


def answers(teacher, rows, views=None):
    return teacher.logits(rows, torch.arange(len(rows)), views)


def accuracy(teacher, rows):
    return float((answers(teacher, rows).argmax(1) == rows.labels).float().mean())


# ---- training --------------------------------------------------------------------------------------------------------

PARAMS = {
    "RidgeClassifier": {"calibrate": True},
    "LinearSVC": {"calibrate": True},
    "SVC": {"calibrate": True},
    "SGDClassifier": {"loss": "log_loss"},
    "MLPClassifier": {"hidden_layer_sizes": [16], "max_iter": 600, "learning_rate_init": 0.01},
    "RandomForestClassifier": {"n_estimators": 10},
    "ExtraTreesClassifier": {"n_estimators": 10},
    "GradientBoostingClassifier": {"n_estimators": 5},
    "AdaBoostClassifier": {"n_estimators": 5},
    "HistGradientBoostingClassifier": {"max_iter": 5, "min_samples_leaf": 2},
    "QuadraticDiscriminantAnalysis": {"reg_param": 0.1},
}


@pytest.mark.parametrize("name", [n for n, known in ESTIMATORS.items() if known.takes_negative])
def test_every_estimator_learns_a_table_and_comes_back_from_its_file(tmp_path, name):
    rows = table_rows()
    teacher, folded = train_sklearn(f"sklearn:{name}", PARAMS.get(name), rows, folds=0)
    assert folded is None and accuracy(teacher, rows) > 0.6
    path = teacher.save(tmp_path / "model")
    loaded = load_skops(path, rows, trusted_types=SAVED_TYPES)
    assert torch.equal(answers(loaded, rows), answers(teacher, rows))
    assert loaded.fingerprint == teacher.fingerprint and loaded.name == name
    assert (teacher.kind, teacher.num_params, teacher.license) == ("sklearn", None, None)


@pytest.mark.parametrize("name", ["LogisticRegression", "MultinomialNB", "RandomForestClassifier", "SVC"])
@pytest.mark.parametrize("rows", [text_rows, image_rows])
def test_texts_and_images(tmp_path, name, rows):
    rows = rows()
    teacher, _ = train_sklearn(name, PARAMS.get(name), rows, folds=0)
    assert accuracy(teacher, rows) > 0.8
    loaded = load_teacher(teacher.save(tmp_path / "m.skops"), rows, trusted_types=SAVED_TYPES)
    assert torch.equal(answers(loaded, rows), answers(teacher, rows))


def test_pixels_are_flattened_channels_first_in_0_to_1():
    rows = image_rows(augmentation=Augmentation("crop_flip", 1, None, 0))
    teacher, _ = train_sklearn("LogisticRegression", {}, rows, folds=0)
    by_hand = LogisticRegression(max_iter=1000).fit(rows.images.reshape(30, -1).numpy() / np.float32(255), rows.labels)
    views = torch.arange(30) % 2
    pixels = rows.raw(range(30), views)["image"].reshape(30, -1).numpy() / np.float32(255)
    expected = np.log(np.maximum(by_hand.predict_proba(pixels), 1e-4))
    assert np.allclose(answers(teacher, rows, views), expected, atol=1e-4)
    small = image_rows()
    small.images = small.images[:, :, :2]
    with pytest.raises(ValueError, match="fitted on 48 pixel values per image, the data's images have 24"):
        answers(teacher, small)
    ragged = image_rows()
    ragged._gather = lambda positions: [torch.zeros(3, 4, 4 + i % 2, dtype=torch.uint8) for i in positions.tolist()]
    with pytest.raises(ValueError, match="needs images of one size"):
        answers(teacher, ragged)


def test_both_texts_of_a_pair_are_read():
    labels = torch.tensor([0, 1, 2] * 10)
    texts = [f"house {i}" for i in range(30)]
    pairs = [f"the {NAMES[y]}" for y in labels]
    rows = TextRows(Dataset.from_dict({"t": texts}), texts, labels, NAMES, pairs=pairs)
    teacher, _ = train_sklearn("LogisticRegression", {"C": 100.0}, rows)
    assert torch.equal(teacher.logits(rows, torch.arange(30)).argmax(-1), labels)


def test_text_pipeline_is_tfidf_of_one_and_two_words():
    rows = text_rows()
    teacher, _ = train_sklearn("LogisticRegression", {"C": 3.0}, rows, folds=0)
    by_hand = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=3.0, max_iter=1000)
    ).fit(rows.texts, rows.labels)
    expected = np.log(by_hand.predict_proba(rows.texts))
    assert np.allclose(answers(teacher, rows), expected, atol=1e-5)


def test_logits_are_floored_logs_of_probabilities():
    rows = table_rows()
    teacher, _ = train_sklearn("KNeighborsClassifier", {"n_neighbors": 1}, rows, folds=0)
    logits = answers(teacher, rows)
    assert set(logits.unique().tolist()) == {np.float32(FLOOR), 0.0}


@pytest.mark.parametrize("name", ["LogisticRegression", "RandomForestClassifier", "HistGradientBoostingClassifier"])
def test_unseen_categories_and_gaps_are_answered_alone_as_in_company(name):
    """One row at a time too: what pandas makes of a column depends on what else is in it."""
    rows, other = table_rows(), table_rows(12)
    other.table = other.table.astype(object)
    other.table["food"] = other.table["food"].where(other.table.index > 3, "straw")
    for row, column in enumerate(other.table.columns):
        other.table.loc[6 + row, column] = None
    other.table.loc[11] = None
    teacher, _ = train_sklearn(name, PARAMS.get(name), rows, folds=0)
    together = answers(teacher, other)
    assert torch.isfinite(together).all()
    alone = torch.cat([teacher.logits(other, torch.tensor([row])) for row in range(12)])
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(answers(teacher, table_rows(12))[4:6], together[4:6], atol=1e-5)  # the same values as objects


def test_a_column_without_a_value_stays_one_of_words():
    """A single row, as where a model is timed."""
    frame = sklearn_inputs({"table": pd.DataFrame({"town": pd.Series([None], dtype="str")})})
    assert frame["town"].dtype == object and frame["town"].isna().all()
    encoder = OneHotEncoder(handle_unknown="ignore").fit(pd.DataFrame({"town": ["Rome", "Oslo", np.nan]}, dtype=object))
    assert encoder.transform(frame).sum() == 1  # the gap


def test_what_an_estimator_cannot_answer_names_it():
    class Strict(DummyClassifier):
        def predict_proba(self, X):
            raise ValueError("unknown categories")

    rows = table_rows()
    estimator = Strict().fit([[0]], [0])
    names = rows.class_names
    teacher = SklearnTeacher(
        estimator, name="strict", source="s.skops", class_names=names, data_names=names, fingerprint="x"
    )
    with pytest.raises(ValueError, match=r"Teacher 'strict' \(s.skops\) cannot answer these rows: unknown categories"):
        teacher.logits(rows, torch.tensor([0]), torch.tensor([-1]))


def test_the_seed_decides_and_one_core_is_taken():
    rows = table_rows()
    settings = {"n_estimators": 5, "max_features": 1}
    first, second, other = (train_sklearn("RandomForestClassifier", settings, rows, seed, 0)[0] for seed in (0, 0, 1))
    assert torch.equal(answers(first, rows), answers(second, rows)) and first.fingerprint == second.fingerprint
    assert not torch.equal(answers(first, rows), answers(other, rows)) and first.fingerprint != other.fingerprint
    forest = first.estimator[-1]
    assert (forest.n_jobs, forest.random_state) == (1, 0)
    asked = train_sklearn("RandomForestClassifier", {**settings, "n_jobs": 2, "random_state": 7}, rows, 0, 0)[0]
    assert (asked.estimator[-1].n_jobs, asked.estimator[-1].random_state) == (2, 7)
    assert asked.fingerprint != first.fingerprint
    relabelled = table_rows()
    relabelled.labels = relabelled.labels.flip(0)
    assert train_sklearn("RandomForestClassifier", settings, relabelled, 0, 0)[0].fingerprint != first.fingerprint


def test_calibrated_estimator_is_asked_for():
    with pytest.raises(ValueError, match=r"sklearn:SVC \(SVC\) has no `predict_proba`.*`calibrate: true`"):
        train_sklearn("SVC", {}, table_rows())
    teacher, _ = train_sklearn("SVC", {"calibrate": True, "C": 2.0}, table_rows(), folds=0)
    assert teacher.estimator[-1].estimator.C == 2.0
    with pytest.raises(ValueError, match="no `predict_proba` with these settings"):
        train_sklearn("SGDClassifier", {"loss": "hinge"}, table_rows())


@pytest.mark.parametrize(
    ("name", "params", "rows", "said"),
    [
        ("RandomForrestClassifier", {}, table_rows, "Did you mean RandomForestClassifier"),
        ("os.system", {}, table_rows, "no scikit-learn classifier that can be trained on the spot"),
        ("DecisionTreeClassifier", {"depth": 3}, table_rows, "has no parameter depth. It has .*max_depth"),
        ("GaussianNB", {}, text_rows, "cannot read the sparse word counts of texts. For texts use one of Logistic"),
        ("MultinomialNB", {}, table_rows, "a table has negative numbers"),
        ("SVC", {"calibrate": True}, lambda: table_rows(12), "SVC cannot be trained on .* rows, . of the rarest class"),
    ],
)
def test_what_cannot_be_trained(name, params, rows, said):
    with pytest.raises(ValueError, match=said):
        train_sklearn(name, params, rows())


# ---- out of fold -----------------------------------------------------------------------------------------------------


def noisy_rows(count=60):
    """Labels that the features say nothing about: whoever is right has seen them."""
    rng = np.random.default_rng(0)
    columns = {"x": rng.normal(size=count), "label": rng.integers(0, 3, count)}
    features = Features({"x": Value("float64"), "label": ClassLabel(names=NAMES)})
    return TableRows.from_dataset(Dataset.from_dict(columns, features=features), None, "label", NAMES)


def test_out_of_fold_answers_know_nothing_of_the_labels_they_answer():
    rows = noisy_rows()
    full, folded = train_sklearn("KNeighborsClassifier", {"n_neighbors": 1}, rows, folds=5)
    assert accuracy(full, rows) == 1.0
    assert accuracy(folded, rows) < 0.55
    # No label of a row has a say in its own answer.
    for row in (3, 17):
        changed = noisy_rows()
        changed.labels[row] = (changed.labels[row] + 1) % 3
        positions = np.flatnonzero((folded.fold_of_row != folded.fold_of_row[row]).numpy())
        again, _ = train_sklearn("KNeighborsClassifier", {"n_neighbors": 1}, changed.subset(positions), folds=0)
        one = torch.tensor([row])
        assert torch.equal(again.logits(changed, one), folded.logits(rows, one))


def test_the_full_model_answers_every_other_part():
    full, folded = train_sklearn("GaussianNB", {}, table_rows(), folds=3)
    other = table_rows(21, seed=5)
    assert torch.equal(answers(folded, other), answers(full, other))
    assert not torch.equal(answers(folded, table_rows()), answers(full, table_rows()))
    assert len({full.fingerprint, *(fold.fingerprint for fold in folded.folds), folded.fingerprint}) == 5


def test_folds_are_stratified_and_depend_on_the_seed_alone():
    labels = np.repeat([0, 1], [80, 20])
    folds = stratified_folds(labels, 5, seed=1)
    assert [int((labels[folds == fold] == 1).sum()) for fold in range(5)] == [4] * 5
    assert np.array_equal(folds, stratified_folds(labels, 5, 1))
    assert not np.array_equal(folds, stratified_folds(labels, 5, 2))


def test_class_smaller_than_the_folds_gets_the_floor_where_it_is_missing():
    rows = table_rows(31)
    rows.labels[:] = torch.arange(31) % 2 * 2
    rows.labels[11] = 1  # the middle class: those behind it must keep their places
    full, folded = train_sklearn("GaussianNB", {}, rows, folds=5)
    alone = folded.logits(rows, torch.tensor([11]))
    assert alone.shape == (1, 3) and alone[0, 1] == np.float32(FLOOR)  # its fold never saw the class
    assert alone[0, [0, 2]].exp().sum() == pytest.approx(1, abs=1e-3)
    assert answers(full, rows)[11, 1] > FLOOR


def test_folds_out_of_range():
    for folds in (1, -1, 61):
        with pytest.raises(ValueError, match=f"must be 0 .* or between 2 and the number of rows, 60, got {folds}"):
            train_sklearn("GaussianNB", {}, table_rows(), folds=folds)
    few = table_rows(12)
    with pytest.raises(ValueError, match="must not exceed the 4 rows of the largest class, got 5.*teachers.0.folds=4"):
        train_sklearn("GaussianNB", {}, few, folds=5)
    one_class = table_rows()
    one_class.labels[:] = 1
    with pytest.raises(ValueError, match="needs rows of at least two classes"):
        train_sklearn("GaussianNB", {}, one_class, folds=0)


# ---- files of others -------------------------------------------------------------------------------------------------


def test_untrusted_types_are_listed_and_can_be_trusted(tmp_path):
    rows = image_rows()
    pixels = rows.images.flatten(1).numpy() / np.float32(255)
    forest = make_pipeline(FunctionTransformer(np.log1p), RandomForestClassifier(5)).fit(
        pixels, np.array(NAMES)[rows.labels.numpy()]
    )
    path = tmp_path / "forest.skops"
    skops.io.dump(forest, path)
    with pytest.raises(ValueError, match=r"forest.skops holds types .*: .*sklearn.tree._tree.Tree.*`trusted_types`"):
        load_teacher(path, rows)
    teacher = load_teacher(path, rows, trusted_types=["sklearn.tree._tree.Tree"])
    # Names come from the classes it was fitted on, which stand in alphabetical order.
    assert teacher.class_names == NAMES and teacher.name == "forest"
    assert np.allclose(answers(teacher, rows), np.log(np.maximum(forest.predict_proba(pixels), 1e-4)), atol=1e-5)


class Foreign(LogisticRegression):
    pass


def test_code_of_others_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Foreign, "__setstate__", lambda *_: pytest.fail("loaded"), raising=False)
    skops.io.dump(Foreign().fit([[0.0], [1.0]], [0, 1]), tmp_path / "f.skops")
    with pytest.raises(ValueError, match="Foreign"):
        load_teacher(tmp_path / "f.skops", image_rows(), trusted_types=["another.Type"])


def test_names_from_labels_from_the_json_or_in_order(tmp_path):
    rows = image_rows()
    pixels = rows.images.flatten(1).numpy() / np.float32(255)
    model = GaussianNB().fit(pixels, rows.labels)
    path = tmp_path / "m.skops"
    skops.io.dump(model, path)
    with pytest.warns(UserWarning, match="no names"):
        in_order = load_teacher(path, rows)
    assert accuracy(in_order, rows) > 0.9
    turned = load_teacher(path, rows, labels=["emu", "dog", "cat"])
    assert torch.equal(answers(turned, rows), answers(in_order, rows).flip(1))
    path.with_suffix(".json").write_text(
        json.dumps({"class_names": ["emu", "dog", "cat"], "source": {"license": "mit"}})
    )
    from_json = load_teacher(path, rows)
    assert torch.equal(answers(from_json, rows), answers(turned, rows)) and from_json.license == "mit"
    path.with_suffix(".json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(ValueError, match="has format version 2, this version reads up to 1"):
        load_teacher(path, rows)


def test_file_without_probabilities(tmp_path):
    rows = image_rows()
    skops.io.dump(LinearSVC().fit(rows.images.flatten(1).numpy(), rows.labels), tmp_path / "s.skops")
    with pytest.raises(ValueError, match="CalibratedClassifierCV"):
        load_teacher(tmp_path / "s.skops", rows)
    skops.io.dump(LinearRegression().fit(rows.images.flatten(1).numpy(), rows.labels), tmp_path / "s.skops")
    with pytest.raises(ValueError, match="is a regression model, and a teacher must classify"):
        load_teacher(tmp_path / "s.skops", rows)
    (tmp_path / "s.skops").write_bytes(b"pickled")
    with pytest.raises(ValueError, match="is no skops file. Save the estimator with"):
        load_teacher(tmp_path / "s.skops", rows)


def test_a_frame_is_read_by_its_columns_names(tmp_path):
    rows = table_rows()
    turned = rows.table[["legs", "wild"]]  # not in the data's order, and not all of it
    model = GaussianNB().fit(turned, rows.labels)
    skops.io.dump(model, tmp_path / "m.skops")
    teacher = load_teacher(tmp_path / "m.skops", rows, labels=NAMES)
    assert np.array_equal(answers(teacher, rows).argmax(1).numpy(), model.predict(turned))
    rows.table = rows.table.drop(columns="legs")
    with pytest.raises(ValueError, match=r"columns that the table lacks: legs\. .* data.input_column=\[A,B,\.\.\.\]"):
        answers(teacher, rows)


def test_a_changed_file_has_another_fingerprint(tmp_path):
    rows = table_rows()
    teacher, _ = train_sklearn("GaussianNB", {}, rows, folds=0)
    path = teacher.save(tmp_path / "m.skops")
    teacher.estimator[-1].theta_ += 0.1
    skops.io.dump(teacher.estimator, path)  # somebody else's weights under our JSON
    assert load_skops(path, rows).fingerprint != teacher.fingerprint
