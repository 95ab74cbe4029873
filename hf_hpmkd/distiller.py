"""What distillation adds to a training run: the loss of a batch, the updates after a step, the state to resume from.

Joins the attention ensemble, the temperature scheduler and the losses. Knows nothing of the training loop: the trainer
hands it a forward pass and tells it when an optimizer step is due.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_hpmkd.components.attention_ensemble import AttentionEnsemble, flatten_optimizer, unflatten_optimizer
from hf_hpmkd.components.temperature_scheduler import HeadBatch, TemperatureScheduler, temperature_gradient
from hf_hpmkd.heads import FeatureReader, find_classifier_head
from hf_hpmkd.losses import entropy, feature_loss, kd_loss, log_mixture
from hf_hpmkd.training_args import HPMKDTrainingArguments

GATE_WARMUP_BATCH = 256
"""Guide rows of an update of the gate before the first step."""
_STATE_FORMAT = 1


class TeacherOutputs(Protocol):
    """Where a batch's teacher logits come from: the cache, or teachers running inside the loop."""

    names: list[str]
    num_classes: int

    def lookup(self, rows: torch.Tensor, views: torch.Tensor, inputs: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Logits `(teachers, batch, classes)`, float32, in the data's class order."""
        ...


@dataclass
class GuideRows:
    """Labelled rows that no teacher has seen. `fetch` gives the student's inputs for some of them, collated."""

    fetch: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
    teacher_logits: torch.Tensor  # (teachers, rows, classes), uncalibrated
    labels: torch.Tensor  # (rows,)


@dataclass(frozen=True)
class Batch:
    """A micro-batch that the student has just answered: logits `(batch, classes)`, float32; labels `(batch,)`.

    rows, views: which rows these are, and which view of each, as `TeacherOutputs` knows them. inputs: the student's.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    views: torch.Tensor
    inputs: Mapping[str, Any]


@dataclass
class BatchLosses:
    """Per-sample losses `(batch,)`; `total` is what is trained on. weights: `(batch, teachers)`, detached."""

    total: torch.Tensor
    kd: torch.Tensor
    ce: torch.Tensor
    weights: torch.Tensor
    feature: torch.Tensor | None = None


@dataclass(frozen=True)
class _Remembered:
    """One micro-batch of a step at whose end the temperature learns."""

    head: HeadBatch
    teacher_logits: torch.Tensor
    weights: torch.Tensor


def check_guide(args: HPMKDTrainingArguments, guide: object) -> None:
    """Raises ValueError where the settings need guide rows and there are none."""
    if args.needs_guide and guide is None:
        raise ValueError(
            "gate=mixture, calibrate_teachers and temperature_schedule=learned need guide rows: labelled rows that no "
            "teacher has seen. Pass `guide_dataset=`, or set gate='label' (or 'uniform'), calibrate_teachers=False and "
            "another temperature schedule."
        )


class Distiller:
    """The distillation of one student.

    outputs: the teachers of the training rows. guide: needed where `args.needs_guide`. total_steps: optimizer steps.
    Raises ValueError where the settings need guide rows or penultimate features that are not there.
    """

    trains_more = False
    """Whether it trains modules of its own with the student's optimizer."""

    def __init__(
        self,
        args: HPMKDTrainingArguments,
        student: nn.Module,
        outputs: TeacherOutputs,
        guide: GuideRows | None,
        total_steps: int,
    ) -> None:
        self.args = args
        self.student = student
        self.outputs = outputs
        self.guide = guide
        self.step = 0
        device = next(student.parameters()).device
        check_guide(args, guide)
        self.reader: FeatureReader | None = None
        if args.needs_features:
            self.reader = FeatureReader(find_classifier_head(student, outputs.num_classes))
        self.ensemble = AttentionEnsemble(
            args.gate,
            len(outputs.names),
            outputs.num_classes,
            self.reader.width if self.reader else 1,
            entropy_weight=args.gate_entropy_weight,
            hidden_size=args.gate_hidden_size,
            dropout=args.gate_dropout,
            learning_rate=args.gate_learning_rate,
            seed=args.seed,
            device=device,
        )
        self.scheduler = TemperatureScheduler(
            args.temperature_schedule,
            args.temperature,
            args.temperature_min,
            args.temperature_max,
            total_steps,
            num_updates=total_steps // args.guide_every,
        )
        # The loss is observed on every step or never, whatever the scheduler settles on, so that ranks stay in step.
        self._observes_loss = self.scheduler.needs_loss
        self._generator = torch.Generator().manual_seed(args.seed)
        # What a subclass trains beside the student, with the student's optimizer and schedule.
        self.extras: nn.Module | None = None
        self.projections: nn.ModuleList | None = None
        self._projection_optimizer: torch.optim.Optimizer | None = None
        self._remembered: list[_Remembered] = []
        self._step_loss: torch.Tensor | None = None

    # ---- before the first step -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Calibrates the teachers and warms the gate up on the guide rows. Not for a resumed run."""
        if self.guide is None:
            return
        if self.args.calibrate_teachers:
            self.ensemble.calibrate(self.guide.teacher_logits, self.guide.labels)
        if self.ensemble.is_trained_on_guide and self.args.gate_warmup_steps:
            features, _ = self._guide_forward(torch.arange(len(self.guide.labels)))
            self.ensemble.warm_up(
                features,
                self.ensemble.calibrated(self.guide.teacher_logits),
                self.guide.labels,
                self.args.gate_warmup_steps,
                GATE_WARMUP_BATCH,
            )
        if self.ensemble.gate is not None:
            _broadcast(self.ensemble.gate)

    # ---- within a step ---------------------------------------------------------------------------------------------

    def batch_losses(self, batch: Batch) -> BatchLosses:
        """The losses of a micro-batch, per sample."""
        args, student_logits, labels = self.args, batch.logits, batch.labels
        features = self.reader.read(student_logits, batch.inputs) if self.reader else student_logits[:, :1]
        teacher_features: list[torch.Tensor] = []
        if args.feature_weight > 0:
            look = self.outputs.lookup_with_features  # type: ignore[attr-defined]
            teacher_logits, teacher_features = look(batch.rows, batch.views, batch.inputs)
        else:
            teacher_logits = self.teacher_logits(batch)
        calibrated = self.ensemble.calibrated(teacher_logits.to(student_logits.device))
        weights = self.ensemble.weights(features, calibrated, labels)
        teacher_logits = self.ensemble.taught(calibrated)
        temperature = self.scheduler.temperature
        target = log_mixture(teacher_logits, weights, temperature, standardized=args.kd_kind == "standardized_kl")
        kd = self.kd(student_logits, target, labels)
        ce = self.cross_entropy(student_logits, labels)
        total = args.alpha * kd + (1.0 - args.alpha) * ce
        if args.gate == "joint" and self.ensemble.gate is not None:
            total = total - args.gate_entropy_weight * entropy(weights)
        losses = BatchLosses(total, kd.detach(), ce.detach(), weights.detach())
        if teacher_features:
            losses.feature = self._feature_term(features, teacher_features, losses.weights)
            losses.total = total + args.feature_weight * losses.feature
        if self._learns_after_this_step:
            head = HeadBatch(features.detach(), student_logits.detach(), labels)
            self._remembered.append(_Remembered(head, teacher_logits.detach(), losses.weights))
        return losses

    def teacher_logits(self, batch: Batch) -> torch.Tensor:
        """What the teachers say of a batch, `(teachers, batch, classes)`, uncalibrated."""
        return self.outputs.lookup(batch.rows, batch.views, batch.inputs)

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The labels' term `(batch,)`, with the run's label smoothing."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.args.label_smoothing_factor)

    def kd(self, student_logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The KD term `(batch,)`. target: log-probabilities of the mixture at the temperature of this step."""
        return kd_loss(self.args.kd_kind, student_logits, target, labels, self.scheduler.temperature)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's share of the step's loss, for the schedules that look at it."""
        if self._observes_loss:
            self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()

    @property
    def temperature(self) -> float:
        """T of the coming step."""
        return self.scheduler.temperature

    @property
    def _learns_after_this_step(self) -> bool:
        return self.args.temperature_schedule == "learned" and (self.step + 1) % self.args.guide_every == 0

    def _feature_term(
        self, features: torch.Tensor, teacher_features: list[torch.Tensor], weights: torch.Tensor
    ) -> torch.Tensor:
        if self.projections is None:
            self.make_projections([part.shape[-1] for part in teacher_features])
        assert self.projections is not None
        terms = [
            feature_loss(projection(features.float()), target.float())
            for projection, target in zip(self.projections, teacher_features, strict=True)
        ]
        return (torch.stack(terms, dim=-1) * weights).sum(-1)

    def make_projections(self, widths: list[int]) -> None:
        """One linear map from the student's features to each teacher's; made when the widths are first seen."""
        assert self.reader is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.args.seed)  # torch.manual_seed would reach the GPU's too
            maps = [nn.Linear(self.reader.width, width) for width in widths]
        self.projections = nn.ModuleList(maps).to(next(self.student.parameters()).device)
        self._projection_optimizer = torch.optim.AdamW(self.projections.parameters(), lr=self.args.learning_rate)

    # ---- after a step's last backward ------------------------------------------------------------------------------

    def finish_step(self) -> torch.Tensor | None:
        """Updates gate, projections and temperature; returns the mixture's loss on guide rows where some were seen."""
        self.ensemble.joint_step(average_gradients)
        if self.projections is not None and self._projection_optimizer is not None:
            average_gradients(self.projections)
            self._projection_optimizer.step()
            self._projection_optimizer.zero_grad(set_to_none=True)
        self.step += 1
        guide_loss = self._look_at_guide() if self.step % self.args.guide_every == 0 else None
        loss = None
        if self._step_loss is not None:
            loss = float(_average(self._step_loss))
            self._step_loss = None
        self.scheduler.observe(loss)
        return guide_loss

    def _look_at_guide(self) -> torch.Tensor | None:
        learns = self.args.temperature_schedule == "learned"
        if self.guide is None or not (learns or self.ensemble.is_trained_on_guide):
            return None
        size = min(self.args.guide_batch_size, len(self.guide.labels))
        chosen = torch.randperm(len(self.guide.labels), generator=self._generator)[:size]
        features, logits = self._guide_forward(chosen)
        labels = self.guide.labels[chosen]
        guide_loss = None
        if self.ensemble.is_trained_on_guide:
            teacher_logits = self.ensemble.calibrated(self.guide.teacher_logits[:, chosen])
            guide_loss = self.ensemble.guide_step(features, teacher_logits, labels, average_gradients)
        if learns and self._remembered:
            self._learn_temperature(HeadBatch(features, logits, labels))
        return guide_loss

    def _learn_temperature(self, guide: HeadBatch) -> None:
        assert self.reader is not None
        head = HeadBatch(
            _gather(torch.cat([part.head.features for part in self._remembered])),
            _gather(torch.cat([part.head.logits for part in self._remembered])),
            _gather(torch.cat([part.head.labels for part in self._remembered])),
        )
        weights = _gather(torch.cat([part.weights for part in self._remembered]))
        teacher_logits = torch.cat([part.teacher_logits for part in self._remembered], dim=1)
        teacher_logits = _gather(teacher_logits.transpose(0, 1).contiguous()).transpose(0, 1)
        self._remembered = []
        gradient = temperature_gradient(
            head,
            lambda t: log_mixture(teacher_logits, weights, t),
            guide,
            float(self.reader.head.weight.detach().norm()),
            self.args.alpha,
            self.scheduler.temperature,
        )
        self.scheduler.learn(_average_float(gradient, head.logits.device))

    @torch.no_grad()
    def _guide_forward(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Penultimate features and logits of guide rows, in eval mode, on the unwrapped student."""
        assert self.guide is not None and self.reader is not None
        was_training = self.student.training
        self.student.eval()
        features, logits = [], []
        for part in chosen.split(GATE_WARMUP_BATCH):
            inputs = self.guide.fetch(part)
            outputs = self.student(**inputs)
            logits.append(outputs["logits"] if isinstance(outputs, dict) else outputs[0])
            features.append(self.reader.read(logits[-1], inputs).float())
        self.student.train(was_training)
        for module in self.student.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # only a backward pass does it, and the optimizer steps on the shards
        return torch.cat(features), torch.cat(logits).float()

    def class_weights(self) -> list[list[float]]:
        """Mean weight of each teacher on the guide rows of each class, `teachers x classes`; 0 for no rows."""
        if self.guide is None:
            return []
        features = torch.empty(len(self.guide.labels), 0)  # label and uniform weights need none
        if self.ensemble.gate is not None:
            features, _ = self._guide_forward(torch.arange(len(self.guide.labels)))
        logits = self.ensemble.calibrated(self.guide.teacher_logits)
        with torch.no_grad():
            weights = self.ensemble.weights(features, logits, self.guide.labels)
        of_class = F.one_hot(self.guide.labels, self.outputs.num_classes).to(weights)
        return ((weights.T @ of_class) / of_class.sum(0).clamp_min(1.0)).tolist()

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and metadata, ready for one safetensors file."""
        tensors = {f"ensemble.{name}": tensor for name, tensor in self.ensemble.state_dict().items()}
        tensors["guide_generator"] = self._generator.get_state()
        if self.projections is not None and self._projection_optimizer is not None:
            tensors |= {f"projections.{name}": tensor for name, tensor in self.projections.state_dict().items()}
            tensors |= {f"projections.{k}": v for k, v in flatten_optimizer(self._projection_optimizer).items()}
        if self.extras is not None:
            tensors |= {f"extras.{name}": tensor for name, tensor in self.extras.state_dict().items()}
        metadata = {"format": _STATE_FORMAT, "step": self.step, "temperature": self.scheduler.state_dict()}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"hpmkd": json.dumps(metadata)}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Raises ValueError if the state was saved by other settings or a newer format."""
        saved = json.loads(metadata["hpmkd"])
        if saved["format"] > _STATE_FORMAT:
            raise ValueError(
                f"The checkpoint's distillation state has format {saved['format']}, this version reads up to "
                f"{_STATE_FORMAT}. Update hf_hpmkd, or start a new output folder."
            )
        self.ensemble.load_state_dict(_without_prefix(tensors, "ensemble."))
        self._generator.set_state(tensors["guide_generator"])
        self.scheduler.load_state_dict(saved["temperature"])
        self.step = saved["step"]
        if self.extras is not None:
            self.extras.load_state_dict(_without_prefix(tensors, "extras."))
        projections = _without_prefix(tensors, "projections.")
        if projections:
            weights = {name: tensor for name, tensor in projections.items() if not name.startswith("optimizer.")}
            self.make_projections([weights[f"{i}.weight"].shape[0] for i in range(len(weights) // 2)])
            assert self.projections is not None and self._projection_optimizer is not None
            self.projections.load_state_dict(weights)
            unflatten_optimizer(self._projection_optimizer, projections)

    def close(self) -> None:
        """Takes the hook off the student."""
        if self.reader is not None:
            self.reader.close()


def _without_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ---- several processes: gate, projections and temperature are the same on each ---------------------------------------


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _average(tensor: torch.Tensor) -> torch.Tensor:
    if _world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= _world_size()
    return tensor


def _average_float(value: float, device: torch.device) -> float:
    return float(_average(torch.tensor(value, dtype=torch.float64, device=device))) if _world_size() > 1 else value


def average_gradients(module: nn.Module) -> None:
    """Makes the gradients of a module that is in no DDP wrapper the same on all processes."""
    if _world_size() > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad = _average(parameter.grad)


def _broadcast(module: nn.Module) -> None:
    if _world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    if _world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
