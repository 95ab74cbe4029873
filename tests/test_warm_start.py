"""Warm starts: equal architectures become equal, dead channels may go, layers are spread evenly."""

import pytest
import torch
import torch.nn.functional as F
from test_classifiers import ANIMALS, image_rows, table_rows, text_rows
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvNextConfig,
    DistilBertConfig,
    GPT2Config,
    ModernBertConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.teacher_kinds import pack_linear_layers
from hf_hpmkd.warm_start import WarmStart, can_warm_start, counterpart, warm_start

SIDE = 32
IMAGES = image_rows(SIDE, SIDE)[0]


def of_name(name, rows=IMAGES):
    return lambda seed: build_classifier(name, rows, seed=seed).model.eval()


def of_config(config_class, auto=AutoModelForImageClassification, **sizes):
    def build(seed):
        torch.manual_seed(seed)
        names = {"id2label": dict(enumerate(ANIMALS)), "label2id": {name: i for i, name in enumerate(ANIMALS)}}
        return auto.from_config(config_class(**sizes, **names)).eval()

    return build


def text_config(config_class, **sizes):
    return of_config(config_class, AutoModelForSequenceClassification, **{"vocab_size": 20, "pad_token_id": 0, **sizes})


def vit(width, heads, layers=2):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width}
    return of_config(ViTConfig, **sizes, num_hidden_layers=layers, image_size=SIDE, patch_size=8)


def bert(width, heads, layers=2, **more):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width}
    return text_config(BertConfig, **{**sizes, "num_hidden_layers": layers, "max_position_embeddings": 16, **more})


def distilbert(width, heads):
    sizes = {"dim": width, "n_heads": heads, "hidden_dim": 2 * width, "n_layers": 2, "max_position_embeddings": 16}
    return text_config(DistilBertConfig, **sizes)


def gpt2(width, heads):
    return text_config(
        GPT2Config, n_embd=width, n_head=heads, n_layer=2, n_positions=16, eos_token_id=1, bos_token_id=1
    )


def modernbert(width, heads):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width}
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 1)
    return text_config(ModernBertConfig, **sizes, **special, num_hidden_layers=2, max_position_embeddings=16)


def swin(width, heads):
    sizes = {"embed_dim": width, "num_heads": [heads, 2 * heads], "depths": [1, 2]}
    return of_config(SwinConfig, **sizes, image_size=SIDE, patch_size=4, window_size=4)


def convnext(*widths):
    return of_config(ConvNextConfig, hidden_sizes=list(widths), depths=[1, 2, 1, 1])


def resnet(kind, *widths):
    sizes = {"embedding_size": widths[0], "hidden_sizes": list(widths), "depths": [1, 2]}
    return of_config(ResNetConfig, **sizes, layer_type=kind)


def timm_vit(name, width, heads):
    return of_name(f"timm/{name}_patch16_224[depth=2,embed_dim={width},num_heads={heads}]")


def timm_swin(width, heads):
    sizes = f"depths=1x1x2x1,embed_dim={width},num_heads={'x'.join(str(heads * 2**i) for i in range(4))}"
    return of_name(f"timm/swin_tiny_patch4_window7_224[{sizes}]", image_rows(56, 56)[0])


# A narrow and a wide model of a family, with heads of one size.
PAIRS = {
    "cifar-resnet": (of_name("cifar-resnet-14x6"), of_name("cifar-resnet-14x10")),
    "cifar-resnet, odd": (of_name("cifar-resnet-8x3"), of_name("cifar-resnet-8x7")),
    "mlp": (of_name("mlp-5x3", table_rows()), of_name("mlp-8x6", table_rows())),
    "timm resnet": (
        of_name("timm/resnet10t[channels=8x16x24x32]"),
        of_name("timm/resnet10t[channels=12x20x32x40]"),
    ),
    "timm resnetv2": (
        of_name("timm/resnetv2_50[channels=16x16x32x32,layers=1x1x2x1]"),
        of_name("timm/resnetv2_50[channels=32x32x64x64,layers=1x1x2x1]"),
    ),
    "timm convnext": (
        of_name("timm/convnext_atto[depths=1x1x2x1,dims=8x16x24x32]"),
        of_name("timm/convnext_atto[depths=1x1x2x1,dims=12x20x32x40]"),
    ),
    "timm vit": (timm_vit("vit_tiny", 16, 2), timm_vit("vit_tiny", 24, 3)),
    "timm deit3": (timm_vit("deit3_small", 16, 2), timm_vit("deit3_small", 24, 3)),
    "timm swin": (timm_swin(16, 1), timm_swin(32, 2)),
    "timm mobilenetv3": (of_name("timm/mobilenetv3_small_075"), of_name("timm/mobilenetv3_small_100")),
    "bert": (bert(16, 2), bert(24, 3)),
    "distilbert": (distilbert(16, 2), distilbert(24, 3)),
    "gpt2": (gpt2(16, 2), gpt2(24, 3)),
    "modernbert": (modernbert(16, 2), modernbert(24, 3)),
    "vit": (vit(16, 2), vit(24, 3)),
    "swin": (swin(16, 2), swin(24, 3)),
    "convnext": (convnext(8, 12, 16, 20), convnext(12, 16, 24, 32)),
    "resnet basic": (resnet("basic", 8, 12), resnet("basic", 12, 16)),
    "resnet bottleneck": (resnet("bottleneck", 16, 24), resnet("bottleneck", 32, 48)),
}
EQUAL = {name: pair[0] for name, pair in PAIRS.items()} | {
    "bert-2x32": of_name("bert-2x32", text_rows()),
    "timm efficientnet": of_name("timm/efficientnet_b0"),
    "timm regnet": of_name("timm/regnety_002"),
}


def inputs_of(model):
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "input_ids":
        ids = torch.randint(2, 20, (3, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name == "numeric":
        return {
            "numeric": torch.randn(3, model.config.num_numeric, generator=generator),
            "categorical": torch.ones(3, len(model.config.cardinalities), dtype=torch.long),
        }
    side = 56 if "swin" in str(getattr(model.config, "architecture", "")) else SIDE
    return {"pixel_values": torch.randn(3, 3, side, side, generator=generator)}


@torch.no_grad()
def logits(model):
    inputs = inputs_of(model)
    floats = {key: value.to(model.dtype) for key, value in inputs.items() if value.is_floating_point()}
    return model(**{**inputs, **floats}).logits


@torch.no_grad()
def shake(model):
    """Every tensor random, so that norms, their statistics and zero-initialised layers count too."""
    generator = torch.Generator().manual_seed(11)
    for name, tensor in tensors(model).items():
        if tensor.dim() > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2 / tensor[0].numel() ** 0.5)
        else:
            low = -0.3 if name.endswith(("bias", "mean")) else 0.5  # scales and variances are above zero
            tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


def tensors(model):
    """Parameters and the statistics of batch normalisation."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if "running_" in name}
    return {**{name: parameter.data for name, parameter in model.named_parameters()}, **buffers}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_architectures_become_equal_models(name):
    model, above = EQUAL[name](0), shake(EQUAL[name](1))
    before = logits(model)
    started = warm_start(model, above)
    assert started == WarmStart(started.total, len(list(model.parameters())), 1.0)
    torch.testing.assert_close(logits(model), logits(above), atol=0, rtol=0)
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("name", PAIRS)
def test_a_narrow_model_computes_what_a_wide_one_with_dead_channels_does(name, monkeypatch):
    """The wide model keeps the values that the narrow one takes, all others are zero: then the rest adds nothing,
    provided that everything was taken from where the wide model's own layers look for it.
    """
    model, above = PAIRS[name][0](0), PAIRS[name][1](1)
    # Zeros would change the mean and deviation over channels, which no choice of channels can avoid.
    monkeypatch.setattr(F, "layer_norm", lambda x, shape, weight=None, bias=None, eps=0.0: _affine(x, weight, bias))
    wide, narrow = tensors(above), tensors(model)
    for tensor in wide.values():
        tensor.copy_(torch.arange(1, tensor.numel() + 1).view(tensor.shape))  # each place's number
    assert warm_start(model, above).fraction == 1
    taken = {key: set(tensor.flatten().long().tolist()) for key, tensor in narrow.items()}
    assert all(len(taken[key]) == tensor.numel() for key, tensor in narrow.items())
    shake(above)
    for key, tensor in wide.items():
        alive = torch.tensor([place + 1 in taken[key] for place in range(tensor.numel())]).view(tensor.shape)
        tensor.mul_(alive)
    warm_start(model, above)
    expected = logits(above.double())
    assert expected.std(0).max() > 1e-3 * expected.abs().max()  # the input matters
    torch.testing.assert_close(logits(model.double()), expected, atol=0, rtol=1e-8)


def _affine(x, weight, bias):
    return x * (1 if weight is None else weight) + (0 if bias is None else bias)


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        (1, 5, [0]),
        (2, 5, [0, 4]),
        (3, 5, [0, 2, 4]),
        (3, 12, [0, 6, 11]),
        (4, 4, [0, 1, 2, 3]),
        (3, 2, [0, 1, 1]),
        (2, 1, [0, 0]),
    ],
)
def test_layers_are_spread_evenly(few, many, expected):
    names, above = [str(i) for i in range(few)], [str(i) for i in range(many)]
    assert [counterpart(name, names, above) for name in names] == [str(index) for index in expected]
    blocks, above = [f"b{i + 1}" for i in range(few)], [f"b{i + 1}" for i in range(many)]
    assert [counterpart(name, blocks, above) for name in blocks] == [f"b{index + 1}" for index in expected]
    assert counterpart("conv2", ["conv1", "conv2"], ["conv1", "conv2", "conv3"]) == "conv2"
    assert counterpart("fc", ["fc"], ["head"]) is None and counterpart("0", ["0"], ["fc"]) is None


def test_layers_of_a_deeper_model():
    model, above = bert(16, 2, layers=3)(0), bert(16, 2, layers=6)(1)
    assert warm_start(model, above).fraction == 1
    for ours, theirs in ((0, 0), (1, 3), (2, 5)):
        expected = above.bert.encoder.layer[theirs].state_dict()
        assert all(torch.equal(a, expected[key]) for key, a in model.bert.encoder.layer[ours].state_dict().items())
    stages, deeper = of_name("cifar-resnet-14x4")(0), of_name("cifar-resnet-26x4")(1)
    warm_start(stages, deeper)
    for stage in ("layer1", "layer2", "layer3"):
        last = getattr(stages, stage)[1].conv2.weight
        assert torch.equal(last, getattr(deeper, stage)[3].conv2.weight)


def test_a_wider_model_keeps_the_rest():
    model, above = of_name("mlp-8", table_rows())(0), of_name("mlp-3", table_rows())(1)
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    started = warm_start(model, above)
    inputs, classes = above.hidden[0].in_features, above.classifier.out_features
    embedded = model.embeddings[0].weight.numel()
    shared, all_values = 3 * inputs + 3 + 3 * classes + classes, 8 * inputs + 8 + 8 * classes + classes
    assert started.fraction == pytest.approx((shared + embedded) / (all_values + embedded))
    assert started.tensors == started.total == 5
    assert torch.equal(model.hidden[0].weight[:3], above.hidden[0].weight)
    assert torch.equal(model.hidden[0].weight[3:], own["hidden.0.weight"][3:])
    assert torch.equal(model.classifier.weight[:, :3], above.classifier.weight)
    assert torch.equal(model.classifier.weight[:, 3:], own["classifier.weight"][:, 3:])
    above_resnet, resnet = of_name("cifar-resnet-8x4")(0), of_name("cifar-resnet-8x6")(1)
    warm_start(resnet, above_resnet)
    assert torch.equal(resnet.layer2[0].bn1.weight[[0, 1, 3, 4]], above_resnet.layer2[0].bn1.weight[[0, 1, 2, 3]])


def test_other_classes_keep_their_own_layer():
    model, above = (
        of_name("cifar-resnet-8x4")(0),
        of_name("cifar-resnet-8x4", image_rows(SIDE, SIDE, names=ANIMALS[::-1])[0])(1),
    )
    own = model.linear.weight.clone()
    started = warm_start(model, above)
    assert started.total - started.tensors == 2 and torch.equal(model.linear.weight, own)
    assert torch.equal(model.conv1.weight, above.conv1.weight)


def test_other_vocabularies_are_not_copied():
    model, above = bert(16, 2)(0), bert(16, 2, vocab_size=25)(1)
    own = model.bert.embeddings.word_embeddings.weight.clone()
    started = warm_start(model, above)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, own)
    assert started.total - started.tensors == 1 and started.fraction < 1


def test_another_vocabulary_of_the_same_size_is_not_copied():
    model, above = bert(16, 2)(0), bert(16, 2)(1)
    own = model.bert.embeddings.word_embeddings.weight.clone()
    started = warm_start(model, above, same_vocabulary=False)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, own)
    assert started.total - started.tensors == 1 and started.fraction < 1
    assert torch.equal(model.classifier.weight, above.classifier.weight)


def test_other_kernels_are_not_copied():
    model = vit(16, 2)(0)
    above = of_config(ViTConfig, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2,
                      image_size=SIDE, patch_size=4)(1)  # fmt: skip
    own = [
        model.vit.embeddings.patch_embeddings.projection.weight.clone(),
        model.vit.embeddings.position_embeddings.clone(),
    ]
    started = warm_start(model, above)
    assert started.total - started.tensors == 2
    assert torch.equal(model.vit.embeddings.patch_embeddings.projection.weight, own[0])
    assert torch.equal(model.vit.embeddings.position_embeddings, own[1])


@pytest.mark.parametrize(
    ("model", "above", "message"),
    [
        (bert(16, 2), distilbert(16, 2), "BertForSequenceClassification and DistilBert.* are two families"),
        (PAIRS["timm resnet"][0], PAIRS["timm convnext"][0], "ResNet and ConvNeXt are two families"),
        (
            PAIRS["timm resnet"][0],
            of_name("timm/resnet26[channels=8x16x24x32]"),
            r"only \d+ of \d+ tensors have a counterpart",
        ),
        (
            of_name("timm/densenet121[block_config=1x1x1x1]"),
            of_name("timm/densenet121[block_config=1x1x1x1]"),
            "channels of a DenseNet are of several layers",
        ),
        (of_name("mlp-4", table_rows()), of_name("mlp-4", table_rows().subset([0, 3])), "the two read other tables"),
    ],
)
def test_no_warm_start(model, above, message):
    model, above = model(0), above(1)
    before = logits(model) if message[0] != "t" else None
    assert not can_warm_start(model, above)
    with pytest.raises(ValueError, match=message):
        warm_start(model, above)
    assert before is None or torch.equal(logits(model), before)


def test_families_can():
    for name in ("cifar-resnet", "bert", "timm vit"):
        assert can_warm_start(PAIRS[name][0](0), PAIRS[name][1](1))


def test_a_teacher_packed_into_8_bits_passes_its_rounded_weights_on():
    pytest.importorskip("torchao")
    rows = table_rows()
    whole, packed = (build_classifier("mlp-32x16", rows, seed=1).model for _ in range(2))
    pack_linear_layers(packed, "t")
    students = [build_classifier("mlp-8x8", rows, seed=2).model for _ in range(2)]
    shares = [warm_start(student, above).fraction for student, above in zip(students, (whole, packed), strict=True)]
    assert shares[0] == shares[1] > 0.9
    for one, other in zip(*(student.state_dict().values() for student in students), strict=True):
        torch.testing.assert_close(one, other, atol=0.01, rtol=0.02)
