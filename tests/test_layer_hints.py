"""Layer hints: which layers are a pair, how far apart they are, and what a training does with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_classifiers import image_rows, table_rows, text_rows

from hf_hpmkd.chain_stages import WarmBuild, require_hints
from hf_hpmkd.classifier_training import student_schedule, train_or_load
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.cli import main
from hf_hpmkd.components.adaptive_configuration import DIRECT
from hf_hpmkd.layer_hints import HintPoint, LayerHints, hint_points, layer_hint_loss
from hf_hpmkd.recipe import RecipeError, fingerprint, read_recipe
from hf_hpmkd.recipe_configuration import overrides_of
from hf_hpmkd.run_record import RunRecord
from hf_hpmkd.tasks.base import UNAUGMENTED
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.trainer import HPMKDTrainer
from hf_hpmkd.warm_start import warm_start

IMAGES = image_rows(8, 8)[0]
VIEWS = torch.full((6,), UNAUGMENTED)


def built(name, rows=IMAGES, seed=0, **options):
    return build_classifier(name, rows, seed=seed, **options)


def teacher(name, rows=IMAGES, seed=1):
    return TorchTeacher.of(name, built(name, rows, seed), rows)


@pytest.mark.parametrize(
    ("rows", "student", "above", "pairs"),
    [
        (IMAGES, "cifar-resnet-8", "cifar-resnet-20", [("layer1.0", "layer1.2"), ("layer2.0", "layer2.2")]),
        # 5 layers above to 2 below: the second part begins after two and a half, halves up.
        (IMAGES, "cifar-resnet-14", "cifar-resnet-32", [("layer1.0", "layer1.2"), ("layer1.1", "layer1.4")]),
        (IMAGES, "cifar-resnet-20", "cifar-resnet-8", [("layer1.2", "layer1.0"), ("layer2.2", "layer2.0")]),
        (
            IMAGES,
            "timm/resnet18",
            "timm/resnet34",
            [("timm_model.layer1.0", "timm_model.layer1.1"), ("timm_model.layer1.1", "timm_model.layer1.2")],
        ),
        (IMAGES, "timm/efficientnet_b0", "timm/efficientnet_b1", [("timm_model.blocks.0", "timm_model.blocks.0")]),
        (text_rows(), "bert-1x64", "bert-2x128", [("bert.encoder.layer.0", "bert.encoder.layer.1")]),
        (table_rows(), "mlp-16", "mlp-32x32", []),
        (IMAGES, "cifar-resnet-8", "timm/resnet18", []),
    ],
)
def test_last_layers_of_equal_parts_are_pairs(rows, student, above, pairs):
    found = hint_points(built(student, rows, meta=True).model, built(above, rows, meta=True).model)
    assert found[: len(pairs)] == [HintPoint(*pair) for pair in pairs]
    assert bool(found) == bool(pairs)


def test_the_loss_is_in_variances_of_what_is_above():
    torch.manual_seed(0)
    student, above = torch.randn(5, 4, 3, 3), 3 + 2 * torch.randn(5, 4, 3, 3)
    expected = ((student - above).numpy() ** 2).reshape(5, -1).mean(1) / above.numpy().var()
    np.testing.assert_allclose(layer_hint_loss(student, above).numpy(), expected, rtol=1e-5)
    assert layer_hint_loss(above, above).abs().max() == 0
    guessed = torch.full_like(above, float(above.mean()))
    assert float(layer_hint_loss(guessed, above).mean()) == pytest.approx(1, rel=1e-5)
    assert torch.isfinite(layer_hint_loss(torch.zeros(2, 3), torch.ones(2, 3))).all()  # nothing varies


def test_padding_does_not_count():
    torch.manual_seed(0)
    student, above = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    seen = [above[0, :3].reshape(-1), above[1, :2].reshape(-1)]
    variance = torch.cat(seen).numpy().var()
    expected = [
        float((student[0, :3] - above[0, :3]).pow(2).mean()) / variance,
        float((student[1, :2] - above[1, :2]).pow(2).mean()) / variance,
    ]
    np.testing.assert_allclose(layer_hint_loss(student, above, mask).numpy(), expected, rtol=1e-5)


def without_chance(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_a_student_that_is_the_model_above_has_no_hint_left_and_another_one_has():
    rows = text_rows()
    above = TorchTeacher.of("above", built("bert-2x16", rows, 1), rows)
    above.model.eval()
    same = built("bert-2x16", rows, 1)
    for student, far in ((same, False), (built("bert-1x16", rows, 2), True)):
        without_chance(student.model).train()
        hints = LayerHints(student.model, above, rows, student.feed, weight=2.0, share=0.5)
        inputs = student.feed(rows.raw(torch.arange(6)))
        student.model(**inputs)
        found = hints.losses(torch.arange(6), VIEWS, inputs)
        assert found.shape == (6,) and bool((found > 1e-3).all()) == far and bool((found < 1e-8).all()) != far
        if far:
            found.sum().backward()
            assert student.model.bert.encoder.layer[0].output.dense.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in above.model.parameters())
        hints.close()


def test_a_narrower_student_is_drawn_to_the_channels_that_it_began_with():
    above, student = teacher("cifar-resnet-14x8"), built("cifar-resnet-8x4")
    warm_start(student.model, above.model)
    hints = LayerHints(student.model, above, IMAGES, student.feed, weight=1.0, share=0.5)
    seen = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, out, key=key: seen.__setitem__(key, out.detach()))
        for key, model, path in (
            *((("ours", i), student.model, f"layer{i}.0") for i in (1, 2, 3)),
            *((("theirs", i), above.model, f"layer{i}.1") for i in (1, 2, 3)),
        )
    ]
    student.model.train()
    inputs = student.feed(IMAGES.raw(torch.arange(6)))
    student.model(**inputs)
    found = hints.losses(torch.arange(6), VIEWS, inputs)
    # Shortcuts put zero channels on both sides of a stage's: a quarter of what they lead to before, a quarter behind.
    second = [0, 1, *(4 + channel for channel in range(4)), 12, 13]
    third = [0, 1, 2, 3, *(8 + channel for channel in second), 24, 25, 26, 27]
    expected = [
        layer_hint_loss(seen["ours", stage], seen["theirs", stage][:, channels])
        for stage, channels in zip((1, 2, 3), ([0, 1, 2, 3], second, third), strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected).mean(0))
    for handle in handles:
        handle.remove()
    student.model.eval()
    student.model(**inputs)
    with pytest.raises(ValueError, match="no forward pass"):  # of a student that is judged nothing is kept
        hints.losses(torch.arange(6), VIEWS, inputs)
    hints.close()


@pytest.mark.parametrize(
    ("student", "above", "said"),
    [
        ("mlp-16", "mlp-32x32", "none in common"),
        ("cifar-resnet-8", "timm/resnet18", "none in common"),
    ],
)
def test_models_without_common_rows_are_refused(student, above, said):
    rows = table_rows() if student.startswith("mlp") else IMAGES
    one = built(student, rows)
    with pytest.raises(ValueError, match=said):
        LayerHints(one.model, teacher(above, rows), rows, one.feed, 1.0, 0.5)


def test_padding_reaches_the_loss():
    rows = text_rows()
    above, student = teacher("bert-2x16", rows), built("bert-1x16", rows)
    without_chance(student.model).train()
    hints = LayerHints(student.model, above, rows, student.feed, weight=1.0, share=0.5)
    inputs = student.feed(rows.raw(torch.arange(6)))
    mask = inputs["attention_mask"]
    assert not mask.all() and mask.any()  # texts of unlike length
    student.model(**inputs)
    found = hints.losses(torch.arange(6), VIEWS, inputs)
    states = [
        model(**inputs, output_hidden_states=True).hidden_states[-1].detach() for model in (student.model, above.model)
    ]
    torch.testing.assert_close(found.detach(), layer_hint_loss(*states, mask))
    assert not torch.allclose(found.detach(), layer_hint_loss(*states))
    hints.close()


def test_tokens_are_no_channels():
    rows = text_rows()
    above, student = teacher("bert-2x16", rows), built("bert-1x16", rows)
    hints = LayerHints(without_chance(student.model).train(), above, rows, student.feed, weight=1.0, share=0.5)
    inputs = student.feed(rows.raw(torch.arange(6)))
    student.model(**{name: value[:, :-1] for name, value in inputs.items()})
    with pytest.raises(ValueError, match="one shape but for their channels"):
        hints.losses(torch.arange(6), VIEWS, inputs)
    hints.close()


def test_other_shapes_and_other_words_are_refused():
    rows, more = text_rows(), text_rows()
    more = more.subset(range(4))  # some words are missing, so a token id means another one
    one = built("bert-1x16", rows)
    with pytest.raises(ValueError, match="reads other tokens"):
        LayerHints(one.model, teacher("bert-2x16", more), rows, one.feed, 1.0, 0.5)
    student, above = built("cifar-resnet-8"), teacher("cifar-resnet-14")
    hints = LayerHints(student.model, above, IMAGES, student.feed, 1.0, 0.5)
    inputs = student.feed(IMAGES.raw(torch.arange(6)))
    student.model.train()(inputs["pixel_values"][:, :, ::2, ::2])  # a student of smaller images
    with pytest.raises(ValueError, match="one shape but for their channels"):
        hints.losses(torch.arange(6), VIEWS, inputs)


# ---- in a training ---------------------------------------------------------------------------------------------------


def recipe(**distillation):
    tree = {
        "data": {"path": "sklearn:digits"},
        "teachers": [{"model": "cifar-resnet-14x4"}],
        "student": {"model": "cifar-resnet-8x4"},
        "distillation": {"gate": "uniform", "calibrate_teachers": False, **distillation},
        "training": {"epochs": 2, "batch_size": 6, "learning_rate": 0.01, "optimizer": "sgd", "log_every": 1},
    }
    return read_recipe(tree, "a test")


def trained(folder: Path, asked, teachers=(), above=None, **more):
    above = above or teacher("cifar-resnet-14x4")
    build = WarmBuild(lambda meta=False: built("cifar-resnet-8x4", meta=meta), [above], IMAGES)
    return train_or_load(
        "student", build, asked, student_schedule(asked), folder, IMAGES, IMAGES, teachers=list(teachers), **more
    )


def weights(one):
    return torch.cat([parameter.detach().flatten() for parameter in one.classifier.model.parameters()])


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_hints_are_given_in_their_share_of_the_training(tmp_path: Path, alpha: float) -> None:
    teachers = [teacher("cifar-resnet-14x4")] if alpha else []
    plain = trained(tmp_path / "plain", recipe(alpha=alpha), teachers)
    steps = plain.steps
    hinted = trained(tmp_path / "hinted", recipe(alpha=alpha, hint_weight=1, hint_share=0.5), teachers)
    assert not torch.allclose(weights(plain), weights(hinted))
    logged = {row["step"]: "hint_loss" in row for row in hinted.curve if "loss" in row}
    assert logged == {step: step <= steps / 2 for step in range(1, steps + 1)}
    assert not any("hint_loss" in row for row in plain.curve)
    assert all(row["hint_loss"] > 0 for row in hinted.curve if "hint_loss" in row)


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_a_hint_counts_as_its_rows_do_in_an_accumulated_step(tmp_path: Path, monkeypatch, alpha: float) -> None:
    counted, original = [], HPMKDTrainer._hint_term

    def hint_term(self, rows, views, inputs, num_items):
        counted.append((len(rows), num_items))
        return original(self, rows, views, inputs, num_items)

    monkeypatch.setattr(HPMKDTrainer, "_hint_term", hint_term)
    asked = recipe(alpha=alpha, hint_weight=1, hint_share=1)
    asked = replace(asked, training=replace(asked.training, gradient_accumulation_steps=2))
    trained(tmp_path / "one", asked, [teacher("cifar-resnet-14x4")] if alpha else [])
    assert len(counted) > 2 and sum(rows for rows, _ in counted[:2]) == int(counted[0][1]) == int(counted[1][1])


@pytest.mark.parametrize(("share", "stop_at"), [(1, None), (0.5, None), (1, 2)])
def test_after_a_training_nothing_listens_to_the_teacher(tmp_path: Path, share: float, stop_at: int | None) -> None:
    above = teacher("cifar-resnet-14x4")
    found = trained(tmp_path / "one", recipe(alpha=0, hint_weight=1, hint_share=share), above=above, stop_at=stop_at)
    assert found.steps == (stop_at or found.steps)
    assert any("hint_loss" in row for row in found.curve)
    assert not any(module._forward_hooks for module in above.model.modules())


def test_a_student_must_begin_with_layers_that_have_hints() -> None:
    asked = recipe(hint_weight=1)

    def begins(*teachers):
        return WarmBuild(lambda meta=False: built("cifar-resnet-8x4", meta=meta), teachers, IMAGES)

    require_hints(asked, begins(teacher("cifar-resnet-14x4")))
    require_hints(recipe(), begins())
    with pytest.raises(ValueError, match="got no network for cifar-resnet-8x4"):
        require_hints(asked, begins())
    with pytest.raises(ValueError, match="got timm/resnet18 for cifar-resnet-8x4"):
        require_hints(asked, begins(teacher("timm/resnet18")))


def test_labels_alone_have_no_hints_where_auto_tries_them() -> None:
    assert overrides_of(DIRECT, recipe(hint_weight=1))["distillation"]["hint_weight"] == 0
    assert "hint_weight" not in overrides_of(replace(DIRECT, alpha=0.5), recipe(hint_weight=1))["distillation"]


def test_nothing_is_hinted_from_nowhere(tmp_path: Path) -> None:
    """A student that begins with no teacher's layers (direct training) is trained as if there were no hints."""
    asked = recipe(alpha=0, hint_weight=1)
    direct = train_or_load(
        "direct", lambda: built("cifar-resnet-8x4"), asked, student_schedule(asked), tmp_path / "a", IMAGES, IMAGES
    )
    plain = recipe(alpha=0)
    other = train_or_load(
        "direct", lambda: built("cifar-resnet-8x4"), plain, student_schedule(plain), tmp_path / "b", IMAGES, IMAGES
    )
    assert torch.equal(weights(direct), weights(other))


def test_a_stopped_training_goes_on_to_the_same_student(tmp_path: Path) -> None:
    asked = recipe(alpha=0, hint_weight=1, hint_share=0.75)
    whole = trained(tmp_path / "whole", asked)
    half = whole.steps // 2
    assert half >= 1
    trained(tmp_path / "parts", asked, stop_at=half)
    again = trained(tmp_path / "parts", asked)
    assert again.steps == whole.steps and torch.allclose(weights(whole), weights(again), atol=1e-6)


# ---- in a recipe -----------------------------------------------------------------------------------------------------


def tree(student="cifar-resnet-8", teachers=("cifar-resnet-20",), pretrained=False, **sections):
    return {
        "data": {"path": "somewhere"},
        "teachers": [{"model": one} for one in teachers],
        "student": {"model": student, "pretrained": pretrained},
        "distillation": {"hint_weight": 1},
        **sections,
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (tree(chain={"warm_start": False}), "chain.warm_start is false"),
        (tree("timm/resnet18", ("timm/resnet34",), pretrained=True), "student.pretrained is true"),
        (tree("mlp-16", ("mlp-256x256",)), "the layers of an MLP are fitted"),
        (tree("cifar-resnet-8", ("timm/resnet18", "sklearn:SVC")), "no teacher is of the family of cifar-resnet"),
        (tree("bert-1x64", ("sklearn:LogisticRegression",)), "no teacher is of the family of bert-1x64"),
        (tree(chain={"models": ["cifar-resnet-14"]}), "with a chain it begins with those of its last stage"),
        (tree(chain={"length": "auto"}), "with a chain it begins with those of its last stage"),
        (tree(distillation={"hint_weight": 1, "alpha": 0}, auto="fast"), "labels alone .alpha 0. without hints"),
    ],
)
def test_a_student_that_surely_begins_with_no_layers_is_a_fault(asked, said):
    with pytest.raises(RecipeError, match=said):
        read_recipe(asked, "a test")


@pytest.mark.parametrize(
    "asked",
    [
        tree(),
        tree("cifar-resnet-8", ("a.safetensors", "sklearn:SVC")),
        tree("bert-1x64", ("USER/MODEL",)),
        tree("USER/SMALL", ("USER/LARGE",)),
        tree("cifar-resnet-8", ("./a/folder",)),
        tree("./a/folder", ("cifar-resnet-20",)),
        tree(auto="fast"),
    ],
)
def test_one_that_may_is_none(asked):
    assert read_recipe(asked, "a test").distillation.hint_weight == 1


def test_without_hints_a_recipe_is_the_one_of_before():
    plain = tree() | {"distillation": {}}
    other = tree() | {"distillation": {"hint_share": 0.25}}  # which decides nothing then
    assert fingerprint(read_recipe(plain, "a test")) == fingerprint(read_recipe(other, "a test"))
    shares = [tree() | {"distillation": {"hint_weight": 1, "hint_share": share}} for share in (0.25, 0.5)]
    assert len({fingerprint(read_recipe(one, "a test")) for one in [plain, *shares]}) == 3


def test_a_run_with_hints_says_so(tmp_path: Path) -> None:
    asked = {
        "data": {"path": "sklearn:digits", "views": 2, "max_train_rows": 200},
        "teachers": [{"model": "cifar-resnet-14x4", "epochs": 1}],
        "student": {"model": "cifar-resnet-8x4"},
        "distillation": {"hint_weight": 4, "keep": "distilled"},
        "training": {"epochs": 2, "batch_size": 64, "learning_rate": 0.01, "log_every": 1},
        "output": {"dir": str(tmp_path / "run")},
        "memory": {"use": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 0
    record = RunRecord.load(tmp_path / "run" / "run_record.json")
    assert any("hint_loss" in row for row in record.curves["student"])
    assert not any("hint_loss" in row for row in record.curves["direct"])
    assert record.distils and record.began_with == "cifar-resnet-14x4"
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "outputs of one teacher and the layers of its teacher `cifar-resnet-14x4` with `hf_hpmkd`" in card
    assert "- layer hints: those of `cifar-resnet-14x4`, in the first 50% of the steps\n" in card
    assert json.loads((tmp_path / "run" / "run_record.json").read_text())["recipe"]["distillation"]["hint_weight"] == 4
