"""Students trained at once against each trained alone by torch's own optimizer, on the same rows."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_hpmkd.losses import kd_loss
from hf_hpmkd.models.tabular import TabularConfig, TabularForClassification
from hf_hpmkd.stacked_students import StackedStudent, can_stack, stack_answers, train_stack

ROWS, BATCH = 50, 16  # so that an epoch's last batch is one of two rows
RATES = [math.cos(step / 20) for step in range(23)]  # five epochs and a bit

ALIKE: list[dict[str, Any]] = [
    {"alpha": 0.5, "temperature": 2.0, "target": 1},
    {},
    {"alpha": 0.9, "temperature": 1.0, "target": 0, "learning_rate": 0.05, "weight_decay": 0.5},
    {"alpha": 1.0, "temperature": 2.0, "target": 1, "kd_kind": "dkd", "seed": 4},
    {"alpha": 0.5, "temperature": 2.0, "target": 1, "kd_kind": "dist"},
    {"alpha": 0.7, "temperature": 2.0, "target": 2, "kd_kind": "standardized_kl"},
    {"alpha": 0.5, "temperature": 2.0, "target": 1, "kd_kind": "dist", "seed": 4},
    {"learning_rate": 0.2, "seed": 4},
    {"alpha": 0.9, "temperature": 2.0, "target": 1, "kd_kind": "js"},
]


def model_of(hidden: list[int], seed: int) -> TabularForClassification:
    torch.manual_seed(seed)
    return TabularForClassification(
        TabularConfig(hidden_sizes=hidden, num_numeric=3, cardinalities=[4, 6], num_labels=3)
    )


def data() -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(1)
    inputs = {
        "numeric": torch.randn(ROWS, 3, generator=random),
        "categorical": torch.randint(0, 4, (ROWS, 2), generator=random),
    }
    labels = torch.randint(0, 3, (ROWS,), generator=random)
    return inputs, labels, [torch.randn(ROWS, 3, generator=random).log_softmax(-1) for _ in range(3)]


def batches(seed: int) -> list[Tensor]:
    random, found = torch.Generator().manual_seed(seed), []
    while len(found) < len(RATES):
        found += torch.randperm(ROWS, generator=random).split(BATCH)
    return found[: len(RATES)]


def alone(model: TabularForClassification, one: StackedStudent, max_grad_norm: float) -> dict[str, Tensor]:
    inputs, labels, targets = data()
    decayed = [weight for name, weight in model.named_parameters() if not name.endswith("bias")]
    others = [weight for name, weight in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": one.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=one.learning_rate)
    for rate, rows in zip(RATES, batches(one.seed), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = one.learning_rate * rate
        logits = model(**{name: value[rows] for name, value in inputs.items()}).logits
        loss = (1 - one.alpha) * F.cross_entropy(logits, labels[rows])
        if one.alpha:
            kd = kd_loss(one.kd_kind, logits, targets[one.target][rows], labels[rows], one.temperature)
            loss = loss + one.alpha * kd.mean()
        optimizer.zero_grad()
        loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("hidden", [[], [5], [6, 4]], ids=str)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
def test_each_student_of_a_stack_ends_as_if_trained_alone(hidden: list[int], max_grad_norm: float) -> None:
    inputs, labels, targets = data()
    models, students = [], []
    for number, about in enumerate(ALIKE):
        models.append(model_of(hidden, number % 3))
        start = {name: weight.detach().clone() for name, weight in models[-1].named_parameters()}
        settings = {"learning_rate": 0.02, "weight_decay": 0.01, "seed": 3} | about
        students.append(StackedStudent(start=start, **settings))
    ticks: list[None] = []
    found = train_stack(
        students, inputs, labels, targets, rates=RATES, batch_size=BATCH, max_grad_norm=max_grad_norm,
        tell=lambda: ticks.append(None),
    )  # fmt: skip
    assert len(ticks) == len(RATES)
    answers = stack_answers(found, inputs)
    for place, (model, student) in enumerate(zip(models, students, strict=True)):
        expected = alone(model, student, max_grad_norm)
        assert set(expected) == set(found)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name][place], weight, atol=2e-5, rtol=1e-4)
        assert (expected["classifier.weight"] - student.start["classifier.weight"]).abs().max() > 0.01  # it has learned
        with torch.no_grad():
            assert torch.equal(answers[place], model(**inputs).logits.argmax(-1))


def test_many_rows_are_answered_in_pieces() -> None:
    inputs, _, _ = data()
    many = {name: value.repeat(100, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    models = [model_of([5], seed) for seed in range(3)]
    weights = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        for name, _ in models[0].named_parameters()
    }
    assert torch.equal(stack_answers(weights, many), stack_answers(weights, inputs).repeat(1, 100))


def test_what_can_be_stacked() -> None:
    assert can_stack(model_of([4], 0))
    assert not can_stack(torch.nn.Linear(3, 3)) and not can_stack(None)
    assert not can_stack(TabularForClassification(TabularConfig([4], num_numeric=3, dropout=0.1, num_labels=3)))
