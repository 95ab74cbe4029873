"""Tries the most promising configurations and takes one: the student's recipe, chosen.

The tries are real trainings on the learning-rate schedule of the whole run. Either they are stopped early and judged on
validation rows by the mean of their weights, and the winner goes on where its try stood; or, where students can be
stacked, all are trained at once and to their end (`stacked_tries`), and the winner begins anew. Direct training is
always among them. How many are tried, and how long, says `planned_tries`, which ones, and what to conclude,
`components.adaptive_configuration`, what to expect `expected_gain`; this module gets them the figures, and keeps them
in the run's folder `auto/`, so that an interrupted search goes on.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_hpmkd.chain_probes import StudentBuilder
from hf_hpmkd.chain_stages import Stages, WarmBuild
from hf_hpmkd.classifier_training import student_schedule, train_or_load
from hf_hpmkd.components.adaptive_configuration import (
    DIRECT,
    Choice,
    Configuration,
    Example,
    Judged,
    Leads,
    choose,
    judge,
    propose,
)
from hf_hpmkd.components.progressive_chain import estimate_gain, from_bits, to_bits
from hf_hpmkd.configuration_examples import memory_examples, read_prior
from hf_hpmkd.data import DataParts
from hf_hpmkd.evaluation import student_logits, teacher_logits
from hf_hpmkd.expected_gain import Predictor, contended, most_alike, portfolio, predictor
from hf_hpmkd.heads import find_classifier_head
from hf_hpmkd.kept_student import Proof
from hf_hpmkd.meta_features import LANDMARK, landmark_features
from hf_hpmkd.planned_tries import plan_tries
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_configuration import (
    configuration_of,
    free_fields,
    overrides_of,
    possible_configurations,
    with_values,
)
from hf_hpmkd.recipe_rules import uses_teachers
from hf_hpmkd.run_context import Run
from hf_hpmkd.run_record import AutoRecord, TrialRecord
from hf_hpmkd.stacked_tries import answers_at_once
from hf_hpmkd.student_features import accuracy_at, features_before, landmark_loss
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher
from hf_hpmkd.training_folder import done_file, move_training, write_json

FOLDER = "auto"
MARGIN = 2.0
"""Standard deviations by which a try must be better than direct training, where nothing is proven later: the run does
not train directly, or keeps the distilled student anyway."""

HOPE = 0.0
"""The same for a candidate that has to prove itself at the end of its training: any that promises to be better."""

PROOF = 1.5
"""Standard errors by which its student must then be better than the directly trained one. With one, more runs lose,
some by over half a point; two give up more gain than they spare loss (on rows of the training splits of 33 tables)."""


def configure(
    run: Run,
    parts: DataParts,
    teachers: Sequence[Teacher],
    build_student: StudentBuilder,
    student: Path,
    direct: Path | None = None,
) -> Recipe:
    """The recipe that the student is trained by: the run's own where `auto.mode` is off, else the chosen one.

    Writes what was chosen, and why, into the record. student: folder that the winner's training is moved to, to go on
    there. direct: the same for direct training, where the run trains it anyway.
    """
    if run.recipe.auto.mode == "off":
        return run.recipe
    if run.record.auto is None:
        with run.phase("auto"):
            run.record.auto = _Search(run, parts, teachers, build_student, student, direct).choice()
    if run.is_main:
        shutil.rmtree(run.folder / FOLDER, ignore_errors=True)
    auto = run.record.auto
    run.say(f"Configuration: {auto.reason}. Expectations come from {auto.knowledge}.")
    return with_values(run.recipe, auto.overrides)


def is_direct(recipe: Recipe, chosen: Recipe) -> bool:
    """Whether the chosen recipe trains the student just as the run's direct training is."""
    plain = not uses_teachers(chosen) and chosen.distillation.hint_weight == 0 and not chosen.chain.warm_start
    return recipe.auto.mode != "off" and plain and chosen.training == recipe.training


def proof_needed(recipe: Recipe, auto: AutoRecord | None) -> Proof | None:
    """What the student has to show beside the directly trained one, to be kept. None where the recipe itself asks to
    distil: then it is kept unless it is surely worse. auto: how it was chosen.
    """
    if auto is None or recipe.auto.mode == "off" or "alpha" not in free_fields(recipe):
        return None
    chosen = Configuration(**auto.configuration)
    tried = [one for one in auto.trials if one.name == str(chosen)] if auto.seeds else []
    if not tried or (chosen.distils and _has_stages(recipe)):  # tries hear the teachers alone
        return Proof(PROOF)
    return Proof(PROOF, auto.seeds, tried[0].gain, tried[0].standard_error)


def _has_stages(recipe: Recipe) -> bool:
    return recipe.chain.length != 0 or bool(recipe.chain.models)


def _candidates_from(examples: Sequence[Example]) -> str:
    """Ends a sentence on where expectations come from."""
    sets = len({next(iter(of.values())).data for of in contended(examples)})
    return f"; candidates from a portfolio learned on {sets} data sets of it" if sets else ""


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """A configuration that is tried. steps, seconds: of its training so far."""

    name: str
    configuration: Configuration
    expected: tuple[float, float] = (0.0, 0.0)
    steps: int = 0
    seconds: float = 0.0


class _Search:
    """The search of one run."""

    def __init__(
        self,
        run: Run,
        parts: DataParts,
        teachers: Sequence[Teacher],
        build_student: StudentBuilder,
        student: Path,
        direct: Path | None,
    ) -> None:
        self.run, self.recipe, self.parts, self.teachers = run, run.recipe, parts, list(teachers)
        self.build_student, self.student, self.direct_folder = build_student, student, direct
        self.folder = run.folder / FOLDER
        self.blueprint = build_student(meta=True)
        self.plan = plan_tries(self.recipe, parts, self.blueprint, direct is not None)
        self.total, self.rungs, self.seeds = self.plan.total, self.plan.rungs, self.plan.seeds
        self.direct = _Trial("direct", DIRECT)
        self.tried: list[_Trial] = []
        self.curve: list[dict[str, float]] = []

    def choice(self) -> AutoRecord:
        """Tries and chooses, and moves the trainings that go on to where they do."""
        self._begin()
        started = time.perf_counter()
        features = self._features()
        examples = self._examples()
        knowledge, leads = predictor(examples), Leads(examples)
        trials = self._candidates(features, knowledge, examples)
        judged: list[tuple[_Trial, Judged, TrialRecord]] = []
        records: list[TrialRecord] = []
        if self.seeds:
            judged = sorted(self._judge_at_once(trials, leads), key=lambda one: one[1].rank, reverse=True)
            records = [record for _, _, record in judged]
        for rung in self.rungs:
            if judged:
                judged.sort(key=lambda one: one[1].rank, reverse=True)
                trials = [trial for trial, _, _ in judged][: rung.candidates]
            judged = [(trial, *self._judge(trial, rung.step, leads)) for trial in trials]
            records += [record for _, _, record in judged]
        kept = configuration_of(self.recipe)
        fallback = DIRECT if "alpha" in free_fields(self.recipe) else kept
        proven_later = self.direct_folder is not None and self.recipe.distillation.keep == "better"
        rows = "validation and guide rows" if self.seeds else "validation rows"
        decided = choose([one for _, one, _ in judged], HOPE if proven_later else MARGIN, fallback, rows)
        everyone = [self.direct, *self.tried]
        there = [self.direct] if self.seeds else everyone  # of a stack, none goes on
        going_on = self._hand_over([one for one in there if one.configuration == decided.configuration])
        seconds = sum(trial.seconds for trial in everyone)
        return self._record(decided, features, knowledge, examples, records, going_on, seconds, started)

    def _begin(self) -> None:
        """Makes the folder. Tries of a version that stopped at other steps or judged the last weights are thrown away,
        because they cannot go on.
        """
        file, rungs = self.folder / "rungs.json", ["mean", *([rung.step, rung.candidates] for rung in self.rungs)]
        rungs += [["at once", self.plan.most, self.seeds]] if self.seeds else []
        if self.run.is_main:
            if self.folder.exists() and not (file.is_file() and json.loads(file.read_text(encoding="utf-8")) == rungs):
                shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
            write_json(file, rungs)
        PartialState().wait_for_everyone()

    def _record(
        self, decided: Choice, features: dict[str, float], knowledge: Predictor, examples: Sequence[Example],
        records: list[TrialRecord], going_on: list[_Trial], seconds: float, started: float,
    ) -> AutoRecord:  # fmt: skip
        spent = self.direct.steps + sum(trial.steps for trial in self.tried)
        spent += self.plan.at_once_steps(len(self.tried)) if self.seeds else 0
        return AutoRecord(
            reason=decided.reason,
            knowledge=knowledge.words() + _candidates_from(examples),
            alike=most_alike(features, examples),
            configuration=dataclasses.asdict(decided.configuration),
            overrides=overrides_of(decided.configuration, self.recipe),
            features={name: value for name, value in features.items() if value == value},  # without NaN
            trials=records,
            total_steps=self.total,
            budget_steps=self.plan.budget,
            extra_steps=spent - sum(trial.steps for trial in going_on),
            seconds=seconds,
            extra_seconds=seconds - sum(trial.seconds for trial in going_on),
            seeds=self.seeds,
            deciding_seconds=max(time.perf_counter() - started - seconds, 0.0),
        )

    def _features(self) -> dict[str, float]:
        """Also trains the landmark, which the run's direct training goes on from."""
        half, whole = max(1, round(0.5 * LANDMARK * self.total)), max(2, round(LANDMARK * self.total))
        for step in sorted({half, whole, *(rung.step for rung in self.rungs)}):
            self._answers(self.direct, step)
        recipe = self.recipe
        logits = teacher_logits(self.teachers, self.parts.guide, recipe, self.run.memory.cache, self.run.say)
        on_train = [one.accuracy["train"] for one in self.run.record.teachers if "train" in one.accuracy]
        train_accuracy = float(np.mean(on_train)) if on_train else None
        features = features_before(
            self.parts,
            self.build_student(),
            logits,
            self.teachers,
            train_accuracy,
            self.total,
            recipe.training.learning_rate,
            recipe.chain.warm_start and self._can_start,
        )
        accuracies = [accuracy_at(self.curve, min(step, self.total)) for step in (half, whole)]
        loss, classes = landmark_loss(self.curve, whole), len(self.parts.class_names)
        return features | landmark_features(accuracies, loss, classes, features["mixture_accuracy"])

    def _examples(self) -> list[Example]:
        """What the memory and the prior know. The main process reads; all go by the same."""
        prior = Path(self.recipe.auto.prior).expanduser() if self.recipe.auto.prior else None
        examples = read_prior(prior)
        if self.run.memory.store is not None and self.run.is_main:
            examples += memory_examples(self.run.memory.store.records()[0])
        return broadcast_object_list([examples])[0]

    def _candidates(
        self, features: dict[str, float], knowledge: Predictor, examples: Sequence[Example]
    ) -> list[_Trial]:
        """Written down when first chosen: what a memory has learned meanwhile may not turn a try into another one's."""
        file = self.folder / "candidates.json"
        if self.run.is_main and not file.is_file():
            write_json(file, self._promising(features, knowledge, examples))
        PartialState().wait_for_everyone()
        self.tried = [
            _Trial(f"candidate-{number}", Configuration(**one["configuration"]), tuple(one["expected"]))
            for number, one in enumerate(json.loads(file.read_text(encoding="utf-8")), 1)
        ]
        return self.tried

    def _promising(
        self, features: dict[str, float], knowledge: Predictor, examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        possible, place = possible_configurations(self.recipe)
        own = None if place is None else possible[place]
        found = [one for one in possible if self.plan.will_try(one) and self._can_train(one)]
        place = found.index(own) if own in found else None
        prediction = knowledge.predict(features, found)
        chosen = propose(prediction, found, self.plan.most, place, portfolio(features, examples, found))
        expected = list(zip(prediction.gain.tolist(), prediction.spread.tolist(), strict=True))
        return [{"configuration": dataclasses.asdict(found[one]), "expected": expected[one]} for one in chosen]

    def _can_train(self, one: Configuration) -> bool:
        """Whether the student has the features that a configuration reads, a teacher the weights, and the teachers'
        outputs, as they are kept, tell what its loss asks.
        """
        too_little = self.recipe.distillation.teacher_outputs == "topk" or len(self.parts.class_names) == 2
        if one.kd_kind == "standardized_kl" and too_little and "kd_kind" in free_fields(self.recipe):
            return False
        if one.warm_start:
            return self._can_start
        if not one.distils or (one.gate not in ("mixture", "joint") and one.temperature_schedule != "learned"):
            return True
        return self._has_head

    @cached_property
    def _can_start(self) -> bool:
        return WarmBuild(self.build_student, self._above(), self.parts.train).can_start

    @cached_property
    def _has_head(self) -> bool:
        try:
            find_classifier_head(self.blueprint.model, len(self.parts.class_names))
        except ValueError:
            return False
        return True

    def _judge_at_once(self, trials: Sequence[_Trial], leads: Leads) -> list[tuple[_Trial, Judged, TrialRecord]]:
        """All candidates, at the end of their training, by the rows that also prove in the end what was chosen. To keep
        some rows for the proof alone gains less (on rows set aside of 33 tables). What was measured is kept for an
        interrupted search.
        """
        file = self.folder / "at-once.json"
        if not broadcast_object_list([file.is_file()])[0]:  # one that comes late does as the others
            started = time.perf_counter()
            tried = [DIRECT, *(trial.configuration for trial in trials)]
            about = (self.parts, self.teachers, self.build_student, self._above(), tried, self.seeds)
            right = answers_at_once(self.run, *about, [self.parts.validation, self.parts.guide])
            direct, *others = torch.cat(right, dim=-1)
            gains = [estimate_gain(answers, direct) for answers in others]
            # As in `_judge`: equal answers prove nothing.
            least = 100.0 / direct.shape[-1]
            measured = [(gain.gain, max(gain.standard_error, least)) for gain in gains]
            found = {"measured": measured, "seconds": time.perf_counter() - started}
            if self.run.is_main:
                write_json(file, found)
            PartialState().wait_for_everyone()
        found = json.loads(file.read_text(encoding="utf-8"))
        judged = []
        for trial, measured in zip(trials, found["measured"], strict=True):
            trial.seconds = found["seconds"] / len(trials)
            gain, error = measured
            one = judge(trial.configuration, trial.expected, (gain, error), 1.0, leads)
            record = TrialRecord(str(trial.configuration), self.total, gain, error, trial.expected, trial.seconds)
            judged.append((trial, one, record))
        best = max(judged, key=lambda one: one[1].rank, default=None)
        if best is not None:
            gain, error = best[1].measured
            self.run.say(
                f"Tried {len(trials)} ways at once, each {self.seeds} times, to the end; the best: {best[2].name}, "
                f"{gain:+.2f} ± {error:.2f} points."
            )
        return judged

    def _judge(self, trial: _Trial, step: int, leads: Leads) -> tuple[Judged, TrialRecord]:
        answers, direct = self._answers(trial, step), self._answers(self.direct, step)
        gain = estimate_gain(answers[None], direct[None])
        # Equal answers to few rows are no proof that two students are equal: at least one row is in doubt.
        error = max(gain.standard_error, 100.0 / len(answers))
        judged = judge(trial.configuration, trial.expected, (gain.gain, error), step / self.total, leads)
        record = TrialRecord(str(trial.configuration), step, gain.gain, error, trial.expected, trial.seconds)
        self.run.say(f"Tried {record.name}: {gain.gain:+.2f} ± {error:.2f} points after {step} of {self.total} steps.")
        return judged, record

    def _answers(self, trial: _Trial, step: int) -> torch.Tensor:
        """Which validation rows the student of a trial answers right after so many steps, bool `(rows,)`; with the
        weights that `train_or_load` leaves a training that is stopped there: their mean, unless that is the end.
        """
        file = self.folder / f"{trial.name}-{step}.json"
        if not file.is_file():
            recipe = with_values(self.recipe, overrides_of(trial.configuration, self.recipe))
            teachers = self.teachers if trial.configuration.distils else []
            above = self._above() if recipe.chain.warm_start else []
            started = time.perf_counter()
            trained = train_or_load(
                f"try {trial.name}",
                WarmBuild(self.build_student, above, self.parts.train),
                recipe,
                student_schedule(recipe),
                self.folder / trial.name,
                self.parts.train,
                self.parts.validation,
                num_views=self.parts.num_views,
                teachers=teachers,
                guide=self.parts.guide if teachers else None,
                cache=self.run.memory.cache,
                stop_at=step,
            )
            judged = TorchTeacher.of("judged", trained.classifier, self.parts.train, device=self.run.device)
            logits = student_logits(judged, self.parts.validation, recipe.training.eval_batch_size)
            right = broadcast_object_list([to_bits(logits.argmax(-1) == self.parts.validation.labels)])[0]
            seconds = trial.seconds + time.perf_counter() - started
            about = {"right": right, "seconds": seconds, "curve": trained.curve}
            if self.run.is_main:
                write_json(file, about)
            PartialState().wait_for_everyone()
        about = json.loads(file.read_text(encoding="utf-8"))
        if step > trial.steps:
            trial.steps, trial.seconds = step, about["seconds"]
            if trial is self.direct:
                self.curve = about["curve"]
        return from_bits(about["right"])

    def _above(self) -> list[TorchTeacher]:
        """What the student may start from, as without a chain."""
        if self.recipe.student.pretrained:
            return []
        return Stages(self.run, self.parts, self.teachers, self.folder).above([])

    def _hand_over(self, winners: Sequence[_Trial]) -> list[_Trial]:
        """Moves what goes on: direct training, and the winner, unless a chain will teach it more. winners: it, or
        nothing if what was chosen has not been tried.
        """
        going_on: list[tuple[_Trial, Path]] = []
        if self.direct_folder is not None:
            going_on.append((self.direct, self.direct_folder))
        for winner in winners:
            taught_alike = not (winner.configuration.distils and _has_stages(self.recipe))
            if (winner is not self.direct or self.direct_folder is None) and taught_alike:
                going_on.append((winner, self.student))
        for trial, target in going_on:
            source = self.folder / trial.name
            if self.run.is_main and any(place.exists() for place in (source, done_file(source), target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                move_training(source, target)
        PartialState().wait_for_everyone()
        return [trial for trial, _ in going_on]
