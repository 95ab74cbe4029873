"""What a training that is stopped early has learned, told by the mean of its weights rather than by the last ones.

While the learning rate is high, weights swing around what they learn, and two trainings that are compared on the way
differ by that swing more than by what they will come to. The mean of the weights shows now what the fall of the rate
would: a polynomial-decay average (Shamir & Zhang 2013, sec. 4), which at every step is mostly of the latest part of all
steps so far, so that nobody has to know beforehand where the training stops.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.tasks.base import Rows

_FILE = "averaged_weights.safetensors"  # in a checkpoint
_DECAY = 8.0  # the weight of a step grows with this power of its number
_NORM_ROWS, _NORM_BATCH = 1_024, 64


class StopAt(TrainerCallback):
    """Ends a training on its way, evaluated and with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_evaluate = control.should_save = control.should_training_stop = True


class AveragedWeights(TrainerCallback):
    """Keeps the average, in float32, beside a training, and in its checkpoints. checkpoint: folder of the one that is
    gone on from; where it has none, the average begins there.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        self.steps, self.average = saved_average(checkpoint) if checkpoint is not None else (0, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        share = (_DECAY + 1) / (_DECAY + self.steps)
        for name, weight in kwargs["model"].named_parameters():
            now = weight.detach().float()
            before = self.average.get(name, now).to(now.device)
            self.average[name] = torch.lerp(before, now, share)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
            average = {name: one.contiguous() for name, one in self.average.items()}
            save_file(average, file.with_suffix(".tmp"), metadata={"steps": str(self.steps)})
            file.with_suffix(".tmp").replace(file)


class AveragesAt(AveragedWeights):
    """Keeps the average as it was after each of these steps: step -> average, in `found`."""

    def __init__(self, steps: Collection[int]) -> None:
        super().__init__()
        self.at = set(steps)
        self.found: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step in self.at:
            self.found[state.global_step] = dict(self.average)


def saved_average(checkpoint: str) -> tuple[int, dict[str, Tensor]]:
    """How many steps the average in a checkpoint is of, and the average by name of the parameter; 0 and {} where there
    is none.
    """
    file = Path(checkpoint) / _FILE
    if not file.is_file():
        return 0, {}
    with safe_open(file, "pt") as saved:
        return int(saved.metadata()["steps"]), {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118


def put_average(classifier: Classifier, average: Mapping[str, Tensor], rows: Rows) -> None:
    """Gives a classifier these weights. Batch normalisation then takes its statistics anew, from some of the rows that
    it learns from, because those that it has are of other weights. {} changes nothing.
    """
    model = classifier.model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in average:
                weight.copy_(average[name])
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    norms = [one for one in norms if one.track_running_stats]
    if not average or not norms or len(rows) < 2:
        return
    momenta, training = [one.momentum for one in norms], model.training
    some = torch.linspace(0, len(rows) - 1, min(len(rows), _NORM_ROWS)).long()
    count = max(1, len(some) // _NORM_BATCH)
    weight = next(model.parameters())
    model.eval()
    try:
        for one in norms:
            one.reset_running_stats()
            one.momentum = None  # the plain mean over batches
            one.train()
        with torch.no_grad():
            for first in range(count):  # each from everywhere, as rows may be sorted by class
                inputs = classifier.feed(rows.raw(some[first::count]))
                model(**{name: _moved(value, weight) for name, value in inputs.items()})
    finally:
        model.train(training)
        for one, momentum in zip(norms, momenta, strict=True):
            one.momentum = momentum


def _moved(value: Tensor, weight: Tensor) -> Tensor:
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)
