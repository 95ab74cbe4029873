"""Teachers: whose classes, whose preprocessing, frozen or not, and what is refused before any training."""

import inspect
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_hpmkd import model_identity
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.dataset_rows import DatasetRows
from hf_hpmkd.model_identity import architecture
from hf_hpmkd.models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    TabularConfig,
    TabularForClassification,
    TabularProcessor,
)
from hf_hpmkd.tasks.augmentation import Augmentation
from hf_hpmkd.tasks.base import UNAUGMENTED, json_digest
from hf_hpmkd.tasks.images import ImageFeed, ImageRows, ProcessorFeed
from hf_hpmkd.tasks.tables import TableRows
from hf_hpmkd.tasks.text import TextFeed, TextRows, train_tokenizer
from hf_hpmkd.teacher_kinds import own_class_names
from hf_hpmkd.teachers import (
    ColumnTeacher,
    FoldedTeacher,
    TorchTeacher,
    align_labels,
    as_teacher,
    check_teacher,
    load_teacher,
)

NAMES = ["cat", "dog", "emu"]
K = len(NAMES)
ALL = slice(None)


def image_rows(count=20, size=8):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(K, (count,)).tolist()
    dataset = Dataset.from_dict({"label": labels})
    return ImageRows(dataset, "image", labels, NAMES, Augmentation("crop_flip", 1, None, 0), images)


def text_rows(count=12):
    texts = [f"a {NAMES[i % K]} and number {i}" for i in range(count)]
    labels = [i % K for i in range(count)]
    return TextRows(Dataset.from_dict({"text": texts, "label": labels}), texts, labels, NAMES)


def table_rows(count=12):
    features = Features({"x": Value("float32"), "c": Value("string"), "label": ClassLabel(names=NAMES)})
    columns = {"x": [float(i) for i in range(count)], "c": ["ab"[i % 2] for i in range(count)], "label": [0, 1, 2] * 4}
    return TableRows.from_dataset(Dataset.from_dict(columns, features=features), None, "label", NAMES)


def labels_of(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def answers(teacher, rows, views=None):
    return teacher.logits(rows, torch.arange(len(rows)), views)


class Linear(nn.Module):
    """Looks at the mean of each colour; dropout shows whether it is in eval mode."""

    def __init__(self, classes=K):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head(self.drop(x.mean((2, 3))))


def plain_feed():
    return ImageFeed((8, 8), [0.0] * 3, [1.0] * 3)


# ---- class names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "data", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["c", "a", "b"], ["a", "b", "c"], [1, 2, 0]),
        (["Ice Cream", "HOT-DOG"], ["hot_dog", "icecream"], [1, 0]),
        (["A", "a"], ["a", "A"], [1, 0]),  # exact names come first
        (["1", "0"], ["0", "1"], [1, 0]),  # numbers as names are names
        (["0", "1", "2", "10"], ["0", "1", "10", "2"], [0, 1, 3, 2]),  # also where they only count
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        (["label_1", "label_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
    ],
)
def test_labels_are_aligned_by_name(teacher, data, expected):
    assert align_labels(teacher, data) == expected


def test_names_that_only_count_are_taken_in_order_with_a_warning():
    for names in (["LABEL_0", "LABEL_1"], ["0", "1"]):
        with pytest.warns(UserWarning, match="teacher's classes have no names .* taken in order: cat, dog"):
            assert align_labels(names, ["cat", "dog"]) == [0, 1]
    with pytest.warns(UserWarning, match="data's classes have no names .* taken in order: dog, cat"):
        assert align_labels(["dog", "cat"], ["LABEL_0", "LABEL_1"]) == [0, 1]  # those of a student that has none
    with pytest.raises(ValueError, match="missing from the teacher: 0, 1"):
        align_labels(["dog", "cat"], ["0", "1"])  # of a table: there they are names
    with pytest.raises(ValueError, match="missing from the teacher: cat, dog"):
        align_labels(["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog"])


def test_one_error_lists_every_class_that_does_not_fit():
    with pytest.raises(ValueError) as error:
        align_labels(["cat", "cow", "Cat", "pig"], ["cat", "dog", "emu"])
    message = str(error.value)
    assert "missing from the teacher: dog, emu" in message
    assert "unknown to the data: cow, pig" in message
    assert "twice in the teacher: cat, Cat" in message
    assert "labels" not in message  # four names for three classes: other names would not help
    with pytest.raises(ValueError, match=r"in the order of the teacher's outputs \(cat, cow, pig\), .*labels=\[\"A\","):
        align_labels(["cat", "cow", "pig"], ["cat", "dog", "emu"])
    with pytest.raises(ValueError, match=r"it has 1000: .* and 990 more. Fine-tune it on these classes first") as error:
        align_labels([f"LABEL_{i}" for i in range(1000)], ["cat", "dog"])
    assert len(str(error.value)) < 500


def test_permuted_outputs_are_put_right_and_labels_override():
    model, rows = Linear(), image_rows()
    own = model.eval()(plain_feed()(rows.raw(range(20)))["pixel_values"])
    permuted = TorchTeacher(model, plain_feed(), name="p", data_names=NAMES, class_names=["emu", "cat", "dog"])
    assert permuted.alignment == [1, 2, 0]
    assert torch.equal(answers(permuted, rows), own[:, [1, 2, 0]])
    loaded = load_teacher(model, rows, labels=["emu", "cat", "dog"], feed=plain_feed())
    assert torch.equal(answers(loaded, rows), answers(permuted, rows))


# ---- a torch teacher -------------------------------------------------------------------------------------------------


def test_torch_teacher_is_frozen_and_sees_views_through_its_own_feed():
    rows = image_rows()
    feed = ImageFeed((8, 8), [0.5] * 3, [0.1] * 3)
    teacher = TorchTeacher(Linear().train(), feed, name="t", data_names=NAMES, class_names=NAMES)
    views = torch.arange(20) % 3 - 1
    logits = answers(teacher, rows, views)
    pixels = (rows.raw(range(20), views)["image"].float() / 255 - 0.5) / 0.1
    expected = pixels.mean((2, 3)) @ teacher.model.head.weight.T + teacher.model.head.bias
    assert torch.allclose(logits, expected, atol=1e-4) and logits.dtype == torch.float32
    assert not logits.requires_grad and not any(p.requires_grad for p in teacher.model.parameters())
    assert not torch.allclose(logits, answers(teacher, rows), atol=1e-3)  # the views say something else
    assert teacher.num_params == 3 * K + K and teacher.is_live


def test_wrong_number_of_outputs_is_named():
    teacher = TorchTeacher(Linear(5), plain_feed(), name="five", data_names=NAMES, class_names=NAMES)
    with pytest.raises(ValueError, match=r"'five' must answer with \(batch, 3\) logits.*got shape \(20, 5\)"):
        answers(teacher, image_rows())


def test_bfloat16_teacher_answers_in_float32():
    rows, model = image_rows(), Linear()
    full = answers(TorchTeacher(model, plain_feed(), name="t", data_names=NAMES, class_names=NAMES), rows)
    half = TorchTeacher(model, plain_feed(), name="t", data_names=NAMES, class_names=NAMES, dtype=torch.bfloat16)
    assert half.model.head.weight.dtype == torch.bfloat16
    assert answers(half, rows).dtype == torch.float32
    assert torch.allclose(answers(half, rows), full, atol=0.03) and not torch.equal(answers(half, rows), full)


def test_features_are_what_the_head_sees():
    rows = image_rows()
    teacher = TorchTeacher(Linear(), plain_feed(), name="t", data_names=NAMES, class_names=["dog", "cat", "emu"])
    inputs = plain_feed()(rows.raw(range(20)))
    logits, features = teacher.forward_inputs(inputs)
    assert torch.allclose(features, inputs["pixel_values"].mean((2, 3)))
    assert torch.equal(logits, answers(teacher, rows)) and torch.equal(logits, teacher.forward_logits(inputs))


def test_fingerprint_follows_weights_and_settings_but_not_the_place(tmp_path):
    model = tiny_resnet(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rows = image_rows()
    here, there = load_teacher(tmp_path / "a", rows), load_teacher(tmp_path / "b", rows)
    assert here.identity(rows) == there.identity(rows)
    model.bn1.running_mean += 1e-3  # a buffer counts too
    model.save_pretrained(tmp_path / "b")
    assert load_teacher(tmp_path / "b", rows).fingerprint != here.fingerprint
    same_weights = [nn.Sequential(nn.Conv2d(3, K, 1, stride=s), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for s in (1, 2)]
    same_weights[1].load_state_dict(same_weights[0].state_dict())
    prints = {TorchTeacher(m, plain_feed(), name="t", data_names=NAMES, class_names=NAMES).fingerprint
              for m in same_weights}  # fmt: skip
    assert len(prints) == 2


class Scaled(nn.Module):
    def __init__(self, scale, act=lambda x: x):
        super().__init__()
        self.inner, self.scale, self.act = nn.Linear(2, K), scale, act

    def forward(self, pixel_values):
        return self.act(self.scale * self.inner(pixel_values))


class Halved(Scaled):
    def forward(self, pixel_values):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(pixel_values) / 2


def told_apart(*models):
    for model in models:
        model.load_state_dict(models[0].state_dict())
        model._get_name = lambda: "Scaled"
    return [json_digest({**architecture(model), "class": ""}) for model in models]


def test_fingerprint_of_somebodys_own_module_follows_its_code_and_settings(monkeypatch):
    """Weights and printed modules are the same in all of them; their answers are not."""
    one, same, *others = told_apart(Scaled(1.0), Scaled(1.0, lambda x: x), Scaled(3.0), Halved(1.0))
    assert one == same and len({one, *others}) == 3
    model = Halved(1.0)
    before = told_apart(model)
    model(torch.zeros(1, 2))  # counts its calls, which changes no answer
    assert told_apart(model) == before
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda kind: source(kind).replace("self.scale *", "2 * self.scale *"))
    model_identity._source.cache_clear()
    assert told_apart(model) != before  # the code of what it inherits
    model_identity._source.cache_clear()


# ---- what speaks against a teacher -----------------------------------------------------------------------------------


def column_teacher():
    rows = image_rows(4)
    data = Dataset.from_dict({"z": torch.zeros(4, K).tolist(), "label": rows.labels.tolist()})
    return ColumnTeacher("z", ImageRows(data, "image", rows.labels, NAMES, None, rows.images))


def guide(right, count=200, classes=K, skew=None):
    """Logits that are right on the first `right` rows and say the next class on the others."""
    labels = torch.arange(count) % classes if skew is None else (torch.arange(count) >= skew).long()
    said = torch.where(torch.arange(count) < right, labels, (labels + 1) % classes)
    return nn.functional.one_hot(said, classes).float(), labels


def test_good_teacher_passes():
    logits, labels = guide(150)
    assert check_teacher(column_teacher(), logits, labels, train_accuracy=0.77) == []


@pytest.mark.parametrize("right", [0, 60])
def test_chance_is_warned_of(right):
    logits, labels = guide(right)
    [warning] = check_teacher(column_teacher(), logits, labels)
    assert "no better than chance" in warning and "`labels`" in warning


def test_answering_always_the_same_is_chance_even_where_it_is_mostly_right():
    labels = (torch.arange(200) >= 190).long()  # 95 % of one class
    constant = torch.tensor([[3.0, 1, 0]]).expand(200, K)
    [warning] = check_teacher(column_teacher(), constant, labels)
    assert "accuracy 0.950" in warning and "95% of these rows are of one class" in warning
    [warning] = check_teacher(column_teacher(), constant.flip(1)[:, [1, 2, 0]], labels)
    assert "accuracy 0.050" in warning and "`labels`" in warning
    useful = nn.functional.one_hot(torch.where(torch.arange(200) >= 192, 1, 0), K).float()
    assert check_teacher(column_teacher(), useful, labels) == []


def test_where_all_rows_are_of_one_class_nothing_is_chance():
    labels = torch.zeros(1, dtype=torch.long)
    assert check_teacher(column_teacher(), torch.tensor([[3.0, 1, 0]]), labels) == []


def test_rows_known_by_heart_are_warned_of_where_it_is_significant():
    logits, labels = guide(160)
    [warning] = check_teacher(column_teacher(), logits, labels, train_accuracy=0.99)
    assert (
        "better than others" in warning
        and "accuracy 0.990 there, 0.800 on 200 guide rows" in warning
        and "folds" in warning
    )
    many, many_labels = guide(1600, count=2000)  # two standard errors are 1.8 points here
    assert check_teacher(column_teacher(), many, many_labels, train_accuracy=0.84) == []  # under 5 points
    assert len(check_teacher(column_teacher(), many, many_labels, train_accuracy=0.86)) == 1
    few, few_labels = guide(8, count=9)
    assert check_teacher(column_teacher(), few, few_labels, train_accuracy=0.97) == []  # 9 rows prove nothing


def test_nan_and_wrong_shapes_stop():
    logits, labels = guide(150)
    with pytest.raises(ValueError, match=r"'z' must give \(200, 3\) logits, one per row and class, got \(200, 4\)"):
        check_teacher(column_teacher(), torch.zeros(200, 4), labels)
    logits[[3, 5], 1] = torch.nan
    with pytest.raises(ValueError, match="answers 2 of 200 rows with NaN"):
        check_teacher(column_teacher(), logits, labels)


# ---- transformers ----------------------------------------------------------------------------------------------------


def tiny_resnet(folder, names=NAMES, readme=None):
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(8, 2, **labels_of(names)))
    model.bn1.running_mean += 0.1
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    if readme:
        (folder / "README.md").write_text(readme)
    return model.eval()


def test_image_folder_with_its_own_processor(tmp_path):
    model = tiny_resnet(tmp_path, ["emu", "dog", "cat"], "---\nlicense: apache-2.0\n---\n# A model\n")
    rows = image_rows()
    teacher = load_teacher(str(tmp_path), rows, name="mine")
    assert isinstance(teacher.feed, ProcessorFeed)
    assert (teacher.name, teacher.license, teacher.commit, teacher.kind) == ("mine", "apache-2.0", None, "transformers")
    pixels = (rows.images.float() / 255 - 0.5) / 0.5  # the processor's defaults
    assert torch.allclose(answers(teacher, rows), model(pixels).logits[:, [2, 1, 0]], atol=1e-4)
    with pytest.raises(ValueError, match="missing from the teacher: ant.*unknown to the data: cat"):
        other = image_rows()
        other.class_names = ["ant", "dog", "emu"]
        load_teacher(tmp_path, other)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: other\nlicense_name: weird-1", "weird-1"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("a: b", None),
    ],
)
def test_licence_of_a_card(tmp_path, metadata, expected):
    tiny_resnet(tmp_path, readme=f"---\n{metadata}\n---\n")
    assert load_teacher(tmp_path, image_rows()).license == expected


def test_missing_processor_and_missing_teacher(tmp_path):
    tiny_resnet(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no image processor .* pass the loaded model with its `feed`"):
        load_teacher(tmp_path / "m", image_rows())
    for source in (
        tmp_path / "none",
        tmp_path / "none.skops",
        tmp_path / "none.safetensors",
        f"local-dir:{tmp_path}/n",
    ):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            load_teacher(source, image_rows())


def tiny_bert(folder, kind=BertForSequenceClassification, **settings):
    tokenizer = train_tokenizer(text_rows().texts, 200)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=10, **{**labels_of(NAMES), **settings},
    )  # fmt: skip
    model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def test_a_folder_without_tokenizer_files_is_told(tmp_path):
    tiny_bert(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_teacher(tmp_path, text_rows())
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        build_classifier(str(tmp_path), text_rows())


def test_a_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_hpmkd.teachers.cached_file", lambda *words, **options: pytest.fail("the Hub was asked"))
    for name in ("pipe.joblib", "model.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="A teacher's file is .skops, or .safetensors .*model.bin"):
        load_teacher(tmp_path / "model.bin", text_rows())
    with pytest.raises(ValueError, match="is a pickle, .*skops.io.dump"):
        load_teacher(tmp_path / "pipe.joblib", text_rows())


def test_text_folder_with_its_own_tokenizer(tmp_path):
    model, tokenizer = tiny_bert(tmp_path)
    rows = text_rows()
    teacher = load_teacher(tmp_path, rows)
    assert isinstance(teacher.feed, TextFeed) and teacher.feed.max_length == 10  # no more positions than the model has
    encoded = tokenizer(rows.texts, padding=True, truncation=True, max_length=10, return_tensors="pt")
    assert torch.allclose(answers(teacher, rows), model(**encoded).logits, atol=1e-5)


def test_table_folder_with_its_own_processor(tmp_path):
    rows = table_rows()
    processor = TabularProcessor.fit(rows.table)
    config = TabularConfig([4], processor.num_numeric, processor.cardinalities, **labels_of(NAMES[::-1]))
    model = TabularForClassification(config).attach_processor(processor).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, rows)
    expected = torch.from_numpy(model.predict_proba(rows.table)).flip(1)
    assert torch.allclose(answers(teacher, rows).softmax(1), expected.float(), atol=1e-5)
    with pytest.raises(ValueError, match="is a tabular model, but the data asks for text-classification"):
        load_teacher(tmp_path, text_rows())


def test_generative_model_is_refused(tmp_path):
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8, num_labels=K)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a generative model \(GPT2LMHeadModel\); a teacher must be a classifier"):
        load_teacher(tmp_path, text_rows())
    config.pad_token_id = 0
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    train_tokenizer(text_rows().texts, 100).save_pretrained(tmp_path / "classifier")
    with pytest.warns(UserWarning, match="no names"):  # the same family with a head is one
        load_teacher(tmp_path / "classifier", text_rows())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"problem_type": "regression"}, "is a regression model"),
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, r"is a regression model \(1 output"),
        ({"problem_type": "multi_label_classification"}, "gives several labels at once"),
    ],
)
def test_other_problems_are_refused(tmp_path, settings, said):
    tiny_bert(tmp_path, **settings)
    with pytest.raises(ValueError, match=said):
        load_teacher(tmp_path, text_rows())


def test_model_without_a_trained_head_is_refused(tmp_path):
    tiny_bert(tmp_path, BertModel)
    with pytest.raises(ValueError, match=r"saved as BertModel, but the data asks for text-classification"):
        load_teacher(tmp_path, text_rows())
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"lacks weights .*classifier.*which would be random"):
        load_teacher(tmp_path, text_rows())


def test_model_of_another_task_is_refused(tmp_path):
    tiny_bert(tmp_path)
    with pytest.raises(ValueError, match="saved as BertForSequenceClassification, but the data asks for image-class"):
        load_teacher(tmp_path, image_rows())
    with pytest.raises(ValueError, match="is a bert model, but the data is a table"):
        load_teacher(tmp_path, table_rows())


def test_names_of_teachers_to_be_trained_are_not_looked_up():
    for source in ("sklearn:SVC", "mlp-64", "cifar-resnet-20", "bert-2x64"):
        with pytest.raises(ValueError, match="trained on the spot, so there is nothing to load"):
            load_teacher(source, image_rows())


# ---- timm, files, columns, modules -----------------------------------------------------------------------------------


def timm_folder(folder, **config):
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("resnet10t", num_classes=K, channels=(4, 8, 8, 8), stem_width=4)
    cfg = {"input_size": (3, 8, 8), "mean": (0.1,) * 3, "std": (0.2,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    settings = {"pretrained_cfg": cfg, "label_names": NAMES[::-1], "num_classes": K, **config}
    arguments = {"channels": (4, 8, 8, 8), "stem_width": 4}
    save_for_hf(model, folder, model_config=settings, model_args=arguments, safe_serialization=True)
    return model.eval()


def test_repository_that_timm_pushed_is_loaded_through_timm(tmp_path):
    model = timm_folder(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(TypeError):  # the day this passes, transformers can load these itself
        AutoModelForImageClassification.from_pretrained(tmp_path)
    rows = image_rows()
    expected = model((rows.images.float() / 255 - 0.1) / 0.2).flip(1)
    for source in (tmp_path, f"local-dir:{tmp_path}"):
        teacher = load_teacher(source, rows)
        assert (teacher.kind, teacher.license) == ("timm", "mit")
        assert torch.allclose(answers(teacher, rows), expected, atol=1e-4)
    with pytest.raises(ValueError, match="is an image model, but the data asks for text-classification"):
        load_teacher(f"local-dir:{tmp_path}", text_rows())


def test_cifar_resnet_file(tmp_path):
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(8, 4, num_labels=K)).eval()
    save_file(model.state_dict(), tmp_path / "resnet8.safetensors")
    about = {
        "architecture": {"depth": 8},
        "classes": ["dog", "emu", "cat"],
        "input": {"size": [3, 8, 8], "mean": [0.2] * 3, "std": [0.3] * 3},
        "source": {"license": "BSD-2-Clause"},
    }
    (tmp_path / "resnet8.json").write_text(json.dumps(about))
    rows = image_rows()
    teacher = load_teacher(tmp_path / "resnet8.safetensors", rows)
    expected = model((rows.images.float() / 255 - 0.2) / 0.3).logits[:, [2, 0, 1]]
    assert torch.allclose(answers(teacher, rows), expected, atol=1e-4)
    assert (teacher.name, teacher.license, teacher.num_params) == ("resnet8", "BSD-2-Clause", model.num_parameters())
    del about["input"]["mean"]
    (tmp_path / "resnet8.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must say how pixels are normalised"):
        load_teacher(tmp_path / "resnet8.safetensors", rows)


def rows_with_column(values, count=6):
    rows = text_rows(count)
    features = Features({"text": Value("string"), "z": Sequence(Value("float32"))})
    return TextRows(
        Dataset.from_dict({"text": rows.texts, "z": values}, features=features), rows.texts, rows.labels, NAMES
    )


def test_column_of_logits():
    values = torch.randn(6, K)
    rows = rows_with_column(values.tolist())
    teacher = load_teacher("column:z", rows, labels=["emu", "cat", "dog"])
    assert torch.allclose(answers(teacher, rows), values[:, [1, 2, 0]])
    assert (teacher.kind, teacher.num_params, teacher.name) == ("column", None, "z") and not teacher.is_live
    part = rows.subset([4, 1])
    assert torch.allclose(
        answers(teacher, part), values[[4, 1]][:, [1, 2, 0]]
    )  # the column of the rows it is asked about
    assert teacher.identity(part) != teacher.identity(rows)
    with pytest.raises(ValueError, match="cannot answer augmented views"):
        teacher.logits(rows, torch.arange(2), torch.tensor([UNAUGMENTED, 0]))


@pytest.mark.parametrize(
    ("row", "said"), [([1.0, 2.0], r"row 2 of the part holds \[1.0, 2.0\]"), (None, "row 2 .* holds None"),
                      ([1.0, None, 2.0], "row 2")],
)  # fmt: skip
def test_column_with_a_bad_row(row, said):
    values = torch.randn(6, K).tolist()
    values[2] = row
    with pytest.raises(ValueError, match=f"must hold a list of 3 logits.*{said}"):
        load_teacher("column:z", rows_with_column(values))


def test_missing_column_names_those_there_are():
    with pytest.raises(ValueError, match="column 'q', which the data does not have. Its columns are text, z"):
        load_teacher("column:q", rows_with_column(torch.randn(6, K).tolist()))


def test_modules_need_a_feed_unless_they_take_the_students_inputs(tmp_path):
    with pytest.raises(ValueError, match="Linear does not say how rows become its inputs. Pass its preprocessing"):
        load_teacher(Linear(), image_rows())
    with pytest.raises(ValueError, match="A module does not say how rows become its inputs"):
        as_teacher(Linear(), image_rows())
    with pytest.raises(ValueError, match="`feed` goes with a module"):
        load_teacher("column:z", image_rows(), feed=plain_feed())
    model, data = tiny.tiny_vit(), tiny.TinyImages(10)
    rows = DatasetRows(data, torch.utils.data.default_collate, list(tiny.NAMES.values()))
    teacher = as_teacher(model, rows)
    assert torch.allclose(answers(teacher, rows), model(pixel_values=data.pixels).logits, atol=1e-6)
    assert as_teacher(teacher, rows) is teacher
    with pytest.raises(ValueError, match="no longer has such a column"):
        as_teacher(str(tmp_path), rows)


def test_module_without_names_is_taken_in_order_with_a_warning():
    with pytest.warns(UserWarning, match="no names"):
        teacher = load_teacher(Linear(), image_rows(), feed=plain_feed())
    assert teacher.alignment == [0, 1, 2]


# ---- out of fold -----------------------------------------------------------------------------------------------------


def test_folds_answer_their_own_rows_and_the_full_model_the_rest():
    rows, other = image_rows(), image_rows(5)
    models = [TorchTeacher(Linear(), plain_feed(), name=str(i), data_names=NAMES, class_names=NAMES) for i in range(3)]
    fold_of_row = torch.arange(20) % 2
    folded = FoldedTeacher(models[2], models[:2], fold_of_row, rows)
    views = torch.arange(20) % 2
    found = answers(folded, rows, views)
    for fold in range(2):
        mine = fold_of_row == fold
        assert torch.allclose(found[mine], answers(models[fold], rows, views)[mine], atol=1e-6)
    assert torch.equal(answers(folded, other), answers(models[2], other))
    assert folded.identity(other) == models[2].identity(other)  # one file in the cache for both
    assert folded.identity(rows) != models[2].identity(rows)
    assert (folded.name, folded.num_params) == ("2", models[2].num_params)
    turned = FoldedTeacher(models[2], models[:2], 1 - fold_of_row, rows)
    assert turned.identity(rows) != folded.identity(rows)
    with pytest.raises(ValueError, match="must name one of 2 folds for each of 20 rows"):
        FoldedTeacher(models[2], models[:2], fold_of_row + 1, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folded.to("cpu") is folded


class Mirrored(ViTForImageClassification):
    """The same config and weights, other answers."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs


def test_a_changed_head_or_forward_of_a_model_of_transformers_is_another_teacher():
    model, other = tiny.tiny_vit(), Mirrored(tiny.tiny_vit().config)
    assert architecture(model) == architecture(tiny.tiny_vit()) and "modules" not in architecture(model)
    heads = []
    for activation in (torch.nn.ReLU(), torch.nn.GELU()):
        changed = tiny.tiny_vit()
        changed.classifier = torch.nn.Sequential(activation, changed.classifier)
        heads.append(architecture(changed))
    assert heads[0] != heads[1] and architecture(model) not in heads
    assert any("-outputs.logits" in code for code in architecture(other)["code"])


def test_a_config_may_count_its_classes_from_one():
    model = SimpleNamespace(config=SimpleNamespace(id2label={1: "bad", 2: "good"}))
    assert own_class_names(model) == ["bad", "good"]


def test_a_teacher_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = load_parts(DataConfig("sklearn:wine"), teachers_saw_train=False).train
    built = build_classifier("mlp-4", rows)
    built.model.save_pretrained(tmp_path / "teacher")
    built.feed.processor.save_pretrained(tmp_path / "teacher")
    assert load_teacher("~/teacher", rows).num_params == built.num_params
    assert build_classifier("~/teacher", rows).num_params == built.num_params
