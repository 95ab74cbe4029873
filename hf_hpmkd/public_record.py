"""What of a run record may be published: names on the Hub whole, of what lies on this machine the last name alone."""

import re

from hf_hpmkd.run_record import RunRecord, last_name


def hub_id(source: str, commit: str | None) -> str | None:
    """The Hub id behind a source, or None. A bare `owner/name` counts only with a resolved commit: without one it may
    as well be a folder. `timm/NAME.TAG` is the id of a repository as it stands.
    """
    name = source.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or re.search(r"\.(skops|safetensors)$", name):
        return None
    known = commit is not None or source.startswith("hf-hub:") or re.fullmatch(r"timm/\w+\.\w+", name)
    return name if known else None


def _shown(source: str, on_hub: bool) -> str:
    """A source as the card shows it: Hub ids and names whole, of a folder or file the last name."""
    if on_hub or source.startswith(("sklearn:", "column:", "timm/")):
        return source
    return last_name(source.removeprefix("local-dir:"))


def named_sources(record: RunRecord) -> RunRecord:
    """The record with local sources, absolute or relative, cut down to their last name; no output folder or address."""
    commits = {one.source: one.commit for one in record.teachers}
    for one in record.teachers:
        one.source = _shown(one.source, hub_id(one.source, one.commit) is not None)
    for config in record.recipe.get("teachers", []):
        config["model"] = _shown(config["model"], hub_id(config["model"], commits.get(config["model"])) is not None)
    student = record.recipe.get("student", {})
    if "model" in student:
        student["model"] = _shown(student["model"], hub_id(student["model"], record.commits.get("student")) is not None)
    for place in (record.parts, record.recipe.get("data", {})):
        if "path" in place:
            place["path"] = _shown(place["path"], data_on_hub(record))
    for stage in (*record.chain.stages, *record.chain.left_out) if record.chain else ():
        stage.model = last_name(stage.model)
    for section, key in (("chain", "models"), ("auto", "prior")):
        if named := record.recipe.get(section, {}).get(key):
            record.recipe[section][key] = [_shown(one, False) for one in named] if key == "models" else last_name(named)
    record.recipe.get("distillation", {}).pop("cache_dir", None)
    record.recipe.get("pipeline", {}).pop("address", None)
    record.recipe.pop("output", None)
    record.recipe.pop("memory", None)
    return record


def data_on_hub(record: RunRecord) -> bool:
    return record.parts.get("kind") == "hub"
