"""The plan tells sizes that the run would find, and touches neither network nor disk."""

import json
import math
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import PARTS, load_parts
from hf_hpmkd.model_cost import activation_bytes
from hf_hpmkd.models import CifarResNetConfig, CifarResNetForImageClassification
from hf_hpmkd.plan import plan
from hf_hpmkd.recipe import Recipe, load_recipe, read_recipe


@pytest.fixture(autouse=True)
def offline_and_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Any connection fails, and the cache folder must not come into being."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HPMKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "cache").exists()


def digits(*overrides: str, teachers: tuple[str, ...] = ("cifar-resnet-14x8", "sklearn:SVC")) -> Recipe:
    tree = {
        "data": {"path": "sklearn:digits", "views": 3},
        "teachers": [{"model": model} for model in teachers],
        "student": {"model": "cifar-resnet-8x4"},
    }
    return read_recipe(tree, "test", overrides)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in\n{text}"
    return int(found[1].replace(",", ""))


def test_rows_parameters_steps_and_bytes_are_those_of_the_run() -> None:
    recipe = digits("training.batch_size=100", "training.epochs=3", "teachers.0.epochs=2", "teachers.0.batch_size=50")
    text = plan(recipe)
    parts = load_parts(recipe.data, teachers_saw_train=False)
    rows = {part: number(rf"{part} +([\d,]+) rows", text) for part in PARTS}
    assert rows == {part: len(getattr(parts, part)) for part in PARTS}
    assert sum(rows.values()) == 1797

    for line, model in (("cifar-resnet-14x8 +teacher", "cifar-resnet-14x8"), ("student +student", "cifar-resnet-8x4")):
        assert number(rf"{line} +([\d,]+)", text) == build_classifier(model, parts.train).num_params
    assert re.search(r"SVC +teacher +- +scikit-learn, trained here", text)

    per_epoch = math.ceil(rows["train"] / 100)
    assert f"{per_epoch} per epoch (100 rows a step), {3 * per_epoch} in total" in text
    assert f"teacher cifar-resnet-14x8: {2 * math.ceil(rows['train'] / 50)} steps" in text
    assert "teacher SVC: fitted once, and 5 times for its folds" in text

    others = 1797 - rows["train"]
    needed = 2 * (rows["train"] * 3 * 2 * 10 + others * 2 * 10)
    assert f"Cache    {needed / 1000:.1f} kB of teacher outputs" in text
    assert "there is room" in text


def test_topk_and_live_need_less_disk() -> None:
    def kilobytes(*overrides: str) -> float:
        found = re.search(r"Cache +([\d.]+) kB", plan(digits(*overrides)))
        assert found
        return float(found[1])

    topk = kilobytes("distillation.teacher_outputs=topk", "distillation.topk=2")
    assert kilobytes("distillation.teacher_outputs=live") < topk < kilobytes()


def test_max_steps_and_accumulation_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "7 in total" in plan(digits("training.max_steps=7"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = digits("training.gradient_accumulation_steps=4", "training.batch_size=10", "distillation.direct=false")
    text = plan(recipe)
    train = number(r"train +([\d,]+) rows", text)
    assert f"{math.ceil(train / 80)} per epoch (10 rows x 4 accumulated x 2 processes a step)" in text
    assert "trains once (distilled)" in text


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "1.0 kB are free where they go: NOT ENOUGH" in plan(digits())


def test_student_larger_than_its_teachers_is_told() -> None:
    text = plan(digits("student.model=cifar-resnet-20"))
    assert "warning: the student is larger than every teacher" in text
    assert "warning" not in plan(digits())


def test_imagenet_is_planned_without_network_and_data() -> None:
    text = plan(load_recipe("imagenet_timm"))
    assert "1000 classes (as the teachers have)" in text
    assert "Of timm/resnet18 the architecture alone is taken; student.pretrained=true" in text
    assert "architecture alone" not in plan(digits())
    assert "unknown until the data is loaded" in text
    known = {"convnext-base +teacher": 88_591_464, "resnet50 +teacher": 25_557_032, "student +student": 11_689_512}
    assert {line: number(rf"{line} +([\d,]+)", text) for line in known} == known
    assert "7.6x" in text
    limited = plan(load_recipe("imagenet_timm", ["data.max_train_rows=1281"]))
    assert "at most 1,281 rows" in limited
    assert "11 per epoch (128 rows a step), 1,100 in total" in limited


def test_a_table_on_the_hub_is_unknown_until_loaded() -> None:
    tree = {"data": {"path": "some/table"}, "teachers": [{"model": "mlp-64"}], "student": {"model": "mlp-4"}}
    text = plan(read_recipe(tree, "test"))
    assert "not on this disk, so not opened" in text
    assert re.search(r"student +student +unknown +unknown until the data is loaded", text)


def test_parameters_of_a_weight_file_come_from_its_header(tmp_path: Path) -> None:
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, num_labels=10))
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "net.json").write_text(json.dumps({}), encoding="utf-8")
    recipe = digits(teachers=(str(tmp_path / "net.safetensors"),))
    assert number(r"net +teacher +([\d,]+)", plan(recipe)) == sum(weight.numel() for weight in model.parameters())


def test_activations_are_those_of_the_backward_pass() -> None:
    """Counted by hand: the second layer and the ReLU keep the same 8 numbers; weights are not activations."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 8, device="meta"), torch.nn.Linear(8, 3, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    rows = SimpleNamespace(raw=lambda indices: torch.zeros(len(indices), 4))
    built = SimpleNamespace(model=Net(), feed=lambda raw: {"x": raw})
    assert activation_bytes(built, rows) == 4 * (4 + 8)


def test_activations_of_a_model_that_looks_at_values_are_left_out() -> None:
    class Net(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    rows = SimpleNamespace(raw=lambda indices: torch.zeros(len(indices), 4))
    assert activation_bytes(SimpleNamespace(model=Net(4, 4, device="meta"), feed=lambda raw: {"x": raw}), rows) is None


def test_memory_of_half_precision_and_batch() -> None:
    def activations(*overrides: str) -> float:
        found = re.search(r"([\d.]+) MB for the activations", plan(digits("training.batch_size=4096", *overrides)))
        assert found
        return float(found[1])

    assert activations("training.precision=bf16") == pytest.approx(activations() / 2, rel=0.05)


@pytest.mark.parametrize("name", ["quickstart"])
def test_bundled_recipe_without_files_is_planned(name: str) -> None:
    text = plan(load_recipe(name))
    assert "for the activations of" in text
    assert "None" not in text


def test_tries_add_no_more_steps_than_all_their_trainings_have() -> None:
    def told(epochs: int) -> tuple[int, int]:
        text = plan(digits("auto=fast", "training.batch_size=100", f"training.epochs={epochs}"))
        return number(r"tries at most (\d+) configurations", text), number(r"([\d,]+) steps more at most", text)

    rows = len(load_parts(digits().data, teachers_saw_train=False).train)
    steps = math.ceil(rows / 100)
    candidates, more = told(epochs=1)
    assert more == candidates * steps
    candidates, more = told(epochs=100)
    assert more < candidates * 100 * steps
