"""What a model name means: `cifar-resnet-8`, `mlp-64x32`, `bert-2x64`, `timm/resnet18[layers=1x1x2x1]`, a Hub id, a
folder. Builds nothing, and opens no file and no connection.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, TABULAR_CLASSIFICATION, TASKS, TEXT_CLASSIFICATION

FORMS = {
    IMAGE_CLASSIFICATION: (
        "cifar-resnet-DEPTH with DEPTH = 6n + 2, as in cifar-resnet-8",
        "cifar-resnet-DEPTHxWIDTH, as in cifar-resnet-14x8 (8 channels in the first stage instead of 16)",
        "timm/ARCHITECTURE, as in timm/resnet10t",
    ),
    TEXT_CLASSIFICATION: ("bert-LAYERSxHIDDEN with HIDDEN a multiple of 16, as in bert-2x64",),
    TABULAR_CLASSIFICATION: ("mlp-WIDTH or mlp-WIDTHxWIDTH..., as in mlp-16 or mlp-64x32",),
}
_HUB_FORM = "the id of a model on the Hub or a folder with its files, as in google/mobilenet_v2_1.0_224 or ./student"
_VARIANT_FORM = (
    "timm and Hub names may end in sizes that replace the usual ones, as in timm/resnet18[layers=1x1x2x1] or "
    "./student[hidden_size=128,num_hidden_layers=2]"
)
# bert needs the number, because of bert-base-cased.
_BUILT_HERE = re.compile(r"(cifar-resnet|mlp)(?![a-z])|(bert)-(?=\d)")
TAKEN_FOR_A_TABLE = (
    "The data was taken for a table; if it is texts or images, name their column with data.input_column=COLUMN, of "
    "pairs of texts data.input_column=[A,B] task.type=text-classification."
)
TASK_OF = {"cifar-resnet": IMAGE_CLASSIFICATION, "bert": TEXT_CLASSIFICATION, "mlp": TABULAR_CLASSIFICATION}


@dataclass(frozen=True)
class ModelName:
    """family: cifar-resnet, mlp, bert, timm or hub. numbers: (depth, width), the widths, or (layers, hidden size).
    source: architecture, Hub id or folder, without a prefix. variant: sizes that replace those of the source; keys are
    arguments of the timm architecture or attributes of the transformers config.
    """

    name: str
    family: str
    numbers: tuple[int, ...] = ()
    source: str = ""
    variant: dict[str, Any] = field(default_factory=dict)


def built_family(name: str) -> str | None:
    """cifar-resnet, mlp or bert where a name is of a model that is built from its numbers, else None."""
    built = _BUILT_HERE.match(name)
    return (built[1] or built[2]) if built else None


def split_variant(name: str) -> tuple[str, dict[str, Any]]:
    """`NAME[a=2,b=4x8,c=0.75]` as NAME and `{"a": 2, "b": [4, 8], "c": 0.75}`; a name without brackets has no variant.

    Raises ValueError for brackets with anything else in them, and for a key given twice.
    """
    if not name.endswith("]") or "[" not in name or Path(name.removeprefix("local-dir:")).is_dir():
        return name, {}
    base, inside = name[:-1].split("[", 1)
    number = r"\d+(?:\.\d+)?"
    sizes: dict[str, Any] = {}
    for part in inside.split(","):
        pair = re.fullmatch(rf"([A-Za-z_]\w*)=({number}(?:x{number})*)", part)
        if not base or pair is None or pair[1] in sizes:
            raise ValueError(
                f"The brackets of a model name hold distinct sizes, key=number or key=NUMBERxNUMBER..., with commas "
                f"between, got {part!r} in {name!r}. Write for instance timm/resnet18[layers=1x1x2x1]."
            )
        numbers = [float(text) if "." in text else int(text) for text in pair[2].split("x")]
        sizes[pair[1]] = numbers if len(numbers) > 1 else numbers[0]
    return base, sizes


def with_variant(base: str, sizes: Mapping[str, Any]) -> str:
    """The inverse of `split_variant`. Keys are sorted, so that one model has one name."""
    told = {key: "x".join(map(str, value)) if isinstance(value, list) else value for key, value in sizes.items()}
    return f"{base}[{','.join(f'{key}={told[key]}' for key in sorted(told))}]" if told else base


def parse_name(name: str, task: str) -> ModelName:
    """What a model name means for a task. Opens no file and no connection.

    Raises ValueError, with all the forms that the task knows, for a name of none of them or of another task.
    """
    if task not in TASKS:
        raise ValueError(f"The task must be one of {', '.join(TASKS)}, got {task!r}.")
    if family := built_family(name):
        parsed = _parse_built(name, family)
        if TASK_OF[parsed.family] != task:
            raise bad_name(name, task, f"it is for {TASK_OF[parsed.family]}")
        return parsed
    if timm_name := re.fullmatch(r"(?:hf-hub:)?timm/(.+)", name):
        if task != IMAGE_CLASSIFICATION:
            raise bad_name(name, task, f"it is for {IMAGE_CLASSIFICATION}")
        architecture, variant = split_variant(timm_name[1])
        return ModelName(name, "timm", source=architecture, variant=variant)
    if re.match(r"(sklearn|column):", name) or name.endswith((".skops", ".safetensors")):
        raise bad_name(name, task, "it can be a teacher only, for it is no network to be trained here")
    source, variant = split_variant(os.path.expanduser(re.sub(r"^(hf-hub|local-dir):", "", name)))
    if not Path(source).is_dir():
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise bad_name(name, task, "it is no folder and no id on the Hub") from error
    return ModelName(name, "hub", source=source, variant=variant)


def _parse_built(name: str, family: str) -> ModelName:
    task = TASK_OF[family]
    digits = re.fullmatch(r"\d+(x\d+)*", name.removeprefix(family + "-"))
    numbers = tuple(int(part) for part in digits[0].split("x")) if digits else ()
    if not numbers or min(numbers) < 1:
        raise bad_name(name, task, "positive numbers must follow")
    if family == "cifar-resnet":
        if len(numbers) > 2 or numbers[0] < 8 or (numbers[0] - 2) % 6:
            raise bad_name(name, task, "the depth must be 8, 14, 20, 26, 32, ...")
        numbers = (numbers[0], numbers[1] if len(numbers) == 2 else 16)
    if family == "bert" and (len(numbers) != 2 or numbers[1] % 16):
        raise bad_name(name, task, "two numbers must follow, the second a multiple of 16")
    return ModelName(name, family, numbers)


def forms(task: str) -> str:
    """All forms of a model name for a task, for messages."""
    return "; ".join((*FORMS[task], _HUB_FORM, _VARIANT_FORM))


def bad_name(name: str, task: str, why: str) -> ValueError:
    """The error for a name that means no model of a task."""
    told = f"{name!r} names no model for {task}: {why}. Use one of: {forms(task)}."
    return ValueError(f"{told} {TAKEN_FOR_A_TABLE}" if task == TABULAR_CLASSIFICATION else told)
