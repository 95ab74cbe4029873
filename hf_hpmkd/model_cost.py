"""What training a model costs: operations and bytes per row, counted on torch's meta device, and rough seconds here.

The counts hold no weights and are the same on every machine; the seconds are those of a convolution timed on this one.
"""

import copy
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_hpmkd.classifiers import Classifier
from hf_hpmkd.tasks.base import Rows

_BATCH = 8  # rows of the forward pass that is counted
_FORWARD_AND_BACKWARD = 3  # a backward pass costs about two forward passes
_TIMED_STEPS = 3
_SECONDS_PER_STEP = 0.004  # of the loop itself, however small the model


def training_flops(blueprint: Classifier, rows: Rows) -> int:
    """Floating point operations per row and training step, of matrix products and convolutions; a multiplication and an
    addition are two. blueprint: built with meta=True. A model whose forward pass looks at values, which meta tensors do
    not have, counts as one dense layer with all its parameters.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            blueprint.model.train()(**meta_inputs(blueprint, rows))
        forward = counter.get_total_flops() // _BATCH
    except (NotImplementedError, RuntimeError):
        forward = 0
    return _FORWARD_AND_BACKWARD * (forward or 2 * blueprint.num_params)


def estimated_seconds(flops_per_row: int, rows_per_step: int, steps: int) -> float:
    """Rough seconds of a training on this machine; models of many small layers take longer."""
    return steps * (_SECONDS_PER_STEP + flops_per_row * rows_per_step / operations_per_second())


@cache
def operations_per_second() -> float:
    """Speed of a convolution of middling size, forward and backward, on this machine's device; takes a fraction of a
    second, once.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    layer = torch.nn.Conv2d(32, 32, 3, padding=1, bias=False, device=device)
    images = torch.ones(32, 32, 32, 32, device=device, requires_grad=True)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        layer(images).sum().backward()
        assert layer.weight.grad is not None
        float(layer.weight.grad.sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    operations = _FORWARD_AND_BACKWARD * 2 * images.numel() * 32 * 9
    return operations / min(seconds)


def thread_gain(classifier: Classifier, rows: Rows, batch_size: int, threads: int, count: int) -> float:
    """Training steps per second of `count` models side by side, which share the threads, over those of one model with
    all threads, measured on this machine: above 1, several jobs at a time do more work than one after the other.

    The models share one Python process, which slows them a little where separate processes would not be.
    """
    inputs = classifier.feed(rows.raw(list(range(min(batch_size, len(rows))))))

    def seconds(model: torch.nn.Module, own_threads: int) -> float:
        torch.set_num_threads(own_threads)  # of this Python thread
        times = []
        for _ in range(_TIMED_STEPS + 1):  # the first one warms up
            started = time.perf_counter()
            model(**inputs).logits.float().logsumexp(-1).sum().backward()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    models = [copy.deepcopy(classifier.model).train() for _ in range(count)]
    together = seconds(models[0], threads)
    try:
        with ThreadPoolExecutor(count) as pool:
            side_by_side = statistics.mean(pool.map(seconds, models, [max(1, threads // count)] * count))
    finally:
        torch.set_num_threads(threads)
    return count * together / side_by_side


def activation_bytes(blueprint: Classifier, rows: Rows) -> int | None:
    """Bytes per row that a forward pass keeps for its backward pass; None where the forward pass looks at values."""
    model = blueprint.model.train()
    alive: list[torch.Tensor] = []  # keeps storages from being freed, and their addresses from being given twice
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # the C++ address; data_ptr() is 0 on the meta device
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(**meta_inputs(blueprint, rows))
    except (NotImplementedError, RuntimeError):
        return None
    for weight in (*model.parameters(), *model.buffers()):
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(kept.values()) // _BATCH


def meta_inputs(blueprint: Classifier, rows: Rows) -> dict[str, torch.Tensor]:
    """A batch of the first row on the meta device, as the model's own feed makes it."""
    inputs = {key: value.to("meta") for key, value in blueprint.feed(rows.raw([0] * _BATCH)).items()}
    inputs.pop("attention_mask", None)  # transformers looks at its values, and it weighs next to nothing
    return inputs
