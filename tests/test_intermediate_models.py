"""Models between teacher and student: the grid, sizes that are met, names that build what was counted, and failures."""

import json
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_classifiers import ANIMALS, image_rows, table_rows, text_rows
from transformers import BertConfig, ConvNextConfig, DistilBertConfig, Qwen3Config, ResNetConfig, ViTConfig

import hf_hpmkd.intermediate_models as intermediate_models
from hf_hpmkd.classifiers import build_classifier, count_parameters
from hf_hpmkd.intermediate_models import (
    SMALLER_TOLERANCE,
    TOLERANCE,
    Intermediate,
    find_intermediates,
    find_smaller,
    geometric_sizes,
)
from hf_hpmkd.model_names import split_variant, with_variant
from hf_hpmkd.model_shapes import attention_width, read_shape, round_width
from hf_hpmkd.models import CifarResNetConfig, CifarResNetForImageClassification, load_cifar_resnet_file
from hf_hpmkd.tasks.images import ImageFeed
from hf_hpmkd.tasks.text import train_tokenizer

IMAGES = image_rows(32, 32)[0]


def sized(rows, *names):
    return [(name, count_parameters(name, rows)) for name in names]


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_geometric_sizes():
    assert geometric_sizes(1000, 10, 1) == [100]
    assert geometric_sizes(10**6, 10**2, 3) == [10**5, 10**4, 10**3]
    assert geometric_sizes(1000, 10, 0) == []
    sizes = [853_018, *geometric_sizes(853_018, 75_290, 4), 75_290]  # |θ_i| = |θ_T| (|θ_S| / |θ_T|)^(i / 5)
    for i, size in enumerate(sizes):
        assert size == pytest.approx(853_018 ** (1 - i / 5) * 75_290 ** (i / 5), abs=1)


@pytest.mark.parametrize(
    ("largest", "smallest", "count", "message"),
    [
        (10, 10, 1, "from a larger model to a smaller one, got 10 and 10"),
        (9, 10, 0, "got 9 and 10 parameters.*chain.length to 0"),
        (9, 0, 1, "got 9 and 0"),
        (10, 9, -1, "0 or more, got -1"),
    ],
)
def test_no_grid(largest, smallest, count, message):
    with pytest.raises(ValueError, match=message):
        geometric_sizes(largest, smallest, count)


# ---- families --------------------------------------------------------------------------------------------------------

SWIN = "timm/swin_tiny_patch4_window7_224"
CASES = {  # rows, student, teacher, how many
    "cifar-resnet by depth": (lambda: IMAGES, "cifar-resnet-8", "cifar-resnet-56", 2),
    "cifar-resnet by width": (lambda: IMAGES, "cifar-resnet-14x8", "cifar-resnet-14x64", 3),
    "mlp": (table_rows, "mlp-8x4", "mlp-64x64x32", 3),
    "mlp of one layer": (table_rows, "mlp-16", "mlp-128", 2),
    "bert": (text_rows, "bert-1x32", "bert-4x256", 3),
    "timm resnet": (lambda: IMAGES, "timm/resnet10t", "timm/resnet50", 2),
    "timm resnetv2": (lambda: IMAGES, "timm/resnetv2_18", "timm/resnetv2_34", 1),
    "timm convnext": (lambda: IMAGES, "timm/convnext_atto", "timm/convnext_nano", 1),
    "timm vit": (lambda: IMAGES, "timm/vit_tiny_patch16_224", "timm/vit_small_patch16_224", 1),
    "timm deit3": (lambda: IMAGES, "timm/deit3_small_patch16_224", "timm/deit3_medium_patch16_224", 1),
    "timm swin": (lambda: IMAGES, SWIN + "[depths=1x1x2x1,embed_dim=48]", SWIN + "[depths=2x2x4x2]", 2),
    "timm densenet": (lambda: IMAGES, "timm/densenet121[block_config=2x2x2x2]", "timm/densenet121", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_families(case, monkeypatch):
    rows, student, teacher, count = CASES[case]
    rows = rows()
    sizes = sized(rows, student, teacher)
    builds = []
    monkeypatch.setattr(
        intermediate_models,
        "build_classifier",
        lambda *args, **kw: builds.append(args) or build_classifier(*args, **kw),
    )
    found = find_intermediates(student, sizes[1:], rows, count)
    assert len(builds) <= 2 + 30 * count
    check_chain(found, sizes[1][1], sizes[0][1], rows, count)
    ends = [shape_of(name, rows) for name in (student, teacher)]
    for one in found:
        shape = shape_of(one.name, rows)
        assert shape.kind == ends[0].kind and split_variant(one.name)[0].startswith(split_variant(student)[0][:4])
        for part in ("depths", "widths"):  # neither very deep nor very wide
            small, large = (math.prod(getattr(end, part)) ** (1 / len(getattr(end, part))) for end in ends)
            mean = math.prod(getattr(shape, part)) ** (1 / len(getattr(shape, part)))
            assert 0.75 * min(small, large) <= mean <= 1.35 * max(small, large), (one, part)


def shape_of(name, rows):
    return read_shape(name, build_classifier(name, rows, meta=True).model)


def check_chain(found, largest, smallest, rows, count, tolerance=TOLERANCE):
    assert len(found) == count
    sizes = [largest, *(one.num_params for one in found), smallest]
    assert all(above > below for above, below in zip(sizes, sizes[1:], strict=False))
    for i, one in enumerate(found, start=1):
        assert one.target == round(largest * (smallest / largest) ** (i / (count + 1)))
        assert abs(one.num_params / one.target - 1) <= tolerance
        assert count_parameters(one.name, rows) == one.num_params
        assert with_variant(*split_variant(one.name)) == one.name  # one model has one name


def test_sizes_of_a_perceptron_by_hand():
    rows = table_rows()
    found = find_intermediates("mlp-8x4", sized(rows, "mlp-64x64"), rows, 3)
    for one in found:
        # One number, a category of three codes as round(1.6 * 3^0.56) = 3 numbers, two classes.
        widths = [1 + 3, *map(int, one.name.removeprefix("mlp-").split("x")), 2]
        layers = sum(a * b + b for a, b in zip(widths, widths[1:], strict=False))
        assert one.num_params == 3 * 3 + layers


FOLDERS = {
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [3, 3]},
    ),
    "convnext": (
        ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1]),
        {"hidden_sizes": [24, 48, 96, 192], "depths": [2, 2, 4, 2]},
    ),
    "vit": (
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32),
        {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 384},
    ),
    "bert": (
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100),
        {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 512},
    ),
    "distilbert": (
        DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=100),
        {"dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 512},
    ),
    "qwen3": (
        Qwen3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    intermediate_size=64, vocab_size=100, pad_token_id=0),
        {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 256, "layer_types": ["full_attention"] * 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_transformers_configs(kind, tmp_path):
    config, larger = FOLDERS[kind]
    images = kind in ("resnet", "convnext", "vit")
    rows = IMAGES if images else text_rows()
    folders = [tmp_path / "student", tmp_path / "teacher"]
    for folder, sizes in zip(folders, ({}, larger), strict=True):
        type(config).from_dict({**config.to_dict(), **sizes}).save_pretrained(folder)
        if images:
            ImageFeed((32, 32), (0.5,) * 3, (0.5,) * 3).processor.save_pretrained(folder)
        else:
            train_tokenizer(["a dull film", "a fine film"], 100).save_pretrained(folder)
    small, large = (count_parameters(str(folder), rows) for folder in folders)
    found = find_intermediates(str(folders[0]), [(str(folders[1]), large)], rows, 2)
    check_chain(found, large, small, rows, 2)
    built = build_classifier(found[0].name, rows)
    assert built.num_params == found[0].num_params and built.model.config.model_type == kind
    with torch.no_grad():
        assert built.model.eval()(**built.feed(rows.raw([0, 1]))).logits.shape == (2, len(rows.class_names))
    if kind == "qwen3":
        config = built.model.config
        assert config.num_attention_heads == 2 * config.num_key_value_heads and config.head_dim == 16
        assert len(config.layer_types) == config.num_hidden_layers


@pytest.mark.parametrize("count", [1, 2])
def test_named_variants_are_the_nearest(count):
    student, teacher = sized(IMAGES, "timm/lcnet_035", "timm/lcnet_150")
    found = find_intermediates(student[0], [teacher], IMAGES, count)
    sizes = {}
    for name in ("lcnet_050", "lcnet_075", "lcnet_100"):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=3)
        sizes[f"timm/{name}"] = sum(parameter.numel() for parameter in model.parameters())
    targets = geometric_sizes(teacher[1], student[1], count)
    nearest = [min(sizes, key=lambda name: abs(math.log(sizes[name] / target))) for target in targets]
    assert found == [Intermediate(n, sizes[n], t) for n, t in zip(nearest, targets, strict=True)]


def test_named_variants_do_not_stand_on_one_spot():
    """mobilenetv3_large_100 and mobilenetv3_rw differ by 3,000 parameters, no stage of a chain: the teacher shrinks."""
    student, teacher = sized(IMAGES, "timm/mobilenetv3_small_100", "timm/resnet18")
    found = find_intermediates(student[0], [teacher], IMAGES, 3)
    check_chain(found, teacher[1], student[1], IMAGES, 3)
    assert all(one.name.startswith("timm/resnet18[") for one in found)
    two = find_intermediates(student[0], [teacher], IMAGES, 2)
    assert all(one.name.startswith("timm/mobilenetv3") for one in two)


# ---- teachers --------------------------------------------------------------------------------------------------------


def weights_file(folder, depth, width):
    model = CifarResNetForImageClassification(CifarResNetConfig(depth, width, num_labels=3))
    save_file(model.state_dict(), folder / "net.safetensors")
    card = {"architecture": {"depth": depth}, "classes": ANIMALS}
    (folder / "net.json").write_text(json.dumps(card))
    return str(folder / "net.safetensors"), load_cifar_resnet_file(folder / "net.safetensors").num_parameters()


def test_a_weights_file_tells_its_depth_and_width(tmp_path):
    teacher = weights_file(tmp_path, 50, 4)
    by_file = find_intermediates("cifar-resnet-8x4", [teacher], IMAGES, 2)
    by_name = find_intermediates("cifar-resnet-8x4", [("cifar-resnet-50x4", teacher[1])], IMAGES, 2)
    assert by_file == by_name
    check_chain(by_file, teacher[1], count_parameters("cifar-resnet-8x4", IMAGES), IMAGES, 2)
    assert {CifarResNetConfig(*map(int, one.name[13:].split("x"))).width for one in by_file} <= {4, 5}


@pytest.mark.parametrize("teacher", ["sklearn:MLPClassifier", "nowhere.safetensors", "no-such/model"])
def test_teachers_of_unknown_shape(teacher):
    """Depth and width then grow together, from the student."""
    rows = text_rows()
    student = count_parameters("bert-2x32", rows)
    found = find_intermediates("bert-2x32", [(teacher, 30 * student)], rows, 2)
    check_chain(found, 30 * student, student, rows, 2)
    layers = [int(one.name.split("-")[1].split("x")[0]) for one in found]
    assert 6 >= layers[0] >= layers[1] >= 2 and layers[0] > 2


def test_a_perceptron_grows_wide_rather_than_deep():
    rows = table_rows()
    found = find_intermediates("mlp-16", [("sklearn:MLPClassifier", 200_000)], rows, 1)
    check_chain(found, 200_000, count_parameters("mlp-16", rows), rows, 1)
    assert found[0].name.count("x") in (0, 1)


def test_the_largest_teacher_counts():
    rows = IMAGES
    sizes = sized(rows, "cifar-resnet-20", "cifar-resnet-56", "cifar-resnet-32")
    found = find_intermediates("cifar-resnet-8", sizes, rows, 1)
    assert found == find_intermediates("cifar-resnet-8", [sizes[1]], rows, 1)


def test_none_are_wanted():
    assert find_intermediates("cifar-resnet-56", [], IMAGES, 0) == []


# ---- a smaller one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "name", "times"),
    [
        (lambda: IMAGES, "cifar-resnet-56", 1.5),
        (lambda: IMAGES, "cifar-resnet-56", 11),
        (lambda: IMAGES, "timm/resnet34", 10),
        (lambda: IMAGES, "timm/deit3_small_patch16_224", 4),
        (table_rows, "mlp-64x64x32", 8),
        (text_rows, "bert-4x256", 20),
    ],
)
def test_so_many_times_smaller(rows, name, times):
    rows = rows()
    size = count_parameters(name, rows)
    found, index = find_smaller([(name, {})], rows, times)
    assert index == 0 and found.target == round(size / times)
    assert found.num_params == count_parameters(found.name, rows) == pytest.approx(size / times, rel=TOLERANCE)
    assert found.name.rstrip("0123456789x") == name.rstrip("0123456789x") or found.name.startswith(f"{name}[")


def test_it_is_like_the_largest(tmp_path):
    file, _ = weights_file(tmp_path, 50, 4)
    found, index = find_smaller([("cifar-resnet-8", {}), (file, {})], IMAGES, 3)
    assert index == 0 and found.name.startswith("cifar-resnet-")  # 50 layers of four channels are fewer parameters
    found, index = find_smaller([(file, {}), ("timm/lcnet_150", {})], IMAGES, 3)
    assert (found.name, index) == ("timm/lcnet_075", 1)  # a family without sizes has named relatives


def test_relatives_by_another_name_are_looked_at_where_those_by_this_one_do_not_fit():
    found, _ = find_smaller([("timm/mobilenetv3_large_100", {})], IMAGES, 4)
    assert found.name == "timm/mobilenetv3_small_075"
    assert found.num_params == pytest.approx(found.target, rel=SMALLER_TOLERANCE - 1)


def test_none_is_so_many_times_smaller():
    found_none = r"No model like mlp-64 \(\d+ parameters\) is about 100000 times smaller \(1\)\. Tried: mlp-"
    with pytest.raises(ValueError, match=found_none):
        find_smaller([("mlp-64", {})], table_rows(), 1e5)
    with pytest.raises(
        ValueError, match=r"ghostnet_100 \([\d,]+ parameters\) is about 8 times smaller .*Tried: timm/ghost"
    ):
        find_smaller([("timm/ghostnet_100", {})], IMAGES, 8)
    with pytest.raises(ValueError, match="none of the teachers is a network. Name a student"):
        find_smaller([], IMAGES, 10)


def test_a_teacher_that_cannot_be_built_is_not_passed_over():
    """It may be the largest, and another time it may be there."""
    with pytest.raises(
        ValueError, match=r"(?s)takes all of them, and no-such/model cannot be built here: .*name a student"
    ):
        find_smaller([("cifar-resnet-20", {}), ("no-such/model", {})], IMAGES, 10)
    with pytest.raises(ValueError, match=r"cifar-resnet-8 cannot be built here: .*data\.input_column=COLUMN"):
        find_smaller([("cifar-resnet-8", {})], table_rows(), 2)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_nothing_fits():
    rows = table_rows()
    with pytest.raises(
        ValueError,
        match=r"Between 'mlp-1' \(\d+ parameters\) and 'mlp-2' \(\d+ parameters\) no chain of 2 models can be built\. "
        r"Tried: mlp-.* \(\d+\).*Set chain\.models to names of your own, or chain\.length to 0",
    ):
        find_intermediates("mlp-1", sized(rows, "mlp-2"), rows, 2)
    with pytest.raises(ValueError, match=r"Tried: sklearn:SVC: cannot be built here \(.*teacher only.*; mlp-"):
        find_intermediates("mlp-1", [("sklearn:SVC", count_parameters("mlp-1", rows) + 1)], rows, 1)


def test_families_without_sizes_say_so():
    with pytest.raises(ValueError, match=r"(?s)Tried: a/b: cannot be .*timm/ghostnet_130 \([\d,]+\)"):
        find_intermediates("timm/ghostnet_100", [("a/b", 10**9)], IMAGES, 8)


def test_the_student_must_be_the_smaller_one():
    with pytest.raises(ValueError, match=r"from a larger model to a smaller one.*smaller student or a larger teacher"):
        find_intermediates("cifar-resnet-20", sized(IMAGES, "cifar-resnet-8"), IMAGES, 1)
    with pytest.raises(ValueError, match="Set chain.models to names of your own"):
        find_intermediates("cifar-resnet-20", [], IMAGES, 1)


# ---- widths ----------------------------------------------------------------------------------------------------------


def test_widths_are_rounded_finely_enough():
    assert [round_width(width) for width in (0.2, 7.4, 15.6, 33, 66, 70, 130, 1000, 1005)] == [
        1, 7, 16, 32, 64, 72, 128, 992, 1008
    ]  # fmt: skip
    assert all(abs(round_width(w / 10) / (w / 10) - 1) <= 1 / 14 for w in range(70, 40_000, 7))


@pytest.mark.parametrize(("head_size", "group"), [(64, 1), (32, 1), (16, 2), (8, 1), (5, 1)])
def test_attention_widths(head_size, group):
    for width in range(2 * head_size * group, 1200, 13):
        rounded, heads = attention_width(width, head_size, group)
        assert rounded % heads == 0 and heads % group == 0
        assert 0.74 <= rounded / heads / head_size <= 1.34
        assert abs(rounded / width - 1) < 0.35
    assert attention_width(4 * head_size * group, head_size, group) == (4 * head_size * group, 4 * group)
