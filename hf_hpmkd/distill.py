"""The main job: several teachers in, one small, trained, documented student out. Reads like the algorithm.

    parts    = train, guide, validation, test                      (data)
    pipeline = the long ones of these steps, where several workers are faster (run_ahead)
    teachers = loaded, or trained on the spot without guide rows    (teachers, classifier_training)
    recipe   = how to train the student, tried if `auto` asks        (quick_validation)
    direct   = the student trained on labels alone, to compare      (classifier_training)
    chain    = intermediate models between them, if they pay        (chain, components.progressive_chain)
    student  = the student trained on the outputs of all of them    (trainer, distiller)
    keep     = the better of direct and distilled, by their answers (kept_student)
    report   = test opened once; record, table, plots, card         (evaluation, report, model_card)
    memory   = teacher outputs found there, the run added at the end (run_memory)

Every step leaves its result in the output folder, so that the same command goes on where an interrupted run stood.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd import report
from hf_hpmkd.chain import build_chain, named_stages
from hf_hpmkd.chain_stages import Stages, WarmBuild, require_hints
from hf_hpmkd.classifier_training import Trained, batches_per_step, old_garbage_left, student_schedule, train_or_load
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.evaluation import evaluate_teachers, evaluate_test
from hf_hpmkd.heads import find_classifier_head
from hf_hpmkd.hub_store import check_can_push, push_run
from hf_hpmkd.kept_student import distilled_folder, keep_better
from hf_hpmkd.metrics import check_metrics, load_metric
from hf_hpmkd.quick_validation import configure, is_direct, proof_needed
from hf_hpmkd.recipe import Recipe, fingerprint, recipe_tree
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import start_told, unread_parts, uses_teachers
from hf_hpmkd.run_ahead import run_ahead
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_environment import code_commit
from hf_hpmkd.run_folder import (
    alone_in,
    claim,
    drop_replaced,
    require_same_processes,
    require_same_rows,
    restore_replaced,
)
from hf_hpmkd.run_memory import run_memory
from hf_hpmkd.run_record import RECORD_FILE, ModelRecord
from hf_hpmkd.run_steps import get_teachers, student_builder
from hf_hpmkd.tasks.text import TextFeed
from hf_hpmkd.teacher_kinds import Teacher
from hf_hpmkd.training_folder import copy_training


def check_launch(device_type: str) -> None:
    """Raises ValueError where `accelerate launch` was asked for what it has for GPUs alone, and would leave out, or for
    what would leave the finished student in pieces.
    """
    for asked in ("FSDP", "DEEPSPEED"):
        if device_type == "cpu" and _asked(asked):
            raise ValueError(
                f"accelerate has {asked} for GPUs alone, but this process found none and would train as under DDP. "
                "Launch with recipes/accelerate/ddp_cpu.yaml, or where there are GPUs."
            )

    sharded = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT") != "FULL_STATE_DICT"
    third = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if (_asked("FSDP") and sharded) or (_asked("DEEPSPEED") and third):
        raise ValueError(
            "A finished model is put together in one place, which takes FSDP with fsdp_state_dict_type "
            "FULL_STATE_DICT, or DeepSpeed up to ZeRO stage 2. Change the launch configuration as in "
            "recipes/accelerate."
        )


def check_precision(recipe: Recipe, device_type: str) -> None:
    """Raises ValueError where the recipe asks for what the CPU would leave out without a word."""
    if recipe.training.precision == "fp16" and device_type == "cpu":
        raise ValueError("training.precision: fp16 needs a GPU, and this process found none. Use fp32 or bf16.")


def check_trackers(names: Sequence[str]) -> None:
    """Raises ImportError for a tracker whose package is not there, which upstream tells when training begins."""
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
    for name in names:
        if name in packages and not any(map(find_spec, packages[name])):
            raise ImportError(
                f"training.report_to: {name} is not installed. Install it (`pip install {name}`), or leave it out."
            )


def _asked(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() == "true"


def distill(recipe: Recipe, recipe_source: str = "a recipe") -> Path:
    """Runs a recipe and returns its output folder, with `student/`, `run_record.json`, `plots/` and `README.md`.

    A finished run of the same recipe and rows is left as it is, but for a licence that is named now, and its table
    shown again. Raises ValueError (with the rule, what arrived and the way out) on anything that cannot work, before
    the long work starts.
    """
    folder = Path(recipe.output.dir).expanduser()
    if recipe.hub.push and recipe.hub.repo_id is not None:
        check_can_push(recipe.hub.repo_id)
    # Several processes without a GPU find each other (gloo) only where the CPU is asked for in so many words.
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_launch(state.device.type)
    check_precision(recipe, state.device.type)
    check_trackers(recipe.training.report_to)
    disable_progress_bar()  # transformers draws one for every checkpoint it writes
    with alone_in(folder) if state.is_main_process else nullcontext():
        if state.is_main_process and folder.is_dir():
            restore_replaced(folder)  # a run that was to replace another was killed before it made anything
        try:
            _distill(recipe, recipe_source, folder, state)
        except BaseException:
            if state.is_main_process:
                restore_replaced(folder)
            raise
    return folder


def _distill(recipe: Recipe, recipe_source: str, folder: Path, state: PartialState) -> None:
    with state.main_process_first():
        known = claim(folder, fingerprint(recipe), recipe.output.overwrite and state.is_main_process)
        record = known or new_record(recipe)
        if record.status != "completed":
            require_same_processes(folder, record.processes, batches_per_step(recipe))
            record.processes = batches_per_step(recipe)
        if state.is_main_process and record.status != "completed":
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(recipe), sort_keys=False), encoding="utf-8")
            record.status, record.error = "running", None
            record.save(folder / RECORD_FILE)
    with run_memory(recipe, state.is_main_process) as memory:
        run = Run(folder, record, memory)
        if record.status == "completed":
            _require_same_data(run)
            run.keep_hub(recipe)
            run.say(f"{folder} holds the finished run of {recipe_source}; `output.overwrite=true` runs it again.")
        else:
            memory.before()
            with run.recording(), old_garbage_left():
                _run(run)
        memory.after(record, folder / "student")
    run.say("\n" + report.result_table(record))
    run.say(f"\nThe student is in {folder / 'student'}, its card in {folder / 'README.md'}.")
    if recipe.hub.push and recipe.hub.repo_id is not None and state.is_main_process:
        run.say(f"Published as {push_run(folder, recipe.hub.repo_id, recipe.hub.private)}.")


def _require_same_data(run: Run) -> None:
    """Raises RunFolderError where a finished run was trained on other rows than its data hold now, which are read for
    it. Data that cannot be read any more are told of; what the run left is there all the same.
    """
    try:
        now = recipe_parts(run.recipe).fingerprints(unread_parts(run.recipe))
    except (ValueError, OSError, DatasetsError) as error:
        run.say(f"Whether its data are still the same cannot be told: {error}")
        return
    require_same_rows(run.folder, run.record.rows, now, finished=True)


def _run(run: Run) -> None:
    recipe, record = run.recipe, run.record
    for metric in recipe.training.metrics:
        load_metric(metric)  # a name that does not exist should not be found out at the end
    with run.phase("data"):
        parts = recipe_parts(recipe)
        record.rows = require_same_rows(run.folder, record.rows, parts.fingerprints(unread_parts(recipe)))
        check_metrics(recipe.training.metrics, len(parts.class_names))
        record.class_names = parts.class_names
        record.parts = parts.provenance
        record.commits |= {"hf_hpmkd": code_commit(), "data": parts.provenance.get("commit")}
        run.describe_data(parts)
        build_student = student_builder(recipe, parts)
        blueprint = build_student(meta=True)
        num_params = check_student(recipe, blueprint, len(parts.class_names))
        if told := start_told(recipe):
            run.say(told)
        named_stages(recipe, parts.train)  # a name that means nothing should be found out now
        if recipe.student.pretrained:
            record.commits["student"] = getattr(blueprint.model.config, "_commit_hash", None)

    with run.phase("pipeline"):
        run_ahead(run, parts)
    with run.phase("teachers"):
        teachers = get_teachers(run, parts)
        run.warn_if_larger_than_every_teacher(num_params, teachers)
        evaluate_teachers(run.record, teachers, parts, recipe, run.memory.cache, say=run.say, warn=run.warn)

    above = Stages(run, parts, teachers, run.folder).above([])
    length = recipe.chain.length
    surely = uses_teachers(recipe) and recipe.auto.mode == "off" and not recipe.chain.models
    if surely and length != "auto" and length > 0:
        Stages(run, parts, teachers, run.folder).find(length)  # where there are none, it is known now
    require_hints(recipe, WarmBuild(build_student, above, parts.train))
    if run.is_main:
        drop_replaced(run.folder)
    direct_folder = run.folder / "direct" if recipe.distillation.direct else None
    chosen = configure(run, parts, teachers, build_student, run.folder / "student", direct_folder)

    def train_student(
        name: str, build: Callable[[], Classifier], with_teachers: list[Teacher], recipe: Recipe
    ) -> Trained:
        with run.phase(name):
            trained = train_or_load(
                name,
                build,
                recipe,
                student_schedule(recipe),
                distilled_folder(run.folder) if name == "student" else run.folder / name,
                parts.train,
                parts.validation,
                num_views=parts.num_views,
                teachers=with_teachers,
                guide=parts.guide if with_teachers else None,
                cache=run.memory.cache,
                on_log=lambda history: run.keep_curve(name, history),
            )
        run.keep_curve(name, trained.curve)
        record.models[name] = ModelRecord(name=name, num_params=num_params, seconds=trained.seconds)
        return trained

    trained: dict[str, Trained] = {}
    if recipe.distillation.direct:
        trained["direct"] = train_student("direct", build_student, [], recipe)
        if is_direct(recipe, chosen) and run.is_main:
            copy_training(run.folder / "direct", run.folder / "student")
    run.recipe = chosen
    with run.phase("chain"):
        chain = build_chain(run, parts, teachers, build_student)
    build_warm = WarmBuild(build_student, chain.above, parts.train)
    guides = chain.guides if uses_teachers(chosen) else []
    trained["student"] = train_student("student", build_warm, guides, chosen)
    run.keep_start(build_warm.share, build_warm.origin)
    run.keep_weights(trained["student"], guides)
    if recipe.distillation.keep == "better" and "direct" in trained and not is_direct(recipe, chosen):
        keep_better(run, parts, trained, proof_needed(recipe, record.auto))

    with run.phase("report"):
        classifiers = {name: one.classifier for name, one in trained.items()}
        evaluate_test(record, teachers, classifiers, parts, recipe, run.memory.cache, run.say, run.warn)
        run.memory.count(record)
        run.write_report()


def check_student(recipe: Recipe, student: Classifier, num_classes: int) -> int:
    """The student's parameters. Raises ValueError where the settings need what its architecture lacks."""
    assert student.model is not None
    asked, feed = recipe.data.max_length, student.feed
    if asked and isinstance(feed, TextFeed) and feed.max_length < asked:
        raise ValueError(
            f"`data.max_length` is {asked}, but {recipe.student.model} reads {feed.max_length} tokens at most. Lower "
            "it, or leave it out."
        )
    distillation = recipe.distillation
    reads = distillation.gate in ("mixture", "joint") or distillation.temperature_schedule == "learned"
    if uses_teachers(recipe) and (reads or distillation.feature_weight > 0):
        find_classifier_head(student.model, num_classes)
    return student.num_params
