"""Small MLPs that start from larger ones: units found as by brute force, functions kept where they can be."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from test_classifiers import table_rows

from hf_hpmkd.chain_stages import WarmBuild
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.fitted_start import can_fit, choose_units, fit_start, ridge
from hf_hpmkd.models import TabularConfig, TabularForClassification
from hf_hpmkd.warm_start import warm_start


def mlp(*hidden_sizes, seed=0, classes=3, **more):
    torch.manual_seed(seed)
    config = TabularConfig(hidden_sizes, num_numeric=5, cardinalities=[4], num_labels=classes, **more)
    return TabularForClassification(config).eval()


def rows(count=500, seed=3):
    random = torch.Generator().manual_seed(seed)
    numbers, codes = torch.randn(count, 5, generator=random), torch.randint(4, (count, 1), generator=random)
    return {"numeric": numbers, "categorical": codes}


def forward_selection(features, targets, count):
    """The same by fitting every candidate with numpy."""
    x, y = features - features.mean(0), targets - targets.mean(0)
    chosen = []
    for _ in range(count):
        left = {}
        for unit in set(range(x.shape[1])) - set(chosen):
            part = x[:, [*chosen, unit]]
            left[unit] = np.square(y - part @ np.linalg.lstsq(part, y, rcond=None)[0]).sum()
        chosen.append(min(left, key=left.get))
    return chosen


def test_units_are_those_of_brute_force():
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 3)) @ random.normal(size=(3, 12)) + 0.5 * random.normal(size=(200, 12))
    features *= random.uniform(0.01, 100, 12)
    targets = np.tanh(features[:, :4] / features[:, :4].std(0)) @ random.normal(size=(4, 2))
    found = choose_units(torch.tensor(features), torch.tensor(targets), 6)
    assert found.tolist() == forward_selection(features, targets, 6)


def test_units_that_are_constant_or_copies_are_not_chosen():
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    features = torch.cat([torch.ones(50, 1), features, 2 * features[:, :1] + 1], dim=1)
    chosen = choose_units(features, features[:, 1:4] @ torch.rand(3, 2), 5).tolist()
    assert len(chosen) == 3 and 0 not in chosen and not {1, 4} <= set(chosen)


def test_ridge_is_that_of_scikit_learn():
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(100, 4, generator=random), torch.randn(100, 2, generator=random)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = ridge(x, y)
    known = Ridge(alpha=0.01 * 100).fit(x.numpy(), y.numpy())  # a sum over the rows there, a mean here
    torch.testing.assert_close(weight, torch.tensor(known.coef_, dtype=torch.float32))
    torch.testing.assert_close(bias, torch.tensor(known.intercept_, dtype=torch.float32))
    constant = torch.cat([x, torch.full((100, 1), 7.0)], dim=1)
    wider, same = ridge(constant, y)
    torch.testing.assert_close(wider[:, :4], weight)
    torch.testing.assert_close(same, bias)
    assert bool((wider[:, 4] == 0).all())


def started(small, large, inputs):
    warm_start(small, large)
    assert can_fit(small, large)
    fit_start(small, large, inputs)
    return small


def agreement(model, above, inputs):
    return float((model(**inputs).logits.argmax(1) == above(**inputs).logits.argmax(1)).float().mean())


def test_a_large_mlp_with_few_live_units_is_met_by_a_small_one():
    """12 of 64 units are alive, so 12 are enough for the same function, wherever they stand."""
    large, fresh = mlp(64, seed=1), rows(seed=9)
    dead = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:52]
    with torch.no_grad():
        large.hidden[0].weight[dead], large.hidden[0].bias[dead] = 0.0, -1.0
    small = started(mlp(12), large, rows())
    assert agreement(small, large, fresh) > 0.97
    copied = mlp(12)
    warm_start(copied, large)
    assert agreement(copied, large, fresh) < 0.8


@pytest.mark.parametrize("sizes", [(8,), (8, 8), (16, 8, 8)])
def test_a_student_of_other_depth_is_nearer_than_by_copies(sizes):
    large, inputs, fresh = mlp(64, 64, seed=1), rows(1500), rows(seed=9)
    copied = mlp(*sizes)
    warm_start(copied, large)
    near = agreement(started(mlp(*sizes), large, inputs), large, fresh)
    assert near > 0.6 and near > agreement(copied, large, fresh) + 0.1


def test_units_beyond_those_above_keep_their_values():
    small, large = mlp(10, 10), mlp(6, 32, seed=1)
    before = small.hidden[0].weight.clone()
    started(small, large, rows())
    assert torch.equal(small.hidden[0].weight[6:], before[6:])
    theirs = {tuple(row.tolist()) for row in large.hidden[0].weight}
    assert {tuple(row.tolist()) for row in small.hidden[0].weight[:6]} == theirs


def test_what_cannot_be_fitted():
    assert not can_fit(mlp(4), mlp(4, seed=1))  # equal sizes: a copy is exact
    assert not can_fit(mlp(4), mlp())  # no hidden layer to choose from
    assert not can_fit(mlp(4), mlp(8, classes=2))
    assert not can_fit(mlp(4), torch.nn.Linear(2, 2)) and not can_fit(torch.nn.Linear(2, 2), mlp(4))
    with pytest.raises(ValueError, match="Only an MLP can be fitted"):
        fit_start(mlp(4), mlp(4), rows())


def test_a_warm_build_fits_and_says_so_in_its_key():
    from hf_hpmkd.teacher_kinds import TorchTeacher

    table = table_rows()
    above = build_classifier("mlp-32x32", table, seed=1)
    teacher = TorchTeacher.of("large", above, table, device="cpu")

    def build(*, meta=False):
        return build_classifier("mlp-6", table, seed=0, meta=meta)

    warm = WarmBuild(build, [teacher], table)
    made, again = warm(), warm()
    inputs = made.feed(table.raw(torch.arange(len(table))))
    expected = started(build().model, above.model, inputs)
    assert warm.origin == "large" and warm.share > 0.5
    for one, other, known in zip(made.model.parameters(), again.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one, known)
    assert warm.describe()["fitted"] and "fitted" not in WarmBuild(build, [], table).describe()


def test_a_teacher_that_reads_the_columns_in_another_order_is_no_start():
    from datasets import Dataset

    from hf_hpmkd.tasks import TableRows
    from hf_hpmkd.teacher_kinds import TorchTeacher

    columns = {"age": [2.0, 3.0, 4.0, 5.0], "size": [9.0, 7.0, 1.0, 0.0], "label": [0, 1, 0, 1]}
    table, turned = (
        TableRows.from_dataset(Dataset.from_dict({name: columns[name] for name in names}), None, "label", ["no", "yes"])
        for names in (["age", "size", "label"], ["size", "age", "label"])
    )
    teachers = [
        TorchTeacher.of(name, build_classifier("mlp-32x32", rows, seed=1), table, device="cpu")
        for name, rows in (("turned", turned), ("straight", table))
    ]

    def build(*, meta=False):
        return build_classifier("mlp-6", table, seed=0, meta=meta)

    assert not WarmBuild(build, teachers[:1], table).can_start
    both = WarmBuild(build, teachers, table)
    assert both.can_start and both() is not None and both.origin == "straight"


def test_a_teacher_of_another_vocabulary_keeps_its_words():
    from datasets import Dataset

    from hf_hpmkd.tasks.text import TextRows
    from hf_hpmkd.teacher_kinds import TorchTeacher

    def texts(words):
        dataset = Dataset.from_dict({"label": [0, 1] * 6})
        return TextRows(
            dataset, [f"{words[i % 4]} {words[(i + 1) % 4]}" for i in range(12)], [0, 1] * 6, ["cat", "dog"]
        )

    own, foreign = texts(["aa", "bb", "cc", "dd"]), texts(["ee", "ff", "gg", "hh"])
    above = [build_classifier("bert-1x16", rows, seed=1) for rows in (own, foreign)]
    assert len({len(one.feed.processor) for one in above}) == 1  # of one size

    def started_from(teacher):
        warm = WarmBuild(lambda meta=False: build_classifier("bert-1x16", own, seed=0, meta=meta), [teacher], own)
        return warm().model.get_input_embeddings().weight, warm.describe()

    teachers = [
        TorchTeacher.of(name, one, own, device="cpu") for name, one in zip(("own", "foreign"), above, strict=True)
    ]
    (taken, known), (kept, told) = (started_from(teacher) for teacher in teachers)
    assert torch.equal(taken, above[0].model.get_input_embeddings().weight) and "other_vocabulary" not in known
    unborn = build_classifier("bert-1x16", own, seed=0).model.get_input_embeddings().weight
    assert torch.equal(kept, unborn) and told["other_vocabulary"]
