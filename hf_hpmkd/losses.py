"""Distillation losses as pure tensor functions. Knows nothing of models, teachers' origin or training loops.

One convention throughout: a loss is returned per sample, `(batch,)`, in nats, and carries the factor T² (Hinton et al.
2015, section 2), so that the size of its gradient does not change with the temperature. The caller reduces; only
`labels_loss`, which upstream's trainer calls, is a scalar.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from hf_hpmkd.vocabulary import KD_KINDS, LEGAL_SCHEDULES, TEMPERATURE_SCHEDULES

_SMALLEST_WEIGHT = 1e-12
_SMALLEST_PROBABILITY = 1e-12


def check_kind_and_schedule(kind: str, schedule: str) -> None:
    """Raises ValueError unless `kind` and `schedule` are known and go together (see `LEGAL_SCHEDULES`)."""
    if kind not in KD_KINDS:
        raise ValueError(f"`kd_kind` must be one of {', '.join(KD_KINDS)}, got {kind!r}.")
    if schedule not in TEMPERATURE_SCHEDULES:
        raise ValueError(f"`temperature_schedule` must be one of {', '.join(TEMPERATURE_SCHEDULES)}, got {schedule!r}.")
    if schedule not in LEGAL_SCHEDULES[kind]:
        pairs = "; ".join(f"{name}: {', '.join(legal)}" for name, legal in LEGAL_SCHEDULES.items())
        raise ValueError(
            f"`kd_kind={kind}` cannot be used with `temperature_schedule={schedule}`. Legal pairs are {pairs}."
        )


def standardize(logits: torch.Tensor) -> torch.Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes (Sun et al., CVPR 2024, eq. 9); same shape."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / (centred.std(dim=-1, keepdim=True, unbiased=False) + 1e-7)


def log_mixture(
    teacher_logits: torch.Tensor,
    weights: torch.Tensor,
    temperature: float | torch.Tensor,
    standardized: bool = False,
) -> torch.Tensor:
    """Log of the teachers' mixture at temperature T: `log sum_m a_m(x) softmax(z_m(x) / T)` (HPM-KD, AWMT).

    teacher_logits: `(teachers, batch, classes)`, unscaled (calibrated already, where that is wanted).
    weights: `(batch, teachers)`, rows sum to 1. temperature > 0. standardized: each teacher's logits are
    z-scored over the classes first. Returns log-probabilities `(batch, classes)`.
    """
    if standardized:
        teacher_logits = standardize(teacher_logits)
    log_weights = weights.clamp_min(_SMALLEST_WEIGHT).log().transpose(0, 1).unsqueeze(-1)
    return torch.logsumexp(F.log_softmax(teacher_logits / temperature, dim=-1) + log_weights, dim=0)


def kd_loss(
    kind: str,
    student_logits: torch.Tensor,
    target_log_probs: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor,
) -> torch.Tensor:
    """The distillation loss named `kind`, per sample.

    student_logits: `(batch, classes)`, unscaled. target_log_probs: `(batch, classes)`, the teachers' mixture at
    `temperature`, from `log_mixture`; for `standardized_kl` with `standardized=True`. labels: `(batch,)`, for `dkd`.
    Returns `(batch,)`. Raises ValueError on an unknown kind or differing shapes.
    """
    if student_logits.shape != target_log_probs.shape:
        raise ValueError(
            "Student logits and teacher log-probabilities must have the same shape (batch, classes), got "
            f"{tuple(student_logits.shape)} and {tuple(target_log_probs.shape)}. Align the teachers' classes first."
        )
    if kind == "forward_kl":
        return forward_kl(student_logits, target_log_probs, temperature)
    if kind == "standardized_kl":
        return forward_kl(standardize(student_logits), target_log_probs, temperature)
    if kind == "dkd":
        return decoupled_kd(student_logits, target_log_probs, labels, temperature)
    if kind == "dist":
        return dist_loss(student_logits, target_log_probs, temperature)
    if kind == "js":
        return jensen_shannon(student_logits, target_log_probs, temperature)
    raise ValueError(f"`kind` must be one of {', '.join(KD_KINDS)}, got {kind!r}.")


def forward_kl(
    student_logits: torch.Tensor, target_log_probs: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """KL(teacher ‖ student) at temperature T, times T² (Hinton et al. 2015, section 2). Returns `(batch,)` in nats."""
    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    divergence = F.kl_div(student_log_probs, target_log_probs, reduction="none", log_target=True).sum(-1)
    return divergence * temperature**2


def jensen_shannon(
    student_logits: torch.Tensor, target_log_probs: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Jensen-Shannon divergence at temperature T, times T²: the mean of KL(teacher ‖ m) and KL(student ‖ m), m being
    the mean of the two (Lin 1991, section IV, equal weights; for distilling, Wen et al., ACL 2023).

    At most T² log 2. The gradient of the KL grows with a row's error up to T per logit; this one falls to 0 again, so a
    small student gives up rows that it cannot learn, and one that begins far off learns nothing by this alone. Near the
    teacher it is a quarter of the KL, so that it takes a larger alpha. Returns `(batch,)` in nats.
    """
    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    log_mean = torch.logaddexp(student_log_probs, target_log_probs) - math.log(2.0)
    of_student = F.kl_div(log_mean, student_log_probs, reduction="none", log_target=True).sum(-1)
    of_teacher = F.kl_div(log_mean, target_log_probs, reduction="none", log_target=True).sum(-1)
    return 0.5 * (of_student + of_teacher) * temperature**2


def decoupled_kd(
    student_logits: torch.Tensor,
    target_log_probs: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7), times T². Returns `(batch,)`.

    target_weight weighs the binary divergence "the label or not", non_target_weight the divergence among the other
    classes (1 and 8 are the paper's CIFAR values). With weights 1 and `1 - p_teacher(label)` it is the forward KL.
    """
    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    index = labels.unsqueeze(-1)
    is_label = torch.zeros_like(student_log_probs, dtype=torch.bool).scatter_(-1, index, True)

    def split(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = log_probs.masked_fill(is_label, float("-inf"))
        log_other_mass = torch.logsumexp(others, dim=-1, keepdim=True)
        binary = torch.cat([log_probs.gather(-1, index), log_other_mass], dim=-1)
        return binary, (others - log_other_mass).masked_fill(is_label, 0.0)

    student_binary, student_others = split(student_log_probs)
    teacher_binary, teacher_others = split(target_log_probs)
    target_term = (teacher_binary.exp() * (teacher_binary - student_binary)).sum(-1)
    # At the label both conditional log-probabilities are set to 0, so their difference, and the term, vanish there.
    non_target_term = (teacher_others.exp() * (teacher_others - student_others)).sum(-1)
    return (target_weight * target_term + non_target_weight * non_target_term) * temperature**2


def dist_loss(
    student_logits: torch.Tensor,
    target_log_probs: torch.Tensor,
    temperature: float | torch.Tensor,
    row_weight: float = 1.0,
    column_weight: float = 1.0,
) -> torch.Tensor:
    """DIST (Huang et al., NeurIPS 2022, eq. 6-9): 1 - Pearson correlation of rows and of columns, times T².

    The column term compares each class over the whole micro-batch, so this loss, unlike the others, depends on how a
    batch is cut into accumulation steps or processes. Returns `(batch,)`; the column term is the same for each sample.
    """
    student = F.softmax(student_logits / temperature, dim=-1)
    teacher = target_log_probs.exp()
    rows = 1.0 - _pearson(student, teacher, dim=-1)
    columns = (1.0 - _pearson(student, teacher, dim=0)).mean()
    return (row_weight * rows + column_weight * columns) * temperature**2


def _pearson(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    a, b = a - a.mean(dim=dim, keepdim=True), b - b.mean(dim=dim, keepdim=True)
    return F.cosine_similarity(a, b, dim=dim, eps=1e-8)


def feature_loss(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """FitNets hint (Romero et al. 2015, eq. 3) on layer-normalised features, so that widths and scales do not matter.

    Both `(batch, width)`, the student's already projected to the teacher's width. Returns `(batch,)`, 0 when equal.
    """
    width = teacher_features.shape[-1:]
    difference = F.layer_norm(student_features, width) - F.layer_norm(teacher_features, width)
    return difference.pow(2).mean(-1)


def logit_gradient(
    student_logits: torch.Tensor,
    target_log_probs: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """Gradient of `alpha * forward_kl + (1 - alpha) * cross-entropy` with respect to the student's logits, closed form.

    `alpha T (softmax(z / T) - p_T) + (1 - alpha) (softmax(z) - onehot)`, `(batch, classes)`; differentiable in T.
    """
    soft = temperature * (F.softmax(student_logits / temperature, dim=-1) - target_log_probs.exp())
    hard = F.softmax(student_logits, dim=-1) - F.one_hot(labels, student_logits.shape[-1])
    return alpha * soft + (1.0 - alpha) * hard


def mixture_nll(teacher_logits: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the labels under the teachers' mixture at T = 1: the gate's own objective.

    teacher_logits `(teachers, batch, classes)`, weights `(batch, teachers)`, labels `(batch,)`. Returns `(batch,)`.
    """
    log_probs = log_mixture(teacher_logits, weights, temperature=1.0)
    return -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Shannon entropy over the last dimension, in nats, from 0 (certain) to log(size) (uniform)."""
    return -(probabilities * probabilities.clamp_min(_SMALLEST_PROBABILITY).log()).sum(-1)


def labels_loss(
    outputs: Mapping[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy with the labels, for `Trainer(compute_loss_func=...)`: a scalar, the share of these rows in the
    mean over all num_items_in_batch rows of an optimizer step; None: their own mean.

    Upstream trusts a model whose `forward` takes further arguments to divide by that number. BERT and others take them
    and do not, so that their own loss counts once for every accumulated batch and process. outputs: of a model, with
    `logits` `(batch, classes)`; labels: `(batch,)`.
    """
    num_items = len(labels) if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(outputs["logits"].float(), labels, reduction="sum") / num_items
