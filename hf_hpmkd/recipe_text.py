"""A recipe as YAML that explains itself: what `hpmkd init` writes."""

import dataclasses
import textwrap
from typing import Any

import yaml

from hf_hpmkd.recipe import SECTION_TYPES, Recipe, recipe_tree


def recipe_text(recipe: Recipe, header: str = "") -> str:
    """The recipe as YAML, every field written out under a comment that says what it does. header: comment lines first.

    Of a teacher only the fields that are set are written.
    """
    tree = recipe_tree(recipe)
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for section in dataclasses.fields(Recipe):
        kind = SECTION_TYPES[section.name]
        lines += ["", f"# {_description(section)}", f"{section.name}:"]
        if section.name == "teachers":
            for teacher in tree["teachers"]:
                written = {key: value for key, value in teacher.items() if value not in (None, [], {}, False)}
                items = [f"{key}: {_yaml(value)}" for key, value in written.items()]
                lines += [f"  - {items[0]}", *(f"    {item}" for item in items[1:])]
            continue
        for field in dataclasses.fields(kind):
            for line in textwrap.wrap(_description(field), 112):
                lines.append(f"  # {line}")
            lines.append(f"  {field.name}: {_yaml(tree[section.name][field.name])}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _description(field: Any) -> str:
    return str(getattr(field.default, "description", None) or "")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
