"""What goes on around a training."""

import gc
from pathlib import Path

import pytest

from hf_hpmkd.classifier_training import old_garbage_left, student_schedule, total_steps, training_arguments
from hf_hpmkd.recipe import read_recipe


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, 20),  # two epochs of ten batches
        ({"min_steps": 100}, 100),
        ({"min_steps": 20}, 20),
        ({"min_steps": 7}, 20),
        ({"min_steps": 100, "max_steps": 5}, 5),
    ],
)
def test_few_rows_are_passed_more_often(tmp_path: Path, training: dict, steps: int) -> None:
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "sklearn:LogisticRegression"}],
        "student": {"model": "mlp-4"},
        "training": {"epochs": 2, "batch_size": 10, **training},
    }
    recipe = read_recipe(tree, "a test")
    schedule = student_schedule(recipe)
    assert total_steps(recipe, schedule, 97) == steps
    arguments = training_arguments(recipe, schedule, tmp_path, 97, distills=False)
    by_epochs = 10 * int(arguments.num_train_epochs)
    assert (arguments.max_steps if arguments.max_steps > 0 else by_epochs) == steps


def test_old_garbage_is_left_for_a_while_and_no_longer() -> None:
    assert gc.get_freeze_count() == 0
    with old_garbage_left():
        assert gc.get_freeze_count() > 1000
        with old_garbage_left():
            pass
        assert gc.get_freeze_count() > 1000  # the outer one still holds
    assert gc.get_freeze_count() == 0
