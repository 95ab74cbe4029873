"""Reads how deep and wide a model is, and names models of its family with other depths and widths. Counts nothing."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_hpmkd.model_names import built_family, split_variant, with_variant
from hf_hpmkd.models import CifarResNetConfig, TabularConfig

_INTERMEDIATE = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")
_Sizes = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """kind: shapes of one kind, with as many stages, have sizes between them. depths: layers per stage. widths:
    channels per stage, or one number that all stages follow; of a perceptron, one per layer. named: the name of the
    model whose depths are the given ones and whose widths are near the given ones, rounded to what the family takes.
    """

    kind: str
    depths: tuple[int, ...]
    widths: tuple[float, ...]
    named: Callable[[Sequence[int], Sequence[float]], str]


def read_shape(name: str, model: PreTrainedModel) -> Shape | None:
    """The shape of the model called `name`; None for a family that takes no depths and widths."""
    config = model.config
    built = built_family(name)
    base, variant = split_variant(name)
    found: _Found | None
    if isinstance(config, CifarResNetConfig):
        found = _cifar_resnet(config)
    elif isinstance(config, TabularConfig):
        found = _mlp(config)
    elif built == "bert":
        return Shape("bert", (config.num_hidden_layers,), (config.hidden_size,), _bert_name)
    elif isinstance(timm_model := getattr(model, "timm_model", None), nn.Module):
        readers = [_TIMM[cls.__name__] for cls in type(timm_model).__mro__ if cls.__name__ in _TIMM]
        found = readers[0](timm_model) if readers else None
    else:
        found = _config(config)
    if found is None:
        return None
    kind, depths, widths, sizes = found
    if built == "cifar-resnet":
        return Shape(kind, depths, widths, lambda d, w: _cifar_resnet_name(**sizes(d, w)))
    if built == "mlp":
        return Shape(kind, depths, widths, lambda d, w: "mlp-" + "x".join(map(str, sizes(d, w)["hidden_sizes"])))
    return Shape(kind, depths, widths, lambda d, w: with_variant(base, {**variant, **sizes(d, w)}))


def round_width(width: float) -> int:
    """To a power of two that is between a sixteenth and an eighth of the width, at most 16; at least 1."""
    return _to_step(width, _step(width))


def _step(width: float) -> int:
    return 2 ** min(4, max(0, math.floor(math.log2(max(width, 1) / 8))))


def _to_step(width: float, step: int) -> int:
    return max(1, round(width / step)) * step


def attention_width(width: float, head_size: float, group: int = 1) -> tuple[int, int]:
    """(width, heads) near a width, with heads of about `head_size`, their number a multiple of `group`.

    The size of a head stays divisible by 8 or 2, and moves by a third at most: few heads leave few widths otherwise.
    """
    unit = next((unit for unit in (8, 2) if head_size % unit == 0 and head_size >= 4 * unit), 1)
    sizes = [size for size in range(unit, math.ceil(head_size * 4 / 3) + 1, unit) if 0.74 <= size / head_size <= 1.34]
    best = (math.inf, 0, 0)
    for size in sizes or [round(head_size)]:
        heads = max(1, round(width / (size * group))) * group
        miss = abs(math.log(heads * size / width)) + 0.25 * abs(math.log(size / head_size))
        best = min(best, (miss, heads * size, heads))
    return best[1], best[2]


# ---- families of ours ------------------------------------------------------------------------------------------------

_Found = tuple[str, tuple[int, ...], tuple[float, ...], Callable[[Sequence[int], Sequence[float]], _Sizes]]


def _cifar_resnet(config: CifarResNetConfig) -> _Found:
    return (
        "cifar-resnet",
        ((config.depth - 2) // 6,),
        (config.width,),
        lambda d, w: {"depth": 6 * d[0] + 2, "width": round_width(w[0])},
    )


def _cifar_resnet_name(depth: int, width: int) -> str:
    return f"cifar-resnet-{depth}" + (f"x{width}" if width != 16 else "")


def _mlp(config: TabularConfig) -> _Found | None:
    if not config.hidden_sizes:
        return None
    return (
        "mlp",
        (len(config.hidden_sizes),),
        tuple(config.hidden_sizes),
        lambda d, w: {"hidden_sizes": [round_width(width) for width in w]},
    )


def _bert_name(depths: Sequence[int], widths: Sequence[float]) -> str:
    step = 16 if widths[0] < 128 else 32  # wider ones then have heads of 32 or 64
    return f"bert-{depths[0]}x{max(1, round(widths[0] / step)) * step}"


# ---- timm ------------------------------------------------------------------------------------------------------------


def _stages(depths: str, widths: str) -> Callable[[Sequence[int], Sequence[float]], _Sizes]:
    """Two arguments with one number per stage each."""
    return lambda d, w: {depths: list(d), widths: _round_stages(w)}


def _round_stages(widths: Sequence[float]) -> list[int]:
    """Later stages are rounded to a multiple of the first one's step, so that doubled widths stay doubled."""
    step = max(1, _step(widths[0]) // 2)
    return [_to_step(width, step * max(1, round(width / widths[0]))) for width in widths]


def _timm_resnet(model: Any) -> _Found:
    stages = [stage for name in ("layer1", "layer2", "layer3", "layer4") if (stage := getattr(model, name, None))]
    out = [info["num_chs"] // stages[0][0].expansion for info in model.feature_info[-len(stages) :]]
    return "timm resnet", tuple(map(len, stages)), tuple(out), _stages("layers", "channels")


def _timm_resnetv2(model: Any) -> _Found:
    depths = tuple(len(stage.blocks) for stage in model.stages)
    out = tuple(info["num_chs"] for info in model.feature_info[-len(depths) :])
    return "timm resnetv2", depths, out, _stages("layers", "channels")


def _timm_convnext(model: Any) -> _Found:
    depths = tuple(len(stage.blocks) for stage in model.stages)
    return "timm convnext", depths, tuple(i["num_chs"] for i in model.feature_info), _stages("depths", "dims")


def _timm_vit(model: Any) -> _Found:
    head_size = model.embed_dim / model.blocks[0].attn.num_heads

    def sizes(d: Sequence[int], w: Sequence[float]) -> _Sizes:
        width, heads = attention_width(w[0], head_size)
        return {"depth": d[0], "embed_dim": width, "num_heads": heads}

    return "timm vit", (len(model.blocks),), (model.embed_dim,), sizes


def _timm_swin(model: Any) -> _Found:
    heads = [stage.blocks[0].attn.num_heads for stage in model.layers]
    return _swin("timm swin", [len(stage.blocks) for stage in model.layers], model.embed_dim, heads)


def _swin(kind: str, depths: Sequence[int], width: int, heads: Sequence[int]) -> _Found:
    def sizes(d: Sequence[int], w: Sequence[float]) -> _Sizes:
        first, count = attention_width(w[0], width / heads[0])
        return {"depths": list(d), "embed_dim": first, "num_heads": [count * n // heads[0] for n in heads]}

    return kind, tuple(depths), (width,), sizes


def _timm_densenet(model: Any) -> _Found:
    blocks = [block for name, block in model.features.named_children() if name.startswith("denseblock")]
    return (
        "timm densenet",
        tuple(map(len, blocks)),
        (blocks[0].denselayer1.conv2.out_channels,),
        lambda d, w: {"block_config": list(d), "growth_rate": _to_step(w[0], 2)},
    )


# By class, since arguments and attributes are those of the class. Subclasses count.
_TIMM: Mapping[str, Callable[[Any], _Found]] = {
    "ResNet": _timm_resnet,
    "ResNetV2": _timm_resnetv2,
    "ConvNeXt": _timm_convnext,
    "VisionTransformer": _timm_vit,
    "SwinTransformer": _timm_swin,
    "DenseNet": _timm_densenet,
}


# ---- transformers ----------------------------------------------------------------------------------------------------


def _config(config: PretrainedConfig) -> _Found | None:
    """From a config's sizes. Stages come first: configs with stages may call their number num_hidden_layers."""
    known, kind = config.to_dict(), config.model_type
    if isinstance(depths := known.get("depths"), (list, tuple)):
        widths, heads = known.get("hidden_sizes"), known.get("num_attention_heads")
        if isinstance(widths, (list, tuple)) and len(widths) == len(depths):
            steps = [2 * count for count in heads] if isinstance(heads, (list, tuple)) else []
            steps = [known["groups_width"]] * len(depths) if known.get("groups_width") else steps
            return kind, tuple(depths), tuple(widths), _config_stages(known, steps)
        heads = known.get("num_heads")
        if isinstance(known.get("embed_dim"), int) and isinstance(heads, (list, tuple)):
            return _swin(kind, depths, known["embed_dim"], heads)
        return None
    if "width_coefficient" in known:
        return _efficientnet(known)
    name_of = {key: config.attribute_map.get(key, key) for key in ("hidden_size", "num_hidden_layers")}
    if all(isinstance(known.get(name), int) for name in name_of.values()):
        return _transformer(config, known)
    if isinstance(known.get("depth_multiplier"), (int, float)):  # MobileNet: of its channels
        return (
            kind,
            (1,),
            (known["depth_multiplier"],),
            lambda d, w: {"depth_multiplier": max(5, round(20 * w[0])) / 20},
        )
    return None


def _config_stages(known: _Sizes, steps: Sequence[int]) -> Callable[[Sequence[int], Sequence[float]], _Sizes]:
    def sizes(d: Sequence[int], w: Sequence[float]) -> _Sizes:
        widths = [_to_step(a, step) for a, step in zip(w, steps, strict=True)] if steps else _round_stages(w)
        stem = known.get("embedding_size")  # of ResNet and RegNet, in proportion to what follows
        more = {"embedding_size": round_width(stem * widths[0] / known["hidden_sizes"][0])} if stem else {}
        return {"depths": list(d), "hidden_sizes": widths, **more}

    return sizes


def _efficientnet(known: _Sizes) -> _Found:
    """Depth counts tenths of its coefficient. Its last layer must be told how many channels the one before it has."""

    def sizes(d: Sequence[int], w: Sequence[float]) -> _Sizes:
        width, step = max(2, round(20 * w[0])) / 20, known["depth_divisor"]
        last = max(step, int(1280 * width + step / 2) // step * step)  # as EfficientNetModel rounds
        last += step if last < 0.9 * 1280 * width else 0
        return {"depth_coefficient": d[0] / 10, "hidden_dim": last, "width_coefficient": width}

    return "efficientnet", (round(10 * known["depth_coefficient"]),), (known["width_coefficient"],), sizes


def _transformer(config: PretrainedConfig, known: _Sizes) -> _Found:
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    kv_heads = known.get("num_key_value_heads")
    group = heads // kv_heads if kv_heads else 1
    inner = next((key for key in _INTERMEDIATE if isinstance(known.get(key), int)), None)
    own = config.attribute_map

    def sizes(d: Sequence[int], w: Sequence[float]) -> _Sizes:
        width, count = attention_width(w[0], hidden / heads, group)
        if isinstance(known.get("head_dim"), int):  # heads of a size that does not follow from the width
            width, count = round_width(w[0]), max(1, round(w[0] * heads / hidden / group)) * group
        found = {own.get("num_hidden_layers", "num_hidden_layers"): d[0], own.get("hidden_size", "hidden_size"): width}
        if (key := own.get("num_attention_heads", "num_attention_heads")) in known:
            found[key] = count
        if kv_heads:
            found["num_key_value_heads"] = count // group
        if inner:
            exact = known[inner] * width / hidden
            found[inner] = int(exact) if exact == int(exact) else max(8, round(exact / 8) * 8)
        if known.get("word_embed_proj_dim") == hidden:  # OPT
            found["word_embed_proj_dim"] = width
        return found

    return config.model_type, (config.num_hidden_layers,), (hidden,), sizes
