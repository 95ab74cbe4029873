"""The steps that a run's own process and its workers share."""

import pytest
import torch

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import load_parts
from hf_hpmkd.recipe import read_recipe
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_memory import run_memory
from hf_hpmkd.run_steps import load
from hf_hpmkd.teacher_kinds import TorchTeacher


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), (None, None)])
def test_a_loaded_teacher_has_the_precision_that_the_recipe_says(tmp_path, precision, dtype):
    tree = {
        "data": {"path": "sklearn:digits"},
        "teachers": [{"model": str(tmp_path / "teacher"), "precision": precision}],
        "student": {"model": "cifar-resnet-8x4"},
        "memory": {"use": False},
        "output": {"dir": str(tmp_path / "run")},
    }
    recipe = read_recipe(tree, "test")
    parts = load_parts(recipe.data, teachers_saw_train=False)
    built = build_classifier("cifar-resnet-8x8", parts.train)
    built.model.save_pretrained(tmp_path / "teacher")
    built.feed.processor.save_pretrained(tmp_path / "teacher")
    rows = torch.arange(32)
    with run_memory(recipe, is_main=True) as memory:
        teacher = load(Run(tmp_path / "run", new_record(recipe), memory), "t", recipe.teachers[0], parts)
    assert {weight.dtype for weight in teacher.model.parameters()} == {dtype or torch.float32}
    answers = teacher.logits(parts.guide, rows)
    assert answers.dtype == torch.float32
    expected = TorchTeacher.of("same", built, parts.guide, "cpu").logits(parts.guide, rows)
    furthest = float((answers - expected).abs().max())
    assert 1e-4 < furthest < 0.1 if dtype is torch.bfloat16 else furthest < 1e-5
