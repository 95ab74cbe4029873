"""Decides the temperature of each step (HPM-KD, component MTS). Knows nothing of models, teachers' origin or data.

Six schedules: a constant, the paper's three formulas (cosine, loss-adaptive, convergence-based), the paper's choice
among those three from the first tenth of training (`auto`), and `learned`, which follows the gradient of a held-out
batch's loss after a virtual step. All formulas map progress to s in [0, 1] and `T = T_min + (T_max - T_min) s`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_hpmkd.losses import logit_gradient
from hf_hpmkd.vocabulary import TEMPERATURE_SCHEDULES

_PROBE_SHARE = 0.1  # of training, before `auto` decides (the paper's 10 %)
_SMOOTHING = 0.05  # share of training over which the running loss forgets
_TRAVERSE_SHARE = 0.25  # `learned` can cross its whole range in this share of its updates
_VIRTUAL_STEP = 0.1  # length of the virtual step over the norm of the head


def cosine_progress(fraction: float) -> float:
    """1 at the start (fraction 0) falling to 0 at the end (fraction 1), half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def loss_progress(running_loss: float, first_loss: float) -> float:
    """Loss-adaptive: the share of the first loss that is left, cut to [0, 1]; high loss, high temperature."""
    return min(max(running_loss / first_loss, 0.0), 1.0) if first_loss > 0 else 0.0


def convergence_progress(loss_rate: float, first_loss: float) -> float:
    """Convergence-based: `1 - exp(-|dL/dt| / L_0)`, t as a share of training.

    The paper prints `exp(-λ |dL/dt|)`, which is low while the loss moves fast, against its own prose ("high T early").
    This is what the prose says: near 1 while the loss moves, near 0 once it has converged.
    """
    return 1.0 - math.exp(-abs(loss_rate) / first_loss) if first_loss > 0 else 0.0


def choose_schedule(losses: list[float]) -> str:
    """The paper's `auto`: one of the three formulas from the losses of the first tenth of training, oldest first.

    A loss that is too noisy to steer by (more than a third of its smoothed moves go up) leaves `cosine`, which does not
    look at it; one that has fallen by more than half has mostly converged and suits `convergence`; else `loss`.
    """
    if len(losses) < 10:
        return "cosine"
    chunk = len(losses) // 10
    means = [sum(losses[i * chunk : (i + 1) * chunk]) / chunk for i in range(10)]
    rises = sum(later > earlier for earlier, later in zip(means, means[1:], strict=False)) / 9
    if rises > 1 / 3:
        return "cosine"
    return "convergence" if means[-1] < 0.5 * means[0] else "loss"


@dataclass(frozen=True)
class HeadBatch:
    """What the classifier head sees of a batch: features `(batch, width)`, student logits and labels `(batch,)`."""

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def temperature_gradient(
    train: HeadBatch,
    target_log_probs: Callable[[torch.Tensor], torch.Tensor],
    guide: HeadBatch,
    head_norm: float,
    alpha: float,
    temperature: float,
) -> float:
    """d(guide loss after a virtual step) / dT, in closed form through the classifier head.

    The distillation loss moves the head along `G(T) = mean_i r_i(T) [h_i, 1]ᵀ` with `r_i` from `logit_gradient`; after
    the step the guide logits are `z_j - s G(T)/‖G(T)‖ [h_j, 1]`. The step's length s is fixed (a tenth of `head_norm`),
    so that a temperature is liked for its direction and not for making the gradient longer.
    target_log_probs: T (a scalar tensor) -> teachers' mixture at T, `(batch, classes)`.
    """
    with torch.enable_grad():
        t = torch.tensor(float(temperature), device=train.logits.device, requires_grad=True)
        residual = logit_gradient(train.logits, target_log_probs(t), train.labels, t, alpha)
        direction = residual.transpose(0, 1) @ _with_bias(train.features)
        step = _VIRTUAL_STEP * head_norm * direction / direction.norm().clamp_min(1e-12)
        moved = guide.logits - _with_bias(guide.features) @ step.transpose(0, 1)
        (gradient,) = torch.autograd.grad(F.cross_entropy(moved, guide.labels), t)
    return float(gradient)


def _with_bias(features: torch.Tensor) -> torch.Tensor:
    return F.pad(features.float(), (0, 1), value=1.0)


class TemperatureScheduler:
    """The temperature of the next step, and the memory it takes to know it.

    schedule: one of `vocabulary.TEMPERATURE_SCHEDULES`. temperature > 0: the constant, and where `learned` starts (cut
    to its range). 0 < temperature_min < temperature_max: the range of the others; `constant` does not read them.
    total_steps: optimizer steps of the run, below 1 taken as 1. num_updates: how many times `learn` will be called.
    Raises ValueError for another schedule and temperatures outside these ranges.
    """

    def __init__(
        self,
        schedule: str,
        temperature: float,
        temperature_min: float,
        temperature_max: float,
        total_steps: int,
        num_updates: int = 1,
    ) -> None:
        if schedule not in TEMPERATURE_SCHEDULES:
            raise ValueError(f"The schedule must be one of {', '.join(TEMPERATURE_SCHEDULES)}, got {schedule!r}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}. 1 leaves logits as they are.")
        if schedule != "constant" and not 0 < temperature_min < temperature_max:
            raise ValueError(
                f"`temperature_min` must be above 0 and below `temperature_max`, got {temperature_min} and "
                f"{temperature_max}. Swap them, or use `temperature_schedule=constant` for a fixed temperature."
            )
        self.schedule = schedule
        self.chosen = schedule
        self.range = (temperature_min, temperature_max)
        self.total_steps = max(total_steps, 1)
        self.step = 0
        self._first_loss: float | None = None
        self._running_loss = 0.0
        self._loss_rate: float | None = None
        self._probe_losses: list[float] = []
        self._log_step = 0.0
        self._gradient_moments = (0.0, 0.0, 0)
        self.temperature = float(temperature)
        if schedule == "learned":
            self._log_step = math.log(temperature_max / temperature_min) / max(_TRAVERSE_SHARE * num_updates, 1.0)
            self.temperature = min(max(self.temperature, temperature_min), temperature_max)
        self._update()

    @property
    def needs_loss(self) -> bool:
        """Whether `observe` wants the loss, which costs a synchronisation per step on several processes."""
        return self.chosen in ("loss", "convergence", "auto")

    def observe(self, loss: float | None = None) -> None:
        """One optimizer step is done. loss: its mean training loss, needed where `needs_loss`."""
        self.step += 1
        if self.needs_loss:
            assert loss is not None
            self._remember(loss)
        if self.chosen == "auto" and self.step >= _PROBE_SHARE * self.total_steps:
            self.chosen = choose_schedule(self._probe_losses)
        self._update()

    def learn(self, gradient: float) -> None:
        """One move of a `learned` temperature against the guide loss's `gradient`: Adam on log T, within the range."""
        mean, square, count = self._gradient_moments
        gradient *= self.temperature  # d/d(log T)
        mean, square, count = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2, count + 1
        self._gradient_moments = (mean, square, count)
        direction = (mean / (1 - 0.9**count)) / (math.sqrt(square / (1 - 0.99**count)) + 1e-12)
        moved = self.temperature * math.exp(-self._log_step * direction)
        self.temperature = min(max(moved, self.range[0]), self.range[1])

    def state_dict(self) -> dict:
        """JSON-ready; floats survive the trip exactly."""
        return {
            "schedule": self.schedule,
            "chosen": self.chosen,
            "temperature": self.temperature,
            "step": self.step,
            "first_loss": self._first_loss,
            "running_loss": self._running_loss,
            "loss_rate": self._loss_rate,
            "probe_losses": self._probe_losses,
            "gradient_moments": list(self._gradient_moments),
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state belongs to another schedule."""
        if state["schedule"] != self.schedule:
            raise ValueError(
                f"The checkpoint was saved with `temperature_schedule={state['schedule']}`, this run has "
                f"{self.schedule}. Resume with the settings of the interrupted run."
            )
        self.chosen = state["chosen"]
        if self.schedule != "constant":  # where it does not move, what is asked for now is taken, as alpha is
            self.temperature = state["temperature"]
        self.step = state["step"]
        self._first_loss = state["first_loss"]
        self._running_loss = state["running_loss"]
        self._loss_rate = state["loss_rate"]
        self._probe_losses = list(state["probe_losses"])
        mean, square, count = state["gradient_moments"]
        self._gradient_moments = (mean, square, int(count))

    def _remember(self, loss: float) -> None:
        if self.chosen == "auto":
            self._probe_losses.append(loss)
        if self._first_loss is None:
            self._first_loss = self._running_loss = loss
            return
        # An exponential mean that forgets over `_SMOOTHING` of training. It lags behind the loss by that time, less at
        # the start, so the loss's slope is (loss - mean) / lag.
        decay = math.exp(-1.0 / max(_SMOOTHING * self.total_steps, 1.0))
        lag = _SMOOTHING * (1.0 - decay**self.step)
        rate = (loss - self._running_loss) / lag
        self._running_loss = decay * self._running_loss + (1 - decay) * loss
        # The first step has no slope behind it, so it is not averaged with one.
        self._loss_rate = rate if self._loss_rate is None else decay * self._loss_rate + (1 - decay) * rate

    def _update(self) -> None:
        formula = "cosine" if self.chosen == "auto" else self.chosen
        if formula in ("constant", "learned"):
            return
        if formula == "cosine":
            progress = cosine_progress(self.step / self.total_steps)
        elif self._first_loss is None:
            progress = 1.0
        elif formula == "loss":
            progress = loss_progress(self._running_loss, self._first_loss)
        else:
            # Until there is a slope, the loss counts as moving fast.
            progress = 1.0 if self._loss_rate is None else convergence_progress(self._loss_rate, self._first_loss)
        low, high = self.range
        self.temperature = low + (high - low) * progress
