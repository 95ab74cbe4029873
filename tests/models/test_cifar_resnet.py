"""The CIFAR ResNet against a second implementation, and what a saved folder can do by itself."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers.dynamic_module_utils
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_hpmkd.models.cifar_resnet import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    load_cifar_resnet_file,
    option_a_shortcut,
    read_cifar_resnet_card,
)
from hf_hpmkd.tasks.images import ImageFeed

CLASSES = ["cat", "dog", "owl"]


def tiny(depth=8, width=4, **options):
    """A model whose weights, batch-norm statistics included, are all far from their initial values."""
    torch.manual_seed(0)
    options.setdefault("id2label", dict(enumerate(CLASSES)))
    options.setdefault("label2id", {name: label for label, name in enumerate(CLASSES)})
    model = CifarResNetForImageClassification(CifarResNetConfig(depth, width, **options))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "bn" in name and "num_batches" not in name:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


def functional_resnet(state, pixels, blocks):
    """Straight from He et al. 2015, section 4.2, on a flat dictionary of tensors; the shortcut is a fixed 1x1
    convolution here."""

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    x = torch.relu(norm(F.conv2d(pixels, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{at}.conv1.weight"], padding=1, stride=stride)
            y = F.conv2d(torch.relu(norm(y, f"{at}.bn1")), state[f"{at}.conv2.weight"], padding=1)
            if stride == 2:
                planes = y.shape[1]
                identity = torch.zeros(planes, planes // 2, 1, 1, dtype=x.dtype)
                for channel in range(planes // 2):
                    identity[planes // 4 + channel, channel] = 1.0
                x = F.conv2d(x, identity, stride=2)
            x = torch.relu(norm(y, f"{at}.bn2") + x)
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(("depth", "size"), [(8, (32, 32)), (8, (8, 8)), (14, (28, 28)), (8, (9, 13)), (8, (1, 1))])
def test_equals_a_functional_implementation(depth, size):
    model = tiny(depth).double()
    pixels = torch.randn(5, 3, *size, dtype=torch.double)
    expected = functional_resnet(model.state_dict(), pixels, (depth - 2) // 6)
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-9, atol=1e-9)


def test_published_parameter_counts_and_names():
    # Counts of the published weight files: He et al. 2015, table 6, give 0.27, 0.46, 0.66 and 0.85 million.
    for depth, count in {20: 269722, 32: 464154, 44: 658586, 56: 853018}.items():
        with torch.device("meta"):
            model = CifarResNetForImageClassification(CifarResNetConfig(depth, num_labels=10))
        assert model.num_parameters() == count
    names = set(tiny(14).state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer3.1.bn2.num_batches_tracked", "linear.bias"} <= names
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "linear"}


def test_shortcut_pads_both_sides():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    padded = option_a_shortcut(x, 6, 2)
    assert padded.shape == (2, 6, 2, 2)
    # Three channels are missing: one zero channel before, two after.
    assert torch.equal(padded[:, 1:4], x[:, :, ::2, ::2])
    assert padded[:, 0].abs().sum() == 0 and padded[:, 4:].abs().sum() == 0
    assert option_a_shortcut(x, 3, 1) is x


def test_odd_width_runs():
    assert tiny(8, 3)(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)


def test_loss_is_the_mean_cross_entropy():
    model, pixels, labels = tiny(), torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    outputs = model(pixels, labels=labels)
    by_hand = -outputs.logits.log_softmax(1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(outputs.loss, by_hand)
    assert model(pixels).loss is None


@pytest.mark.parametrize("depth", [2, 7, 10, 18])
def test_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        CifarResNetConfig(depth)


def test_refuses_no_width():
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        CifarResNetConfig(8, 0)


def test_initial_weights_have_the_variance_of_he():
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(8, 32))
    weight = model.layer3[0].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not model.linear.bias.any()


def test_saves_and_loads_through_the_auto_classes(tmp_path):
    model, pixels = tiny(14), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.depth, config.width, config.num_channels) == (14, 4, 3)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is CifarResNetForImageClassification
    assert again.config.id2label == dict(enumerate(CLASSES))
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_another_head_keeps_the_other_weights(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = CifarResNetForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert again.linear.weight.shape == (7, 16) and float(again.linear.weight.detach().std()) > 0.1
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("linear")}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in rest.items())


# ---- the weight file with its JSON -----------------------------------------------------------------------------------


def write_weights(folder, model, **changes):
    card = {"architecture": {"depth": model.config.depth}, "classes": CLASSES} | changes
    save_file(model.state_dict(), folder / "net.safetensors")
    (folder / "net.json").write_text(json.dumps(card))
    return folder / "net.safetensors"


def test_loads_a_weight_file(tmp_path):
    model, pixels = tiny(14, 6), torch.randn(2, 3, 8, 8)
    loaded = load_cifar_resnet_file(write_weights(tmp_path, model, source={"license": "MIT"}))
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert not loaded.training and loaded.config.width == 6
    assert loaded.config.id2label == dict(enumerate(CLASSES)) and loaded.config.label2id["owl"] == 2
    assert read_cifar_resnet_card(tmp_path / "net.safetensors")["source"] == {"license": "MIT"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {"depth": 20}}, r"does not fit its JSON \(depth 20, 3 classes\): .*is missing.* in all"),
        ({"architecture": {"depth": 8}}, r"layer1\.1\.bn1\.bias is unknown"),
        ({"classes": ["a", "b"]}, r"linear\.bias is \(3,\) instead of \(2,\)"),
        ({"classes": []}, "must hold .*classes"),
        ({"architecture": {}}, "got depth None"),
    ],
)
def test_refuses_a_json_that_does_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_cifar_resnet_file(write_weights(tmp_path, tiny(14), **changes))


def test_refuses_a_missing_json_and_foreign_weights(tmp_path):
    path = write_weights(tmp_path, tiny())
    save_file({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no CIFAR ResNet"):
        load_cifar_resnet_file(path)
    (tmp_path / "net.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"net\.json does not exist"):
        load_cifar_resnet_file(path)


# ---- a saved folder by itself ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A saved student, a picture, and the probabilities that its pipeline must give."""
    folder = tmp_path_factory.mktemp("student")
    model, feed = tiny(), ImageFeed((8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    model.save_pretrained(folder)
    feed.processor.save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "picture.png")
    inputs = feed({"image": torch.from_numpy(pixels).permute(2, 0, 1)[None]})
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(1)[0].tolist()
    return folder, dict(zip(CLASSES, probabilities, strict=True))


def run_pipeline(folder, cwd, before, options):
    code = (
        f"{before}\nimport json, transformers\n"
        f"classify = transformers.pipeline('image-classification', model={str(folder)!r}, {options})\n"
        f"print(json.dumps(classify({str(folder / 'picture.png')!r})))"
    )
    environment = os.environ | {"HF_HOME": str(cwd / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {entry["label"]: entry["score"] for entry in json.loads(done.stdout.splitlines()[-1])}


def test_pipeline_here(student):
    folder, expected = student
    entries = pipeline("image-classification", model=str(folder), device="cpu")(str(folder / "picture.png"))
    assert {entry["label"]: entry["score"] for entry in entries} == pytest.approx(expected, abs=1e-5)


def test_the_code_in_the_folder_is_enough(student, tmp_path, monkeypatch):
    folder, _ = student
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "cifar_resnet.CifarResNetConfig",
        "AutoModelForImageClassification": "cifar_resnet.CifarResNetForImageClassification",
    }
    assert not re.search(r"^\s*(from|import) (hf_hpmkd|\.)", (folder / "cifar_resnet.py").read_text(), re.MULTILINE)
    copied = get_class_from_dynamic_module("cifar_resnet.CifarResNetForImageClassification", str(folder))
    assert copied is not CifarResNetForImageClassification
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(copied.from_pretrained(folder)(pixels).logits, tiny()(pixels).logits)


@pytest.mark.slow
def test_pipeline_in_a_fresh_process(student, tmp_path):
    folder, expected = student
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    before = f"import sys; sys.path.insert(0, {root!r}); import hf_hpmkd.models"
    assert run_pipeline(folder, tmp_path, before, "device='cpu'") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_pipeline_without_the_package(student, tmp_path):
    folder, expected = student
    before = "import sys; sys.modules['hf_hpmkd'] = None"
    found = run_pipeline(folder, tmp_path, before, "device='cpu', trust_remote_code=True")
    assert found == pytest.approx(expected, abs=1e-5)
