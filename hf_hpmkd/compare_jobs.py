"""Trains the students of a comparison, one per method and seed, in this process or in several at a time.

A student's result file says how far it is, so a finished one is never trained again and a stopped one goes on from its
last checkpoint. Knows nothing of tables and statistics.
"""

import hashlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers.utils.logging import disable_progress_bar

from hf_hpmkd.baselines import DISTILLERS
from hf_hpmkd.chain import build_chain
from hf_hpmkd.chain_stages import WarmBuild, require_hints
from hf_hpmkd.classifier_training import Trained, old_garbage_left, student_schedule, train_or_load
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.comparison_record import Result, Score
from hf_hpmkd.components.optimization_memory import OptimizationMemory
from hf_hpmkd.control_teachers import CONTROLS, ControlTeacher
from hf_hpmkd.data import DataParts
from hf_hpmkd.engines import end_when, output_to
from hf_hpmkd.evaluation import student_logits
from hf_hpmkd.kept_student import judge_students
from hf_hpmkd.methods import Method, method_recipe
from hf_hpmkd.quick_validation import configure, is_direct, proof_needed
from hf_hpmkd.recipe import Recipe, fingerprint, read_recipe, recipe_tree
from hf_hpmkd.recipe_parts import recipe_parts
from hf_hpmkd.recipe_rules import is_trained_here, uses_teachers
from hf_hpmkd.run_context import Run, new_record
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.run_memory import RunMemory, run_memory
from hf_hpmkd.run_record import RECORD_FILE, AutoRecord, ChainRecord, RunRecord
from hf_hpmkd.run_steps import get_teachers, student_builder
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher
from hf_hpmkd.training_folder import copy_training, done_file, give_way, remove_training

_POLL_SECONDS = 0.5
_FRESH = 2**31  # views before they begin again
_PEER_SEED = 1_000_003  # added to a seed, so that a peer is no other seed's student
_PATIENCE_SECONDS = 10


def now() -> str:
    """UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True)
class Job:
    """One student of a comparison in `folder`."""

    method: Method
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method.name}, seed {self.seed}"

    @property
    def student(self) -> Path:
        return self.folder / f"seed-{self.seed}" / self.method.name

    @property
    def run_folder(self) -> Path:
        return self._beside("run")

    @property
    def result_file(self) -> Path:
        return self._beside("result.json")

    @property
    def log(self) -> Path:
        return self._beside("log")

    @property
    def lock(self) -> Path:
        return self._beside("lock")

    def _beside(self, suffix: str) -> Path:
        return self.student.with_name(f"{self.method.name}.{suffix}")

    def result(self) -> Result | None:
        """What is known of it so far."""
        return Result.load(self.result_file) if self.result_file.is_file() else None


@dataclass
class Workplace:
    """What students of one comparison share inside a process: recipe, data, teachers. Loaded when first needed."""

    recipe: Recipe
    folder: Path
    teacher_seed: int | None = None
    store: OptimizationMemory | None = None  # see `remembering`
    _teachers: dict[str, list[Teacher]] = field(default_factory=dict)

    @cached_property
    def parts(self) -> DataParts:
        return recipe_parts(self.recipe)

    def teacher_key(self, seed: int) -> str:
        """Which teachers a seed has: its own or those of `teacher_seed`; "loaded" where none depends on a seed."""
        if not any(is_trained_here(teacher.model) for teacher in self.recipe.teachers):
            return "loaded"
        return f"seed-{seed if self.teacher_seed is None else self.teacher_seed}"

    def teachers_run(self, key: str) -> Run:
        """The run that gets these teachers: the shared recipe, whose values no method has touched."""
        seed = 0 if key == "loaded" else int(key.removeprefix("seed-"))
        recipe = read_recipe(recipe_tree(self.recipe), "the recipe", [f"training.seed={seed}"])
        return self.run(recipe, self.folder / key)

    def run(self, recipe: Recipe, folder: Path) -> Run:
        """A run of a recipe in a folder, with the memory that all of them share; one that was stopped goes on."""
        record = new_record(recipe)
        if (file := folder / RECORD_FILE).is_file():
            known = RunRecord.load(file)
            record = known if known.recipe_fingerprint == record.recipe_fingerprint else record
        run = Run(folder, record, RunMemory(recipe, self.store, is_main=True, say=print))
        run.record.class_names, run.record.parts = self.parts.class_names, self.parts.provenance
        return run

    @contextmanager
    def remembering(self) -> Iterator["Workplace"]:
        """Within the block the students use the memory of the recipe, and nothing that they use is evicted."""
        with run_memory(self.recipe, is_main=True) as memory:
            self.recipe = replace(self.recipe, memory=memory.recipe.memory)
            self.store = memory.store
            yield self
        self.store = None

    def teachers(self, key: str, run: Run | None = None) -> list[Teacher]:
        """The teachers of that key, loaded, or found trained; only the last ones asked for are kept in memory.

        run: gets them, and its record says what they are; None makes one.
        """
        if key not in self._teachers or run is not None:
            self._teachers = {key: get_teachers(run or self.teachers_run(key), self.parts)}
        return self._teachers[key]

    def heard(self, job: Job, recipe: Recipe) -> list[Teacher]:
        """The teachers that a job's method listens to. Raises ValueError where it needs a network and there is none."""
        how, key = job.method.teachers, self.teacher_key(job.seed)
        if how == "peer":
            seed = (job.seed + _PEER_SEED) % 2**32
            built = student_builder(read_recipe(recipe_tree(recipe), "the peer", [f"training.seed={seed}"]), self.parts)
            return [TorchTeacher.of("peer", built(), self.parts.train, PartialState().device)]
        teachers = self.teachers(key)
        if how in CONTROLS:
            cache = TeacherCache(recipe.distillation.cache_dir)
            return [ControlTeacher(teacher, how, self.parts.num_views, cache) for teacher in teachers]
        if how == "all":
            return teachers
        if how == "best-network":
            teachers = [teacher for teacher in teachers if isinstance(teacher, TorchTeacher)]
        if not teachers:
            raise ValueError(f"{job.method.name} needs a teacher that is one network, this recipe has none.")
        accuracy = {one.name: one.accuracy["guide"] for one in RunRecord.load(self.folder / key / RECORD_FILE).teachers}
        return [max(teachers, key=lambda teacher: accuracy[teacher.name])]

    def fingerprint(self, job: Job) -> str:
        """Of everything that decides a student: its recipe, and which teachers it hears."""
        recipe = fingerprint(method_recipe(self.recipe, job.method, job.seed))
        about = [recipe, job.method.teachers, self.teacher_key(job.seed), job.method.loss]
        about += ["fresh views"] if job.method.fresh_views else []
        return hashlib.sha256(" ".join(about).strip().encode()).hexdigest()

    def train(self, job: Job) -> Result:
        """Trains the student of a job, scores it on validation rows and writes both down."""
        run = self.run(method_recipe(self.recipe, job.method, job.seed), job.run_folder)
        recipe = run.recipe
        searches = recipe.auto.mode != "off"
        hears = uses_teachers(recipe) or recipe.chain.warm_start or searches
        teachers = self.heard(job, recipe) if hears else []
        result = Result(
            job.method.name,
            job.seed,
            self.fingerprint(job),
            status="running",
            overrides=list(job.method.overrides),
            teachers=[teacher.name for teacher in teachers],
            taught_by=self.teacher_key(job.seed),
            started=now(),
            commit=code_commit(),
            hardware=environment()[1],
            threads=torch.get_num_threads(),
        )
        result.save(job.result_file)
        job.run_folder.mkdir(exist_ok=True)
        build = student_builder(recipe, self.parts)
        if searches:
            if (job.run_folder / RECORD_FILE).is_file():  # chosen before an interruption
                run.record.auto = RunRecord.load(job.run_folder / RECORD_FILE).auto
            measured = RunRecord.load(self.folder / self.teacher_key(job.seed) / RECORD_FILE).teachers
            run.record.teachers = [one for one in measured if one.name in result.teachers]  # as a run knows them
        # As in a run: what was chosen has to prove itself against direct training, which is trained for that.
        proves = searches and recipe.distillation.direct and recipe.distillation.keep == "better"
        direct, asked = job.run_folder / "direct" if proves else None, recipe
        recipe = run.recipe = configure(run, self.parts, teachers, build, job.student, direct)
        chain = build_chain(run, self.parts, teachers, build)
        guides = chain.guides if uses_teachers(recipe) else []
        num_views = self.parts.num_views
        if job.method.fresh_views and num_views:
            if guides:
                raise ValueError(f"{job.name}: new views in every epoch go with no teacher, got {len(guides)}.")
            num_views = _FRESH
        build_warm = WarmBuild(build, chain.above, self.parts.train)
        if job.method.teachers not in CONTROLS:  # which have no layers to begin with
            require_hints(recipe, build_warm)

        def fit(build: Callable[[], Classifier], recipe: Recipe, folder: Path, teachers: Sequence[Teacher]) -> Trained:
            return train_or_load(
                job.name,
                build,
                recipe,
                student_schedule(recipe),
                folder,
                self.parts.train,
                self.parts.validation,
                num_views=num_views,
                teachers=teachers,
                guide=self.parts.guide if teachers and not job.method.loss else None,
                cache=run.memory.cache,
                distiller_class=DISTILLERS[job.method.loss],
            )

        given_up = job.run_folder / "distilled"  # for direct training, before an interruption
        student = given_up if done_file(given_up).is_file() else job.student
        plain = None if direct is None else fit(build, asked, direct, [])
        if direct is not None and is_direct(asked, recipe):
            copy_training(direct, job.student)
        trained = fit(build_warm, recipe, student, guides)
        result.seconds = trained.seconds
        if direct is not None and plain is not None and not is_direct(asked, recipe):
            result.seconds += plain.seconds
            size, proof = recipe.training.eval_batch_size, proof_needed(asked, run.record.auto)
            run.record.kept = judge_students(plain.classifier, trained.classifier, self.parts, size, proof)
            if run.record.kept.kept == "direct":
                give_way(job.student, direct, given_up)
                trained = plain
        run.keep_start(build_warm.share, build_warm.origin)
        run.keep_weights(trained, guides)
        run.memory.count(run.record)
        run.record.status = "completed"
        run.save()
        result.steps, result.curve = trained.steps, trained.curve
        result.seconds += chain_seconds(run.record.chain)
        result.seconds += search_seconds(run.record.auto)
        result.chain = run.record.chain
        result.num_params, result.weights = trained.classifier.num_params, weights_digest(job.student)
        is_trial = job.folder != self.folder  # of a tuning, which a version that diverges does not win
        result.scores["validation"] = self.score(trained.classifier, self.parts.validation, is_trial)
        result.status, result.finished = "completed", now()
        result.save(job.result_file)
        remove_training(given_up)
        return result

    def load_student(self, job: Job) -> Classifier:
        """The trained student of a finished job. Raises FileNotFoundError where its folder is gone."""
        if not job.student.is_dir():
            raise FileNotFoundError(
                f"The student of {job.name} should lie in {job.student}, but that is gone. Remove {job.result_file} to "
                "train it again."
            )
        classifier = student_builder(method_recipe(self.recipe, job.method, job.seed), self.parts)(meta=True)
        classifier.model = type(classifier.model).from_pretrained(job.student)
        return classifier

    def score(self, student: Classifier, rows: Rows, may_diverge: bool = False) -> Score:
        """The student's hits on unaugmented rows. Raises ValueError for answers that are no finite numbers, as a
        diverged student gives; with `may_diverge` these are wrong.
        """
        names, device = self.parts.class_names, PartialState().device
        model = TorchTeacher(student.model, student.feed, name="student", data_names=names, device=device)
        logits = student_logits(model, rows, self.recipe.training.eval_batch_size)
        finite = logits.isfinite().all(-1)
        if not (may_diverge or finite.all()):
            raise ValueError(
                f"A student's logits must be finite, got NaN or infinity on {int((~finite).sum())} of {len(finite)} "
                "rows: its training diverged. Lower training.learning_rate."
            )
        return Score.of((finite & (logits.argmax(-1) == rows.labels)).numpy())


def weights_digest(folder: Path) -> str | None:
    """sha256 (hex) of the weights in a model's folder; None where there are none."""
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


def search_seconds(auto: AutoRecord | None) -> float:
    """Seconds of an adaptive configuration's tries, without those that a training went on from, where that is known."""
    if auto is None:
        return 0.0
    return auto.seconds if auto.extra_seconds is None else auto.extra_seconds


def chain_seconds(chain: ChainRecord | None) -> float:
    """Seconds that a chain's stages (those left out too) and decisions took, however often the run was stopped; of a
    stage found in the memory those of its training.
    """
    if chain is None:
        return 0.0
    stages = sum(stage.seconds or 0.0 for stage in (*chain.stages, *chain.left_out))
    return stages + sum(one.seconds for one in chain.decisions)


# ---- running many ----------------------------------------------------------------------------------------------------


def run_jobs(place: Workplace, jobs: Sequence[Job], num_processes: int, say: Callable[[str], None]) -> list[str]:
    """Trains the students of all unfinished jobs and says a line for each; returns one line per job that failed.

    num_processes: 1 trains here, more in as many processes, which share this one's threads. A failed job stops no
    other. Whatever ends this process ends the others; what they had trained stays.
    """
    waiting = [job for job in jobs if not _is_completed(job)]
    for job in waiting:
        job.student.parent.mkdir(parents=True, exist_ok=True)
        Result(job.method.name, job.seed, place.fingerprint(job)).save(job.result_file)
    tell = _Teller(waiting, len(jobs), num_processes, say)
    if num_processes == 1:
        for job in waiting:
            _run_one(place, job)
            tell.news()
    elif waiting:
        with _processes(place, waiting, min(num_processes, len(waiting))) as processes:
            while any(process.is_alive() for process in processes):
                tell.news()
                time.sleep(_POLL_SECONDS)
        tell.news()
        tell.lost([process.exitcode for process in processes])
    for job in waiting:
        job.lock.unlink(missing_ok=True)
    return tell.failures


def _is_completed(job: Job) -> bool:
    result = job.result()
    return result is not None and result.status == "completed"


def _run_one(place: Workplace, job: Job) -> None:
    """One job; what goes wrong in it is written down and goes no further."""
    try:
        with old_garbage_left():
            place.train(job)
    except Exception as error:  # whatever it is, the other students are not concerned
        with open(job.log, "a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        result = job.result()
        assert result is not None
        result.status, result.error = "failed", f"{type(error).__name__}: {error}"
        result.finished = now()
        result.save(job.result_file)


def time_left(seconds: float, finished: int, left: int) -> str:
    """What remains, in words, where so many students took so many seconds; "" under two minutes."""
    minutes = round(seconds / finished * left / 60)
    if minutes < 2:
        return ""
    told = f"{minutes} min" if minutes < 100 else f"{round(minutes / 60)} h"
    return f"; about {told} for the other {left}"


class _Teller:
    """Says a line for every job that ended since the last time, and keeps those of the failed ones. num_processes: how
    many are trained at a time, so that no fewer tell how long the rest takes.
    """

    def __init__(self, waiting: Sequence[Job], total: int, num_processes: int, say: Callable[[str], None]) -> None:
        self.waiting = list(waiting)
        self.total, self.done = total, total - len(waiting)
        self.num_processes, self.trained, self.begun = num_processes, 0, time.monotonic()
        self.say = say
        self.failures: list[str] = []

    def news(self) -> None:
        ended = [
            (job, result)
            for job in self.waiting
            if (result := job.result()) and result.status in ("completed", "failed")
        ]
        over = [job for job, _ in ended]
        self.waiting = [job for job in self.waiting if job not in over]
        self.trained += sum(result.status == "completed" for _, result in ended)
        left = ""
        if ended and self.trained >= self.num_processes:
            left = time_left(time.monotonic() - self.begun, self.trained, len(self.waiting))
        for job, result in ended:
            self.done += 1
            if result.status == "failed":
                self._fail(job, str(result.error))
                continue
            accuracy = result.scores["validation"].accuracy
            told = f"[{self.done}/{self.total}] {job.name}: validation accuracy {accuracy:.2%}, {result.seconds:.1f} s"
            self.say(told + left)

    def lost(self, exit_codes: Sequence[int | None]) -> None:
        """What is still waiting when all processes have ended."""
        codes = ", ".join(str(code) for code in exit_codes)
        for job in self.waiting:
            self.done += 1
            self._fail(job, f"its process ended without a result (exit codes {codes}; -9 is often too little memory)")
        self.waiting = []

    def _fail(self, job: Job, error: str) -> None:
        line = f"{job.name}: failed, {error} (log: {job.log})"
        self.failures.append(line)
        self.say(f"[{self.done}/{self.total}] {line}")


@contextmanager
def _processes(place: Workplace, jobs: Sequence[Job], count: int) -> Iterator[list[Any]]:
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    setting = recipe_tree(place.recipe), place.folder, place.teacher_seed
    # Not daemonic: the data loaders of a recipe may need processes of their own. `end_when` sees to the end instead.
    processes = [context.Process(target=_work, args=(setting, list(jobs), threads)) for _ in range(count)]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the libraries when the new process loads them
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(_PATIENCE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _work(setting: tuple[dict[str, Any], Path, int | None], jobs: list[Job], threads: int) -> None:
    """A process: takes each job that no other has taken, once, until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the first process ends the others
    parent: Any = multiprocessing.parent_process()
    end_when(lambda: not parent.is_alive())
    torch.set_num_threads(threads)
    PartialState(cpu=not torch.accelerator.is_available())
    disable_progress_bar()
    tree, folder, teacher_seed = setting
    with Workplace(read_recipe(tree, "the recipe"), folder, teacher_seed).remembering() as place:
        for job in jobs:
            try:
                with FileLock(job.lock, timeout=0):
                    result = job.result()
                    if result is not None and result.status == "waiting":
                        with output_to(job.log):
                            _run_one(place, job)
            except Timeout:  # another process is at it
                continue
