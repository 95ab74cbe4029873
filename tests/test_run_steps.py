"""The steps that a run's own process and its workers share."""

import pytest
import torch
from datasets import Dataset

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import load_parts
from hf_hpmkd.recipe import read_recipe
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_memory import run_memory
from hf_hpmkd.run_steps import load
from hf_hpmkd.teacher_kinds import TorchTeacher


def saved_and_loaded(folder, data, model, student, precision):
    """A network as it was saved, the rows, and the teacher that a recipe of this precision loads from there."""
    tree = {
        "data": {"path": data},
        "teachers": [{"model": str(folder / "teacher"), "precision": precision}],
        "student": {"model": student},
        "memory": {"use": False},
        "output": {"dir": str(folder / "run")},
    }
    recipe = read_recipe(tree, "test")
    parts = load_parts(recipe.data, teachers_saw_train=False)
    built = build_classifier(model, parts.train)
    built.model.save_pretrained(folder / "teacher")
    built.feed.processor.save_pretrained(folder / "teacher")
    teacher, _ = loaded(recipe, folder, parts)
    return TorchTeacher.of("same", built, parts.guide, "cpu"), parts.guide, teacher


def loaded(recipe, folder, parts):
    """The recipe's teacher, and what the record was warned of."""
    with run_memory(recipe, is_main=True) as memory:
        run = Run(folder / "run", new_record(recipe), memory)
        return load(run, "t", recipe.teachers[0], parts), run.record.warnings


def test_a_class_order_that_is_guessed_stands_in_the_record(tmp_path):
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": str(tmp_path / "teacher")}],
        "student": {"model": "mlp-2"},
        "memory": {"use": False},
    }
    recipe = read_recipe(tree, "test")
    parts = load_parts(recipe.data, teachers_saw_train=False)
    built = build_classifier("mlp-4", parts.train)
    built.model.config.id2label = {index: f"LABEL_{index}" for index in range(3)}
    built.model.save_pretrained(tmp_path / "teacher")
    built.feed.processor.save_pretrained(tmp_path / "teacher")
    _, warned = loaded(recipe, tmp_path, parts)
    assert len(warned) == 1 and "Teacher 't': The teacher's classes have no names" in warned[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), (None, None)])
def test_a_loaded_teacher_has_the_precision_that_the_recipe_says(tmp_path, precision, dtype):
    saved, guide, teacher = saved_and_loaded(
        tmp_path, "sklearn:digits", "cifar-resnet-8x8", "cifar-resnet-8x4", precision
    )
    assert {weight.dtype for weight in teacher.model.parameters()} == {dtype or torch.float32}
    assert (teacher.fingerprint == saved.fingerprint) == (precision in (None, "fp32"))
    rows = torch.arange(32)
    answers = teacher.logits(guide, rows)
    assert answers.dtype == torch.float32
    furthest = float((answers - saved.logits(guide, rows)).abs().max())
    assert 1e-4 < furthest < 0.1 if dtype is torch.bfloat16 else furthest < 1e-5


def test_int8_rounds_the_weights_of_linear_layers_to_256_steps_a_row(tmp_path):
    pytest.importorskip("torchao")
    saved, guide, teacher = saved_and_loaded(tmp_path, "sklearn:wine", "mlp-64x64", "mlp-8", "int8")
    whole = saved.fingerprint
    layers = [(name, part) for name, part in saved.model.named_modules() if isinstance(part, torch.nn.Linear)]
    assert len(layers) == 3
    for name, layer in layers:
        unpacked = teacher.model.get_submodule(name).weight.dequantize()
        step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        error = (unpacked - layer.weight).abs()
        assert bool((error <= 0.51 * step).all()) and float(error.max()) > 0
        layer.weight.data = unpacked
    rows = torch.arange(len(guide))
    torch.testing.assert_close(teacher.logits(guide, rows), saved.logits(guide, rows))
    assert teacher.fingerprint != whole  # or the one would be given the other's outputs


def test_int8_is_refused_where_it_would_pack_next_to_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least half of the parameters; here they hold 2%. Take bf16"):
        saved_and_loaded(tmp_path, "sklearn:digits", "cifar-resnet-8x8", "cifar-resnet-8x4", "int8")


def test_a_gap_in_the_answers_to_test_rows_is_told_before_anything_is_trained(tmp_path):
    for split, rows in (("train", 60), ("test", 20)):
        answers = [[0.5, -0.5]] * rows
        if split == "test":
            answers[7] = None
        columns = {"x": [float(row) for row in range(rows)], "label": ["a", "b"] * (rows // 2), "said": answers}
        Dataset.from_dict(columns).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    tree = {
        "data": {
            "path": str(tmp_path / "data"),
            "input_column": ["x"],
            "validation_from": "train",
            "guide_from": "train",
        },
        "teachers": [{"model": "column:said"}],
        "student": {"model": "mlp-2"},
        "memory": {"use": False},
    }
    recipe = read_recipe(tree, "test")
    with pytest.raises(ValueError, match="row 7 of the part holds None"):
        loaded(recipe, tmp_path, load_parts(recipe.data))
