"""A distillation as one YAML file: its fields, reading it, and every fault of a file told at once.

Opens no data and no model. What the fields do is decided elsewhere; which values go together is in `recipe_rules`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.engines import PipelineConfig
from hf_hpmkd.recipe_faults import apply_overrides, did_you_mean, dotted, parse_yaml, validate, write_out
from hf_hpmkd.recipe_rules import (
    LEARNING_RATE,
    RATE_BESIDE,
    RATES,
    file_faults,
    fill_learning_rate,
    rule_faults,
)
from hf_hpmkd.search_budget import AutoConfig

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)

# Where and by how many workers a run is done changes no result, so it stays out of the fingerprint.
_NOT_IN_FINGERPRINT = {
    **dict.fromkeys(("output", "hub", "memory", "pipeline")),
    "training": ("report_to", "num_workers", "save_total_limit"),
    "distillation": ("cache_dir",),
}


class RecipeError(ValueError):
    """A recipe that cannot be run. `faults` holds one line per fault, the message all of them."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


@dataclass(config=_STRICT, kw_only=True)
class TaskConfig:
    """What is classified."""

    type: Literal["auto", "image-classification", "text-classification", "tabular-classification"] = Field(
        "auto", description="What is classified; auto reads it from the columns of the data."
    )


@dataclass(config=_STRICT, kw_only=True)
class TeacherConfig:
    """One teacher: trained on the spot (mlp-..., cifar-resnet-..., bert-..., sklearn:...) or loaded (anything else)."""

    model: str = Field(
        min_length=1,
        description="Trained on the spot: mlp-256x256, cifar-resnet-20, bert-2x64, sklearn:RandomForestClassifier. "
        "Loaded: a Hub id or folder, timm/..., hf-hub:..., local-dir:..., FILE.safetensors (CIFAR ResNet), FILE.skops, "
        "column:NAME (logits in the data).",
    )
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in tables and logs; null takes it from model."
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the scikit-learn estimator (sklearn: only)."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub repository.")
    labels: list[str] | None = Field(
        None, description="Class names in the order of the teacher's outputs, where its config does not say them."
    )
    epochs: int | None = Field(None, ge=1, description="Epochs of a network trained on the spot; null: the student's.")
    learning_rate: float | None = Field(
        None, gt=0, description=f"Learning rate of a network trained on the spot; {RATE_BESIDE}"
    )
    batch_size: int | None = Field(
        None, ge=1, description="Batch size of a network trained on the spot; null takes training.batch_size."
    )
    folds: int | None = Field(
        None,
        ge=0,
        description="Teachers trained on the spot: the training rows are answered by that many models, each trained "
        "without the rows it answers; 0 uses the one model trained on all. null: 5 for scikit-learn, 0 for networks.",
    )
    precision: Literal["fp32", "bf16", "fp16", "int8"] | None = Field(
        None, description="Weights of a network that is loaded; null: as in its file. int8: its linear layers alone."
    )
    license: str | None = Field(None, description="Licence of the teacher's weights, for the card.")
    trusted_types: list[str] = Field(
        default_factory=list, description="Further types that a .skops file may hold; read them before you list them."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a Hub model. Read it first.")


@dataclass(config=_STRICT, kw_only=True)
class StudentConfig:
    """The small model that is trained."""

    model: str = Field(
        min_length=1, description="cifar-resnet-8, mlp-16, bert-1x64, timm/resnet18, or a Hub id or folder."
    )
    pretrained: bool = Field(
        False, description="Start from the weights of a timm or Hub model; false takes its architecture alone."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub repository.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a Hub model. Read it first.")


@dataclass(config=_STRICT, kw_only=True)
class DistillationConfig:
    """How the teachers teach. Needs nothing set; the defaults are plain ones."""

    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teachers: 0 ignores them, 1 ignores the labels.")
    kd_kind: Literal["forward_kl", "standardized_kl", "dkd", "dist", "js"] = Field(
        "forward_kl",
        description="Distillation loss: forward_kl (Hinton), standardized_kl (z-scored logits), dkd (decoupled), dist "
        "(correlations), js (Jensen-Shannon, which lets go of rows that are far off; meant for alpha 0.9 at T 1).",
    )
    temperature: float = Field(4.0, gt=0, description="Softness T of the targets: 1 leaves them, larger flattens.")
    temperature_schedule: Literal["constant", "cosine", "loss", "convergence", "auto", "learned"] = Field(
        "constant", description="How T moves during training; constant keeps temperature."
    )
    temperature_min: float = Field(2.0, gt=0, description="Lower end of a moving T.")
    temperature_max: float = Field(6.0, gt=0, description="Upper end of a moving T.")
    gate: Literal["mixture", "joint", "label", "uniform"] = Field(
        "mixture",
        description="How teachers are weighed per row: mixture (the mixture predicts guide labels), joint (the paper's "
        "way), label (closed form), uniform.",
    )
    entropy_weight: float = Field(
        0.01, ge=0, description="Reward for spread weights; 0 lets the gate settle on one teacher."
    )
    calibrate_teachers: bool = Field(
        True, description="Bring the teachers to one scale by a scalar each, fitted on guide rows."
    )
    guide_every: int = Field(10, ge=1, description="Training steps between two looks at guide rows.")
    guide_batch_size: int = Field(64, ge=1, description="Guide rows per look.")
    feature_weight: float = Field(
        0.0, ge=0, description="Weight of matching the teachers' features; above 0 needs teacher_outputs live."
    )
    hint_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of layer hints: of matching what the layers of the teacher put out that a warm start takes "
        "layers of (it runs live); 4 was tried, 0 gives none.",
    )
    hint_share: float = Field(0.5, gt=0, le=1, description="Share of the training, from its start, with layer hints.")
    teacher_outputs: Literal["full", "topk", "live"] = Field(
        "full", description="full: computed once and kept; topk: the largest of each row; live: run in the loop."
    )
    topk: int | None = Field(None, ge=1, description="Classes kept per row with teacher_outputs topk.")
    cache_dir: str | None = Field(None, description="Folder of teacher outputs; null: $HPMKD_CACHE or the memory's.")
    direct: bool = Field(True, description="Also train the student without teachers, for comparison.")
    keep: Literal["better", "distilled"] = Field(
        "better", description="The student. better: direct where it surely is; where auto chose, unless the other is."
    )


@dataclass(config=_STRICT, kw_only=True)
class ChainConfig:
    """The progressive chain: intermediate models between the teachers and the student, trained before it."""

    length: Literal["auto"] | int = Field(
        0, description="Number of intermediate models; auto lets short probes on validation rows decide."
    )
    max_length: int = Field(2, ge=1, description="The most that auto may train.")
    models: list[str] = Field(
        default_factory=list,
        description="Names of intermediate models, largest first, to be used as they are; empty builds them by size.",
    )
    guidance: Literal["dense", "previous"] = Field(
        "dense",
        description="What a model of the chain learns from: dense, all above it, teachers included; previous (the "
        "paper's), the one right above.",
    )
    warm_start: bool = Field(
        True,
        description="Start stages and student from layers and leading channels (MLPs: from the best units) of the "
        "nearest model above that shares their family; false, and models without such relatives, start from scratch.",
    )
    epochs: int | None = Field(None, ge=1, description="Epochs of a stage; null takes training.epochs.")
    learning_rate: float | None = Field(None, gt=0, description=f"Learning rate of a stage; {RATE_BESIDE}")
    probe_share: float = Field(
        0.2, gt=0, le=1, description="Length of a probe of auto, as a share of the student's training."
    )
    probe_seeds: int = Field(2, ge=1, description="Students trained on each side of a probe.")
    min_gain: float = Field(
        0.1,
        ge=0,
        description="Points of validation accuracy that auto asks of a stage per student training that it costs.",
    )


@dataclass(config=_STRICT, kw_only=True)
class TrainingConfig:
    """The student's training loop."""

    epochs: int = Field(10, ge=1, description="Passes over the training rows.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1 lets epochs decide.")
    min_steps: int = Field(0, ge=0, description="At least so many steps where `max_steps` is -1, for data of few rows.")
    batch_size: int = Field(128, ge=1, description="Training rows per step and process.")
    eval_batch_size: int = Field(256, ge=1, description="Rows per step of evaluation and of the teachers.")
    learning_rate: float = Field(LEARNING_RATE, gt=0, description=f"Largest learning rate. {RATES}")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    optimizer: str = Field(
        "adamw_torch", description="Name of an optimizer of TrainingArguments.optim: adamw_torch, sgd."
    )
    optimizer_args: str | None = Field(
        None, description="Arguments of the optimizer, as TrainingArguments.optim_args: momentum=0.9,nesterov=true."
    )
    lr_scheduler: str = Field("cosine", description="Name of a scheduler of TrainingArguments.lr_scheduler_type.")
    warmup_steps: int | float = Field(0.05, ge=0, description="Steps of rising learning rate; below 1, a share of all.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches per optimizer step.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are cut to this norm; 0 does not cut.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initial weights and of the order of rows.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Numbers used in training; fp16 needs a GPU."
    )
    num_workers: int = Field(0, ge=0, description="Processes that prepare batches; 0 prepares them in the loop.")
    report_to: list[str] = Field(default_factory=list, description="Trackers, such as tensorboard.")
    log_every: int | None = Field(None, ge=1, description="Steps between log lines; null chooses.")
    evaluations: int = Field(10, ge=1, description="How many times the student is evaluated during training.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    metrics: list[str] = Field(
        default_factory=lambda: ["accuracy", "macro_f1", "calibration_error", "teacher_agreement"],
        min_length=1,
        description="Metrics: ours by name, any other id through evaluate.",
    )
    keep: Literal["last", "best"] = Field(
        "last", description="Which checkpoint becomes the student: the last, or the best by validation accuracy."
    )


@dataclass(config=_STRICT, kw_only=True)
class OutputConfig:
    """Where a run goes."""

    dir: str = Field("hpmkd-run", min_length=1, description="Folder of the run; an unfinished run in it is resumed.")
    overwrite: bool = Field(False, description="Replace a finished or different run in that folder.")


@dataclass(config=_STRICT, kw_only=True)
class HubConfig:
    """Whether the student is published."""

    push: bool = Field(False, description="Upload the student, its card and records at the end.")
    repo_id: str | None = Field(None, description="Repository, user/name.")
    private: bool = Field(True, description="Create the repository as private.")
    license: str | None = Field(None, description="The student's licence, as the Hub names it; for its card.")


@dataclass(config=_STRICT, kw_only=True)
class MemoryConfig:
    """The optimization memory: what is read before a run, and added to after it."""

    use: bool = Field(
        True, description="Read the memory before the run and add the run after it; false leaves it alone."
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="A folder, or hf://datasets/USER/NAME for a shared one; null: $HPMKD_MEMORY or a folder in the "
        "Hugging Face home.",
    )
    limit_gb: float | None = Field(
        50.0,
        ge=0,
        description="Teacher outputs and models kept on this disk, in GB; above it the least recently used go. "
        "null: no limit.",
    )
    share_models: bool = Field(True, description="A shared memory gets the student and the intermediate models.")
    share_outputs: bool = Field(False, description="A shared memory also gets the teacher outputs.")
    private: bool = Field(True, description="Make a shared memory private, and refuse a public one.")


@dataclass(config=_STRICT, kw_only=True)
class Recipe:
    """A whole run. Sections without a required key may be left out."""

    data: DataConfig = Field(description="The rows, and how they are cut into train, guide, validation and test.")
    teachers: list[TeacherConfig] = Field(min_length=1, description="One entry per teacher.")
    student: StudentConfig = Field(description="The small model that is trained.")
    task: TaskConfig = Field(default_factory=TaskConfig, description="What is classified.")
    distillation: DistillationConfig = Field(default_factory=DistillationConfig, description="How the teachers teach.")
    chain: ChainConfig = Field(
        default_factory=ChainConfig, description="Intermediate models between the teachers and the student."
    )
    auto: AutoConfig = Field(default_factory=AutoConfig, description="Whether the configuration is chosen by tries.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="The student's training loop.")
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="Who does the jobs of a run.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="Where the run goes.")
    hub: HubConfig = Field(default_factory=HubConfig, description="Whether the student is published.")
    memory: MemoryConfig = Field(default_factory=MemoryConfig, description="What earlier runs left for later ones.")


_ADAPTER = TypeAdapter(Recipe)
SECTION_TYPES: dict[str, Any] = {
    "data": DataConfig,
    "teachers": TeacherConfig,
    "student": StudentConfig,
    "task": TaskConfig,
    "distillation": DistillationConfig,
    "chain": ChainConfig,
    "auto": AutoConfig,
    "training": TrainingConfig,
    "pipeline": PipelineConfig,
    "output": OutputConfig,
    "hub": HubConfig,
    "memory": MemoryConfig,
}
# Take the place of what lacks, so that the rest of the file is still checked. No rule says anything about "missing".
_STAND_INS: dict[str, Any] = {
    "data": {"path": "missing"},
    "teachers": [{"model": "missing"}],
    "student": {"model": "missing"},
    "path": "missing",
    "model": "missing",
}


def section_keys() -> dict[str, list[str]]:
    """The keys of every section, in order; under "" the sections themselves."""
    keys = {name: [field.name for field in dataclasses.fields(kind)] for name, kind in SECTION_TYPES.items()}
    return {"": list(SECTION_TYPES), **keys}


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package: inside it when installed, beside it in a clone."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe given by path or by bundled name. Raises RecipeError naming the bundled ones."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if str(path_or_name) in bundled:
        return bundled[str(path_or_name)]
    near = did_you_mean(path.stem, bundled)
    raise RecipeError(
        str(path_or_name), [f"there is no such file.{near} Recipes known by name: {', '.join(bundled) or 'none'}."]
    )


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = (), check_files: bool = False) -> Recipe:
    """The recipe in a YAML file or of a bundled name, with `section.key=value` words applied.

    check_files: also look whether the local files it names exist. Raises RecipeError with every fault: unknown keys
    (with the closest known one), values of a wrong type or range, and combinations that do not go together.
    """
    path = find_recipe(path_or_name)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not YAML, or not UTF-8
        raise RecipeError(str(path_or_name), [str(error)]) from error
    return read_recipe(tree, str(path_or_name), overrides, check_files)


def read_recipe(tree: Any, source: str, overrides: Iterable[str] = (), check_files: bool = False) -> Recipe:
    """The recipe in a tree of plain values (from YAML or JSON); `source` names it in messages. Raises RecipeError."""
    if not isinstance(tree, dict):
        found = type(tree).__name__ if tree else "nothing"
        raise RecipeError(source, [f"must hold sections ({', '.join(SECTION_TYPES)}), got {found}."])
    tree = json.loads(json.dumps(tree, default=str))
    write_out(tree)
    override_faults = apply_overrides(tree, overrides)
    write_out(tree)
    fill_learning_rate(tree)
    recipe, faults = validate(_ADAPTER, tree, section_keys(), _STAND_INS)
    lines = override_faults + [f"{dotted(path)}: {text}" for path, text in faults.items()]
    if recipe is not None:
        told = {dotted(path) for path in faults}
        lines += [
            text for keys, text in _all_rules(recipe, check_files) if not any(_touches(key, told) for key in keys)
        ]
    if lines:
        raise RecipeError(source, lines)
    return recipe


def check_recipe(recipe: Recipe, source: str = "the recipe") -> None:
    """Checks what goes together, and that local files exist. Raises RecipeError with every fault."""
    faults = [text for _, text in _all_rules(recipe, check_files=True)]
    if faults:
        raise RecipeError(source, faults)


def _all_rules(recipe: Recipe, check_files: bool) -> list[tuple[tuple[str, ...], str]]:
    return [*rule_faults(recipe), *(file_faults(recipe) if check_files else [])]


def _touches(key: str, told: set[str]) -> bool:
    return any(key == other or key.startswith(other + ".") for other in told)


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, every default filled in; `read_recipe` reads it back."""
    return _ADAPTER.dump_python(recipe, mode="json")


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 over what decides the result: all but output, hub, trackers, workers and places of caches."""
    tree = recipe_tree(recipe)
    if recipe.auto.mode == "off":  # then the section decides nothing
        del tree["auto"]
    for section, keys in _NOT_IN_FINGERPRINT.items():
        if keys is None:
            del tree[section]
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    drop_unset(tree)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def drop_unset(tree: dict[str, Any]) -> None:
    """Takes out of a recipe's tree what decides nothing where it is not set, as in recipes from before these fields."""
    if not tree["distillation"]["hint_weight"]:
        del tree["distillation"]["hint_share"]
    for section, key in (("training", "min_steps"), ("data", "max_length"), ("distillation", "hint_weight")):
        if not tree[section][key]:
            del tree[section][key]


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors; `recipes/recipe.schema.json` is this."""
    schema = _ADAPTER.json_schema()
    memory = schema["properties"]["memory"]
    memory["anyOf"] = [{"$ref": memory.pop("$ref")}, {"type": "string", "minLength": 1}]
    auto = schema["properties"]["auto"]
    # `off` is false to a YAML 1.1 reader.
    auto["anyOf"] = [
        {"$ref": auto.pop("$ref")},
        {"enum": ["off", "fast", "thorough", False]},
        {"type": "number", "exclusiveMinimum": 0},
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "hf_hpmkd recipe"}


MIN_STEPS = 1_000  # at least, of a line without a recipe that does not say how long


def recipe_from_line(
    teachers: Sequence[str],
    student: str | Mapping[str, Any],
    dataset: str,
    output: str | None = None,
    overrides: Iterable[str] = (),
    check_files: bool = False,
) -> Recipe:
    """The recipe of `--teacher A … --student S --dataset D [--output DIR]`, `auto: fast`, with enough steps for few
    rows unless the overrides say how long. student: its name, or fields of `StudentConfig`. Raises RecipeError.
    """
    overrides = list(overrides)
    long = {f"training.{key}" for key in ("epochs", "max_steps", "min_steps")}
    said = any(word.partition("=")[0].strip() in long for word in overrides)
    tree: dict[str, Any] = {
        "auto": "fast",  # who sets nothing gets what pays
        "data": {"path": dataset},
        "teachers": [{"model": teacher} for teacher in teachers],
        "student": {"model": student} if isinstance(student, str) else dict(student),
        "training": {} if said else {"min_steps": MIN_STEPS},
    }
    tree |= {} if output is None else {"output": {"dir": output}}
    return read_recipe(tree, "the command line", overrides, check_files)
