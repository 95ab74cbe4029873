"""What a run does with the optimization memory: opens it, finds its teacher outputs there, and adds itself at the end.

A memory that cannot be used is told and left alone: no run ends because of it, and none is lost.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from hf_hpmkd.components.optimization_memory import OptimizationMemory, default_outputs_root
from hf_hpmkd.hub_client import HubPushError
from hf_hpmkd.memory_hub import HubMemory, is_hub_place
from hf_hpmkd.memory_records import memory_row
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.run_record import RunRecord
from hf_hpmkd.teacher_cache import TeacherCache, readable_bytes

Say = Callable[[str], None]


def outputs_folder(recipe: Recipe) -> Path:
    """Where the teacher outputs of a recipe lie: as it says, else as the environment says, else in its memory; without
    a memory in the run's own folder."""
    memory, chosen = recipe.memory, recipe.distillation.cache_dir or os.environ.get("HPMKD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if not memory.use:
        return Path(recipe.output.dir).expanduser() / "teacher_outputs"
    if memory.path is None or is_hub_place(memory.path):
        return default_outputs_root()
    return Path(memory.path).expanduser() / "teacher_outputs"


def open_memory(recipe: Recipe, say: Say | None = None) -> OptimizationMemory:
    """The memory that a recipe names, local or shared. Nothing is read or written yet."""
    settings = recipe.memory
    limit = None if settings.limit_gb is None else int(settings.limit_gb * 1e9)
    outputs = outputs_folder(recipe)
    if settings.path is not None and is_hub_place(settings.path):
        return HubMemory(
            settings.path,
            limit_bytes=limit,
            outputs_root=outputs,
            on_message=say,
            share_models=settings.share_models,
            share_outputs=settings.share_outputs,
            private=settings.private,
        )
    return OptimizationMemory(settings.path, limit, outputs, on_message=say)


class RunMemory:
    """One run's view of the memory. store: find_model, keep_model and the rest; None for a run without memory.
    cache: the teacher outputs. recipe: the run's, with the folder of the teacher outputs filled in.
    """

    def __init__(self, recipe: Recipe, store: OptimizationMemory | None, is_main: bool, say: Say) -> None:
        folder = outputs_folder(recipe)
        self.recipe = replace(recipe, distillation=replace(recipe.distillation, cache_dir=str(folder)))
        self.store, self.is_main, self.say = store, is_main, say
        self.cache = TeacherCache(folder, source=store)
        # Several runs may share a store; each counts what it finds itself.
        self._before = (0, 0, 0.0)
        if store is not None:
            self._before = (store.models_found, store.models_computed, store.model_seconds)

    def before(self) -> None:
        """Brings what others have added, and says what is known."""
        if self.store is None or not self.is_main:
            return
        if isinstance(self.store, HubMemory) and (news := self.store.refresh()):
            self.say(f"Memory: {news} new records from {self.store.where}.")
        rows, faults = self.store.records()
        for fault in faults:
            self.say(f"Memory: {fault}; skipped.")
        self.say(f"Memory ({self.store.where}): {len(rows)} runs are known.")

    def count(self, record: RunRecord) -> None:
        """Writes into the record what the run found in the memory, and says so."""
        if self.store is None:
            return
        tally, (found, computed, seconds) = self.cache.tally, self._before
        training_seconds = self.store.model_seconds - seconds
        record.memory = {
            "where": self.store.where,
            "outputs_found": tally.found,
            "outputs_computed": tally.computed,
            "models_found": self.store.models_found - found,
            "models_computed": self.store.models_computed - computed,
            "bytes_saved": tally.found_bytes,
            "seconds_saved": round(tally.found_seconds + training_seconds, 3),
            "model_seconds_saved": round(training_seconds, 3),
        }
        self.say(found_line(record))

    def after(self, record: RunRecord, student: Path) -> None:
        """Adds a completed run that is not in the memory yet: its record, its student, and both to the shared one."""
        if self.store is None or not self.is_main or not record.memory:
            return
        try:
            row = memory_row(record)
            alike = (row["recipe_fingerprint"], row["finished"])  # an earlier version may have remembered it otherwise
            known = [one for one in self.store.records()[0] if (one["recipe_fingerprint"], one["finished"]) == alike]
            row = known[0] if known else row
            new = self.store.add_record(row)
            self.store.keep_model(row["id"], student)
            freed = self.store.evict(self.store.limit_bytes)
            if new:
                self.say(f"Remembered as {row['id'][:12]} in {self.store.root}.")
            if freed.names:
                self.say(f"Memory: {len(freed.names)} least recently used files went, {readable_bytes(freed.nbytes)}.")
            if freed.over:
                self.say(f"Memory: {readable_bytes(freed.over)} above its limit, all in use by running jobs.")
            if isinstance(self.store, HubMemory):
                self.store.share(row, sorted(self.cache.tally.names))
                self.say(f"Added to {self.store.where}.")
        except HubPushError as error:
            self.say(f"Warning: {error}")
        except (OSError, ValueError) as error:
            self.say(f"Warning: the run is finished, but could not be remembered: {error}")


def found_line(record: RunRecord) -> str:
    """What a run found in its memory, in one line."""
    memory = record.memory
    asked = memory["outputs_found"] + memory["outputs_computed"]
    parts = [f"{memory['outputs_found']} of {asked} files of teacher outputs were there"]
    training = memory.get("model_seconds_saved", 0.0)
    if memory["outputs_found"]:
        seconds = memory["seconds_saved"] - training
        parts.append(f"{readable_bytes(memory['bytes_saved'])} and {seconds:.1f} s of computing them spared")
    models = memory["models_found"] + memory["models_computed"]
    if models:
        parts.append(f"{memory['models_found']} of {models} models were there")
    if training:
        parts.append(f"{training:.1f} s of training them spared")
    return f"Memory: {'; '.join(parts)}."


@contextmanager
def run_memory(recipe: Recipe, is_main: bool) -> Iterator[RunMemory]:
    """The memory for the length of a run; within the block nothing that the run uses is evicted."""

    def say(text: str) -> None:
        if is_main:
            print(text, flush=True)

    if not recipe.memory.use:
        yield RunMemory(recipe, None, is_main, say)
        return
    with ExitStack() as stack:
        memory = open_memory(recipe, say)
        try:
            store: OptimizationMemory | None = stack.enter_context(memory.running())
        except OSError as error:
            say(f"Warning: the memory in {memory.root} cannot be used: {error}. The run goes on without one.")
            recipe, store = replace(recipe, memory=replace(recipe.memory, use=False)), None
        yield RunMemory(recipe, store, is_main, say)
