"""Many small students trained at once, their weights stacked: a step of an MLP of a few hundred weights is not
arithmetic but the calls around it, and a hundred of them can share these.

Of the same model, on the same rows; each with its own start, rate, teachers' say and order of the rows. A student comes
out as if `torch.optim.AdamW` had trained it alone. Knows tensors only, no teachers and no files.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_hpmkd.losses import kd_loss
from hf_hpmkd.models.tabular import TabularForClassification

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of AdamW, where `training.optimizer_args` says nothing
_ROWS_AT_ONCE = 4096  # of all students together times their number; larger blocks leave the processor's cache


@dataclass(frozen=True)
class StackedStudent:
    """One of a stack. start: its first weights, by name. alpha, temperature, kd_kind: as in a recipe. target: which of
    the targets it hears; without a meaning where alpha is 0. learning_rate: its largest. seed: of its rows' order.
    """

    start: Mapping[str, Tensor]
    learning_rate: float
    weight_decay: float
    seed: int
    alpha: float = 0.0
    temperature: float = 1.0
    kd_kind: str = "forward_kl"
    target: int = 0

    @property
    def taught(self) -> tuple[str, float, int]:
        """What students have in common that can be taught by one call."""
        return (self.kd_kind, self.temperature, self.target) if self.alpha > 0 else ("", 0.0, 0)


def columns(model: object) -> int:
    """Numbers and codes that a model which can be stacked sees of a row."""
    if not isinstance(model, TabularForClassification):
        return 0
    return model.config.num_numeric + len(model.config.cardinalities)


def embedded(model: object) -> tuple[int, int]:
    """Category columns of a model that can be stacked, and the weights of their embeddings."""
    if not isinstance(model, TabularForClassification):
        return 0, 0
    tables = zip(model.config.cardinalities, model.config.embedding_sizes, strict=True)
    return len(model.config.cardinalities), sum(codes * size for codes, size in tables)


def can_stack(model: object) -> bool:
    """Whether a model is one that `train_stack` can train."""
    return isinstance(model, TabularForClassification) and model.config.dropout == 0


def train_stack(
    students: Sequence[StackedStudent],
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    targets: Sequence[Tensor],
    *,
    rates: Sequence[float],
    batch_size: int,
    max_grad_norm: float,
    tell: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """The students' weights after their training, by name, each `(students, ...)`.

    inputs, labels: of the training rows, as the model takes them. targets: log-probabilities `(rows, classes)` of the
    teachers' mixture, each at a temperature. rates: share of the learning rate at every step. max_grad_norm: of each
    student's gradient; 0 does not cut. tell: called after every step.
    """
    order = sorted(range(len(students)), key=lambda one: students[one].taught)
    stack = [students[one] for one in order]
    device = labels.device
    shapes = {name: weight.shape for name, weight in stack[0].start.items()}
    # A row holds all that a student knows, so that a step of the optimizer is a dozen calls, however many layers.
    rows_of_weights = [torch.cat([one.start[name].float().flatten() for name in shapes]) for one in stack]
    flat = torch.stack(rows_of_weights).to(device).requires_grad_()
    first, second = torch.zeros_like(flat), torch.zeros_like(flat)
    largest = torch.tensor([one.learning_rate for one in stack], device=device)[:, None]
    decays = torch.tensor([one.weight_decay for one in stack], device=device)[:, None]
    decayed = [torch.full((shape.numel(),), float(not name.endswith("bias"))) for name, shape in shapes.items()]
    shrinking = largest * decays * torch.cat(decayed).to(device)  # biases do not, as `Trainer` has it
    alpha = torch.tensor([one.alpha for one in stack], device=device)[:, None]
    groups = _groups(stack)
    seeds = sorted({one.seed for one in stack})
    of_student = torch.tensor([seeds.index(one.seed) for one in stack])
    drawn = _batches(seeds, len(labels), batch_size)
    for step, share in enumerate(rates):
        rows = next(drawn)[of_student].to(device)  # (students, batch)
        logits = _forward(_by_name(flat, shapes), {name: value[rows] for name, value in inputs.items()})
        known = labels[rows]
        loss = F.cross_entropy(logits.flatten(0, 1), known.flatten(), reduction="none").view(rows.shape)
        if groups:
            taught = [_kd(one, logits[part], targets[one.target][rows[part]], known[part]) for one, part in groups]
            heard = torch.cat([loss.new_zeros(len(stack) - sum(map(len, taught)), rows.shape[1]), *taught])
            loss = alpha * heard + (1 - alpha) * loss
        (gradient,) = torch.autograd.grad(loss.mean(1).sum(), flat)
        with torch.no_grad():
            if max_grad_norm:
                gradient.mul_((max_grad_norm / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
            flat.addcmul_(flat, shrinking, value=-share)
            first.lerp_(gradient, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            scale = second.sqrt().div_(math.sqrt(1 - _BETAS[1] ** (step + 1))).add_(_EPSILON)
            flat.sub_(torch.div(first, scale, out=scale).mul_(largest * (share / (1 - _BETAS[0] ** (step + 1)))))
        tell()
    back = torch.argsort(torch.tensor(order))
    return _by_name(flat.detach()[back], shapes)


def _by_name(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights `(students, ...)` in rows that hold all of a student's, `(students, weights)`."""
    parts = flat.split([shape.numel() for shape in shapes.values()], dim=1)
    return {name: part.view(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@torch.no_grad()
def stack_answers(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The class that each student of a stack says each row is, `(students, rows)`. inputs: as of `train_stack`."""
    students, rows = len(next(iter(weights.values()))), len(next(iter(inputs.values())))
    size = max(1, _ROWS_AT_ONCE // students)
    found = []
    for part in torch.arange(rows).split(size):
        everyone = {name: value[part].expand(students, *value[part].shape) for name, value in inputs.items()}
        found.append(_forward(weights, everyone).argmax(-1))
    return torch.cat(found, dim=1)


def _forward(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """`TabularForClassification.forward` of each student: logits `(students, batch, classes)` of inputs
    `(students, batch, ...)`.
    """
    categories = inputs["categorical"]
    everyone = torch.arange(len(categories), device=categories.device)[:, None]
    embedded = [weights[f"embeddings.{i}.weight"][everyone, categories[..., i]] for i in range(categories.shape[-1])]
    x = torch.cat([inputs["numeric"], *embedded], dim=-1) if embedded else inputs["numeric"]
    layer = 0
    while f"hidden.{layer}.weight" in weights:
        x = F.relu(_linear(x, weights, f"hidden.{layer}"))
        layer += 1
    return _linear(x, weights, "classifier")


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.baddbmm(weights[f"{name}.bias"][:, None], x, weights[f"{name}.weight"].transpose(1, 2))


def _kd(one: StackedStudent, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The KD term `(students, batch)` of students that are taught alike."""
    if one.kd_kind == "dist":  # it compares the rows of a batch
        several = zip(logits, target, labels, strict=True)
        return torch.stack([kd_loss(one.kd_kind, z, said, known, one.temperature) for z, said, known in several])
    flat = kd_loss(one.kd_kind, logits.flatten(0, 1), target.flatten(0, 1), labels.flatten(), one.temperature)
    return flat.view(labels.shape)


def _groups(stack: Sequence[StackedStudent]) -> list[tuple[StackedStudent, slice]]:
    """Those that are taught alike, the first of them and their places; the untaught ones, which come first, in none."""
    found, start = [], 0
    for taught, members in groupby(stack, key=lambda one: one.taught):
        alike = list(members)
        if taught[0]:
            found.append((alike[0], slice(start, start + len(alike))))
        start += len(alike)
    return found


def _batches(seeds: Sequence[int], rows: int, size: int) -> Iterator[Tensor]:
    """Positions of rows, `(seeds, batch)`, epoch after epoch in an order of each seed's own; an epoch's last batch is
    what is left.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield from torch.stack([torch.randperm(rows, generator=one) for one in generators]).split(size, dim=1)
