"""The mean of the weights of a training that is stopped on its way."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_hpmkd import stopped_training
from hf_hpmkd.classifier_training import Trained, student_schedule, train_or_load
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.recipe import read_recipe
from hf_hpmkd.stopped_training import AveragedWeights, AveragesAt, put_average

PARTS = load_parts(DataConfig(path="sklearn:wine"), teachers_saw_train=False)


class Weights(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, np.ndarray]] = []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: nn.Module) -> None:
        self.after.append({name: one.detach().cpu().numpy().copy() for name, one in kwargs["model"].named_parameters()})


def train(folder: Path, stop_at: int | None, *callbacks: TrainerCallback) -> Trained:
    """Direct training of 12 steps on wine."""
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "mlp-4"},
        "training": {"max_steps": 12, "batch_size": 16, "evaluations": 4, "learning_rate": 0.1},
    }
    recipe, build = read_recipe(tree, "a test"), partial(build_classifier, "mlp-4", PARTS.train)
    more = {"stop_at": stop_at, "callbacks": callbacks}
    return train_or_load("one", build, recipe, student_schedule(recipe), folder, PARTS.train, PARTS.validation, **more)


def by_hand(after: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Step t counts t (t + 1) ... (t + 7): what the recursion of Shamir & Zhang (2013) with eta 8 comes to."""
    shares = np.array([float(math.prod(range(t, t + 8))) for t in range(1, len(after) + 1)])
    shares /= shares.sum()
    return {name: sum(s * one[name] for s, one in zip(shares, after, strict=True)) for name in after[0]}


def weights(trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, one.detach().cpu().numpy()) for name, one in trained.classifier.model.named_parameters())


def test_what_is_stopped_has_the_mean_of_its_weights_and_what_ends_its_last_ones(tmp_path: Path) -> None:
    seen = Weights()
    stopped = train(tmp_path / "one", 7, seen)
    expected = by_hand(seen.after)
    last = load_file(tmp_path / "one" / "checkpoints" / "checkpoint-7" / "model.safetensors")
    for name, found in weights(stopped):
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(last[name].numpy(), seen.after[-1][name])  # what is gone on from
        assert np.abs(found - seen.after[-1][name]).max() > 1e-3
    for name, found in weights(train(tmp_path / "one", 7)):  # read again, as after an interruption
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6)
    ended = train(tmp_path / "one", None, seen)
    assert len(seen.after) == 12
    for name, found in weights(ended):
        np.testing.assert_array_equal(found, seen.after[-1][name])


def test_the_mean_goes_over_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    seen = Weights()
    for stop in (3, 4, 10):
        halting = train(tmp_path / "halting", stop)
    at_once = train(tmp_path / "at-once", 10, seen)
    expected = by_hand(seen.after)
    for (name, one), (_, two) in zip(weights(halting), weights(at_once), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, expected[name], rtol=1e-5, atol=1e-6)


def test_means_are_kept_as_they_were_on_the_way(tmp_path: Path) -> None:
    seen, averages = Weights(), AveragesAt([2, 9])
    train(tmp_path / "one", None, seen, averages)
    assert sorted(averages.found) == [2, 9]
    for step, found in averages.found.items():
        expected = by_hand(seen.after[:step])
        for name, one in found.items():
            np.testing.assert_allclose(one.cpu().numpy(), expected[name], rtol=1e-5, atol=1e-6)


class Normed(nn.Module):
    """The columns, normalised, some dropped: has every kind of state that a look at the mean could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.last = nn.BatchNorm1d(13, momentum=0.25), nn.Dropout(0.5), nn.Linear(13, 3)

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(numeric)))


@pytest.mark.parametrize(("training", "batch", "count"), [(False, 64, 1), (True, 64, 1), (False, 25, 4), (True, 7, 15)])
def test_statistics_of_batch_normalisation_are_those_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, training: bool, batch: int, count: int
) -> None:
    monkeypatch.setattr(stopped_training, "_NORM_BATCH", batch)
    rows = PARTS.train
    classifier = dataclasses.replace(build_classifier("mlp-4", rows), model=Normed().train(training))
    model = classifier.model
    before = {name: one.clone() for name, one in model.state_dict().items()}
    put_average(classifier, {}, rows)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    state = torch.get_rng_state()
    put_average(classifier, {"last.bias": torch.tensor([1.0, 2.0, 3.0])}, rows)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was dropped, so no chance was used up
    features = classifier.feed(rows.raw(range(len(rows))))["numeric"]
    parts = [features[first::count] for first in range(count)]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([one.mean(0) for one in parts]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([one.var(0) for one in parts]).mean(0))
    assert model.last.bias.tolist() == [1.0, 2.0, 3.0] and torch.equal(model.last.weight, before["last.weight"])
    assert model.norm.momentum == 0.25 and {one.training for one in model.modules()} == {training}


def test_weights_that_lie_otherwise_in_memory_are_kept_too_and_a_checkpoint_without_a_mean_begins_one(
    tmp_path: Path,
) -> None:
    model = nn.Linear(3, 2)
    model.weight.data = model.weight.data.t().contiguous().t()
    averaged, state = AveragedWeights(), TrainerState(global_step=1, is_world_process_zero=True)
    args = SimpleNamespace(output_dir=str(tmp_path))
    (tmp_path / "checkpoint-1").mkdir()
    averaged.on_step_end(args, state, None, model=model)
    averaged.on_save(args, state, None)
    again = AveragedWeights(str(tmp_path / "checkpoint-1"))
    assert again.steps == 1 and torch.equal(again.average["weight"], model.weight)
    (file,) = (tmp_path / "checkpoint-1").iterdir()  # nothing half written beside it
    file.unlink()
    anew = AveragedWeights(str(tmp_path / "checkpoint-1"))
    assert (anew.steps, anew.average) == (0, {})
