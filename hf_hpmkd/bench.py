"""Measures what distillation costs in time and memory, as ratios inside one run with the two sides taking turns.

The images and the weights are random: neither changes the work that is timed. Every figure goes into a JSON record.
"""

import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.report import markdown
from hf_hpmkd.run_environment import code_commit, environment
from hf_hpmkd.tasks.base import UNAUGMENTED, FedDataset
from hf_hpmkd.tasks.images import Augmentation, ImageRows
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.trainer import HPMKDTrainer
from hf_hpmkd.training_args import HPMKDTrainingArguments

STUDENT, TEACHERS, BATCH = (
    "cifar-resnet-8",
    ("cifar-resnet-20", "cifar-resnet-32", "cifar-resnet-44", "cifar-resnet-56"),
    128,
)
_VIEWS, _GUIDE_ROWS, _ROUNDS, _WARM_STEPS = 6, 1_280, 4, 5
_CAPTURE_BATCH = 50
LIMITS = {
    "hpmkd_step_over_plain_trainer_step": 1.10,
    "trainer_step_over_handwritten_step": 1.15,
    "capture_over_bare_no_grad_loop": 1.10,
    "peak_memory_over_plain_plus_mapped_file": 1.15,
}


def bench_trainer(
    output: Path | None = None, steps: int = 200, live_steps: int = 40, rows: int = 2_560
) -> dict[str, Any]:
    """All comparisons of the trainer; prints them and writes them to `output` (JSON) where given.

    steps: optimizer steps per side, in four turns. live_steps: the same with teachers in the loop, which are slow.
    rows: training rows. Returns the record: per comparison the ratio of each turn and their median, and its limit.
    """
    if torch.cuda.is_available():
        raise ValueError("This benchmark measures the CPU, its memory included. Hide the GPU: CUDA_VISIBLE_DEVICES= ")
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), rows)
        versions, hardware = environment()
        record: dict[str, Any] = {
            "format_version": 1,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": code_commit(),
            "seed": 0,
            "versions": versions,
            "hardware": hardware,
            "threads": torch.get_num_threads(),
            "setting": f"{STUDENT}, batch {BATCH}, {len(TEACHERS)} teachers, {_VIEWS} views, {steps} steps per side",
            "comparisons": {},
        }
        plain = bench.stepper(bench.plain_trainer())
        record["comparisons"] = {
            "hpmkd_step_over_plain_trainer_step": compare(bench.stepper(bench.hpmkd_trainer("full")), plain, steps),
            "live_step_over_plain_trainer_step": compare(bench.stepper(bench.hpmkd_trainer("live")), plain, live_steps),
            "trainer_step_over_handwritten_step": compare(plain, bench.handwritten, steps),
            "capture_over_bare_no_grad_loop": compare(
                bench.capture, bench.bare_forward, rows // _CAPTURE_BATCH * _ROUNDS
            ),
            "peak_memory_over_plain_plus_mapped_file": bench.memory(),
        }
        for name, limit in LIMITS.items():
            record["comparisons"][name]["limit"] = limit
    print(bench_table(record))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def bench_table(record: dict[str, Any]) -> str:
    """A record of `bench_trainer` as a Markdown table: the median ratio, the span of the turns, the limit we set."""
    lines = []
    for name, found in record["comparisons"].items():
        turns = found.get("ratios")
        span = f"{min(turns):.2f} to {max(turns):.2f}" if turns else "-"
        limit = f"{found['limit']:.2f}" if "limit" in found else "-"
        lines.append([name.replace("_over_", " ÷ ").replace("_", " "), f"{found['ratio']:.2f}", span, limit])
    return markdown(("ratio", "median", "turns", "limit"), lines, left=1)


def compare(a: Callable[[int], float], b: Callable[[int], float], steps: int) -> dict[str, Any]:
    """Seconds of `a(n)` over those of `b(n)`, in turns a b b a ...; the median of the turns' ratios is the figure."""
    per_turn = max(steps // _ROUNDS, 1)
    a_seconds: list[float] = []
    b_seconds: list[float] = []
    for turn in range(_ROUNDS):
        order = ((a, a_seconds), (b, b_seconds))
        for side, seconds in order if turn % 2 == 0 else reversed(order):
            gc.collect()
            seconds.append(side(per_turn) / per_turn)
    ratios = [one / other for one, other in zip(a_seconds, b_seconds, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds_per_step": [statistics.median(a_seconds), statistics.median(b_seconds)],
        "steps": per_turn * _ROUNDS,
    }


class _Bench:
    """Random images, a student and four teachers of the real sizes."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder = folder
        self.rows = _random_images(num_rows, seed=0)
        self.guide = _random_images(_GUIDE_ROWS, seed=1)
        self.teachers = []
        for seed, name in enumerate(TEACHERS):
            built = build_classifier(name, self.rows, seed=seed)
            self.teachers.append(TorchTeacher(built.model, built.feed, name=name, data_names=self.rows.class_names))

    def arguments(self, **settings: Any) -> HPMKDTrainingArguments:
        return HPMKDTrainingArguments(
            str(self.folder / "run"),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=256,
            learning_rate=1e-3,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=50,
            temperature_schedule="learned",
            teacher_cache_dir=str(self.folder / "cache"),
            **settings,
        )

    def plain_trainer(self) -> Callable[[int], Trainer]:
        def make(steps: int) -> Trainer:
            built = build_classifier(STUDENT, self.rows, seed=0)
            data = self.data(built.feed) | {"data_collator": _without_row_ids}
            return Trainer(built.model, self.arguments(max_steps=steps), **data)

        return make

    def hpmkd_trainer(self, teacher_outputs: str) -> Callable[[int], Trainer]:
        def make(steps: int) -> Trainer:
            built = build_classifier(STUDENT, self.rows, seed=0)
            args = self.arguments(max_steps=steps, teacher_outputs=teacher_outputs)
            guide = FedDataset(self.guide, built.feed)
            return HPMKDTrainer(built.model, self.teachers, args, guide_dataset=guide, **self.data(built.feed))

        return make

    def data(self, feed: Any) -> dict[str, Any]:
        return {"train_dataset": FedDataset(self.rows, feed, _VIEWS), "data_collator": FedDataset.collate}

    def stepper(self, make: Callable[[int], Trainer]) -> Callable[[int], float]:
        """Seconds of `steps` training steps, capture, gate warm-up and the first steps left out."""

        def seconds(steps: int) -> float:
            clock = _Clock()
            trainer = make(steps + _WARM_STEPS)
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return clock.seconds

        return seconds

    def handwritten(self, steps: int) -> float:
        """The same steps in a plain PyTorch loop: indexing, augmentation and feed included, no framework."""
        built = build_classifier(STUDENT, self.rows, seed=0)
        model, data = built.model, FedDataset(self.rows, built.feed, _VIEWS)
        assert model is not None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        model.train()
        order = torch.randperm(len(self.rows))
        started = 0.0
        for step in range(steps + _WARM_STEPS):
            if step == _WARM_STEPS:
                started = time.perf_counter()
            first = step * BATCH % (len(order) - BATCH)
            batch = data.__getitems__(order[first : first + BATCH].tolist())
            loss = F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started

    def capture(self, batches: int) -> float:
        """Seconds to fill a new cache with one teacher's outputs on this many batches of `_CAPTURE_BATCH` rows."""
        rows = self.rows.subset(range(min(_CAPTURE_BATCH * batches, len(self.rows))))
        with tempfile.TemporaryDirectory() as empty:
            started = time.perf_counter()
            TeacherCache(Path(empty)).outputs(self.teachers[:1], rows, 0, batch_size=_CAPTURE_BATCH, progress=False)
            return time.perf_counter() - started

    def bare_forward(self, batches: int) -> float:
        """The same forward passes with nothing kept."""
        rows = self.rows.subset(range(min(_CAPTURE_BATCH * batches, len(self.rows))))
        teacher = self.teachers[0]
        started = time.perf_counter()
        with torch.no_grad():
            for part in torch.arange(len(rows)).split(_CAPTURE_BATCH):
                teacher.model(**teacher.feed(rows.raw(part, torch.full_like(part, UNAUGMENTED))))
        return time.perf_counter() - started

    def memory(self) -> dict[str, Any]:
        """Peak resident memory of training on a filled cache over that of plain training plus the mapped files."""
        TeacherCache(self.folder / "cache").outputs(self.teachers, self.rows, _VIEWS, batch_size=256, progress=False)
        mapped = sum(path.stat().st_size for path in (self.folder / "cache").rglob("*.safetensors"))
        peaks = [_peak_of_process(self.folder, len(self.rows), cached) for cached in (True, False)]
        return {
            "ratio": peaks[0] / (peaks[1] + mapped),
            "bytes": {"cached": peaks[0], "plain": peaks[1], "mapped_files": mapped},
        }


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _WARM_STEPS:
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._started


def _without_row_ids(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: batch[key] for key in ("pixel_values", "labels")}


def _random_images(count: int, seed: int) -> ImageRows:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    dataset = datasets.Dataset.from_dict({"label": labels.tolist()})
    augmentation = Augmentation("crop_flip", padding=4, size=None, seed=0)
    return ImageRows(dataset, "image", labels, [f"class {k}" for k in range(10)], augmentation, pixels)


def _peak_of_process(folder: Path, rows: int, cached: bool) -> int:
    """Peak resident bytes of a process of its own that trains 200 steps."""
    command = [sys.executable, "-m", "hf_hpmkd.bench", str(folder), str(rows), str(int(cached))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def _train_and_report_peak(folder: Path, rows: int, cached: bool) -> None:
    bench = _Bench.__new__(_Bench)
    bench.folder, bench.rows, bench.guide = folder, _random_images(rows, 0), _random_images(_GUIDE_ROWS, 1)
    if cached:
        bench.__init__(folder, rows)  # type: ignore[misc]
    bench.stepper(bench.hpmkd_trainer("full") if cached else bench.plain_trainer())(200)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    _train_and_report_peak(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
