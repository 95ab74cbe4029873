"""`hpmkd compare`: several methods on equal terms over several seeds; resumable, and it counts looks at the test part.

setting  = one recipe, methods that change its losses, seeds       (methods)
tuning   = if asked for, the same number of trainings for each method (tuning)
teachers = per seed, the same for all methods; outputs cached      (distill, evaluation)
students = one per method and seed                                 (compare_jobs)
scores   = validation rows; test rows only with `final`, each look at them recorded
summary  = comparison.json, table.md, plots/                       (comparison_record, comparison_report)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd.baselines import DISTILLERS
from hf_hpmkd.baselines.stages import stages
from hf_hpmkd.chain import named_stages
from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.compare_jobs import Job, Workplace, now, run_jobs
from hf_hpmkd.comparison_record import COMPARISON_FILE, ComparisonRecord, Look, MethodRecord, Result, Trial
from hf_hpmkd.comparison_report import draw_plots, summary
from hf_hpmkd.data import PARTS
from hf_hpmkd.distill import check_precision, check_student, student_builder
from hf_hpmkd.evaluation import evaluate_teachers, teacher_logits
from hf_hpmkd.intermediate_models import find_intermediates
from hf_hpmkd.methods import Method, method_recipe, with_overrides
from hf_hpmkd.recipe import Recipe, fingerprint, read_recipe, recipe_tree
from hf_hpmkd.recipe_rules import family, is_trained_here, teacher_names, unread_parts, uses_teachers
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.run_folder import alone_in, contents, require_same_rows
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.tuning import TUNING_SEED, again, num_versions, trials
from hf_hpmkd.vocabulary import NO_NETWORKS


@dataclass(frozen=True)
class Settings:
    """What to compare. baseline: None takes the first method. teacher_seed: of all teachers trained on the spot; None
    gives each seed its own, as `distill` does. final: score on the test part too. processes: students at a time.
    tune: trainings that each method may spend on choosing its values on validation rows; 0 takes them as they are.
    """

    methods: Sequence[Method]
    seeds: Sequence[int]
    folder: Path
    baseline: str | None = None
    teacher_seed: int | None = None
    final: bool = False
    processes: int = 1
    tune: int = 0


def compare(
    recipe: Recipe, settings: Settings, source: str = "a recipe", say: Callable[[str], None] = print
) -> ComparisonRecord:
    """Trains what is not trained yet, writes the summary into the folder, and returns the record.

    Methods and seeds may be added to a folder later; what is finished there is never trained again. Raises ValueError,
    before any training, for settings that cannot be used; and after all the rest is done, naming them, if students
    failed.
    """
    _check(settings)
    state = PartialState(cpu=not torch.accelerator.is_available())
    disable_progress_bar()
    recipe = _shared_recipe(recipe, settings.folder)
    for method in settings.methods:  # its faults come before any file is made
        one = method_recipe(recipe, method, 0)
        check_precision(one, state.device.type)
        if one.training.precision == "fp16" and DISTILLERS[method.loss].trains_more:
            raise ValueError(f"training.precision: fp16 scales gradients, which {method.name} does not undo. Use bf16.")
    workplace = Workplace(recipe, settings.folder, settings.teacher_seed)
    _check_folder(settings.folder)
    with alone_in(settings.folder), workplace.remembering() as place:
        record = _open_record(recipe, settings, source)
        settings = replace(settings, methods=_usable(place, settings.methods, say))
        # The test part stays closed.
        rows = place.parts.fingerprints(unread_parts(place.recipe), [part for part in PARTS if part != "test"])
        record.rows = require_same_rows(settings.folder, record.rows, rows, [COMPARISON_FILE])
        record.parts = place.parts.provenance
        record.save(settings.folder / COMPARISON_FILE)
        methods, tried = _tuned(place, settings, record, say)
        jobs = [Job(method, seed, settings.folder) for seed in settings.seeds for method in methods]
        # Those of earlier seeds too, which stand beside these in one row.
        seeds = sorted({*record.seeds, *settings.seeds})
        _check_jobs(place, [Job(method, seed, settings.folder) for seed in seeds for method in methods])
        record.seeds, record.baseline = seeds, _baseline(settings)
        _write_methods(record, methods, tried)
        try:
            failures = _train(place, jobs, settings.processes, record, say)
            if settings.final:
                _open_test(place, jobs, record, say)
        finally:  # interrupted, the record holds what is finished: `--table` shows it
            _gather(record, settings.folder)
            record.save(settings.folder / COMPARISON_FILE)
        text = summary(record)
        (settings.folder / "table.md").write_text(text + "\n", encoding="utf-8")
        draw_plots(record, settings.folder / "plots")
    say("\n" + text)
    say(f"\nRecord, table and plots are in {settings.folder}.")
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(jobs)} students failed; the same command tries them again:\n"
            + "\n".join(f"  - {line}" for line in failures)
        )
    return record


# ---- before ----------------------------------------------------------------------------------------------------------


def _check(settings: Settings) -> None:
    names = [method.name for method in settings.methods]
    if len(names) < 2:
        raise ValueError(f"A comparison needs at least two methods, got {', '.join(names) or 'none'}.")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError(f"Seeds must be given, and each once, got {list(settings.seeds)}.")
    if settings.baseline is not None and settings.baseline not in names:
        raise ValueError(f"The baseline must be one of the methods ({', '.join(names)}), got {settings.baseline!r}.")
    if settings.tune < 0:
        raise ValueError(f"`--tune` must be 0 or more trainings per method, got {settings.tune}.")
    if settings.processes < 1:
        raise ValueError(f"`--jobs` must be at least 1, got {settings.processes}.")
    if PartialState(cpu=not torch.accelerator.is_available()).num_processes > 1:
        raise ValueError("A comparison is started as one process. Use `--jobs` to train several students at a time.")


def _usable(place: Workplace, methods: Sequence[Method], say: Callable[[str], None]) -> list[Method]:
    """The methods, without optional ones that cannot work here. Raises ValueError for another that cannot: it would
    fail at its turn, when much was trained before it.
    """
    found = []
    for method in methods:
        one = method_recipe(place.recipe, method, 0)
        student = student_builder(one, place.parts)(meta=True)
        check_student(one, student, len(place.parts.class_names))
        named_stages(one, place.parts.train)
        try:
            _require_models(method, one, student, place.parts.train)
        except ValueError as error:
            if not method.optional:
                raise ValueError(f"Method {method.name} cannot work here. {error}") from error
            say(f"{method.name} is left out, it cannot work here. {error}")
            continue
        found.append(method)
    return found


def _require_models(method: Method, recipe: Recipe, student: Classifier, rows: Rows) -> None:
    """Raises ValueError where the teachers' names or the student show that the method lacks a model it needs."""
    networks = [one for one in recipe.teachers if family(one.model) not in NO_NETWORKS]
    if method.teachers == "best-network" and all(one.folds for one in networks):
        raise ValueError(
            "It looks inside a teacher that is one network, got "
            f"{', '.join(teacher_names(recipe))}, none of which is. Add a network as a teacher (without folds), or "
            "leave the method out."
        )
    if method.loss in ("at", "fitnets"):
        stages(student.model)
    chain, student_of = recipe.chain, recipe.student
    searched = isinstance(chain.length, int) and chain.length and not chain.models and recipe.auto.mode == "off"
    if searched and uses_teachers(recipe) and all(is_trained_here(one.model) for one in networks):
        find_intermediates(
            student_of.model,
            [(one.model, build_classifier(one.model, rows, meta=True).num_params) for one in networks],
            rows,
            int(chain.length),
            revision=student_of.revision,
            trust_remote_code=student_of.trust_remote_code,
        )


def _shared_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Seed and folder are the comparison's to choose, so the recipe's own make no difference."""
    tree = recipe_tree(recipe)
    tree["training"]["seed"], tree["output"]["dir"] = 0, str(folder)
    return read_recipe(tree, "the recipe")


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / COMPARISON_FILE).is_file() and (found := sorted(contents(folder))):
        raise ValueError(
            f"The output folder must be empty or hold a comparison, {folder} holds {', '.join(found[:5])}. Choose "
            "another with --output."
        )


def _open_record(recipe: Recipe, settings: Settings, source: str) -> ComparisonRecord:
    """The record in the folder, or a new one. Seeds and baseline are added once the command is known to go on."""
    file, versions_hardware = settings.folder / COMPARISON_FILE, environment()
    if file.is_file():
        record = ComparisonRecord.load(file)
        if record.recipe_fingerprint != fingerprint(recipe) or record.teacher_seed != settings.teacher_seed:
            raise ValueError(
                f"{settings.folder} holds a comparison on another recipe (or on this one with other values, or with "
                "another --teacher-seed). Choose another folder with --output."
            )
    else:
        record = ComparisonRecord(
            source, recipe_tree(recipe), fingerprint(recipe), _baseline(settings), teacher_seed=settings.teacher_seed
        )
        record.started = now()
    record.versions, record.hardware = versions_hardware
    record.commits["hf_hpmkd"] = code_commit()
    return record


def _baseline(settings: Settings) -> str:
    return settings.baseline or settings.methods[0].name


def _write_methods(record: ComparisonRecord, methods: Sequence[Method], tried: Sequence[Trial]) -> None:
    """These methods, as they are compared, and what their tuning tried, before what was compared here earlier."""
    new = [MethodRecord(m.name, m.description, list(m.overrides), m.teachers, m.loss, m.fresh_views) for m in methods]
    names = {method.name for method in methods}
    record.methods = new + [method for method in record.methods if method.name not in names]
    if tried:
        record.trials = [*tried, *(trial for trial in record.trials if trial.method not in names)]


def _tuned(
    place: Workplace, settings: Settings, record: ComparisonRecord, say: Callable[[str], None]
) -> tuple[list[Method], list[Trial]]:
    """The methods with the values that were best on validation rows, each after as many trainings as the others, and
    what was tried. record: gets the teachers.
    """
    if not settings.tune:
        return list(settings.methods), []
    if record.tuning_teacher_seed is None:  # those of the first seed are needed anyway
        record.tuning_teacher_seed = settings.seeds[0] if settings.teacher_seed is None else settings.teacher_seed
    place = Workplace(place.recipe, place.folder, record.tuning_teacher_seed, place.store)
    versions = {method: trials(place.recipe, method, num_versions(settings.tune)) for method in settings.methods}
    versions = {method: several for method, several in versions.items() if len(several) > 1}
    jobs: dict[Method, list[list[Job]]] = {
        method: [[Job(one, TUNING_SEED, place.folder / "tuning")] for one in several]
        for method, several in versions.items()
    }
    _train_trials(place, jobs, settings.processes, record, say)
    for of_method in jobs.values():
        accuracies = [_accuracy(of_version) for of_version in of_method]
        for version, times in again(accuracies, settings.tune - len(of_method)).items():
            of_method[version] += [
                replace(of_method[version][0], seed=TUNING_SEED + number) for number in range(1, 1 + times)
            ]
    _train_trials(place, jobs, settings.processes, record, say)
    tuned: list[Method] = []
    trials_made: list[Trial] = []
    for method in settings.methods:
        if method not in jobs:  # there is nothing to choose from
            tuned.append(method)
            continue
        tried = jobs[method]
        best = max(tried, key=lambda of_version: (len(of_version) > 1, _accuracy(of_version)))
        for of_version in tried:
            words = list(of_version[0].method.overrides[len(method.overrides) :])
            seconds = sum(_result(job).seconds or 0.0 for job in of_version)
            chosen = of_version is best
            trials_made.append(
                Trial(method.name, words, _accuracy(of_version), seconds, chosen, trainings=len(of_version))
            )
            if chosen:
                tuned.append(with_overrides(method, words))
                say(f"{method.name}: {' '.join(words) or 'its own values'} of {len(tried)} tried.")
    return tuned, trials_made


def _train_trials(
    place: Workplace,
    jobs: dict[Method, list[list[Job]]],
    processes: int,
    record: ComparisonRecord,
    say: Callable[[str], None],
) -> None:
    """Trains what is not trained yet of each method's versions. Raises ValueError if one fails."""
    everything = [job for of_method in jobs.values() for of_version in of_method for job in of_version]
    _check_jobs(place, everything)
    if failures := _train(place, everything, processes, record, say):
        raise ValueError(
            f"{len(failures)} trainings of the tuning failed, and budgets must be equal; the same command tries them "
            "again:\n" + "\n".join(f"  - {line}" for line in failures)
        )


def _accuracy(jobs: Sequence[Job]) -> float:
    """Mean accuracy of finished students on validation rows."""
    return float(np.mean([_result(job).scores["validation"].accuracy for job in jobs]))


def _train(
    place: Workplace, jobs: Sequence[Job], processes: int, record: ComparisonRecord, say: Callable[[str], None]
) -> list[str]:
    """Trains the students that are not finished, after their teachers; returns a line per student that failed."""
    unfinished = [job for job in jobs if (result := job.result()) is None or result.status != "completed"]
    for key in dict.fromkeys(place.teacher_key(job.seed) for job in unfinished):
        _prepare_teachers(place, key, record, say)
    return run_jobs(place, jobs, processes, say)


def _check_jobs(place: Workplace, jobs: Sequence[Job]) -> None:
    """What lies in the folder under a job's name must be of that job."""
    for job in jobs:
        result = job.result()
        began = job.student.exists() or job.run_folder.exists()
        touched = result is not None and (result.status == "completed" or began)
        if result is not None and touched and result.recipe_fingerprint != place.fingerprint(job):
            raise ValueError(
                f"{job.folder} holds a student of {job.name} that was trained with other values "
                f"({' '.join(result.overrides) or 'none changed'}). Give it the same values (and the same "
                "--tune), or another name, or choose another folder with --output."
            )


def _prepare_teachers(place: Workplace, key: str, record: ComparisonRecord, say: Callable[[str], None]) -> None:
    """Gets the teachers and their outputs, once for all methods, and writes down how good they are."""
    run = place.teachers_run(key)
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.phase("teachers"):
        teachers = place.teachers(key, run)
        evaluate_teachers(run.record, teachers, place.parts, run.recipe, run.memory.cache, say=say, warn=run.warn)
    run.memory.count(run.record)
    run.record.status = "completed"
    run.save()
    seen = {
        teacher.name: teacher.accuracy["test"] for teacher in record.teachers.get(key, []) if "test" in teacher.accuracy
    }
    for teacher in run.record.teachers:  # measured at an earlier look, and not to be measured again
        if teacher.name in seen:
            teacher.accuracy["test"] = seen[teacher.name]
    record.teachers[key] = run.record.teachers
    record.warnings = list(dict.fromkeys([*record.warnings, *run.record.warnings]))
    record.save(place.folder / COMPARISON_FILE)


# ---- after -----------------------------------------------------------------------------------------------------------


def _open_test(place: Workplace, jobs: Sequence[Job], record: ComparisonRecord, say: Callable[[str], None]) -> None:
    """Scores the finished students on the test part, and writes down that it was looked at before it is."""
    finished = [job for job in jobs if (result := job.result()) is not None and result.status == "completed"]
    new = [job for job in finished if "test" not in _result(job).scores]
    keys = dict.fromkeys(place.teacher_key(job.seed) for job in finished)
    unscored = [key for key in keys if any("test" not in one.accuracy for one in record.teachers[key])]
    if new:
        students = {job.method.name: [one.seed for one in new if one.method == job.method] for job in new}
        record.looks.append(Look(now(), students))
        record.save(place.folder / COMPARISON_FILE)
        say(f"Opening the test part for {len(new)} students (look {len(record.looks)}).")
    test = place.parts.test
    for key in unscored:
        teachers = place.teachers(key)
        run = place.teachers_run(key)
        logits = teacher_logits(teachers, test, run.recipe, run.memory.cache, say)
        for known, of_teacher in zip(record.teachers[key], logits, strict=True):
            known.accuracy["test"] = float((of_teacher.argmax(-1) == test.labels).double().mean())
        record.save(place.folder / COMPARISON_FILE)
    for job in new:
        result = _result(job)
        result.scores["test"] = place.score(place.load_student(job), test)
        result.save(job.result_file)


def _result(job: Job) -> Result:
    return Result.load(job.result_file)


def _gather(record: ComparisonRecord, folder: Path) -> None:
    """The results of all finished students into the record, without their curves."""
    record.results = []
    for method in record.methods:
        for seed in record.seeds:
            file = folder / f"seed-{seed}" / f"{method.name}.result.json"
            result = Result.load(file) if file.is_file() else None
            if result is not None and result.status == "completed":
                result.curve = []
                record.results.append(result)
