"""Weighs several teachers per sample (HPM-KD, component AWMT). Knows nothing of temperature, data or training loops.

Pure functions first (`label_weights`, `fit_calibration`, `teacher_statistics`), then the gate network, then
`AttentionEnsemble`, which remembers calibration, gate, optimizer and random state and can be saved and resumed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn

from hf_hpmkd.losses import entropy, mixture_nll

GATE_OBJECTIVES = ("mixture", "joint", "label", "uniform")
TRAINED_OBJECTIVES = ("mixture", "joint")

_CALIBRATION_RANGE = (0.25, 100.0)
# One standard deviation of log τ before any row is seen. Without it a teacher that answers a dozen rows right looks as
# if it could not be too sure. Of none, 1, 0.5 and 0.25 the best on validation rows of 33 tables.
_LOG_TAU_SPREAD = 0.5
_EMBEDDING_SIZE = 16
_NUM_STATISTICS = 3


def fit_calibration(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The scalar τ under which `logits / τ` are the likeliest (Guo et al., ICML 2017, section 4.2), of few rows nearer
    to 1: the mode of its posterior, with a normal prior on log τ.

    logits: `(rows, classes)` of one teacher on rows it has not seen. labels: `(rows,)`. The result lies in
    [0.25, 100]; above 1 the teacher was over-confident. A teacher that tells the classes of a row nothing apart is
    left as it is, 1.
    """
    logits = logits.double()

    def loss(log_tau: float) -> float:
        nll = F.cross_entropy(logits / torch.tensor(log_tau).exp(), labels, reduction="sum").item()
        return nll + 0.5 * (log_tau / _LOG_TAU_SPREAD) ** 2

    low, high = (torch.tensor(end).log().item() for end in _CALIBRATION_RANGE)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    best = min((found.x, low, high), key=loss)
    return float(torch.tensor(best).exp())


def label_weights(teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Closed-form weights from each teacher's loss on the label (CA-MKD, Zhang et al., ICASSP 2022, eq. 3).

    `a_m = (1 - softmax_m(CE_m)) / (M - 1)`. teacher_logits `(teachers, batch, classes)`, labels `(batch,)`.
    Returns `(batch, teachers)`, rows sum to 1; a single teacher gets 1.
    """
    num_teachers, batch, _ = teacher_logits.shape
    if num_teachers == 1:
        return teacher_logits.new_ones(batch, 1)
    losses = F.cross_entropy(teacher_logits.flatten(0, 1), labels.repeat(num_teachers), reduction="none").view(
        num_teachers, batch
    )
    return ((1.0 - F.softmax(losses, dim=0)) / (num_teachers - 1)).transpose(0, 1)


def uniform_weights(teacher_logits: torch.Tensor) -> torch.Tensor:
    """Equal weights `(batch, teachers)` for logits `(teachers, batch, classes)`."""
    num_teachers, batch, _ = teacher_logits.shape
    return teacher_logits.new_full((batch, num_teachers), 1.0 / num_teachers)


def teacher_statistics(teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each teacher's output says of itself. teacher_logits: `(teachers, batch, classes)`, calibrated.

    Returns probabilities `(batch, teachers, classes)` and statistics `(batch, teachers, 3)`: confidence (largest
    probability), entropy over log(classes), both in [0, 1], and disagreement, KL from the mean of the teachers (nats).
    """
    probabilities = F.softmax(teacher_logits, dim=-1).transpose(0, 1)
    mean = probabilities.mean(dim=1, keepdim=True).clamp_min(1e-12)
    own_entropy = entropy(probabilities)
    disagreement = -(probabilities * mean.log()).sum(-1) - own_entropy
    scale = torch.tensor(float(probabilities.shape[-1])).log()
    return probabilities, torch.stack([probabilities.amax(-1), own_entropy / scale, disagreement], dim=-1)


class AttentionGate(nn.Module):
    """Scores every teacher for every sample; softmax over the teachers gives the weights (HPM-KD, AWMT).

    The score of teacher m is `MLP([features(x); statistics_m(x); t_m]) + c_m · p_m(x)`: the paper's two-layer network
    over student features and a learned embedding t_m, plus the teacher's own statistics and a learned trust c_m in
    what the teacher says, class by class, which is what tells specialists apart. Embeddings, trust and the last layer
    start at zero, so training starts from equal weights, and teachers that give identical outputs keep equal weights.
    """

    def __init__(
        self, num_teachers: int, num_classes: int, feature_size: int, hidden_size: int = 128, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.feature_layer = nn.Linear(feature_size, hidden_size)
        self.statistics_layer = nn.Linear(_NUM_STATISTICS, hidden_size, bias=False)
        self.embedding_layer = nn.Linear(_EMBEDDING_SIZE, hidden_size, bias=False)
        self.hidden_layer = nn.Linear(hidden_size, hidden_size)
        self.score_layer = nn.Linear(hidden_size, 1, bias=False)
        self.embeddings = nn.Parameter(torch.zeros(num_teachers, _EMBEDDING_SIZE))
        self.class_trust = nn.Parameter(torch.zeros(num_teachers, num_classes))
        nn.init.zeros_(self.score_layer.weight)

    def forward(
        self, features: torch.Tensor, teacher_logits: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Weights `(batch, teachers)` from features `(batch, feature_size)`, logits `(teachers, batch, classes)`.

        Dropout is applied only where a generator is given, and draws from it alone.
        """
        probabilities, statistics = teacher_statistics(teacher_logits)
        features = F.layer_norm(features.float(), features.shape[-1:])
        hidden = F.relu(
            self.feature_layer(features).unsqueeze(1)
            + self.statistics_layer(statistics)
            + self.embedding_layer(self.embeddings)
        )
        hidden = F.relu(self.hidden_layer(self._drop(hidden, generator)))
        scores = self.score_layer(self._drop(hidden, generator)).squeeze(-1)
        scores = scores + (probabilities * self.class_trust).sum(-1)
        return F.softmax(scores, dim=-1)

    def _drop(self, hidden: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if generator is None or self.dropout == 0:
            return hidden
        # One mask for all teachers of a sample: a mask each would tell identical teachers apart.
        keep = torch.rand(hidden.shape[0], 1, hidden.shape[-1], generator=generator) >= self.dropout
        return hidden * keep.to(hidden.device) / (1.0 - self.dropout)


class AttentionEnsemble:
    """The teachers' calibration and weights, with their training state.

    Objectives of the gate: `mixture` minimises the mixture's loss on labelled guide rows minus `entropy_weight` times
    the mean entropy of the weights; `joint` (the paper's) follows the student's own loss through `weights`; `label`
    (CA-MKD) and `uniform` have no parameters. The paper trains jointly, which pays the gate for the teacher that is
    easiest to imitate; `mixture` is our departure from it.

    num_teachers, num_classes, feature_size: positive. entropy_weight: β >= 0, 0 lets the gate collapse onto one
    teacher. Raises ValueError on an unknown objective.
    """

    def __init__(
        self,
        objective: str,
        num_teachers: int,
        num_classes: int,
        feature_size: int,
        *,
        entropy_weight: float = 0.01,
        hidden_size: int = 128,
        dropout: float = 0.2,
        learning_rate: float = 3e-3,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if objective not in GATE_OBJECTIVES:
            raise ValueError(f"The gate objective must be one of {', '.join(GATE_OBJECTIVES)}, got {objective!r}.")
        self.objective = objective
        self.entropy_weight = entropy_weight
        self.calibration = torch.ones(num_teachers, device=device)
        self.sharpness = torch.ones((), device=device)
        self.generator = torch.Generator().manual_seed(seed)
        self.gate: AttentionGate | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if objective in TRAINED_OBJECTIVES and num_teachers > 1:
            with torch.random.fork_rng(devices=[]):  # initial weights depend on `seed`, not on the caller's state
                torch.default_generator.manual_seed(seed)
                self.gate = AttentionGate(num_teachers, num_classes, feature_size, hidden_size, dropout).to(device)
            self.optimizer = _gate_optimizer(self.gate, learning_rate)

    @property
    def is_trained_on_guide(self) -> bool:
        return self.gate is not None and self.objective == "mixture"

    def calibrate(self, guide_logits: torch.Tensor, guide_labels: torch.Tensor) -> None:
        """Sets one calibration temperature τ per teacher from guide rows, and the sharpness of what they teach.

        guide_logits: `(teachers, rows, classes)`. Sharpness is max(1, τ of the teacher that is likeliest once honest).
        """
        logits, labels = guide_logits.cpu(), guide_labels.cpu()
        fitted = torch.tensor([fit_calibration(of_teacher, labels) for of_teacher in logits])
        honest = torch.stack([F.cross_entropy(z / tau, labels) for z, tau in zip(logits, fitted, strict=True)])
        self.calibration = fitted.to(self.calibration.device)
        self.sharpness = fitted[honest.argmin()].clamp(min=1.0).to(self.calibration.device)

    def calibrated(self, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Honest logits `z_m / τ_m`, for the gate to judge; shape kept: `(teachers, batch, classes)`."""
        return teacher_logits / self.calibration.view(-1, 1, 1)

    def taught(self, calibrated: torch.Tensor) -> torch.Tensor:
        """What the student is taught of calibrated logits: all teachers at the best one's own scale.

        Honest logits are softer than those of an over-confident teacher, and students learned less from them. So the
        scale of an over-confident best teacher is kept (alone, it teaches as in plain KD), that of others follows.
        """
        return calibrated * self.sharpness

    def weights(self, features: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Weights `(batch, teachers)` for calibrated logits `(teachers, batch, classes)`; rows sum to 1.

        Only under `joint` do they carry a gradient, to the gate and not to the student: `features` are detached.
        """
        if self.objective == "label":
            return label_weights(teacher_logits, labels)
        if self.gate is None:
            return uniform_weights(teacher_logits)
        if self.objective == "joint" and torch.is_grad_enabled():
            return self.gate(features.detach(), teacher_logits, self.generator)
        with torch.no_grad():
            return self.gate(features.detach(), teacher_logits)

    def guide_step(
        self,
        features: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        reduce_gradients: Callable[[nn.Module], None] = lambda module: None,
    ) -> torch.Tensor:
        """One update of the `mixture` gate on a batch of guide rows; returns the mixture's loss before it (scalar)."""
        assert self.gate is not None and self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        weights = self.gate(features.detach(), teacher_logits, self.generator)
        loss = mixture_nll(teacher_logits, weights, labels).mean()
        (loss - self.entropy_weight * entropy(weights).mean()).backward()
        reduce_gradients(self.gate)
        self.optimizer.step()
        return loss.detach()

    def joint_step(self, reduce_gradients: Callable[[nn.Module], None] = lambda module: None) -> None:
        """One update of the `joint` gate from the gradients that the student's loss left in it."""
        if self.gate is None or self.optimizer is None or self.objective != "joint":
            return
        reduce_gradients(self.gate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def warm_up(
        self, features: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, steps: int, batch_size: int
    ) -> None:
        """Fits the `mixture` gate on guide rows before the student's first step, so that a bad teacher never counts.

        features `(rows, feature_size)`, teacher_logits `(teachers, rows, classes)` calibrated, labels `(rows,)`.
        """
        for _ in range(steps):
            chosen = torch.randint(len(labels), (batch_size,), generator=self.generator).to(labels.device)
            self.guide_step(features[chosen], teacher_logits[:, chosen], labels[chosen])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that a bitwise resume needs, as flat tensors (safetensors-ready)."""
        state = {"calibration": self.calibration, "sharpness": self.sharpness, "generator": self.generator.get_state()}
        if self.gate is not None and self.optimizer is not None:
            state |= {f"gate.{name}": tensor for name, tensor in self.gate.state_dict().items()}
            state |= flatten_optimizer(self.optimizer)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError if the state belongs to another number of teachers or another objective."""
        if state["calibration"].shape != self.calibration.shape:
            raise ValueError(
                f"The saved ensemble has {len(state['calibration'])} teachers, this run has {len(self.calibration)}. "
                "Resume with the teachers of the interrupted run, or start a new output folder."
            )
        saved_gate = {name.removeprefix("gate."): t for name, t in state.items() if name.startswith("gate.")}
        if bool(saved_gate) != (self.gate is not None):
            raise ValueError(
                f"The checkpoint was saved {'with' if saved_gate else 'without'} a trained gate, this run has "
                f"`gate={self.objective}`. Resume with the settings of the interrupted run."
            )
        self.calibration = state["calibration"].to(self.calibration.device)
        self.sharpness = state["sharpness"].to(self.calibration.device)
        self.generator.set_state(state["generator"].cpu())
        if self.gate is not None and self.optimizer is not None:
            self.gate.load_state_dict(saved_gate)
            unflatten_optimizer(self.optimizer, state)


def _gate_optimizer(gate: AttentionGate, learning_rate: float) -> torch.optim.Optimizer:
    trust = [gate.class_trust]
    others = [parameter for parameter in gate.parameters() if parameter is not gate.class_trust]
    # Trust enters the scores directly, in the scores' own units, and has to cross several of them.
    groups: list[dict[str, Any]] = [{"params": others}, {"params": trust, "lr": 10 * learning_rate}]
    # A large eps: between identical teachers the gradient is rounding error, which Adam must not blow up into a step.
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.01, eps=1e-6)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's per-parameter tensors as `optimizer.<index>.<name>`; its hyper-parameters are the caller's."""
    per_parameter = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, values in per_parameter.items()
        for name, value in values.items()
    }


def unflatten_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """The inverse of `flatten_optimizer`; other keys of `state` are ignored."""
    per_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            per_parameter.setdefault(int(index), {})[name] = value
    full = optimizer.state_dict()
    optimizer.load_state_dict({"state": per_parameter, "param_groups": full["param_groups"]})
