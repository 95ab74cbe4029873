"""The student's model card: a README.md with the Hub's metadata, made from the run record and nothing else.

Claims no more than the record says, shows no path of the machine, and says so where distillation did not help.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_hpmkd import report
from hf_hpmkd.public_record import data_on_hub, hub_id, named_sources
from hf_hpmkd.run_record import RunRecord, TeacherRecord, last_name

CARD_FILE = "README.md"

_TABULAR = "tabular-classification"
_TASKS = ("image-classification", "text-classification", _TABULAR)
# Ours that the Hub knows by another name; `teacher_agreement` says nothing of quality and stays out of the metadata.
_HUB_METRICS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "accuracy": ("accuracy", "Accuracy", None),
    "macro_f1": ("f1", "Macro F1", {"average": "macro"}),
    "calibration_error": ("calibration_error", "Expected calibration error, 15 bins", None),
}
_CAPTIONS = {
    "learning_curves": "Learning curves: cross-entropy on training batches and accuracy on validation rows, over steps",
    "temperature": "Distillation temperature over steps",
    "teacher_weights": "Mean weight of each teacher over steps",
    "class_weights": "Mean weight of each teacher on the guide rows of each class",
    "pipeline": "The jobs of the run over time, worker by worker",
}
# (pattern in the lower-case licence, what it restricts)
_RESTRICTIONS = (
    (r"\bnc\b|non-?commercial|research", "forbids commercial use"),
    (r"\bnd\b|no-?deriv", "forbids derived works"),
    (r"\bsa\b|share-?alike|gpl|\bodbl\b", "share-alike: asks that derived works carry the same licence"),
    (r"rail|llama|gemma", "carries its own terms of use"),
)


def write_card(
    record: RunRecord,
    folder: str | os.PathLike[str],
    student_folder: str | os.PathLike[str],
    plots: Sequence[str | os.PathLike[str]] = (),
    license: str | None = None,
) -> Path:
    """Writes `folder/README.md` and returns it.

    student_folder: holds the student's config.json, which tells how it is opened. plots: image files inside `folder`,
    linked relative to it. license: the one its author gives the student, as a Hub identifier; None names none.
    Raises ValueError if the record has no student, or a plot lies outside `folder`.
    """
    folder, student_folder = Path(folder), Path(student_folder)
    if "student" not in record.models:
        raise ValueError(
            f"A card needs a student in the record, got models {sorted(record.models)} (status: {record.status}). "
            "Write it after the student is trained."
        )
    links = _links(folder, plots)
    config_file = student_folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    public = named_sources(record.public())
    data = card_data(public, config, license)
    text = "\n\n".join(section for section in _sections(public, config, student_folder.name, links, license) if section)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    path = folder / CARD_FILE
    card.save(path)
    return path


def _links(folder: Path, plots: Sequence[str | os.PathLike[str]]) -> list[str]:
    links = []
    for plot in plots:
        try:
            links.append(Path(plot).resolve().relative_to(folder.resolve()).as_posix())
        except ValueError:
            raise ValueError(
                f"Plots must lie inside the card's folder, so that they are published with it; {last_name(str(plot))} "
                "does not. Draw them into a folder beside the card."
            ) from None
    return links


# ---- what the record says --------------------------------------------------------------------------------------------


def task(record: RunRecord) -> str | None:
    """The task, from the data's provenance or the recipe; None if neither says."""
    found = record.parts.get("task") or record.recipe.get("task", {}).get("type")
    return found if found in _TASKS else None


def _commits(record: RunRecord) -> list[tuple[str, str | None]]:
    """Names and commits: of the code, data and student, then of the teachers (which older records hold twice)."""
    teachers = [
        (one.name, one.commit) for one in record.teachers if (one.name, one.commit) not in record.commits.items()
    ]
    return [*record.commits.items(), *teachers]


def _linked(name: str, place: str | None) -> str:
    """A name as code, with a link to its place on the Hub if it has one."""
    return f"[`{name}`](https://huggingface.co/{place})" if place else f"`{name}`"


def data_name(record: RunRecord) -> str:
    return str(record.parts.get("path") or record.recipe.get("data", {}).get("path") or "unnamed data")


def student_name(record: RunRecord) -> str:
    return str(record.recipe.get("student", {}).get("model") or "student")


def _start_of_student(record: RunRecord) -> str | None:
    """The Hub id whose weights the student began with, if any."""
    student = record.recipe.get("student", {})
    return hub_id(student.get("model", ""), record.commits.get("student")) if student.get("pretrained") else None


def base_models(record: RunRecord) -> list[str]:
    """Hub ids: what the student's weights began with, then the teachers that it learned from or began with."""
    taught = [one for one in record.teachers if not record.labels_alone or one.name == record.began_with]
    teachers = [hub_id(one.source, one.commit) for one in taught if not one.trained_here]
    return list(dict.fromkeys(name for name in [_start_of_student(record), *teachers] if name))


def card_data(record: RunRecord, config: dict[str, Any], license: str | None = None) -> ModelCardData:
    """The metadata. `record` has been through `public`; config: the student's config.json."""
    kind = task(record)
    results = eval_results(record)
    tags = ["knowledge-distillation", "hf_hpmkd", kind, "custom_code" if "auto_map" in config else None]
    values: dict[str, Any] = {
        "library_name": "hf_hpmkd" if kind == _TABULAR else "transformers",
        "pipeline_tag": kind,
        "license": license,
        "tags": [tag for tag in tags if tag],
        "datasets": [data_name(record)] if data_on_hub(record) else None,
        "metrics": sorted({one.metric_type for one in results} - {"calibration_error"}) or None,
        "base_model": base_models(record) or None,
        # The Hub has no relation for distillation; without one it would guess "merge" for several teachers.
        "base_model_relation": "finetune" if base_models(record) else None,
    }
    values = {key: value for key, value in values.items() if value is not None}
    if results:
        repo_id = record.recipe.get("hub", {}).get("repo_id")
        made_up = f"{last_name(student_name(record))}-{last_name(data_name(record))}".replace(":", "-")
        values |= {"model_name": last_name(repo_id or made_up), "eval_results": results}
    return ModelCardData(**values)


def eval_results(record: RunRecord) -> list[EvalResult]:
    """The student's finite test metrics, exactly as recorded; none if the run has no task or no test metrics."""
    kind = task(record)
    metrics = record.models["student"].metrics.get("test", {})
    part = record.parts.get("parts", {}).get("test", {})
    found = []
    for name, value in metrics.items():
        if kind is None or name == "teacher_agreement" or not math.isfinite(value):
            continue
        metric_type, metric_name, metric_args = _HUB_METRICS.get(name, (name, name, None))
        found.append(
            EvalResult(
                task_type=kind,
                dataset_type=data_name(record),
                dataset_name=last_name(data_name(record)),
                dataset_config=record.parts.get("name"),
                dataset_split=part.get("split"),
                dataset_revision=record.parts.get("commit"),
                dataset_args={"rows": part["rows"], "drawn": part["how"]} if {"rows", "how"} <= part.keys() else None,
                metric_type=metric_type,
                metric_name=metric_name,
                metric_value=value,
                metric_args=metric_args,
            )
        )
    return found


def license_warning(license: str | None) -> str | None:
    """What a licence, as written, restricts, or that none is known; None for one without a known restriction."""
    words = (license or "").strip().lower().replace("_", "-")
    if words in ("", "unknown", "other", "none"):
        return "no licence is known: ask the owner before you use or publish what was made with it"
    found = [text for pattern, text in _RESTRICTIONS if re.search(pattern, words)]
    return "; ".join(found) or None


# ---- the text --------------------------------------------------------------------------------------------------------


def _sections(
    record: RunRecord, config: dict[str, Any], student_folder: str, links: list[str], license: str | None
) -> list[str]:
    repo_id = record.recipe.get("hub", {}).get("repo_id")
    where = f'"{repo_id}"' if repo_id else f'"{student_folder}"  # the folder of the student, or its id on the Hub'
    return [
        _opening(record),
        "## Results\n\n" + report.markdown_table(record) + "\n\n" + _reading(record),
        _metrics(record),
        "\n\n".join(f"![{_CAPTIONS.get(Path(link).stem, Path(link).stem)}]({link})" for link in links),
        usage(record, config, where),
        _teachers(record),
        report.auto_section(record),
        report.chain_section(record),
        _data(record),
        _training(record),
        _limits(record),
        _licences(record, license),
    ]


def _opening(record: RunRecord) -> str:
    count = len(record.teachers)
    teachers = "one teacher" if count == 1 else f"{count} teachers"
    name, data = last_name(student_name(record)), last_name(data_name(record))
    alone = record.labels_alone
    lines = [f"# {name}, trained on {data}" if alone else f"# {name}, distilled from {teachers} on {data}"]
    if record.status != "completed":
        lines.append(f"> **This run did not finish (status: {record.status}).** The figures below may be incomplete.")
    kind = f" for {task(record)}" if task(record) else ""
    size = record.models["student"].num_params
    params = f" with {size:,} parameters" if size else ""
    classes = f" It tells {len(record.class_names)} classes apart." if record.class_names else ""
    source = "the labels alone" if alone else f"the outputs of {teachers}"
    if record.hinted:
        source = f"{'the labels' if alone else source} and the layers of its teacher `{record.began_with}`"
    origin = record.began_with if alone else ""
    start = f", from weights of its teacher `{origin}`," if origin else ""
    lines.append(f"A model{kind}{params}, trained on {source}{start} with `hf_hpmkd`.{classes}")
    if record.kept_direct and record.distils:
        proved = "made it worse" if record.kept and record.kept.needed is None else "did not prove better"
        rows = report.deciding_parts(record)
        lines.append(f"It was also distilled from {teachers}, which {proved} on {rows} rows.")
    student = record.models["student"]
    best = record.best_teacher()
    retention = report.student_retention(record, student)
    if best is not None and retention is not None and student.accuracy() is not None:
        num_rows = record.num_rows("test")
        on = f"the same {num_rows:,} test rows" if num_rows else "the same test rows"
        lines.append(
            f"It reaches {student.accuracy():.2%} test accuracy, a retention of {retention:.2%} relative to the best "
            f"single teacher (`{best.name}`, {best.accuracy['test']:.2%}) on {on}."
        )
    lines.append(f"**{report.verdict(record)}**")
    if record.kept is not None:
        lines.append(report.kept_told(record))
    return "\n\n".join(lines)


def _reading(record: RunRecord) -> str:
    lines = [
        "Compression: parameters of the largest teacher that has a count, over those of the row. Retention: test "
        "accuracy over that of the best single teacher, chosen by these same test rows."
    ]
    if "direct" in record.models:
        lines.append("`direct`: the same model trained on the labels alone.")
    if any(row.latency_ms is not None for row in report.rows(record)):
        lines.append(
            f"ms/sample: median from one raw row to its logits, preprocessing included, on {_hardware(record)}."
        )
    return " ".join(lines)


def _metrics(record: RunRecord) -> str:
    shown = ("direct", "distilled", "student")
    models = {name: model for name in shown if (model := record.models.get(name)) is not None}
    lines = []
    for part in ("validation", "test"):
        names = dict.fromkeys(name for model in models.values() for name in model.metrics.get(part, {}))
        for name in names:
            values = [model.metrics.get(part, {}).get(name) for model in models.values()]
            lines.append([part, name, *("-" if value is None else f"{value:.4f}" for value in values)])
    columns = [record.other_name if name == "distilled" else name for name in models]
    return report.markdown(("part", "metric", *columns), lines, left=2) if lines else ""


def usage(record: RunRecord, config: dict[str, Any], where: str) -> str:
    """where: what stands behind `student =`."""
    kind, model_type = task(record), str(config.get("model_type", ""))
    lines = [f"\nstudent = {where}"]
    note = ""
    if model_type.startswith("hpmkd_") or kind == _TABULAR:
        lines.insert(0, "import hf_hpmkd  # registers the model's class")
        if "auto_map" in config:
            note = "The class also lies beside the weights: `trust_remote_code=True` opens it without `hf_hpmkd`."
    if kind == _TABULAR:
        lines[0] = "import pandas as pd"
        columns = record.parts.get("input_columns") or []
        listed = f"  # columns: {', '.join(columns)}" if 0 < len(columns) <= 12 else "  # the columns it was trained on"
        lines.insert(1, "from hf_hpmkd.models.tabular import TabularForClassification")
        lines += [
            "model = TabularForClassification.from_pretrained(student)",
            f'table = pd.read_csv("rows.csv"){listed}',
            "model.predict(table)  # class names; predict_proba gives probabilities",
        ]
    else:
        example = '"image.png"'
        if kind == "text-classification":
            example = '"A text to classify.", truncation=True'
            if len(columns := record.parts.get("input_columns") or []) == 2:
                example = '{"text": "The ' + columns[0] + '.", "text_pair": "The ' + columns[1] + '."}, truncation=True'
        lines.insert(0, "from transformers import pipeline")
        lines += [
            f'classify = pipeline("{kind or "image-classification"}", model=student)',
            f"classify({example})",
        ]
    if model_type == "timm_wrapper":
        note = "It is a timm network: `AutoModelForImageClassification.from_pretrained(student).timm_model` is it bare."
    code = "\n".join(lines)
    return f"## How to use\n\n```python\n{code}\n```" + (f"\n\n{note}" if note else "")


def _teachers(record: RunRecord) -> str:
    def share(value: float | None, form: str = "{:.2%}") -> str:
        return "-" if value is None or not math.isfinite(value) else form.format(value)

    lines = [
        [
            one.name,
            _linked(one.source, hub_id(one.source, one.commit)),
            "trained here" if one.trained_here else one.kind,
            one.commit[:12] if one.commit else "-",
            share(one.accuracy.get("guide")),
            share(one.accuracy.get("validation")),
            share(one.calibration_temperature, "{:.3f}"),
            share(one.mean_weight, "{:.3f}"),
        ]
        for one in record.teachers
    ]
    header = ("teacher", "source", "kind", "commit", "guide acc.", "validation acc.", "calibration T", "mean weight")
    text = "## Teachers\n\n" + report.markdown(header, lines, left=4)
    if base_models(record):
        text += (
            "\n\nThe metadata names base models with the relation `finetune`, the Hub's nearest: a student is trained "
            "on its teachers' outputs"
        )
        start = record.began_with or _start_of_student(record)
        text += f". This one began with weights of `{start}`." if start else " and holds none of their weights."
    warnings = [f"- `{one.name}`: {' '.join(warning.split())}" for one in record.teachers for warning in one.warnings]
    return text + ("\n\n" + "\n".join(warnings) if warnings else "")


def _data(record: RunRecord) -> str:
    about = record.parts
    local = about.get("kind") in ("folder", "file")
    details = [
        "on the Hub" if data_on_hub(record) else f"a local {about['kind']}" if local else "",
        f"configuration {about['name']}" if about.get("name") else "",
        f"commit {about['commit']}" if about.get("commit") else "",
    ]
    listed = ", ".join(detail for detail in details if detail)
    place = f"datasets/{data_name(record)}" if data_on_hub(record) else None
    text = f"## Data\n\n{_linked(data_name(record), place)}" + (f" ({listed})" if listed else "") + "."
    lines = [
        [part, f"{one['rows']:,}", str(one.get("split", "-")), str(one.get("how", "-"))]
        for part, one in about.get("parts", {}).items()
    ]
    if lines:
        text += "\n\n" + report.markdown(("part", "rows", "of split", "drawn"), lines, left=1)
        text += (
            "\n\ntrain: taught the student. guide: weighed and calibrated the teachers. validation: watched the "
            "training. test: measured after it."
        )
    return text


def _hardware(record: RunRecord) -> str:
    hardware = record.hardware
    if not hardware:
        return "hardware that was not recorded"
    gpus = hardware.get("gpus") or []
    cpu = f"{hardware.get('cpu', 'an unrecorded processor')}, {hardware.get('cores', '?')} cores"
    return ", ".join([*gpus, cpu])


def _training(record: RunRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    place = str(record.memory.get("where", ""))
    share = record.recipe.get("distillation", {}).get("hint_share", 0)
    facts = {
        "seed": str(record.seed),
        "hardware": _hardware(record),
        "versions": versions,
        "seconds": ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in record.seconds.items()),
        "started": record.started or "",
        "finished": record.finished or "",  # not yet, where the run itself writes its card
        "commits": ", ".join(f"{name} {commit}" for name, commit in _commits(record) if commit),
        "layer hints": f"those of `{record.began_with}`, in the first {share:.0%} of the steps"
        if record.hinted
        else "",
        "recipe fingerprint": record.recipe_fingerprint,
        "optimization memory": _linked(place, place.removeprefix("hf://")) if place.startswith("hf://") else "",
    }
    text = "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    if record.warnings:
        text += "\n\nWarnings of the run:\n\n" + "\n".join(
            f"- {' '.join(warning.split())}" for warning in record.warnings
        )
    if record.recipe:
        recipe = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=100).strip()
        text += f"\n\n<details><summary>The recipe</summary>\n\n```yaml\n{recipe}\n```\n\n</details>"
    return text


def _limits(record: RunRecord) -> str:
    lines = [
        f"One run with seed {record.seed}; how much the figures vary from seed to seed was not measured.",
        f"Rows that are not like those of `{data_name(record)}`: other sources, noise, adversarial inputs.",
        "Differences between groups of people, and other unwanted bias. What its teachers have, it may have learnt.",
    ]
    if "calibration_error" not in record.models["student"].metrics.get("test", {}):
        lines.append("Whether its probabilities are calibrated.")
    if record.models["student"].latency_ms is not None:
        lines.append("Speed on other hardware or with other batch sizes than one.")
    return "## What it was not tested for\n\n" + "\n".join(f"- {line}" for line in lines)


def _licences(record: RunRecord, license: str | None) -> str:
    def line(what: str, found: str | None) -> str:
        warning = license_warning(found)
        return f"- {what}: {found or 'unknown'}" + (f" - **{warning}**" if warning else "")

    own = f"The student: {license}." if license else "No licence has been chosen for the student (`hub.license`)."
    lines = [line(f"data `{data_name(record)}`", record.parts.get("license"))]
    lines += [_teacher_licence(one, line) for one in record.teachers]
    start = record.recipe.get("student", {})
    if start.get("pretrained"):
        lines.append(line(f"weights the student began with, `{start.get('model')}`", None))
    return (
        f"## Licences\n\n{own} Those of what it was made from, as far as the run knows them; they may bind whoever "
        "uses or passes on the student:\n\n" + "\n".join(lines)
    )


def _teacher_licence(teacher: TeacherRecord, line: Any) -> str:
    if teacher.trained_here and teacher.license is None:
        return f"- teacher `{teacher.name}`: trained in this run, on the data above"
    if teacher.kind == "column" and teacher.license is None:
        return f"- teacher `{teacher.name}`: a column of the data above"
    return str(line(f"teacher `{teacher.name}`", teacher.license))
