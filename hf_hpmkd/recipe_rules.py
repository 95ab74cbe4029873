"""Which values of a recipe go together, and which files it needs. Opens nothing; every fault comes with its keys."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_hpmkd.model_names import built_family, parse_name, split_variant
from hf_hpmkd.recipe_faults import did_you_mean
from hf_hpmkd.sklearn_estimators import ESTIMATORS
from hf_hpmkd.vocabulary import (
    DATA_FILES,
    IMAGE_CLASSIFICATION,
    LEGAL_SCHEDULES,
    NO_NETWORKS,
    SKLEARN_SETS,
    TABULAR_CLASSIFICATION,
    TEXT_CLASSIFICATION,
)

if TYPE_CHECKING:
    from hf_hpmkd.recipe import Recipe, TeacherConfig

Fault = tuple[tuple[str, ...], str]  # the keys that are to blame, and the line that says why

_TASK_OF_FAMILY = {
    "cifar-resnet": IMAGE_CLASSIFICATION,
    "timm": IMAGE_CLASSIFICATION,
    "mlp": TABULAR_CLASSIFICATION,
    "bert": TEXT_CLASSIFICATION,
}
_NETWORKS = ("cifar-resnet", "mlp", "bert")

LEARNING_RATE = 0.001
"""Of a student whose recipe names none."""

FAMILY_RATES = {"mlp": 0.01, "cifar-resnet": 0.01, "bert": 0.002}
"""The same of our own families, as small ones want it (model_cards/LOG.md); larger ones were not asked."""

FINE_TUNING_RATE = 5e-5
"""The same of a student that begins with pre-trained weights: the Trainer's own default."""

RATES = (
    f"Left out, {', '.join(f'{name}-... has {rate}' for name, rate in FAMILY_RATES.items())}, what begins with "
    f"pre-trained weights {FINE_TUNING_RATE:f} (what is trained beside it from nothing has the usual one), any other "
    f"{LEARNING_RATE}."
)

USUAL_NAMES = {
    "optimizer": {"adamw_torch", "adamw_torch_fused", "sgd"},
    "lr_scheduler": {"cosine", "linear", "constant", "constant_with_warmup"},
    "report_to": {"tensorboard", "trackio", "wandb"},
}
"""Of `training`; transformers knows them for sure. Whatever else it knows, it takes seconds to import to ask it."""

RATE_BESIDE = "null takes training.learning_rate; where that fine-tunes or is the student's usual one, the model's."


def family(model: str) -> str:
    """What a model name stands for: cifar-resnet, mlp, bert, sklearn, timm, safetensors, skops, column or hub."""
    if built := built_family(model):
        return built
    if model.startswith(("timm/", "hf-hub:timm/")):
        return "timm"
    for prefix in ("sklearn", "column"):
        if model.startswith(prefix + ":"):
            return prefix
    for suffix in ("safetensors", "skops"):
        if model.endswith("." + suffix):
            return suffix
    return "hub"


def is_trained_here(model: str) -> bool:
    """Whether a teacher of that name is trained on the spot; others are loaded."""
    return family(model) in (*_NETWORKS, "sklearn")


def student_stand_in(teachers: Sequence[str]) -> str:
    """A student's name to read the rest of a recipe with, while the student itself is to be found from the teachers.
    Raises ValueError where no teacher is a network.
    """
    for name in teachers:
        if family(name) in (*_NETWORKS, "timm", "hub"):
            return name
        if family(name) == "safetensors":
            return "cifar-resnet-8"
    raise ValueError(
        "--compression makes a smaller model of the largest network among the teachers, got --teacher "
        f"{', '.join(teachers)}. Add a network as a teacher, or name a student: --student S."
    )


def is_sklearn(model: str) -> bool:
    """Whether a teacher of that name is a scikit-learn estimator trained on the spot."""
    return family(model) == "sklearn"


def usual_learning_rate(student: str, pretrained: bool = False) -> float:
    """Of a student by this name whose recipe names none."""
    if pretrained:
        return FINE_TUNING_RATE
    return FAMILY_RATES.get(family(student), LEARNING_RATE)


def fill_learning_rate(tree: dict[str, Any]) -> None:
    """The one default that another value decides. What is no section or name yet is left for the faults to tell."""
    student, training = tree.get("student"), tree.setdefault("training", {})
    if isinstance(student, dict) and isinstance(student.get("model"), str) and isinstance(training, dict):
        training.setdefault("learning_rate", usual_learning_rate(student["model"], student.get("pretrained") is True))


def start_told(recipe: "Recipe") -> str:
    """Says that of a student from elsewhere the architecture alone is taken, where that is so; else ""."""
    student = recipe.student
    if student.pretrained or family(student.model) not in ("hub", "timm"):
        return ""
    told = f"Of {student.model} the architecture alone is taken"
    if split_variant(student.model)[1]:  # sizes of one's own, for which there are no weights
        return f"{told}."
    return f"{told}; student.pretrained=true begins with its weights (usual learning rate: {FINE_TUNING_RATE:f})."


def teacher_names(recipe: "Recipe") -> list[str]:
    """One distinct name per teacher: `name` where given, else from `model`, numbered where two would be the same."""
    names: list[str] = []
    given = {teacher.name for teacher in recipe.teachers if teacher.name}
    for teacher in recipe.teachers:
        stem = re.sub(r"^(sklearn|column|hf-hub|local-dir):", "", teacher.model.rstrip("/")).rsplit("/", 1)[-1]
        stem = re.sub(r"\.(safetensors|skops)$", "", stem) or "teacher"
        name, count = teacher.name or stem, 1
        while not teacher.name and (name in names or name in given):
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


def uses_teachers(recipe: "Recipe") -> bool:
    """Whether the student's loss listens to the teachers at all."""
    return recipe.distillation.alpha > 0 or recipe.distillation.feature_weight > 0


def unread_parts(recipe: "Recipe") -> list[str]:
    """Parts whose rows nothing reads before they are trained on: with live teachers no outputs are stored for them."""
    return ["train"] if recipe.distillation.teacher_outputs == "live" else []


def rule_faults(recipe: "Recipe") -> Iterator[Fault]:
    """Values that do not go together."""
    yield from _task_rules(recipe)
    for position, teacher in enumerate(recipe.teachers):
        yield from _teacher_rules(f"teachers.{position}", teacher)
    yield from _student_rules(recipe)
    yield from _distillation_rules(recipe)
    yield from _chain_rules(recipe)
    yield from _other_rules(recipe)


def _task_rules(recipe: "Recipe") -> Iterator[Fault]:
    task = recipe.task.type
    models = {f"teachers.{i}.model": teacher.model for i, teacher in enumerate(recipe.teachers)}
    models["student.model"] = recipe.student.model
    tasks = {key: _TASK_OF_FAMILY[family(name)] for key, name in models.items() if family(name) in _TASK_OF_FAMILY}
    for key, found in tasks.items():
        if task not in ("auto", found):
            yield (key, "task.type"), f"{key}: {models[key]!r} is for {found}, but task.type is {task}."
    if task == "auto" and len(set(tasks.values())) > 1:
        told = "; ".join(f"{key} {models[key]!r} is for {found}" for key, found in tasks.items())
        yield tuple(tasks), f"teachers, student: all models must be for one task: {told}."
    for key, name in models.items():
        own_task = _TASK_OF_FAMILY.get(family(name), task)
        try:
            _, sizes = split_variant(name)
            if family(name) in (*_NETWORKS, "timm", "hub") and own_task != "auto" and not looks_local(name):
                parse_name(name, own_task)
        except ValueError as error:
            yield (key,), f"{key}: {error}"
        else:
            if sizes and (key != "student.model" or recipe.student.pretrained):
                yield (
                    (key, "student.pretrained") if key == "student.model" else (key,),
                    f"{key}: there are no trained weights for sizes of your own, as in {name!r}. Leave the brackets "
                    f"out{', or set student.pretrained to false' if key == 'student.model' else ''}.",
                )


def _teacher_rules(at: str, teacher: "TeacherConfig") -> Iterator[Fault]:
    kind = family(teacher.model)
    network_here = kind in _NETWORKS
    only: list[tuple[str, bool, str]] = [
        ("params", kind == "sklearn", "is for sklearn: teachers"),
        ("epochs", network_here, "is for networks trained on the spot"),
        ("learning_rate", network_here, "is for networks trained on the spot"),
        ("batch_size", network_here, "is for networks trained on the spot"),
        ("folds", is_trained_here(teacher.model), "is for teachers trained on the spot"),
        ("labels", not is_trained_here(teacher.model), "is for teachers that are loaded"),
        ("precision", kind in ("hub", "timm", "safetensors"), "is for networks that are loaded"),
        ("revision", kind in ("hub", "timm"), "is for teachers from the Hub"),
        ("trust_remote_code", kind == "hub", "is for teachers from the Hub"),
        ("trusted_types", kind == "skops", "is for .skops files"),
    ]
    for key, fits, rule in only:
        value = getattr(teacher, key)
        if value not in (None, {}, [], False) and not fits:
            yield (f"{at}.{key}", f"{at}.model"), f"{at}.{key}: {rule}, and {teacher.model!r} is none. Remove the key."
    if kind == "sklearn" and (name := teacher.model.removeprefix("sklearn:")) not in ESTIMATORS:
        yield (
            (f"{at}.model",),
            f"{at}.model: {name!r} is not among the classifiers that can be trained on the spot."
            f"{did_you_mean(name, ESTIMATORS)} Possible: {', '.join(ESTIMATORS)}.",
        )
    if teacher.folds == 1:
        yield (f"{at}.folds",), f"{at}.folds: must be 0 (one model for all rows) or at least 2, got 1."


def _student_rules(recipe: "Recipe") -> Iterator[Fault]:
    student, kind = recipe.student, family(recipe.student.model)
    if kind in ("sklearn", "column", "skops", "safetensors"):
        yield (
            ("student.model",),
            f"student.model: {student.model!r} cannot be a student, which must be a network that learns by gradients. "
            "Use cifar-resnet-8, mlp-16, bert-1x64, timm/... or a Hub id.",
        )
    for key in ("pretrained", "revision", "trust_remote_code"):
        if getattr(student, key) and kind in _NETWORKS:
            yield (
                (f"student.{key}", "student.model"),
                f"student.{key}: {student.model!r} is built from its name and has nothing to download. Remove the key.",
            )


def _distillation_rules(recipe: "Recipe") -> Iterator[Fault]:
    it, at = recipe.distillation, "distillation"
    if it.temperature_schedule not in LEGAL_SCHEDULES[it.kd_kind]:
        yield (
            (f"{at}.kd_kind", f"{at}.temperature_schedule"),
            f"{at}.temperature_schedule: {it.temperature_schedule} does not go with kd_kind {it.kd_kind}, which takes "
            f"{', '.join(LEGAL_SCHEDULES[it.kd_kind])}.",
        )
    ends = (f"{at}.temperature_min", f"{at}.temperature_max", f"{at}.temperature_schedule")
    if it.temperature_schedule != "constant" and it.temperature_min >= it.temperature_max:
        yield (
            ends,
            f"{at}.temperature_min: must be below temperature_max, got {it.temperature_min:g} and "
            f"{it.temperature_max:g}. Swap them, or use temperature_schedule constant for a fixed temperature.",
        )
    elif it.temperature_schedule == "learned" and not it.temperature_min <= it.temperature <= it.temperature_max:
        yield (
            (*ends, f"{at}.temperature"),
            f"{at}.temperature: the learned schedule starts there, so it must lie between temperature_min and "
            f"temperature_max ({it.temperature_min:g} to {it.temperature_max:g}), got {it.temperature:g}.",
        )
    if it.teacher_outputs == "topk" and it.topk is None:
        yield (f"{at}.topk",), f"{at}.topk: teacher_outputs topk needs the number of classes to keep, for instance 16."
    if it.teacher_outputs != "topk" and it.topk is not None:
        yield (
            (f"{at}.topk", f"{at}.teacher_outputs"),
            f"{at}.topk: is for teacher_outputs topk, got teacher_outputs {it.teacher_outputs}. Remove one of the two.",
        )
    if it.teacher_outputs == "topk" and it.kd_kind == "standardized_kl":
        yield (
            (f"{at}.kd_kind", f"{at}.teacher_outputs"),
            f"{at}.kd_kind: standardized_kl divides by the spread of all logits, of which teacher_outputs topk keeps "
            "the largest alone. Use teacher_outputs full, or another kind.",
        )
    if it.feature_weight > 0:
        if it.teacher_outputs != "live":
            yield (
                (f"{at}.feature_weight", f"{at}.teacher_outputs"),
                f"{at}.feature_weight: above 0 needs teacher_outputs live, because features are not stored; got "
                f"{it.teacher_outputs}.",
            )
        if it.alpha == 0 and recipe.auto.mode != "off":
            yield (
                (f"{at}.feature_weight", f"{at}.alpha", "auto"),
                f"{at}.feature_weight: with alpha 0 all that auto tries is labels alone. Raise alpha, or set auto off.",
            )
        named = zip(teacher_names(recipe), recipe.teachers, strict=True)
        without = [name for name, one in named if family(one.model) in NO_NETWORKS or one.folds]
        if without:
            yield (
                (f"{at}.feature_weight", "teachers"),
                f"{at}.feature_weight: every teacher must have features, but {', '.join(without)} has none "
                "(scikit-learn models, columns and out-of-fold teachers). Set it to 0, or leave these teachers out.",
            )
    if it.hint_weight > 0 and (obstacle := _no_hints(recipe)):
        yield (
            (f"{at}.hint_weight", f"{at}.alpha", "chain", "student", "teachers", "auto"),
            f"{at}.hint_weight: hints come from a teacher whose layers the student begins with, but {obstacle}. Set it "
            f"to 0, got {it.hint_weight:g}.",
        )
    if "fp16" in recipe.training.precision and (it.feature_weight > 0 or it.gate == "joint"):
        yield (
            ("training.precision", f"{at}.feature_weight", f"{at}.gate"),
            "training.precision: fp16 scales gradients, which gate joint and the feature term do not undo. Use bf16.",
        )


def _no_hints(recipe: "Recipe") -> str:
    """Why there are surely no layer hints for the student; "" where there may be."""
    if recipe.chain.length != 0 or recipe.chain.models:
        return "with a chain it begins with those of its last stage"
    if not recipe.chain.warm_start:
        return "chain.warm_start is false"
    if recipe.student.pretrained:
        return "student.pretrained is true"
    if recipe.auto.mode != "off" and recipe.distillation.alpha == 0:
        return "auto tries labels alone (alpha 0) without hints"
    kind = family(recipe.student.model)
    if kind == "mlp":
        return "the layers of an MLP are fitted to it, not taken"
    alike = ("hub", kind, "safetensors") if kind == "cifar-resnet" else ("hub", kind)
    fits = kind == "hub" or any(family(teacher.model) in alike for teacher in recipe.teachers)
    return "" if fits else f"no teacher is of the family of {recipe.student.model}"


def _chain_rules(recipe: "Recipe") -> Iterator[Fault]:
    chain, distillation = recipe.chain, recipe.distillation
    length, models = chain.length, chain.models
    if length != "auto" and length < 0:
        yield ("chain.length",), f"chain.length: must be auto or a number from 0 on, got {length}."
        return
    if models and length not in ("auto", 0, len(models)):
        yield (
            ("chain.length", "chain.models"),
            f"chain.length: with chain.models it must be left out or be their number ({len(models)}), got {length}. "
            "Remove one of the two.",
        )
    if (models or length not in ("auto", 0)) and distillation.alpha == 0 and distillation.feature_weight == 0:
        yield (
            ("chain.length", "chain.models", "distillation.alpha"),
            "chain.length: with distillation.alpha 0 nothing learns from the chain. Set it to 0, or alpha above 0.",
        )
    if chain.epochs is not None and recipe.training.max_steps > 0:
        yield (
            ("chain.epochs", "training.max_steps"),
            f"chain.epochs: training.max_steps ({recipe.training.max_steps}) decides the steps of stages too, so "
            "epochs would change nothing. Remove one of the two.",
        )
    for position, name in enumerate(teacher_names(recipe)):
        if re.match(r"(stage|probe)-\d", name):
            yield (
                (f"teachers.{position}.name",),
                f"teachers.{position}.name: {name!r} is how the chain calls its own models. Give the teacher another.",
            )
    for position, name in enumerate(models):
        if family(name) not in (*_NETWORKS, "timm", "hub"):
            yield (
                (f"chain.models.{position}",),
                f"chain.models.{position}: {name!r} must be a network that is trained here from nothing, such as "
                "cifar-resnet-14, mlp-64, bert-2x64, timm/... or the architecture of a Hub model.",
            )


def _other_rules(recipe: "Recipe") -> Iterator[Fault]:
    for name, count in Counter(teacher.name for teacher in recipe.teachers if teacher.name).items():
        if count > 1:
            keys = tuple(f"teachers.{i}.name" for i, teacher in enumerate(recipe.teachers) if teacher.name == name)
            yield keys, f"{', '.join(keys)}: names must differ, {name!r} is given {count} times."
    training = recipe.training
    if training.max_steps == 0:
        yield ("training.max_steps",), "training.max_steps: must be -1 (epochs decide) or at least 1, got 0."
    if training.warmup_steps >= 1 and training.warmup_steps != int(training.warmup_steps):
        yield (
            ("training.warmup_steps",),
            f"training.warmup_steps: must be a share below 1 or a whole number of steps, got {training.warmup_steps}.",
        )
    yield from _name_faults(recipe)
    hub = recipe.hub
    if hub.push and hub.repo_id is None:
        yield ("hub.repo_id",), "hub.repo_id: hub.push needs the repository to push to, as user/name."
    if hub.repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", hub.repo_id):
        yield ("hub.repo_id",), f"hub.repo_id: must have the form user/name, got {hub.repo_id!r}."
    pipeline = recipe.pipeline
    if pipeline.address is not None and pipeline.engine != "ray":
        yield (
            ("pipeline.address", "pipeline.engine"),
            f"pipeline.address: is for engine ray, got engine {pipeline.engine}. Remove the key, or set the engine.",
        )
    if pipeline.engine == "in-process" and pipeline.workers not in (None, 1):
        yield (
            ("pipeline.workers", "pipeline.engine"),
            f"pipeline.workers: one process does one job at a time, got {pipeline.workers} workers with engine "
            "in-process. Remove the key, or use engine local.",
        )
    if pipeline.processes > 1:
        yield from _process_faults(recipe)
    place = recipe.memory.path
    if place is not None and "://" in place and not re.fullmatch(r"hf://datasets/[\w.-]+/[\w.-]+", place):
        yield (
            ("memory.path",),
            f"memory.path: a shared memory is a dataset repository, hf://datasets/USER/NAME, got {place!r}.",
        )


def _process_faults(recipe: "Recipe") -> Iterator[Fault]:
    """Trainings by several processes, which share every batch."""
    processes, engine = recipe.pipeline.processes, recipe.pipeline.engine
    if engine not in ("local", "ray"):
        yield (
            ("pipeline.processes", "pipeline.engine"),
            f"pipeline.processes: engine {engine} starts none, got {processes}. Use engine local or ray, or accelerate "
            "launch for the whole run.",
        )
    batches = {"training.batch_size": recipe.training.batch_size}
    for index, teacher in enumerate(recipe.teachers):
        if teacher.batch_size is not None and not is_sklearn(teacher.model):
            batches[f"teachers.{index}.batch_size"] = teacher.batch_size
    for key, size in batches.items():
        if size % processes:
            yield (
                (key, "pipeline.processes"),
                f"{key}: must be a multiple of pipeline.processes, which share a batch, got {size} and {processes}.",
            )


def _name_faults(recipe: "Recipe") -> Iterator[Fault]:
    """Names that transformers knows or does not: optimizer, scheduler, trackers. Only unusual ones are looked up."""
    training = recipe.training
    given = {
        "optimizer": [training.optimizer],
        "lr_scheduler": [training.lr_scheduler],
        "report_to": training.report_to,
    }
    if all(set(names) <= USUAL_NAMES[key] for key, names in given.items()):
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    known = {
        "optimizer": [one.value for one in OptimizerNames],
        "lr_scheduler": [one.value for one in SchedulerType],
        "report_to": [*INTEGRATION_TO_CALLBACK],
    }
    for key, names in given.items():
        for name in names:
            if name not in known[key]:
                at = f"training.{key}"
                yield (at,), f"{at}: transformers knows no {name!r}.{did_you_mean(name, known[key])}"


def file_faults(recipe: "Recipe") -> Iterator[Fault]:
    """Local files and folders that a recipe names and that are not there. Names of the Hub are not looked up."""
    path = recipe.data.path
    if path.startswith("sklearn:"):
        if (name := path.removeprefix("sklearn:")) not in SKLEARN_SETS:
            yield ("data.path",), f"data.path: scikit-learn comes with {', '.join(SKLEARN_SETS)}, got {name!r}."
    # A Hub id has at most one slash.
    elif (looks_local(path) or path.count("/") > 1) and not glob(str(Path(path).expanduser()), recursive=True):
        yield ("data.path",), _no_such("data.path", path)
    if (prior := recipe.auto.prior) is not None and not Path(prior).expanduser().is_file():
        yield ("auto.prior",), _no_such("auto.prior", prior)
    for key, model in [
        *((f"teachers.{i}.model", teacher.model) for i, teacher in enumerate(recipe.teachers)),
        ("student.model", recipe.student.model),
    ]:
        if not looks_local(model):
            continue
        file = Path(model.removeprefix("local-dir:")).expanduser()
        if model.endswith("]") and not file.exists():  # sizes of its own, which are no part of the folder's name
            file = Path(str(file).split("[")[0])
        if not file.exists():
            yield (key,), _no_such(key, model)
        elif file.suffix == ".safetensors" and not file.with_suffix(".json").exists():
            yield (key,), f"{key}: {model!r} needs its description beside it, {file.with_suffix('.json').name}."


def looks_local(name: str) -> bool:
    """Whether a name can only mean a file or folder here: ./x, ../x, /x, ~/x, local-dir:x, or a known suffix."""
    return name.startswith(("./", "../", "/", "~", "local-dir:")) or name.endswith(
        (*DATA_FILES, ".safetensors", ".skops")
    )


def _no_such(key: str, path: str) -> str:
    return f"{key}: there is no {path!r} here. Give the place on your disk: {key}=PATH."
