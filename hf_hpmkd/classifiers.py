"""Names to models: what `cifar-resnet-8`, `mlp-64x32`, `bert-2x64`, `timm/resnet10t` or a Hub id stands for, built with
the preprocessing that fits it, for students, models between, and teachers trained on the spot. Trains nothing.
"""

import difflib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from hf_hpmkd.heads import find_classifier_head
from hf_hpmkd.model_names import TASK_OF, ModelName, bad_name, forms, parse_name, split_variant, with_variant
from hf_hpmkd.models import (
    CifarResNetConfig,
    TabularConfig,
    TabularForClassification,
    TabularProcessor,
)
from hf_hpmkd.tasks.base import Feed, Rows
from hf_hpmkd.tasks.images import ImageFeed, ProcessorFeed
from hf_hpmkd.tasks.tables import TableFeed
from hf_hpmkd.tasks.text import (
    MAX_TEXT_LENGTH,
    TextFeed,
    most_positions,
    require_words,
    train_tokenizer,
    without_unknown_inputs,
)
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TABULAR_CLASSIFICATION, TEXT_CLASSIFICATION

_AUTO_MODEL = {
    IMAGE_CLASSIFICATION: AutoModelForImageClassification,
    TEXT_CLASSIFICATION: AutoModelForSequenceClassification,
    TABULAR_CLASSIFICATION: AutoModel,
}
_SMALL_IMAGE = 64
# What the constructors of timm and transformers raise for sizes that do not go together.
_UNBUILDABLE = (
    AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError,
    StrictDataclassError,
)  # fmt: skip
_STATISTICS_ROWS = 2048
# Whatever a config was saved in: half of the small steps of a training would be lost in 16 bits.
_DTYPE = torch.float32


@dataclass
class Classifier:
    """A model and its own preprocessing. num_params: all parameters, buffers not counted. origin: the teacher, or stage
    (a TorchTeacher), with whose layers it begins; None for none.
    """

    model: PreTrainedModel
    feed: Feed
    family: str
    num_params: int
    origin: Any = None


@dataclass(frozen=True)
class _Request:
    """What is to be built."""

    name: ModelName
    rows: Rows
    pretrained: bool
    meta: bool
    processor: Any
    hub: Mapping[str, Any]  # trust_remote_code, and revision where given

    @property
    def labels(self) -> dict[str, Any]:
        names = self.rows.class_names
        return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def build_classifier(
    name: str,
    rows: Rows,
    *,
    seed: int = 0,
    pretrained: bool = False,
    meta: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    processor: Any = None,
) -> Classifier:
    """The classifier called `name` for these training rows, on the CPU, in training mode.

    rows: give the task, the classes, and what a preprocessing learns (mean and deviation of pixels, a vocabulary,
    the columns of a table), and how much of a text is read (`max_length`). Images of up to 64 pixels keep their
    size; cifar-resnet gets larger or varied ones as 32 x 32. seed: the initial weights depend on it alone; torch's
    own generator is left as it was. pretrained: False takes the configuration of a timm or Hub model and draws new
    weights; True loads them, and only a classifier for the same classes in the same order keeps its last layer.
    meta: no weights at all, on torch's meta device, to count parameters. processor: use this one instead (image
    processor, tokenizer or TabularProcessor).

    Raises ValueError for a name that means nothing, for pretrained=True where there are no weights, and for weights
    that do not fit; OSError if the Hub or the folder does not have the model.
    """
    parsed = parse_name(name, rows.task)
    if pretrained and parsed.family in TASK_OF:
        raise ValueError(
            f"There are no pre-trained weights for {name!r}. Set pretrained to False, or name a Hub model."
        )
    if pretrained and parsed.variant:
        raise ValueError(
            f"There are no pre-trained weights for the sizes in {name!r}. Set pretrained to False, or leave the "
            f"brackets out: {split_variant(name)[0]}."
        )
    # A definite False, because None would stop at a prompt for code from the Hub.
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision:
        hub["revision"] = revision
    request = _Request(parsed, rows, pretrained and not meta, meta, processor, hub)
    build = {"cifar-resnet": _cifar_resnet, "mlp": _mlp, "bert": _bert, "timm": _timm, "hub": _from_hub}[parsed.family]
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs' generators too, which are not put back.
        torch.default_generator.manual_seed(seed)
        model, feed = build(request)
    return Classifier(model.train(), feed, parsed.family, sum(p.numel() for p in model.parameters()))


def count_parameters(name: str, rows: Rows, **options: Any) -> int:
    """Number of parameters of `build_classifier(name, rows, ...)`, without its weights."""
    return build_classifier(name, rows, **options, meta=True).num_params


# ---- built from numbers ----------------------------------------------------------------------------------------------


class _NoValues(TorchFunctionMode):
    """Draws no initial values, which on the meta device change nothing and take most of a transformer's time."""

    _FILLS = ("normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_", "copy_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _new_model(config: PretrainedConfig, request: _Request) -> PreTrainedModel:
    with torch.device("meta") if request.meta else nullcontext(), _NoValues() if request.meta else nullcontext():
        of_16_bits = str(config.dtype).removeprefix("torch.") not in ("None", "float32")
        more = {"dtype": _DTYPE} if of_16_bits else {}  # else the config would be another one
        return _AUTO_MODEL[request.rows.task].from_config(
            config, trust_remote_code=request.hub["trust_remote_code"], **more
        )


def _cifar_resnet(request: _Request) -> tuple[PreTrainedModel, Feed]:
    depth, width = request.name.numbers
    size = getattr(request.rows, "image_size", None)
    if size is None or max(size) > _SMALL_IMAGE:
        size = (32, 32)
    config = CifarResNetConfig(depth, width, num_channels=3, **request.labels)
    return _new_model(config, request), _image_feed(request, size)


def _mlp(request: _Request) -> tuple[PreTrainedModel, Feed]:
    processor = request.processor
    if processor is None:
        processor = TabularProcessor.fit(request.rows.raw(torch.arange(len(request.rows)))["table"])
    config = TabularConfig(
        hidden_sizes=request.name.numbers,
        num_numeric=processor.num_numeric,
        cardinalities=processor.cardinalities,
        **request.labels,
    )
    model = _new_model(config, request)
    assert isinstance(model, TabularForClassification)
    return model.attach_processor(processor), TableFeed(processor)


def attention_heads(hidden_size: int) -> int:
    """Heads of 64 from hidden size 128 on, as in BERT; of 32, else 16, where 64 does not divide it or it is smaller.

    hidden_size: a multiple of 16.
    """
    size = next(size for size in (64, 32, 16) if hidden_size % size == 0 and (size < 64 or hidden_size >= 128))
    return hidden_size // size


def _bert(request: _Request) -> tuple[PreTrainedModel, Feed]:
    layers, hidden = request.name.numbers
    longest = request.rows.max_length or MAX_TEXT_LENGTH
    tokenizer = request.processor
    if tokenizer is None:
        raw = request.rows.raw(torch.arange(len(request.rows)))
        tokenizer = train_tokenizer([*raw["text"], *raw.get("text_pair", [])])
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=attention_heads(hidden),
        intermediate_size=4 * hidden,
        max_position_embeddings=longest,
        pad_token_id=tokenizer.pad_token_id,
        **request.labels,
    )
    return _new_model(config, request), _text_feed(tokenizer, longest)


def _text_feed(tokenizer: Any, longest: int) -> TextFeed:
    tokenizer.model_max_length = longest  # for those who load the model: they read what it was trained on
    return TextFeed(tokenizer, longest)


def _image_feed(request: _Request, size: tuple[int, int]) -> Feed:
    """For weights that start from nothing: pixels standardised by the training rows' own mean and deviation."""
    if request.processor is not None:
        return ProcessorFeed(request.processor)
    mean, std = pixel_statistics(request.rows)
    return ImageFeed(size, mean, std, channels=3)


def pixel_statistics(rows: Rows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per colour, of pixels in 0..1, over 2,048 rows evenly spaced (all, if fewer).

    Grey images give three equal numbers. Rounded to four digits; a deviation is at least 1/255, for blank images.
    """
    step = max(1, len(rows) // _STATISTICS_ROWS)
    images = rows.raw(torch.arange(0, len(rows), step)[:_STATISTICS_ROWS])["image"]
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for image in images:
        pixels = image.flatten(1).double() / 255
        count += pixels.shape[1]
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


# ---- timm, transformers ----------------------------------------------------------------------------------------------


def _timm(request: _Request) -> tuple[PreTrainedModel, Feed]:
    import timm

    architecture = request.name.source.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join('timm/' + found for found in close)}?" if close else ""
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}.{hint}")
    if request.pretrained:
        return _load(request, f"timm/{_with_tag(request.name.source)}")
    usual = timm.get_pretrained_cfg(architecture)
    assert usual is not None
    _, *usual_size = usual.input_size
    size = getattr(request.rows, "image_size", None)
    if size is None or size[0] > usual_size[0] or size[1] > usual_size[1]:
        size = (usual_size[0], usual_size[1])
    feed = _image_feed(request, size)
    taught = {"input_size": [3, *size], "crop_pct": 1.0, "interpolation": "bilinear"}
    if isinstance(feed, ImageFeed):
        taught |= {"mean": list(feed.mean), "std": list(feed.std)}
    # Models with a fixed number of patches have to be told; they refuse sizes that their patches do not divide.
    fixed = {"img_size": list(size)} if usual.fixed_input_size and list(size) != usual_size else {}
    config = TimmWrapperConfig(
        architecture=architecture, model_args={**fixed, **request.name.variant} or None, **request.labels
    )
    config.pretrained_cfg = taught
    try:
        model = _new_model(config, request)
        if request.name.variant:  # sizes that do not go together may be found out by the first image alone
            with torch.no_grad():
                model.eval()(pixel_values=torch.zeros(1, 3, *size, device=model.device))
        return model, feed
    except _UNBUILDABLE as error:
        other = (
            "other sizes in the brackets, or another architecture" if request.name.variant else "another architecture"
        )
        raise ValueError(
            f"{with_variant(architecture, request.name.variant)!r} cannot be built for {size[0]} x {size[1]} images "
            f"({error}). Choose {other}."
        ) from error


def _with_tag(name: str) -> str:
    """A bare architecture's name with the tag of its usual weights, as the Hub has it: resnet18.a1_in1k."""
    import timm

    usual = timm.get_pretrained_cfg(name) if "." not in name else None
    known = (usual.hf_hub_id or "").removeprefix("timm/") if usual is not None else ""
    return known if known.startswith(f"{name}.") else name


def _from_hub(request: _Request) -> tuple[PreTrainedModel, Feed]:
    if request.pretrained:
        return _load(request, request.name.source)
    config = _config(request, request.name.source)
    _classify(config, request)
    feed = _own_feed(request, request.name.source, config)
    model = _new_variant(config, request) if request.name.variant else _new_model(config, request)
    if isinstance(model, TabularForClassification):
        model.attach_processor(feed.processor)
    return model, feed


def _new_variant(config: PretrainedConfig, request: _Request) -> PreTrainedModel:
    """A model of the config's kind with other sizes."""
    name, variant = request.name.name, request.name.variant
    if isinstance(config, TimmWrapperConfig):
        config.model_args = {**(config.model_args or {}), **variant}
    else:
        sizes = {config.attribute_map.get(key, key): value for key, value in variant.items()}
        settings = config.to_dict()
        for key, value in sizes.items():
            if key not in settings or isinstance(settings[key], (bool, str, dict)):
                close = difflib.get_close_matches(key, settings, n=3)
                raise ValueError(
                    f"{name!r}: the configuration of a {config.model_type} has no size {key!r}."
                    f"{f' Did you mean {chr(44).join(close)}?' if close else ''} Its config.json lists all."
                )
            sizes[key] = [value] if isinstance(settings[key], (list, tuple)) and not isinstance(value, list) else value
        layers, kinds = getattr(config, "num_hidden_layers", None), settings.get("layer_types")
        if kinds and len(kinds) == layers:  # one per layer, so there must be as many as there will be layers
            wanted = sizes.get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), layers)
            sizes["layer_types"] = [kinds[index % layers] for index in range(wanted)]
    try:
        if not isinstance(config, TimmWrapperConfig):
            config = _remade(config, {**settings, **sizes})
        return _new_model(config, request)
    except _UNBUILDABLE as error:
        raise ValueError(f"{name!r} cannot be built with these sizes ({error}). Choose others.") from error


def _remade(config: PretrainedConfig, settings: dict[str, Any]) -> PretrainedConfig:
    """A config makes some numbers from others (Swin's hidden_size). They are no arguments, and must be made anew."""
    arguments = inspect.signature(type(config)).parameters
    made = {key: settings.pop(key) for key in list(settings) if key not in arguments and type(settings[key]) is int}
    new = type(config).from_dict(settings)
    for key, value in made.items():
        if not hasattr(new, key):  # not made, but added by hand
            setattr(new, key, value)
    return new


def _config(request: _Request, source: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, **request.hub)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{source!r} cannot be opened as a model: {error} A model name is one of: {forms(request.rows.task)}."
        ) from error
    if request.rows.task == TABULAR_CLASSIFICATION and not isinstance(config, TabularConfig):
        raise bad_name(request.name.name, request.rows.task, f"it is a {config.model_type}, which reads no tables")
    if isinstance(config, TimmWrapperConfig) and config.model_args:
        # Repositories that timm pushed may repeat it there, and the wrapper then passes it twice: a TypeError.
        config.model_args.pop("num_classes", None)
    return config


def _classify(config: PretrainedConfig, request: _Request) -> None:
    """Makes it one of a classifier for the classes of the rows, whatever the model was trained for."""
    for key, value in request.labels.items():
        setattr(config, key, value)
    config.problem_type = None  # of several labels a row, or a regression


def _own_feed(request: _Request, source: str, config: PretrainedConfig) -> Feed:
    """The preprocessing that the model's folder or repository names."""
    if request.rows.task == TABULAR_CLASSIFICATION:
        return TableFeed(request.processor or TabularProcessor.from_pretrained(source, **request.hub))
    if request.rows.task == IMAGE_CLASSIFICATION:
        return ProcessorFeed(request.processor or AutoImageProcessor.from_pretrained(source, **request.hub))
    tokenizer = request.processor or AutoTokenizer.from_pretrained(source, **request.hub)
    require_words(tokenizer, source)
    without_unknown_inputs(tokenizer, config)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders have none, and the mask hides what is padded
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    longest = request.rows.max_length or min(MAX_TEXT_LENGTH, tokenizer.model_max_length)
    return _text_feed(tokenizer, min(longest, most_positions(config) or longest))


def _load(request: _Request, source: str) -> tuple[PreTrainedModel, Feed]:
    config = _config(request, source)
    had = [str(name) for _, name in sorted((config.id2label or {}).items())]
    _classify(config, request)
    feed = _own_feed(request, source, config)
    model, info = _AUTO_MODEL[request.rows.task].from_pretrained(
        source, config=config, dtype=_DTYPE, ignore_mismatched_sizes=True, output_loading_info=True, **request.hub
    )
    num_classes = len(request.rows.class_names)
    odd = [str(key) for key, _, wanted in info["mismatched_keys"] if wanted[0] != num_classes]
    if odd:
        raise ValueError(f"The weights of {source!r} do not fit its configuration: {', '.join(odd[:8])}.")
    if had != request.rows.class_names and len(had) == num_classes:
        _renew(find_classifier_head(model, num_classes))
    return model, feed


def _renew(head: nn.Linear) -> None:
    """As many classes, but other ones: what the layer knows of them would only mislead."""
    nn.init.normal_(head.weight, std=0.02)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
