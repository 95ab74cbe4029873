"""The progressive chain of a run: its stages built, probed, trained, judged and kept, largest first.

How long the chain is, `components.progressive_chain` decides; this module gets it the figures. Everything that took
training lies in the run's folder `chain/`, finished stages in the memory too, so that the same command goes on where an
interrupted run stood, and no stage is trained twice.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState

from hf_hpmkd.chain_probes import Probes, StudentBuilder
from hf_hpmkd.chain_stages import Stages
from hf_hpmkd.data import DataParts
from hf_hpmkd.intermediate_models import Intermediate, build_intermediate
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_rules import uses_teachers
from hf_hpmkd.run_context import Run
from hf_hpmkd.run_record import ChainDecision, ChainRecord
from hf_hpmkd.tasks.base import Rows
from hf_hpmkd.teacher_kinds import Teacher, TorchTeacher

FOLDER = "chain"


@dataclass(frozen=True)
class Chain:
    """What stands above the student. guides: what it learns from. above: what it may start from, nearest first."""

    guides: list[Teacher]
    above: list[TorchTeacher]


def named_stages(recipe: Recipe, rows: Rows) -> list[Intermediate]:
    """The intermediate models that the recipe names, built on the meta device. Raises what `build_classifier` does for
    names that mean nothing.
    """
    sizes = [build_intermediate(name, rows, recipe.student, meta=True).num_params for name in recipe.chain.models]
    return [Intermediate(name, size, size) for name, size in zip(recipe.chain.models, sizes, strict=True)]


def build_chain(run: Run, parts: DataParts, teachers: Sequence[Teacher], build_student: StudentBuilder) -> Chain:
    """Decides on the stages, trains them into `run.folder/chain` and writes what was decided, and why, into the record.

    Raises ValueError where the recipe asks for stages and none can be built.
    """
    stages = Stages(run, parts, list(teachers), run.folder / FOLDER)
    chain = run.record.chain
    if chain is None or not chain.reason:
        chain = run.record.chain = ChainRecord()
        chain.reason = _fill(chain, stages, build_student)
        chain.stages = stages.records
        run.say(f"Chain: {chain.reason}")
        run.save()
    else:  # decided before an interruption
        for one in chain.stages:
            stages.keep(*stages.train(Intermediate(one.model, one.num_params, one.target or one.num_params)))
    PartialState().wait_for_everyone()
    if run.is_main:
        shutil.rmtree(run.folder / FOLDER / "probes", ignore_errors=True)
    starts_warm = run.recipe.chain.warm_start and not run.recipe.student.pretrained
    return Chain(stages.guides(stages.finished), stages.above(stages.finished) if starts_warm else [])


def _fill(chain: ChainRecord, stages: Stages, build_student: StudentBuilder) -> str:
    """Trains the stages; returns why there are so many."""
    recipe = stages.run.recipe
    config = recipe.chain
    if not uses_teachers(recipe):
        return "no intermediate model, because the student does not listen to teachers (distillation.alpha is 0)."
    if config.length == "auto" and not config.models:
        return _decide(chain, stages, Probes(stages, build_student))
    wanted = named_stages(recipe, stages.parts.train)
    if not wanted:
        assert config.length != "auto"
        wanted = stages.find(config.length)
    for one in wanted:
        stages.keep(*stages.train(one))
    sizes_told = " and ".join(f"{one.num_params:,}" for one in wanted)
    return f"{_counted(len(wanted))}{f' of {sizes_told} parameters' if wanted else ''}, as the recipe asks."


def _decide(chain: ChainRecord, stages: Stages, probes: Probes) -> str:
    """One stage after the other, each at the geometric middle of what stands above and the student, while it pays."""
    run, reasons = stages.run, []
    while len(stages.finished) < run.recipe.chain.max_length:
        try:
            candidate = stages.find(1)[0]
        except ValueError as error:
            reasons.append(f"no further one can be built: {str(error).rstrip('.')}")
            break
        size = f"{candidate.num_params:,} parameters"
        probe = probes.before(candidate)
        chain.decisions.append(probe)
        run.say(f"Chain: would a stage of {size} pay? {_figures(probe)}: {'yes' if probe.accepted else 'no'}.")
        run.save()
        if not probe.accepted:
            reasons.append(f"none of {size}: {_figures(probe)}")
            break
        stage, record = stages.train(candidate)
        measured = probes.after(candidate, stage)
        chain.decisions.append(measured)
        run.say(f"Chain: does the finished one? {_figures(measured)}: {'yes' if measured.accepted else 'no'}.")
        if not measured.accepted:
            stages.drop(record)
            chain.left_out.append(record)
            reasons.append(f"one of {size} was trained and left out: {_figures(measured)}")
            break
        stages.keep(stage, record)
        run.save()
        reasons.append(f"one of {size}: {_figures(probe)}, {_figures(measured)}")
    return f"{_counted(len(stages.finished))} ({'; '.join(reasons)})."


def _counted(count: int) -> str:
    return {0: "no intermediate model", 1: "one intermediate model"}.get(count, f"{count} intermediate models")


def _figures(decision: ChainDecision) -> str:
    when = "in the probe" if decision.moment == "probe" else "measured with the finished stage"
    return (
        f"{decision.gain:+.2f} ± {decision.standard_error:.2f} points {when}, {decision.required:.2f} asked for a cost "
        f"of {decision.cost:.1f} student trainings"
    )
