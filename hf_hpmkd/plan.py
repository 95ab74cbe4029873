"""What a recipe would do, told before anything is trained or downloaded: sizes, parts, disk, steps, memory.

Models are built on the meta device, from names or from configs at hand; data on this disk is opened and cut into its
parts, data on the Hub is not. What cannot be known without a download is said to be unknown.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open

from hf_hpmkd.classifier_training import Schedule, stage_schedule, student_schedule, teacher_schedule, total_steps
from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.data import PARTS, DataParts
from hf_hpmkd.intermediate_models import build_intermediate, find_intermediates
from hf_hpmkd.model_cost import activation_bytes, estimated_seconds, training_flops
from hf_hpmkd.planned_tries import plan_tries
from hf_hpmkd.recipe import Recipe, TeacherConfig
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import family, is_trained_here, looks_local, start_told, teacher_names, uses_teachers
from hf_hpmkd.run_memory import outputs_folder
from hf_hpmkd.search_budget import budget_steps, most_candidates
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.tasks.images import ImageRows
from hf_hpmkd.tasks.text import TextRows
from hf_hpmkd.teacher_cache import estimate, readable_bytes
from hf_hpmkd.vocabulary import IMAGE_CLASSIFICATION, NO_NETWORKS, TEXT_CLASSIFICATION

_STAND_IN_SIDE = 224  # pixels; of images that are not on this disk
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class _Model:
    """A line of the table. What is None is not known before the model is trained or downloaded."""

    name: str
    role: str
    num_params: int | None
    activations: int | None = None  # bytes kept per row for the backward pass
    note: str = ""


def plan(recipe: Recipe) -> str:
    """The plan as text. Trains nothing, downloads nothing. Raises what opening local data raises."""
    parts = recipe_parts(recipe) if on_this_disk(recipe) else None
    rows = parts.train if parts else _stand_in_rows(recipe)
    chosen = recipe.student
    student = _built("student", "student", chosen.model, rows, chosen.revision, chosen.trust_remote_code, measure=True)
    teachers = [
        _teacher(name, teacher, rows) for name, teacher in zip(teacher_names(recipe), recipe.teachers, strict=True)
    ]
    sections = [
        [f"Plan: {len(teachers)} teachers -> {recipe.student.model} on {recipe.data.path}"],
        _data_lines(recipe, parts, rows),
        _model_lines(student, teachers, start_told(recipe)),
        _cache_lines(recipe, parts, rows),
        _step_lines(recipe, parts),
        _auto_lines(recipe, parts, rows, student),
        _chain_lines(recipe, parts, rows, student, teachers),
        _memory_lines(recipe, student, teachers),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


# ---- data ------------------------------------------------------------------------------------------------------------


def on_this_disk(recipe: Recipe) -> bool:
    """Whether the data can be opened without the Hub."""
    path = recipe.data.path
    return path.startswith("sklearn:") or looks_local(path) or Path(path).expanduser().exists()


def _stand_in_rows(recipe: Recipe) -> Rows | None:
    """One empty row with as many classes as a loaded teacher has outputs; None for tables and where none says it."""
    num_classes = next(filter(None, (_num_outputs(teacher) for teacher in recipe.teachers)), None)
    families = {family(model) for model in (recipe.student.model, *(teacher.model for teacher in recipe.teachers))}
    if num_classes is None:
        return None
    names = [f"class {index}" for index in range(num_classes)]
    if recipe.task.type == IMAGE_CLASSIFICATION or families & {"timm", "cifar-resnet", "safetensors"}:
        pixels = torch.zeros(1, 3, _STAND_IN_SIDE, _STAND_IN_SIDE, dtype=torch.uint8)
        return ImageRows(Dataset.from_dict({"label": [0]}), "image", [0], names, images=pixels)
    if recipe.task.type == TEXT_CLASSIFICATION or "bert" in families:
        return TextRows(Dataset.from_dict({"label": [0]}), ["stand-in"], [0], names, max_length=recipe.data.max_length)
    return None


def _num_outputs(teacher: TeacherConfig) -> int | None:
    if teacher.labels:
        return len(teacher.labels)
    if family(teacher.model) == "timm":
        from timm.models import get_pretrained_cfg

        known = get_pretrained_cfg(teacher.model.rsplit("/", 1)[-1], allow_unregistered=True)
        return known.num_classes if known else None
    if family(teacher.model) == "hub" and Path(teacher.model).is_dir():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(teacher.model, trust_remote_code=teacher.trust_remote_code).num_labels
    return None


def _data_lines(recipe: Recipe, parts: DataParts | None, rows: Rows | None) -> list[str]:
    if parts is None:
        classes = f"{len(rows.class_names)} classes (as the teachers have)" if rows else "classes unknown"
        limit = recipe.data.max_train_rows
        return [
            f"Data     {classes}; not on this disk, so not opened",
            f"         train: {f'at most {limit:,} rows' if limit else 'unknown until the data is loaded'}",
        ]
    lines = [f"Data     {parts.kind}, {len(parts.class_names)} classes"]
    for part in PARTS:
        lines.append(
            f"         {part:11}{len(getattr(parts, part)):>9,} rows   {parts.provenance['parts'][part]['how']}"
        )
    if parts.num_views:
        who = "" if parts.train.keeps_labels else ", for students that hear teachers"
        lines.append(f"         {parts.num_views} augmented views of each training row{who}")
    return lines + [f"         warning: {warning}" for warning in parts.provenance["warnings"]]


# ---- models ----------------------------------------------------------------------------------------------------------


def _teacher(name: str, teacher: TeacherConfig, rows: Rows | None) -> _Model:
    kind, here = family(teacher.model), is_trained_here(teacher.model)
    if kind == "safetensors":
        return _Model(name, "teacher", _count_in_file(Path(teacher.model).expanduser()))
    if kind in NO_NETWORKS:
        notes = {"sklearn": "scikit-learn, trained here", "skops": "scikit-learn", "column": "a column of the data"}
        return _Model(name, "teacher", None, note=notes[kind])
    found = _built(name, "teacher", teacher.model, rows, teacher.revision, teacher.trust_remote_code)
    if here:
        found.note = "trained here" if found.num_params is not None else f"trained here, {found.note}"
    return found


def _built(
    name: str,
    role: str,
    model: str,
    rows: Rows | None,
    revision: str | None,
    trust_remote_code: bool,
    measure: bool = False,
) -> _Model:
    if rows is None:
        return _Model(name, role, None, note="unknown until the data is loaded")
    try:
        built = build_classifier(model, rows, meta=True, revision=revision, trust_remote_code=trust_remote_code)
    except OSError:  # transformers' and huggingface_hub's answer when a config is neither here nor reachable
        return _Model(name, role, None, note="its config is not at hand")
    return _Model(name, role, built.num_params, activation_bytes(built, rows) if measure else None)


def _count_in_file(path: Path) -> int | None:
    """Parameters of a safetensors file, from its header."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if not key.endswith(_BUFFERS)]  # noqa: SIM118 - not a dict
        return sum(math.prod(file.get_slice(key).get_shape()) for key in keys)


def _model_lines(student: _Model, teachers: list[_Model], start: str) -> list[str]:
    largest = max((teacher.num_params for teacher in teachers if teacher.num_params is not None), default=None)
    width = max(len(model.name) for model in [student, *teachers]) + 2
    lines = [f"Models   {'':{width}}{'role':10}{'parameters':>13}{'fp32':>11}   student is smaller by"]
    for model in [*teachers, student]:
        size, in_bytes, ratio = "unknown", "", ""
        if model.num_params is not None:
            size, in_bytes = f"{model.num_params:,}", readable_bytes(4 * model.num_params)
            if model.role == "teacher" and student.num_params:
                ratio = f"{model.num_params / student.num_params:.1f}x"
        elif model.note.startswith(("scikit-learn", "a column")):
            size = "-"
        line = f"         {model.name:{width}}{model.role:10}{size:>13}{in_bytes:>11}   {ratio:8}{model.note}"
        lines.append(line.rstrip())
    if student.num_params and largest and student.num_params > largest:
        lines.append("         warning: the student is larger than every teacher, so nothing is compressed")
    if start:
        lines.append(f"         {start}")
    return lines


# ---- cost ------------------------------------------------------------------------------------------------------------


def _cache_lines(recipe: Recipe, parts: DataParts | None, rows: Rows | None) -> list[str]:
    distillation, teachers = recipe.distillation, len(recipe.teachers)
    root = outputs_folder(recipe)
    room = f"{readable_bytes(_free_bytes(root))} are free where they go"
    if parts is None:
        if distillation.teacher_outputs == "live":
            return [
                "Cache    the teachers run in the loop (live); the other parts are kept, sizes unknown until loaded"
            ]
        if rows is None:
            return [f"Cache    unknown until the data is loaded; {room}"]
        row = _outputs_bytes(recipe, 1, 0, len(rows.class_names))
        return [f"Cache    {readable_bytes(row)} per training row and view, of {teachers} teachers; {room}"]
    classes, others = len(parts.class_names), sum(len(getattr(parts, part)) for part in PARTS if part != "train")
    needed = estimate(teachers, others, classes, 0).bytes
    told = f"{others:,} rows x {teachers} teachers x {classes} classes x 2 bytes"
    if distillation.teacher_outputs != "live":
        needed += _outputs_bytes(recipe, len(parts.train), parts.num_views, classes)
        kept = classes if distillation.topk is None else f"the {distillation.topk} largest of {classes}"
        views = max(parts.num_views, 1)
        told = f"{len(parts.train):,} rows x {views} views x {teachers} teachers x {kept} classes, and the other parts"
    verdict = (
        "there is room" if needed < _free_bytes(root) else "NOT ENOUGH: set distillation.cache_dir or teacher_outputs"
    )
    return [f"Cache    {readable_bytes(needed)} of teacher outputs: {told}", f"         {room}: {verdict}"]


def _outputs_bytes(recipe: Recipe, rows: int, views: int, classes: int) -> int:
    distillation = recipe.distillation
    if distillation.topk is None:
        return estimate(len(recipe.teachers), rows, classes, views).bytes
    return estimate(len(recipe.teachers), rows, classes, views, "topk", distillation.topk).bytes


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _step_lines(recipe: Recipe, parts: DataParts | None) -> list[str]:
    training = recipe.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = training.batch_size * training.gradient_accumulation_steps * processes
    batch = f"{training.batch_size} rows"
    if per_step != training.batch_size:
        batch += f" x {training.gradient_accumulation_steps} accumulated x {processes} processes"
    rows = len(parts.train) if parts else recipe.data.max_train_rows
    times = "twice (direct, then distilled)" if recipe.distillation.direct else "once (distilled)"
    floor = f", or {training.min_steps:,} steps where those are more" if training.min_steps else ""
    if rows is None:
        return [f"Steps    unknown until the data is loaded; {training.epochs} epochs{floor}, {batch} a step, {times}"]
    per_epoch = math.ceil(rows / per_step)
    total = total_steps(recipe, student_schedule(recipe), rows)
    lines = [f"Steps    {per_epoch:,} per epoch ({batch} a step), {total:,} in total; the student trains {times}"]
    for name, teacher in zip(teacher_names(recipe), recipe.teachers, strict=True):
        kind = family(teacher.model)
        if kind == "sklearn":
            folds = 5 if teacher.folds is None else teacher.folds
            lines.append(
                f"         teacher {name}: fitted once" + (f", and {folds} times for its folds" if folds else "")
            )
        elif is_trained_here(teacher.model):
            steps = total_steps(recipe, teacher_schedule(recipe, teacher), rows)
            times = f", {1 + teacher.folds} times" if teacher.folds else ""
            lines.append(f"         teacher {name}: {steps:,} steps{times}")
    return lines


def _auto_lines(recipe: Recipe, parts: DataParts | None, rows: Rows | None, student: _Model) -> list[str]:
    """How long configurations would be tried."""
    mode, total = recipe.auto.mode, _steps(recipe, parts, student_schedule(recipe))
    if mode == "off":
        return ["Auto     off: the student is trained as the recipe says"]
    if rows is None or total is None or student.num_params is None:
        return ["Auto     unknown until the data is loaded and the student's size is known"]
    chosen, training = recipe.student, recipe.training
    blueprint = build_classifier(
        chosen.model, rows, meta=True, revision=chosen.revision, trust_remote_code=chosen.trust_remote_code
    )
    if parts is not None and (tries := plan_tries(recipe, parts, blueprint, recipe.distillation.direct)).seeds:
        return [
            f"Auto     tries at most {tries.most} configurations and direct training to their end, all at once, "
            f"{tries.seeds} of each, which takes as long as {tries.at_once_steps(tries.most):,} steps more"
        ]
    rows_per_step = training.batch_size * training.gradient_accumulation_steps
    budget = budget_steps(mode, total, training_flops(blueprint, rows) * rows_per_step)
    budget = min(budget, most_candidates(mode) * total)  # each trained to its end at most
    return [
        f"Auto     tries at most {most_candidates(mode)} configurations beside direct training, {budget:,} steps more "
        "at most"
    ]


def _chain_lines(
    recipe: Recipe, parts: DataParts | None, rows: Rows | None, student: _Model, teachers: list[_Model]
) -> list[str]:
    """The intermediate models that would be built: all of them, or the first where the run decides by itself."""
    config, training = recipe.chain, recipe.training
    if not uses_teachers(recipe) or (config.length == 0 and not config.models):
        return ["Chain    no intermediate models"]
    if rows is None or student.num_params is None:
        return ["Chain    unknown until the data is loaded and the student's size is known"]
    decides = config.length == "auto" and not config.models
    sized = [
        (one.model, known.num_params)
        for one, known in zip(recipe.teachers, teachers, strict=True)
        if known.num_params is not None
    ]
    chosen = recipe.student
    try:
        names = config.models or [
            one.name
            for one in find_intermediates(
                chosen.model,
                sized,
                rows,
                1 if config.length == "auto" else config.length,
                revision=chosen.revision,
                trust_remote_code=chosen.trust_remote_code,
            )
        ]
    except ValueError as error:
        if not decides:
            raise
        return [f"Chain    decides itself: no intermediate model. {error}"]
    steps, stage_steps = (_steps(recipe, parts, one) for one in (student_schedule(recipe), stage_schedule(recipe)))
    share = stage_steps / steps if steps and stage_steps else (config.epochs or training.epochs) / training.epochs
    head = "decides itself; the first candidate:" if decides else f"{len(names)}, as the recipe asks:"
    lines = [f"Chain    {head}"]
    student_cost = training_flops(build_intermediate(chosen.model, rows, chosen, meta=True), rows)
    for number, name in enumerate(names, 1):
        built = build_intermediate(name, rows, chosen, meta=True)
        flops = training_flops(built, rows)
        cost = flops / student_cost * share
        told = [f"{built.num_params:,} parameters", f"{cost:.1f} student trainings"]
        if steps is not None:
            rows_per_step = training.batch_size * training.gradient_accumulation_steps
            told.append(f"roughly {estimated_seconds(flops, rows_per_step, round(steps * share)):,.0f} s here")
        needed = _state_bytes(built.num_params) + (_kept_bytes(recipe, activation_bytes(built, rows)) or 0)
        told.append(f"{readable_bytes(needed)} of memory")
        lines.append(f"         stage-{number}  {name}: {', '.join(told)}")
        if decides:
            before = config.probe_share * (2 * config.probe_seeds + cost)
            after = config.probe_share * config.probe_seeds
            lines.append(f"         probes: {before:.1f} student trainings before it is trained, {after:.1f} after")
    return lines


def _steps(recipe: Recipe, parts: DataParts | None, schedule: Schedule) -> int | None:
    rows = len(parts.train) if parts else recipe.data.max_train_rows
    return None if rows is None else total_steps(recipe, schedule, rows)


def _state_bytes(num_params: int) -> int:
    """Of a model in training: weights, gradients and AdamW's two moments, fp32."""
    return num_params * 4 * 4


def _kept_bytes(recipe: Recipe, per_row: int | None) -> int | None:
    """Of a batch's activations, kept for the backward pass; None where a row's are not known."""
    half = 0.5 if recipe.training.precision != "fp32" else 1.0
    return None if per_row is None else int(per_row * recipe.training.batch_size * half)


def _memory_lines(recipe: Recipe, student: _Model, teachers: list[_Model]) -> list[str]:
    if student.num_params is None:
        return ["Memory   unknown until the student's size is known"]
    states = readable_bytes(_state_bytes(student.num_params))
    lines = [f"Memory   roughly: {states} for the student's weights, gradients and optimizer (AdamW, fp32)"]
    if (kept := _kept_bytes(recipe, student.activations)) is not None:
        batch = recipe.training.batch_size
        lines.append(f"         {readable_bytes(kept)} for the activations of {batch} rows")
    loaded = sum(4 * teacher.num_params for teacher in teachers if teacher.num_params)
    when = "all the time" if recipe.distillation.teacher_outputs == "live" else "while their outputs are computed"
    when += "; for layer hints one of them longer" if recipe.distillation.hint_weight else ""
    lines.append(f"         {readable_bytes(loaded)} for the teachers' weights, {when}")
    return lines
