"""YAML text and `key=value` words to a checked tree; every fault as one line. Knows nothing of distillation.

A fault line reads "key path: what arrived, the rule, the way out". Reading goes on after a fault, so that a file with
five mistakes says five things.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2), leaves dates as text and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Here keys are as they were written; what `<<` brings along may be given again."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is one value, not several", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice; keep one of the two", key.start_mark
                )
            seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# PyYAML follows YAML 1.1, where 1e-3 and 1.5e3 (no dot, no sign) are text; github.com/yaml/pyyaml/issues/173.
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, with line and column, if it is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ValueError("not valid YAML for a recipe: it is nested too deeply.") from error


def write_out(tree: dict[str, Any]) -> None:
    """Sections given as one value, in place: `memory: hf://datasets/USER/NAME` and `auto: fast` say it all."""
    if isinstance(tree.get("memory"), str):
        tree["memory"] = {"path": tree["memory"]}
    if isinstance(tree.get("auto"), str | int | float):
        tree["auto"] = {"mode": tree["auto"]}
    if isinstance(tree.get("auto"), dict) and tree["auto"].get("mode") is False:
        tree["auto"]["mode"] = "off"  # YAML 1.1 reads the bare word as false


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Sets `section.key=value` words in `tree`, in place: the value is YAML; list items go by position.

    Returns the faults. Whether a key exists is left to `validate`, which knows the fields.
    """
    faults = []
    for word in overrides:
        path, equals, value = word.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            faults.append(f"{word}: an override has the form section.key=value, for instance training.epochs=3.")
            continue
        try:
            _set(tree, keys, parse_yaml(value))
        except ValueError as error:
            faults.append(f"{word}: {error}")
    return faults


def _set(node: Any, keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys):
        here: Any = key
        if isinstance(node, list):
            if not node:
                raise ValueError(f"`{'.'.join(keys[:depth])}` is an empty list, which has no position; give the list.")
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(
                    f"`{'.'.join(keys[:depth])}` is a list of {len(node)}, so the next word must be a position from 0 "
                    f"to {len(node) - 1}, got {key!r}."
                )
            here = int(key)
        elif not isinstance(node, dict):
            raise ValueError(f"`{'.'.join(keys[:depth])}` holds one value ({node!r}), it has no key {key!r}.")
        if depth == len(keys) - 1:
            node[here] = value
            return
        if isinstance(node, dict) and node.get(here) is None:
            node[here] = {}
        node = node[here]


def validate(
    adapter: TypeAdapter[Any], tree: Any, sections: dict[str, list[str]], stand_ins: dict[str, Any]
) -> tuple[Any, dict[Path, str]]:
    """The object that `adapter` makes of `tree`, and the faults by key path.

    Without faults the dict is empty. With faults the object holds defaults or stand-ins at the faulty keys, so that
    rules about the other keys can still be checked, or is None if even that fails. Strict: "3" is no integer, true no
    number. sections: keys by section, for "did you mean" across sections. stand_ins: values for required keys.
    """
    faults: dict[Path, str] = {}
    for _ in range(10):  # a few rounds: taking a faulty key out can bring a missing one to light
        try:
            return adapter.validate_json(json.dumps(tree, default=str), strict=True), faults
        except ValidationError as error:
            found = _messages(error, tree, sections)
        tree = json.loads(json.dumps(tree, default=str))
        for path in sorted(found, key=len, reverse=True):
            _mend(tree, path, stand_ins)
        faults.update({path: text for path, text in found.items() if not _is_told(path, faults)})
    return None, faults


def _is_told(path: Path, faults: dict[Path, str]) -> bool:
    """Whether this key, or one above it, already has its fault."""
    return any(path[: len(told)] == told for told in faults)


def _messages(error: ValidationError, tree: Any, sections: dict[str, list[str]]) -> dict[Path, str]:
    rules: dict[Path, list[str]] = {}
    whole: dict[Path, str] = {}
    for detail in error.errors(include_url=False):
        path, kind = _key_path(detail["loc"], tree), detail["type"]
        if kind == "missing":
            whole[path] = "is missing and has no default."
        elif kind == "unexpected_keyword_argument":
            whole[path] = _unknown_key(path, sections)
        elif kind in ("dataclass_type", "dataclass_exact_type"):
            whole[path] = f"must be a mapping of keys to values, got {_shown(detail['input'])}."
        elif kind == "value_error":
            whole[path] = f"{detail['msg'].removeprefix('Value error, ').rstrip('.')}."
        else:
            rules.setdefault(path, []).append(_rule(detail))
    for path, texts in rules.items():
        whole.setdefault(path, f"must be {' or '.join(dict.fromkeys(texts))}, got {_shown(_value(tree, path))}.")
        if "text" in texts and isinstance(_value(tree, path), bool | int | float):
            whole[path] += ' YAML reads No, yes, 0 and the like as no text unless they are quoted: "No".'
        if isinstance(_value(tree, path), str) and texts[0].startswith("one of"):
            whole[path] += did_you_mean(str(_value(tree, path)), re.findall(r"'([^']*)'", texts[0]))
    return whole


def _rule(detail: Any) -> str:
    text = detail["msg"].removeprefix("Input should be ").rstrip(".")
    if detail["type"] == "literal_error":
        return f"one of {text}"
    if detail["type"] == "string_pattern_mismatch":
        return f"text of the form {detail['ctx']['pattern']}"
    text = re.sub(r"^List should have at least 1 item.*", "a list of at least one", text)
    return text.replace("a valid integer", "an integer").replace("a valid string", "text").replace("a valid ", "a ")


def _key_path(location: Sequence[str | int], tree: Any) -> Path:
    """The part of pydantic's location that names keys of the file; the rest names members of unions."""
    path: list[str | int] = []
    for key in location:
        if isinstance(tree, dict):
            path.append(key)
            tree = tree.get(key)
        elif isinstance(tree, list) and isinstance(key, int):
            path.append(key)
            tree = tree[key] if key < len(tree) else None
        else:
            break
    return tuple(path)


def _value(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _mend(tree: Any, path: Path, stand_ins: dict[str, Any]) -> None:
    """Takes the value at `path` out, or puts a stand-in there if one is known for its key or list."""
    *above, last = path
    for key in above:
        tree = tree[key]
    if isinstance(tree, list):
        tree[int(last)] = stand_ins.get(str(above[-1]), [None])[0]
    elif last in stand_ins:
        tree[last] = stand_ins[str(last)]
    else:
        tree.pop(last, None)


def _unknown_key(path: Path, sections: dict[str, list[str]]) -> str:
    key, section = str(path[-1]), str(path[0]) if len(path) > 1 else ""
    known = sections.get(section, [])
    near = did_you_mean(key, known)
    elsewhere = [
        f"{'teachers.0' if name == 'teachers' else name}.{key}"
        for name, keys in sections.items()
        if name and name != section and key in keys
    ]
    if elsewhere:
        near = f" Did you mean `{'` or `'.join(elsewhere)}`?"
    return f"is not a known key.{near}" + ("" if near else f" Known here: {', '.join(known)}.")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean `x`?' for the known word closest to `word`, '' if none is close."""
    known = list(known)
    longer = [one for one in known if one.startswith(f"{word}_")]  # adamw: adamw_torch
    near = longer or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""


def _shown(value: Any) -> str:
    text = "nothing (null)" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(path: Path) -> str:
    """`('teachers', 0, 'name')` as `teachers.0.name`, the form that overrides take."""
    return ".".join(str(key) for key in path)
