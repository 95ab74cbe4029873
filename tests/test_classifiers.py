"""Names to models: what each form builds, that seeds and heads behave, and that wrong names say what is right."""

import json

import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Qwen3Config,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    TimmWrapperForImageClassification,
)

from hf_hpmkd.classifiers import (
    _with_tag,
    attention_heads,
    build_classifier,
    count_parameters,
    parse_name,
    pixel_statistics,
)
from hf_hpmkd.model_names import split_variant, with_variant
from hf_hpmkd.models import CifarResNetForImageClassification, TabularForClassification
from hf_hpmkd.tasks.images import ImageFeed, ImageRows, ProcessorFeed
from hf_hpmkd.tasks.tables import TableRows
from hf_hpmkd.tasks.text import TextRows, train_tokenizer

IMAGE, TEXT, TABLE = "image-classification", "text-classification", "tabular-classification"
ANIMALS = ["cat", "dog", "owl"]


def image_rows(height=8, width=8, grey=False, names=ANIMALS, count=12):
    random = np.random.default_rng(0)
    shape = (count, height, width) if grey else (count, height, width, 3)
    pixels = random.integers(0, 256, shape, dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    labels = [row % len(names) for row in range(count)]
    data = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": labels}
    return ImageRows.from_dataset(Dataset.from_dict(data, features=features), "image", "label", names), pixels


def text_rows(names=("bad", "good"), **more):
    texts = ["a dull film", "a fine film", "dull dull dull", "fine and short", "dull and long", "a film"] * 2
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    data = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(12)]}, features=features)
    return TextRows.from_dataset(data, "text", "label", list(names), **more)


def table_rows():
    data = {"age": [20, 30, 40, 50], "job": ["cook", None, "actor", "cook"], "label": [0, 1, 0, 1]}
    features = Features({"age": Value("int64"), "job": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return TableRows.from_dataset(Dataset.from_dict(data, features=features), None, "label", ["no", "yes"])


def logits(classifier, rows):
    with torch.no_grad():
        return classifier.model.eval()(**classifier.feed(rows.raw(range(len(rows))))).logits


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "family", "numbers", "source"),
    [
        ("cifar-resnet-8", IMAGE, "cifar-resnet", (8, 16), ""),
        ("cifar-resnet-14x8", IMAGE, "cifar-resnet", (14, 8), ""),
        ("mlp-16", TABLE, "mlp", (16,), ""),
        ("mlp-64x32x8", TABLE, "mlp", (64, 32, 8), ""),
        ("bert-2x64", TEXT, "bert", (2, 64), ""),
        ("bert-base-uncased", TEXT, "hub", (), "bert-base-uncased"),
        ("timm/resnet10t", IMAGE, "timm", (), "resnet10t"),
        ("hf-hub:timm/resnet18.a1_in1k", IMAGE, "timm", (), "resnet18.a1_in1k"),
        ("google/mobilenet_v2_1.0_224", IMAGE, "hub", (), "google/mobilenet_v2_1.0_224"),
        ("mlpnet", TABLE, "hub", (), "mlpnet"),
    ],
)
def test_names(name, task, family, numbers, source):
    parsed = parse_name(name, task)
    assert (parsed.name, parsed.family, parsed.numbers, parsed.source) == (name, family, numbers, source)


def test_a_folder_is_a_name(tmp_path):
    assert parse_name(f"local-dir:{tmp_path}", IMAGE).source == str(tmp_path)
    with pytest.raises(ValueError, match=r"no folder and no id on the Hub\. Use one of: .*cifar-resnet-8"):
        parse_name(f"{tmp_path}/nowhere/at all", IMAGE)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("cifar-resnet-9", IMAGE, r"depth must be 8, 14, 20"),
        ("cifar-resnet-2", IMAGE, r"depth must be 8, 14, 20"),
        ("cifar-resnet-8x4x4", IMAGE, r"depth must be"),
        ("cifar-resnet20", IMAGE, r"positive numbers must follow\. Use one of: cifar-resnet-DEPTH .*timm/"),
        ("cifar-resnet-8x", IMAGE, r"positive numbers must follow"),
        ("mlp", TABLE, r"positive numbers must follow\. Use one of: mlp-WIDTH"),
        ("mlp-64x0", TABLE, r"positive numbers must follow"),
        ("mlp-64,32", TABLE, r"positive numbers must follow"),
        ("bert-2", TEXT, r"two numbers must follow.*bert-2x64"),
        ("bert-2x60", TEXT, r"multiple of 16"),
        ("bert-2x64", IMAGE, r"no model for image-classification: it is for text-classification"),
        ("timm/resnet10t", TEXT, r"it is for image-classification"),
        ("sklearn:RandomForestClassifier", TABLE, r"teacher only"),
        ("forest.skops", TABLE, r"teacher only"),
        ("a/b/c", TEXT, r"no folder and no id"),
        ("mlp-16", "regression", r"task must be one of image-classification, .*got 'regression'"),
    ],
)
def test_bad_names(name, task, message):
    with pytest.raises(ValueError, match=message):
        parse_name(name, task)


@pytest.mark.parametrize(
    ("name", "task", "source", "variant"),
    [
        ("timm/resnet18[layers=1x1x2x1]", IMAGE, "resnet18", {"layers": [1, 1, 2, 1]}),
        ("hf-hub:timm/vit_tiny.a[num_heads=3,depth=6]", IMAGE, "vit_tiny.a", {"num_heads": 3, "depth": 6}),
        ("user/model[hidden_size=128]", TEXT, "user/model", {"hidden_size": 128}),
        ("user/model[depth_multiplier=0.75]", IMAGE, "user/model", {"depth_multiplier": 0.75}),
    ],
)
def test_sizes_in_brackets(name, task, source, variant):
    parsed = parse_name(name, task)
    assert (parsed.source, parsed.variant) == (source, variant)
    assert parse_name(with_variant(source, variant), task).variant == variant


def test_one_model_has_one_name(tmp_path):
    assert with_variant("a", {"z": 1, "b": [2, 3]}) == "a[b=2x3,z=1]" == with_variant("a", {"b": [2, 3], "z": 1})
    assert with_variant("a", {}) == "a" and split_variant("a") == ("a", {})
    assert split_variant("./a[b=2x3,z=1]") == ("./a", {"b": [2, 3], "z": 1})
    folder = tmp_path / "run[1]"
    folder.mkdir()
    assert split_variant(str(folder)) == (str(folder), {})  # a folder that is called so


@pytest.mark.parametrize("brackets", ["[]", "[layers]", "[layers=]", "[layers=1,layers=2]", "[layers=1x]", "[a=1;b=2]"])
def test_bad_brackets(brackets):
    with pytest.raises(ValueError, match=r"hold distinct sizes, key=number .* in '.*timm/resnet18\[layers=1x1x2x1\]"):
        parse_name(f"timm/resnet18{brackets}", IMAGE)


def test_names_with_numbers_take_no_brackets():
    with pytest.raises(ValueError, match="positive numbers must follow"):
        parse_name("cifar-resnet-8[width=4]", IMAGE)


# ---- built here ------------------------------------------------------------------------------------------------------


def test_cifar_resnet():
    rows, _ = image_rows()
    built = build_classifier("cifar-resnet-14x4", rows)
    assert type(built.model) is CifarResNetForImageClassification and built.family == "cifar-resnet"
    assert (built.model.config.depth, built.model.config.width) == (14, 4)
    assert built.model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert built.model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert built.num_params == built.model.num_parameters() and built.model.training
    assert logits(built, rows).shape == (12, 3)


@pytest.mark.parametrize(("size", "expected"), [((8, 10), (8, 10)), ((64, 64), (64, 64)), ((65, 64), (32, 32))])
def test_cifar_resnet_keeps_small_images(size, expected):
    rows, _ = image_rows(*size)
    built = build_classifier("cifar-resnet-8x2", rows)
    assert built.feed.size == expected
    assert built.feed(rows.raw([0]))["pixel_values"].shape == (1, 3, *expected)


@pytest.mark.parametrize("grey", [False, True])
def test_pixel_statistics_equal_numpy(grey):
    rows, pixels = image_rows(grey=grey)
    axes = None if grey else (0, 1, 2)
    mean, std = pixel_statistics(rows)
    np.testing.assert_allclose(mean, np.broadcast_to((pixels / 255).mean(axes), 3), atol=6e-5)
    np.testing.assert_allclose(std, np.broadcast_to((pixels / 255).std(axes), 3), atol=6e-5)
    inputs = build_classifier("cifar-resnet-8x2", rows).feed(rows.raw(range(12)))["pixel_values"]
    assert inputs.shape == (12, 3, 8, 8)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_mlp():
    rows = table_rows()
    built = build_classifier("mlp-6x5", rows)
    assert type(built.model) is TabularForClassification and built.model.config.hidden_sizes == [6, 5]
    assert built.model.config.cardinalities == [3] and built.feed.processor is built.model.processor
    assert set(built.model.predict(rows.table)) <= {"no", "yes"}
    other = build_classifier("mlp-6x5", rows.subset([0, 2]), processor=built.feed.processor)
    assert other.feed.processor.mean == [35.0]  # that of all rows, not of these two


def test_bert():
    rows = text_rows()
    built = build_classifier("bert-2x32", rows)
    config = built.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 32, 128)
    assert config.vocab_size == len(built.feed.processor) and config.pad_token_id == built.feed.processor.pad_token_id
    assert "dull" in built.feed.processor.get_vocab()
    assert logits(built, rows).shape == (12, 2)
    tokenizer = train_tokenizer(["quite other words"], 100)
    assert build_classifier("bert-1x16", rows, processor=tokenizer).feed.processor is tokenizer


def test_how_much_of_a_text_is_read_is_for_the_rows_to_say(tmp_path):
    few, many = text_rows(), text_rows(max_length=300)
    for rows, length in ((few, 128), (many, 300), (many.subset([0, 1]), 300)):
        built = build_classifier("bert-1x16", rows)
        assert built.model.config.max_position_embeddings == built.feed.max_length == length
        built.feed.processor.save_pretrained(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == length
    assert few.training_key(0) == [few.fingerprint, None, 0]  # as before there was a choice: what is kept is found
    assert many.training_key(0) == [few.fingerprint, None, 0, 300]

    bert_folder(tmp_path / "hub", ["bad", "good"])  # of 24 positions
    assert build_classifier(str(tmp_path / "hub"), text_rows(max_length=20)).feed.max_length == 20
    assert build_classifier(str(tmp_path / "hub"), text_rows(max_length=30)).feed.max_length == 24


def test_a_bare_timm_name_has_the_tag_of_its_usual_weights():
    assert _with_tag("resnet18").startswith("resnet18.") and _with_tag("resnet18.of_mine") == "resnet18.of_mine"
    usual = timm.get_pretrained_cfg("vit_base_patch32_clip_quickgelu_224").hf_hub_id
    assert not usual.startswith("timm/vit_base_patch32_clip_quickgelu_224")  # of another network, so not taken
    assert _with_tag("vit_base_patch32_clip_quickgelu_224") == "vit_base_patch32_clip_quickgelu_224"


def test_attention_heads():
    assert {hidden: attention_heads(hidden) for hidden in (16, 32, 48, 64, 96, 128, 160, 256, 768)} == {
        16: 1, 32: 1, 48: 3, 64: 2, 96: 3, 128: 2, 160: 5, 256: 4, 768: 12
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cifar-resnet-8x4", lambda: image_rows()[0]),
        ("timm/resnet10t", lambda: image_rows(32, 32)[0]),
        ("mlp-8", table_rows),
        ("bert-1x16", text_rows),
    ],
)
def test_the_seed_alone_decides(name, rows):
    rows = rows()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_classifier(name, rows, seed=3).model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    same, other = (build_classifier(name, rows, seed=seed).model.state_dict() for seed in (3, 4))
    assert all(torch.equal(same[key], tensor) for key, tensor in first.items())
    assert any(not torch.equal(other[key], tensor) for key, tensor in first.items())


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cifar-resnet-8x4", lambda: image_rows()[0]),
        ("timm/resnet10t", lambda: image_rows(32, 32)[0]),
        ("mlp-8", table_rows),
        ("bert-1x16", text_rows),
    ],
)
def test_counting_needs_no_weights(name, rows):
    rows = rows()
    on_meta = build_classifier(name, rows, meta=True)
    assert {parameter.device.type for parameter in on_meta.model.parameters()} == {"meta"}
    assert count_parameters(name, rows) == on_meta.num_params == build_classifier(name, rows).num_params


def test_no_weights_for_names_of_ours():
    with pytest.raises(ValueError, match="no pre-trained weights for 'mlp-8'"):
        build_classifier("mlp-8", table_rows(), pretrained=True)


# ---- timm ------------------------------------------------------------------------------------------------------------


def test_timm_from_scratch(tmp_path):
    rows, pixels = image_rows(32, 32)
    built = build_classifier("timm/resnet10t", rows)
    assert type(built.model) is TimmWrapperForImageClassification and built.family == "timm"
    assert built.feed.size == (32, 32)
    expected = logits(built, rows)
    assert expected.shape == (12, 3)
    built.model.save_pretrained(tmp_path)
    built.feed.processor.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(
        [PIL.Image.fromarray(image) for image in pixels], return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (12, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, expected, atol=1e-4, rtol=1e-3)


def test_timm_with_patches_is_told_the_size():
    rows, _ = image_rows(32, 32)
    built = build_classifier("timm/vit_tiny_patch16_224", rows, meta=True)
    assert built.model.timm_model.patch_embed.num_patches == 4


def test_timm_takes_no_more_pixels_than_usual():
    rows, _ = image_rows(300, 20, count=3)
    usual = timm.get_pretrained_cfg("resnet10t").input_size[1:]
    assert build_classifier("timm/resnet10t", rows, meta=True).feed.size == tuple(usual)


def test_timm_unknown_architecture():
    with pytest.raises(ValueError, match=r"no architecture 'resnet10'\. Did you mean .*timm/resnet10t"):
        build_classifier("timm/resnet10", image_rows()[0])


def test_timm_with_sizes_of_its_own(tmp_path):
    rows, _ = image_rows(32, 32)
    built = build_classifier("timm/resnet10t[channels=8x16x24x32,layers=1x1x2x1]", rows)
    torch.manual_seed(0)
    expected = timm.create_model("resnet10t", channels=(8, 16, 24, 32), layers=(1, 1, 2, 1), num_classes=3)
    shapes = {name: parameter.shape for name, parameter in expected.named_parameters()}
    assert {name: p.shape for name, p in built.model.timm_model.named_parameters()} == shapes
    built.model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = built.feed(rows.raw(range(3)))["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(pixels).logits, built.model.eval()(pixels).logits)


def test_sizes_that_cannot_be():
    rows, _ = image_rows(32, 32)
    with pytest.raises(
        ValueError, match=r"'resnet10t\[depth=3\]' cannot be built .*depth.* other sizes in the brackets"
    ):
        build_classifier("timm/resnet10t[depth=3]", rows, meta=True)
    for meta in (True, False):  # three stages where four are named: found out by the first image alone
        with pytest.raises(ValueError, match=r"'resnet10t\[layers=1x1x1\]' cannot be built .*other sizes"):
            build_classifier("timm/resnet10t[layers=1x1x1]", rows, meta=meta)
    with pytest.raises(ValueError, match=r"no pre-trained weights for the sizes in .*: timm/resnet10t\."):
        build_classifier("timm/resnet10t[layers=1x1x1x2]", rows, pretrained=True)


def timm_folder(folder, **extra):
    """A folder as timm's own push_to_hub leaves it."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    config = {
        "architecture": "resnet10t",
        "num_classes": 5,
        "num_features": 512,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
        | {"interpolation": "bilinear", "num_classes": 5, "tag": "x", "classifier": "fc", "first_conv": "conv1.0"},
    } | extra
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("extra", [{}, {"model_args": {"num_classes": 5}}, {"label_names": list("abcde")}])
def test_timm_weights_with_a_new_head(tmp_path, extra):
    original = timm_folder(tmp_path, **extra)
    rows, _ = image_rows(32, 32)
    built = build_classifier(str(tmp_path), rows, pretrained=True)
    assert type(built.model) is TimmWrapperForImageClassification and isinstance(built.feed, ProcessorFeed)
    assert built.model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    loaded = built.model.timm_model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in original.state_dict().items() if not k.startswith("fc"))
    assert logits(built, rows).shape == (12, 3)


def test_timm_weights_with_their_head(tmp_path):
    original = timm_folder(tmp_path, label_names=list("abcde"))
    rows, _ = image_rows(32, 32, names=list("abcde"))
    built = build_classifier(f"local-dir:{tmp_path}", rows, pretrained=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in rows.raw(range(12))["image"]]))
    with torch.no_grad():
        expected = original.eval()((pixels / 255 - 0.5) / 0.5)
    torch.testing.assert_close(logits(built, rows), expected, atol=1e-4, rtol=1e-3)


# ---- folders of transformers -----------------------------------------------------------------------------------------


def bert_folder(folder, labels):
    tokenizer = train_tokenizer(["a dull film", "a fine film"], 100)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    config = BertConfig(**shape, id2label=dict(enumerate(labels)))
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("labels", "keeps"), [(["bad", "good"], True), (["good", "bad"], False), (["bad", "fair", "good"], False)]
)
def test_only_the_same_classes_keep_their_layer(tmp_path, labels, keeps):
    original = bert_folder(tmp_path, labels)
    rows = text_rows()
    built = build_classifier(str(tmp_path), rows, pretrained=True)
    assert built.family == "hub" and built.feed.max_length == 24
    loaded, saved = built.model.state_dict(), original.state_dict()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved if not key.startswith("classifier"))
    if keeps:
        assert torch.equal(loaded["classifier.weight"], saved["classifier.weight"])
    else:
        assert not torch.isin(loaded["classifier.weight"], saved["classifier.weight"]).any()
        same, other = (build_classifier(str(tmp_path), rows, pretrained=True, seed=s).model for s in (0, 1))
        assert torch.equal(same.classifier.weight, built.model.classifier.weight)
        assert not torch.equal(other.classifier.weight, built.model.classifier.weight)
    assert built.model.config.id2label == {0: "bad", 1: "good"} and logits(built, rows).shape == (12, 2)


def test_configuration_without_weights(tmp_path):
    original = bert_folder(tmp_path, ["bad", "good"])
    (tmp_path / "model.safetensors").unlink()
    rows = text_rows()
    built = build_classifier(str(tmp_path), rows, seed=1)
    key = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(built.model.state_dict()[key], original.state_dict()[key])
    assert count_parameters(str(tmp_path), rows, pretrained=True) == original.num_parameters()  # from config alone


def test_a_folder_with_sizes_of_its_own(tmp_path):
    bert_folder(tmp_path, ["bad", "good"])
    built = build_classifier(f"{tmp_path}[hidden_size=24,intermediate_size=40,num_hidden_layers=2]", text_rows())
    config = built.model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (24, 40, 2)
    assert len(built.model.bert.encoder.layer) == 2 and config.id2label == {0: "bad", 1: "good"}
    assert logits(built, text_rows()).shape == (12, 2)
    with pytest.raises(ValueError, match=r"a bert has no size 'hidden_sizes'\. Did you mean hidden_size"):
        build_classifier(f"{tmp_path}[hidden_sizes=24]", text_rows())
    with pytest.raises(ValueError, match=r"hidden_size=25\]' cannot be built with these sizes \(.*\)\. Choose others"):
        build_classifier(f"{tmp_path}[hidden_size=25]", text_rows())
    with pytest.raises(ValueError, match="no pre-trained weights for the sizes"):
        build_classifier(f"{tmp_path}[hidden_size=24]", text_rows(), pretrained=True)


def test_a_timm_folder_with_sizes_of_its_own(tmp_path):
    timm_folder(tmp_path)
    built = build_classifier(f"{tmp_path}[layers=1x1x1x2]", image_rows(32, 32)[0], meta=True)
    assert [len(getattr(built.model.timm_model, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 2]


def test_sizes_that_a_config_works_out_follow(tmp_path):
    SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=32, mine=7).save_pretrained(tmp_path)
    ImageFeed((32, 32), (0.5,) * 3, (0.5,) * 3).processor.save_pretrained(tmp_path)
    built = build_classifier(f"{tmp_path}[embed_dim=16]", image_rows()[0], meta=True)
    assert built.model.config.hidden_size == 32 and built.model.config.mine == 7
    assert built.model.classifier.in_features == 32


def test_layer_types_are_as_many_as_layers(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(**sizes, num_hidden_layers=3, intermediate_size=16, layer_types=kinds, vocab_size=100)
    config.save_pretrained(tmp_path)
    train_tokenizer(["a dull film", "a fine film"], 100).save_pretrained(tmp_path)
    for layers, expected in ((2, kinds[:2]), (5, kinds + kinds[:2])):
        built = build_classifier(f"{tmp_path}[num_hidden_layers={layers}]", text_rows(), meta=True)
        assert built.model.config.layer_types == expected


def test_an_image_model_brings_its_processor(tmp_path):
    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape, id2label={0: "x", 1: "y"})).save_pretrained(tmp_path)
    ImageFeed((16, 16), (0.5,) * 3, (0.5,) * 3).processor.save_pretrained(tmp_path)
    rows, _ = image_rows(grey=True)
    built = build_classifier(str(tmp_path), rows, pretrained=True)
    assert isinstance(built.feed, ProcessorFeed)
    assert built.feed(rows.raw([0]))["pixel_values"].shape == (1, 3, 16, 16)
    assert logits(built, rows).shape == (12, 3)


def test_students_of_ours_go_on(tmp_path):
    rows, tables = image_rows()[0], table_rows()
    for name, data in (("cifar-resnet-8x4", rows), ("mlp-8", tables)):
        built = build_classifier(name, data, seed=5)
        folder = tmp_path / name
        built.model.save_pretrained(folder)
        built.feed.processor.save_pretrained(folder)
        again = build_classifier(str(folder), data, pretrained=True)
        torch.testing.assert_close(logits(again, data), logits(built, data), atol=1e-5, rtol=1e-5)
    assert again.model.predict(tables.table) == built.model.predict(tables.table)


def test_weights_that_do_not_fit(tmp_path):
    bert_folder(tmp_path, ["bad", "good"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match=r"do not fit its configuration: .*intermediate\.dense"):
        build_classifier(str(tmp_path), text_rows(), pretrained=True)


def test_a_folder_without_a_model(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"(?s)cannot be opened as a model: .*model_type.*one of: bert-LAYERSxHIDDEN"):
        build_classifier(str(tmp_path), text_rows())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"(?s)'no-such-model' cannot be opened.*one of: bert-LAYERSxHIDDEN"):
        build_classifier("no-such-model", text_rows())
    bert_folder(tmp_path, ["no", "yes"])
    with pytest.raises(ValueError, match="it is a bert, which reads no tables"):
        build_classifier(str(tmp_path), table_rows())


def test_code_from_a_folder_needs_permission(tmp_path):
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign.py").write_text("raise AssertionError('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_classifier(str(tmp_path), text_rows())


def test_decoders_pad_with_their_end_token(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    trained = train_tokenizer(["a dull film", "a fine film"], 100)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, eos_token="[SEP]")
    tokenizer.save_pretrained(tmp_path)
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    built = build_classifier(str(tmp_path), text_rows(), pretrained=True)
    assert built.model.config.pad_token_id == tokenizer.eos_token_id
    assert type(built.model) is AutoModelForSequenceClassification._model_mapping[GPT2Config]
    assert logits(built, text_rows()).shape == (12, 2)


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_student_is_one_of_single_labels_in_full_precision_whatever_it_was_saved_as(tmp_path, pretrained):
    rows = text_rows()
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        problem_type="multi_label_classification", num_labels=4,
    )  # fmt: skip
    BertForSequenceClassification(config).to(torch.bfloat16).save_pretrained(tmp_path)
    train_tokenizer(rows.texts).save_pretrained(tmp_path)
    built = build_classifier(str(tmp_path), rows, pretrained=pretrained)
    assert {one.dtype for one in built.model.parameters()} == {torch.float32}
    loss = built.model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1])).loss
    assert 0.1 < loss.item() < 2  # a cross-entropy of two classes, hardly trained
