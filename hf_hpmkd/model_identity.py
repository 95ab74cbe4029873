"""What tells two models apart beside their weights. Knows nothing of teachers."""

import copy
import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# What a config says of where and by whom it was written, which changes nothing in the outputs; nor does use_cache,
# which Trainer switches off in the model that it trains.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "_commit_hash", "transformers_version", "auto_map", "use_cache")

# Their modules are told by what they print.
_LIBRARIES = frozenset(
    {"builtins", "abc", "typing", "torch", "torchvision", "torchao", "timm", "transformers", "hf_hpmkd"}
)


def architecture(model: nn.Module) -> dict[str, Any]:
    """JSON-able: what the weights do not say: settings of a config, with the modules where they are others than it
    makes, else the printed modules (strides, activations); and of modules of no library their code and the plain
    settings that they were made with.
    """
    told: dict[str, Any] = {"class": type(model).__name__}
    if isinstance(model, PreTrainedModel):
        told["config"] = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE_CONFIG_KEYS}
        if (kinds := _kinds(model)) != _kinds_of_config(model):
            told["modules"] = kinds
    else:
        told["modules"] = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    own = [part for part in model.modules() if _is_own(type(part))]
    if own:
        kinds_of_own = {base for kind in {type(part) for part in own} for base in kind.__mro__ if _is_own(base)}
        told["code"] = sorted(map(_source, kinds_of_own))
        told["attributes"] = [_settings(part) for part in own]
    return told


def _kinds(model: nn.Module) -> list[str]:
    return [f"{name}: {type(part).__name__}" for name, part in model.named_modules()]


def _kinds_of_config(model: PreTrainedModel) -> list[str] | None:
    """As the model's class makes them of its config; None where it cannot."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _kinds(type(model)(copy.deepcopy(model.config)))
    except Exception:  # whatever somebody's class raises: what is told then is more than is needed
        return None


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in _LIBRARIES


@cache
def _source(kind: type) -> str:
    """The code of a class; its name where that is not to be had, as in a console."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module was made with, as far as it is plain and kept under its name; not what it counts or remembers."""
    asked = inspect.signature(type(module).__init__).parameters
    return {name: value for name, value in vars(module).items() if name in asked and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(map(_is_plain, value)))
