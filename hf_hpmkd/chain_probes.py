"""Short trainings that tell what a stage of the chain brings to the student, for `progressive_chain` to judge."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from accelerate import PartialState

from hf_hpmkd.chain_stages import Stages, WarmBuild, clear_training
from hf_hpmkd.classifier_training import Schedule, stage_schedule, student_schedule, total_steps
from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.components.progressive_chain import (
    estimate_gain,
    from_bits,
    is_confirmed,
    is_promising,
    required_gain,
    to_bits,
)
from hf_hpmkd.intermediate_models import Intermediate
from hf_hpmkd.model_cost import training_flops
from hf_hpmkd.run_record import ChainDecision
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.training_folder import write_json


class StudentBuilder(Protocol):
    """Makes the student with its initial weights, or on the meta device. seed: None takes the recipe's."""

    def __call__(self, *, meta: bool = False, seed: int | None = None) -> Classifier: ...


class Probes:
    """Judges candidates for the next stage of a run. Everything trained lies in `folder` until the chain is decided."""

    def __init__(self, stages: Stages, build_student: StudentBuilder) -> None:
        self.stages, self.build_student = stages, build_student
        self.config, self.folder = stages.run.recipe.chain, stages.folder / "probes"
        self.student_flops = training_flops(build_student(meta=True), stages.parts.train)
        self.counted: set[str] = set()  # students whose seconds are in a decision

    def before(self, candidate: Intermediate) -> ChainDecision:
        """Judged by a stage that is itself trained for a short time only."""
        stages = self.stages
        name = f"probe-{len(stages.finished) + 1}"
        build, schedule = stages.builder(candidate), self._short(stage_schedule(stages.run.recipe))
        trained = stages.fit(f"a stage's {name}", build, schedule, self.folder / name, stages.finished, evaluations=1)
        stage = stages.as_teacher(name, trained.classifier, candidate.name)
        return self._judge("probe", candidate, stage, is_promising, trained.seconds)

    def after(self, candidate: Intermediate, stage: TorchTeacher) -> ChainDecision:
        """Judged by the finished stage."""
        return self._judge("measured", candidate, stage, is_confirmed, 0.0)

    def _judge(
        self,
        moment: str,
        candidate: Intermediate,
        stage: TorchTeacher,
        accepts: Callable[..., bool],
        seconds: float,
    ) -> ChainDecision:
        finished = self.stages.finished
        with_stage, seconds_with = self._students([*finished, stage])
        without, seconds_without = self._students(finished)
        gain = estimate_gain(with_stage, without)
        cost = self._cost(candidate)
        required = required_gain(self.config.min_gain, cost)
        return ChainDecision(
            moment,
            candidate.name,
            candidate.num_params,
            gain.gain,
            gain.standard_error,
            required,
            cost,
            accepts(gain, required),
            seconds + seconds_with + seconds_without,
        )

    def _cost(self, candidate: Intermediate) -> float:
        """A stage's training in student trainings, by operations: seconds would make the decision depend on luck."""
        recipe, rows = self.stages.run.recipe, self.stages.parts.train
        flops = training_flops(self.stages.blueprint(candidate), rows)
        steps, student_steps = (
            total_steps(recipe, one, len(rows)) for one in (stage_schedule(recipe), student_schedule(recipe))
        )
        return flops * steps / (self.student_flops * student_steps)

    def _students(self, above: Sequence[TorchTeacher]) -> tuple[torch.Tensor, float]:
        """Which validation rows short-trained students below these stages answer right, bool `(seeds, rows)`, and the
        seconds of their training that are in no earlier decision.
        """
        answers, seconds = [], 0.0
        for extra in range(self.config.probe_seeds):
            name = f"below-{above[-1].name if above else 'teachers'}-{extra}"
            right, took = self._student(name, extra, above)
            answers.append(right)
            seconds += 0.0 if name in self.counted else took
            self.counted.add(name)
        return torch.stack(answers), seconds

    def _student(self, name: str, extra: int, above: Sequence[TorchTeacher]) -> tuple[torch.Tensor, float]:
        """One such student's answers, bool `(rows,)`, and its seconds; kept as they get known."""
        recipe = self.stages.run.recipe
        schedule = self._short(student_schedule(recipe))
        schedule = dataclasses.replace(schedule, seed=schedule.seed + extra)
        warm = recipe.chain.warm_start and not recipe.student.pretrained
        start = self.stages.above(above) if warm else []
        build = WarmBuild(partial(self.build_student, seed=schedule.seed), start, self.stages.parts.train)
        key = self.stages.key(build, schedule, above)
        folder = self.folder / name
        file = folder.with_suffix(".json")
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if known.get("key") != key:
            told = f"probe {name.rpartition('-')[0]}, {extra + 1} of {self.config.probe_seeds}"
            trained = self.stages.fit(told, build, schedule, folder, above, evaluations=1)
            right = to_bits(self.stages.right(trained.classifier))
            known = {"key": key, "right": right, "seconds": trained.seconds}
            PartialState().wait_for_everyone()
            if self.stages.run.is_main:
                write_json(file, known)
                clear_training(folder)
        return from_bits(known["right"]), known["seconds"]

    def _short(self, schedule: Schedule) -> Schedule:
        steps = total_steps(self.stages.run.recipe, schedule, len(self.stages.parts.train))
        return dataclasses.replace(schedule, max_steps=max(1, round(self.config.probe_share * steps)), keep="last")
