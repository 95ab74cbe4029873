"""Finished classifiers from a memory: taken if they are what they say, else named, left and made anew."""

import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.components.optimization_memory import OptimizationMemory
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.kept_classifiers import About, Training, measure, take
from hf_hpmkd.training_folder import done_file

KEY, FILE = "0" * 64, "training.json"


@pytest.fixture(scope="module")
def parts():
    return load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False)


@pytest.fixture
def store(tmp_path):
    return OptimizationMemory(tmp_path / "memory")


@pytest.fixture
def finished(tmp_path, parts):
    """A folder as a training leaves it, here of a network that was only drawn."""
    folder = tmp_path / "finished"
    classifier = build_classifier("mlp-4", parts.train, seed=3)
    classifier.model.save_pretrained(folder)
    About(KEY, Training(2.5, 10, [{"loss": 1.0}]), measure(classifier, parts.validation, 7)).save(folder / FILE)
    return folder


def taken(store, parts, folder, name="mlp-4"):
    return take(store, KEY, FILE, lambda: build_classifier(name, parts.train, meta=True), parts.validation, 64, folder)


def test_nothing_is_taken_where_there_is_nothing(store, parts, tmp_path):
    assert taken(store, parts, tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_a_sound_one_lies_where_it_would_have_been_trained(store, parts, finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps({**config, "hidden_sizes": [9], "auto_map": {"x": "evil.py"}}))
    store.keep_model(KEY, finished)
    folder = tmp_path / "run" / "mlp-4"
    about = taken(store, parts, folder)
    assert about == About.load(finished / FILE) and store.model_seconds == 2.5
    assert json.loads(done_file(folder).read_text()) == dataclasses.asdict(about.trained)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(finished / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert json.loads((folder / "config.json").read_text()) == config, "its own settings are not believed"


def rewrite(folder, **changes):
    file = folder / FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reverse_head(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in reversed(list(tensors)) if tensors[name].shape[:1] == (3,))
    save_file({**tensors, name: -tensors[name]}, folder / "model.safetensors", {"format": "pt"})


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


HARM = {
    "claims more": (lambda folder: rewrite(folder, accuracy=2.0), "should answer 200.00% .* answers"),
    "claims nothing": (lambda folder: rewrite(folder, accuracy=None), "does not say how good"),
    "NaN": (lambda folder: rewrite(folder, accuracy=float("nan")), "should answer nan%"),
    "another": (lambda folder: rewrite(folder, key="1" * 64), "is that of another"),
    "newer": (lambda folder: rewrite(folder, format_version=2), "has format 2, this version reads 1"),
    "text": (lambda folder: rewrite(folder, trained={"seconds": "x", "steps": 1}), "is not of the form"),
    "endless": (lambda folder: rewrite(folder, trained={"seconds": float("inf"), "steps": 1}), "is not of the form"),
    "no file": (lambda folder: (folder / FILE).unlink(), "cannot be read"),
    "deep": (lambda folder: (folder / FILE).write_text("[" * 99999), "cannot be read"),
    "other weights": (lose_a_tensor, "weights are those of another model"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_a_bad_one_is_named_and_its_place_is_the_next_ones(store, parts, finished, tmp_path, name):
    harm, told = HARM[name]
    bad = tmp_path / "bad"
    shutil.copytree(finished, bad)
    harm(bad)
    store.keep_model(KEY, bad)
    folder = tmp_path / "run" / "mlp-4"
    with pytest.warns(UserWarning, match=f"The model {KEY} of the memory is not used .*{told}"):
        assert taken(store, parts, folder) is None
    assert not folder.exists() and not done_file(folder).exists() and store.model_seconds == 0
    store.keep_model(KEY, finished)
    assert taken(store, parts, folder) is not None


def test_weights_of_another_shape_are_refused(store, parts, finished, tmp_path):
    store.keep_model(KEY, finished)
    with pytest.warns(UserWarning, match="weights"):
        assert taken(store, parts, tmp_path / "run", name="mlp-8") is None


def test_weights_that_answer_otherwise_are_refused(store, parts, finished, tmp_path):
    reverse_head(finished)
    store.keep_model(KEY, finished)
    with pytest.warns(UserWarning, match="of the validation rows right, and answers"):
        assert taken(store, parts, tmp_path / "run") is None
