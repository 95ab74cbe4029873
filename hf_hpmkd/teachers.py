"""Loads teachers: transformers and timm classifiers, CIFAR ResNet files, scikit-learn files, logits in the data.

What a teacher can do is in `teacher_kinds`, how scikit-learn teachers are trained in `sklearn_teachers`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils import cached_file, extract_commit_hash

from hf_hpmkd.class_names import align_labels
from hf_hpmkd.dataset_rows import DatasetRows, SharedInputsFeed, parameters_of
from hf_hpmkd.hub_client import card_license
from hf_hpmkd.model_names import TAKEN_FOR_A_TABLE
from hf_hpmkd.sklearn_teachers import PREFIX as SKLEARN_PREFIX
from hf_hpmkd.sklearn_teachers import SAVED_TYPES, SklearnTeacher, load_skops, train_sklearn
from hf_hpmkd.tasks.base import Feed, Rows
from hf_hpmkd.tasks.images import ImageFeed, ProcessorFeed
from hf_hpmkd.tasks.tables import TableFeed
from hf_hpmkd.tasks.text import NO_TOKENIZER, TextFeed, most_positions, require_words, without_unknown_inputs
from hf_hpmkd.teacher_kinds import (
    ColumnTeacher,
    FoldedTeacher,
    Teacher,
    TorchTeacher,
    check_teacher,
    own_class_names,
)
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TABULAR_CLASSIFICATION, TASKS, TEXT_CLASSIFICATION

__all__ = [
    "SAVED_TYPES",
    "ColumnTeacher",
    "FoldedTeacher",
    "SklearnTeacher",
    "Teacher",
    "TorchTeacher",
    "align_labels",
    "as_teacher",
    "check_teacher",
    "load_skops",
    "load_teacher",
    "train_sklearn",
]

COLUMN_PREFIX = "column:"
_TIMM_PREFIXES = ("timm/", "hf-hub:", "local-dir:")
_TRAINED_HERE = ("mlp-", "cifar-resnet-", "bert-", SKLEARN_PREFIX)
_MOST_TOKENS = 512
_TABULAR_MODEL_TYPE = "hpmkd_tabular_mlp"
_HEADS = {IMAGE_CLASSIFICATION: "ForImageClassification", TEXT_CLASSIFICATION: "ForSequenceClassification"}


@dataclass(frozen=True)
class _Options:
    """What `load_teacher` was asked for, beside source and rows."""

    name: str
    labels: Sequence[str] | None
    revision: str | None
    device: torch.device | str
    dtype: torch.dtype | None
    trust_remote_code: bool


def load_teacher(
    source: str | Path | nn.Module,
    rows: Rows,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    feed: Feed | None = None,
    trust_remote_code: bool = False,
    trusted_types: Sequence[str] = (),
) -> Teacher:
    """A teacher of the classes of `rows`, frozen and in eval mode, with its own preprocessing.

    source: Hub id or folder of a transformers or timm classifier, `timm/NAME`, `hf-hub:ID`, `local-dir:FOLDER`,
    `FILE.skops`, `FILE.safetensors` (CIFAR ResNet with its JSON beside it), `column:NAME`, or a module with its feed.
    labels: class names in the order of the outputs, where its config does not say them or says others than the data.
    dtype: of torch teachers, as for `TorchTeacher`. trusted_types: see `load_skops`.

    Raises FileNotFoundError where nothing is found, ValueError for classes that do not fit the data's, for generative
    and regression models, for models without a trained classifier head and for ones of another task.
    """
    if isinstance(source, nn.Module):
        return _from_module(source, rows, name, labels, device, dtype, feed)
    text = re.sub(
        r"^(local-dir:)?(~.*)", lambda named: (named[1] or "") + str(Path(named[2]).expanduser()), str(source)
    )
    if feed is not None:
        raise ValueError(f"`feed` goes with a module, got the source {text!r}, which brings its own.")
    if text.startswith(COLUMN_PREFIX):
        return ColumnTeacher(text.removeprefix(COLUMN_PREFIX), rows, name=name, class_names=labels)
    if text.endswith(".skops"):
        return load_skops(text, rows, name=name, labels=labels, trusted_types=trusted_types)
    if text.startswith(_TRAINED_HERE) and not Path(text).exists():
        raise ValueError(
            f"{text!r} names a teacher that is trained on the spot, so there is nothing to load. Train it first "
            "(`train_sklearn`, or a recipe), or give the folder or file of a trained one."
        )
    if rows.task not in TASKS:
        raise ValueError(
            f"Teacher {text!r} reads images, texts or tables, but the dataset no longer has such a column. Keep the "
            "raw column beside the student's inputs, or pass a module that takes these inputs."
        )
    options = _Options(name or _short(text), labels, revision, device, dtype, trust_remote_code)
    if text.endswith(".safetensors"):
        return _from_safetensors(Path(text), rows, options)
    if text.startswith(_TIMM_PREFIXES):
        return _from_timm(text, rows, options)
    return _from_transformers(text, rows, options)


def as_teacher(teacher: str | Path | nn.Module | Teacher, rows: Rows, device: torch.device | str = "cpu") -> Teacher:
    """A `Teacher` as it is (moved to the device), a source through `load_teacher`, or a module that takes the student's
    inputs. Raises ValueError for a module where rows cannot give these inputs."""
    if isinstance(teacher, Teacher):
        return teacher.to(device)
    if not isinstance(teacher, nn.Module):
        return load_teacher(teacher, rows, device=device)
    if not isinstance(rows, DatasetRows):
        raise ValueError(
            "A module does not say how rows become its inputs. Pass `TorchTeacher(module, feed, name=..., "
            "data_names=rows.class_names)`, with the feed of your FedDataset if it takes the student's inputs."
        )
    named, takes_all = parameters_of(teacher)
    feed = SharedInputsFeed(None if takes_all else named)
    return _from_module(teacher, rows, None, None, device, None, feed)


def reads_raw(teacher: Teacher) -> bool:
    """Whether it makes its inputs itself of an image or text; one that is a column reads neither."""
    feed = getattr(teacher.full if isinstance(teacher, FoldedTeacher) else teacher, "feed", None)
    return teacher.kind == "sklearn" or (feed is not None and not isinstance(feed, SharedInputsFeed))


def name_apart(teachers: Sequence[Teacher]) -> None:
    """Numbers teachers of the same name (two modules of one class), because logs and plots go by name."""
    given, taken = {teacher.name for teacher in teachers}, set[str]()
    for teacher in teachers:
        stem, count = teacher.name, 1
        while teacher.name in taken or (count > 1 and teacher.name in given):
            count += 1
            teacher.name = f"{stem}-{count}"
        taken.add(teacher.name)


def _short(source: str) -> str:
    """The last part of a path or id: "resnet18.a1_in1k", "resnet20_cifar10"."""
    return source.rstrip("/").split("/")[-1].removesuffix(".safetensors").split(":")[-1]


def _from_module(
    module: nn.Module,
    rows: Rows,
    name: str | None,
    labels: Sequence[str] | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
    feed: Feed | None,
) -> TorchTeacher:
    if feed is None:
        raise ValueError(
            f"A {type(module).__name__} does not say how rows become its inputs. Pass its preprocessing as `feed`, or "
            "its folder or Hub id as source."
        )
    config = getattr(module, "config", None)
    if isinstance(config, PretrainedConfig):
        _require_classifier(config, type(module).__name__)
    return TorchTeacher(
        module,
        feed,
        name=name or type(module).__name__,
        data_names=rows.class_names,
        class_names=labels,
        source=type(module).__name__,
        device=device,
        dtype=dtype,
    )


# ---- transformers ----------------------------------------------------------------------------------------------------


def _from_transformers(source: str, rows: Rows, options: _Options) -> TorchTeacher:
    found = _config_file(source, options.revision)
    settings = json.loads(Path(found).read_text())
    if settings.get("model_type") == _TABULAR_MODEL_TYPE:
        return _from_tabular(source, rows, options)
    if "pretrained_cfg" in settings and "model_type" not in settings:
        # AutoModel raises TypeError on repositories that timm pushed (transformers 5.23: `num_classes` given twice).
        folder = Path(source).is_dir()
        return _from_timm(f"local-dir:{source}" if folder else f"hf-hub:{source}", rows, options)
    kwargs: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = AutoConfig.from_pretrained(source, **kwargs)
    _require_classifier(config, source)
    if rows.task == TABULAR_CLASSIFICATION:
        raise ValueError(
            f"{source} is a {config.model_type} model, but the data is a table. Use a tabular teacher: mlp-..., "
            f"sklearn:..., a .skops file, or a folder saved by this package. {TAKEN_FOR_A_TABLE}"
        )
    _require_task(config, source, rows.task)
    auto = AutoModelForImageClassification if rows.task == IMAGE_CLASSIFICATION else AutoModelForSequenceClassification
    model, report = auto.from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise ValueError(
            f"{source} lacks weights of a {type(model).__name__} ({', '.join(missing[:5])}), which would be random. A "
            "teacher must be a trained classifier: fine-tune it first."
        )
    license, commit = _card_facts(source, options.revision)
    return TorchTeacher(
        model,
        _image_feed(source, config, kwargs)
        if rows.task == IMAGE_CLASSIFICATION
        else _text_feed(source, config, kwargs),
        name=options.name,
        data_names=rows.class_names,
        class_names=options.labels,
        source=source,
        license=license,
        commit=commit,
        device=options.device,
        dtype=options.dtype,
    )


def _config_file(source: str, revision: str | None) -> str:
    if source.endswith((".joblib", ".pkl", ".pickle")):
        raise ValueError(
            f"{source!r} is a pickle, which may run any code when it is read and is not opened here. Save the "
            "estimator with `skops.io.dump(estimator, 'model.skops')` and give that file."
        )
    if Path(source).is_file():
        raise ValueError(
            f"A teacher's file is .skops, or .safetensors with its JSON beside it, got {source!r}. Give the folder of "
            "a transformers model."
        )
    try:
        found = cached_file(source, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"No teacher at {source!r}: it is neither a folder with a config.json nor a Hub model that can be "
            f"reached. Check the name, the revision and, for private models, `hf auth login`. ({error})"
        ) from error
    if found is None:
        raise FileNotFoundError(
            f"The folder {source!r} has no config.json, so it holds no transformers model. Of a scikit-learn estimator "
            "give the file, FOLDER/model.skops."
        )
    return found


def _require_classifier(config: PretrainedConfig, source: str) -> None:
    architectures = config.architectures or []
    generative = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))]
    if generative:
        raise ValueError(
            f"{source} is a generative model ({generative[0]}); a teacher must be a classifier. Fine-tune it with a "
            "classification head first, or store its answers as a logits column (`column:NAME`)."
        )
    if config.problem_type == "regression" or config.num_labels == 1:
        raise ValueError(
            f"{source} is a regression model ({config.num_labels} output(s)); a teacher must be a classifier with one "
            "output per class."
        )
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{source} gives several labels at once (multi_label_classification); a teacher must choose one class of "
            "several."
        )


def _require_task(config: PretrainedConfig, source: str, task: str) -> None:
    architectures = config.architectures or []
    if architectures and not any(_HEADS[task] in a for a in architectures):
        raise ValueError(
            f"{source} was saved as {', '.join(architectures)}, but the data asks for {task}: a model saved as "
            f"...{_HEADS[task]}. Choose a teacher of this task, or fine-tune this one with a classification head first."
        )


def _image_feed(source: str, config: PretrainedConfig, kwargs: dict[str, Any]) -> Feed:
    if config.model_type == "timm_wrapper":
        return _timm_feed(config.pretrained_cfg, config.architecture)
    try:
        return ProcessorFeed(AutoImageProcessor.from_pretrained(source, **kwargs))
    except OSError as error:
        raise FileNotFoundError(
            f"{source} has no image processor (preprocessor_config.json), so its preprocessing is unknown. Save one "
            "beside the model, or pass the loaded model with its `feed`."
        ) from error


def _text_feed(source: str, config: PretrainedConfig, kwargs: dict[str, Any]) -> TextFeed:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except OSError as error:
        raise FileNotFoundError(NO_TOKENIZER.format(source)) from error
    require_words(tokenizer, source)
    without_unknown_inputs(tokenizer, config)
    return TextFeed(tokenizer, min(_MOST_TOKENS, tokenizer.model_max_length, most_positions(config) or _MOST_TOKENS))


def _from_tabular(source: str, rows: Rows, options: _Options) -> TorchTeacher:
    from hf_hpmkd.models.tabular import TabularForClassification, TabularProcessor

    if rows.task != TABULAR_CLASSIFICATION:
        raise ValueError(
            f"{source} is a tabular model, but the data asks for {rows.task}. Choose a teacher of this task."
        )
    license, commit = _card_facts(source, options.revision)
    revision = options.revision or "main"
    return TorchTeacher(
        TabularForClassification.from_pretrained(source, revision=revision),
        TableFeed(TabularProcessor.from_pretrained(source, revision=revision)),
        name=options.name,
        data_names=rows.class_names,
        class_names=options.labels,
        source=source,
        license=license,
        commit=commit,
        device=options.device,
        dtype=options.dtype,
    )


def _card_facts(source: str, revision: str | None) -> tuple[str | None, str | None]:
    """Licence and commit of a Hub repository or folder, from its README.md and its place in the cache; None if
    unknown."""
    license, commit = None, None
    for filename in ("README.md", "config.json"):
        path = cached_file(
            source,
            filename,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            continue
        commit = commit or extract_commit_hash(path, None)
        if filename == "README.md":
            license = card_license(metadata_load(path) or {})
    return license, commit


# ---- timm and files --------------------------------------------------------------------------------------------------


def _from_timm(source: str, rows: Rows, options: _Options) -> TorchTeacher:
    import timm

    if rows.task != IMAGE_CLASSIFICATION:
        raise ValueError(
            f"{source} is an image model, but the data asks for {rows.task}. Choose a teacher of this task."
        )
    location = "hf-hub:" + source if source.startswith("timm/") else source
    name = source.removeprefix("timm/")
    if source.startswith("timm/") and options.revision is None and timm.is_model(name):
        location = name  # timm knows which weights a bare architecture name means
    elif options.revision is not None and location.startswith("hf-hub:"):
        location = f"{location}@{options.revision}"
    try:
        model: Any = timm.create_model(location, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"timm cannot load {source!r}: {str(error).rstrip('.')}. Check the name (`timm.list_pretrained()`), the "
            "folder and the connection."
        ) from error
    if not model.num_classes:
        raise ValueError(f"{source} has no classifier head (0 classes). Choose a teacher that was trained to classify.")
    cfg = dict(model.pretrained_cfg)
    place = source.removeprefix("local-dir:") if source.startswith("local-dir:") else cfg.get("hf_hub_id")
    license, commit = _card_facts(place, options.revision) if place else (None, None)
    return TorchTeacher(
        model,
        _timm_feed(cfg, cfg.get("architecture")),
        name=options.name,
        data_names=rows.class_names,
        class_names=options.labels or _timm_class_names(model, cfg),
        source=source,
        kind="timm",
        license=license or cfg.get("license"),
        commit=commit,
        device=options.device,
        dtype=options.dtype,
    )


def _timm_feed(cfg: dict[str, Any], architecture: str | None) -> Feed:
    if cfg.get("crop_mode", "center") == "center" and cfg.get("interpolation", "bilinear") in ("bilinear", "bicubic"):
        return ImageFeed.from_timm(cfg)
    from transformers import TimmWrapperImageProcessor

    return ProcessorFeed(TimmWrapperImageProcessor(cfg, architecture))


def _timm_class_names(model: Any, cfg: dict[str, Any]) -> list[str]:
    """Names in the config, else those of the ImageNet subset it was trained on, else LABEL_0, ..."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = cfg.get("label_names")
    subset = None if names else infer_imagenet_subset(model)
    if subset:
        names = ImageNetInfo(subset).label_descriptions()
    # ImageNet's short descriptions name two classes "crane": only the order tells them apart then.
    if not names or len(set(names)) != model.num_classes:
        names = [f"LABEL_{index}" for index in range(model.num_classes)]
    return [str(name) for name in names]


def _from_safetensors(path: Path, rows: Rows, options: _Options) -> TorchTeacher:
    from hf_hpmkd.models.cifar_resnet import load_cifar_resnet_file

    if rows.task != IMAGE_CLASSIFICATION:
        raise ValueError(f"{path} is an image model, but the data asks for {rows.task}. Choose a teacher of this task.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no teacher at {path}. Check the path.")
    model = load_cifar_resnet_file(path)
    about = json.loads(path.with_suffix(".json").read_text())
    expected = about.get("input", {})
    channels, height, width = expected.get("size", (3, 32, 32))
    if "mean" not in expected or "std" not in expected:
        raise ValueError(
            f"{path.with_suffix('.json').name} must say how pixels are normalised: input.mean and input.std, of "
            "pixels in 0..1."
        )
    return TorchTeacher(
        model,
        ImageFeed((height, width), expected["mean"], expected["std"], channels),
        name=options.name,
        data_names=rows.class_names,
        class_names=options.labels or own_class_names(model),
        source=str(path),
        license=(about.get("source") or {}).get("license"),
        device=options.device,
        dtype=options.dtype,
    )
