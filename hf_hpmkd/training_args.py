"""The arguments of `HPMKDTrainer`: those of `TrainingArguments`, and what distillation adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_hpmkd.components.attention_ensemble import GATE_OBJECTIVES
from hf_hpmkd.losses import check_kind_and_schedule
from hf_hpmkd.vocabulary import KD_KINDS, TEMPERATURE_SCHEDULES

TEACHER_OUTPUTS = ("full", "topk", "live")


@dataclass
class HPMKDTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the distillation settings. Raises ValueError on values that cannot be used."""

    alpha: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the teachers against the labels: loss = alpha KD + (1 - alpha) CE. 0 ignores the "
            "teachers and is plain Trainer, bit for bit; 1 ignores the labels."
        },
    )
    kd_kind: str = field(default="forward_kl", metadata={"help": f"Distillation loss: {', '.join(KD_KINDS)}."})
    temperature: float = field(
        default=4.0,
        metadata={"help": "Temperature T > 0 of the soft targets; 1 leaves logits as they are, larger flattens."},
    )
    temperature_schedule: str = field(
        default="constant",
        metadata={"help": f"How T moves during training: {', '.join(TEMPERATURE_SCHEDULES)}."},
    )
    temperature_min: float = field(default=2.0, metadata={"help": "Lower end of a moving T."})
    temperature_max: float = field(default=6.0, metadata={"help": "Upper end of a moving T."})
    gate: str = field(
        default="mixture",
        metadata={
            "help": "How teachers are weighed: mixture (the gate makes the mixture predict guide labels), joint (the "
            "paper's: it follows the student's loss), label (CA-MKD, closed form), uniform."
        },
    )
    gate_entropy_weight: float = field(
        default=0.01, metadata={"help": "β >= 0: how much spread weights are worth; 0 lets the gate pick one teacher."}
    )
    gate_hidden_size: int = field(default=128, metadata={"help": "Width of the gate network."})
    gate_dropout: float = field(default=0.2, metadata={"help": "Dropout of the gate network, in [0, 1)."})
    gate_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate (AdamW) of the gate."})
    gate_warmup_steps: int = field(
        default=200, metadata={"help": "Updates of the mixture gate on guide rows before the student's first step."}
    )
    calibrate_teachers: bool = field(
        default=True,
        metadata={"help": "Bring the teachers to one scale by a scalar each, fitted on guide rows."},
    )
    guide_every: int = field(
        default=10, metadata={"help": "Optimizer steps between two looks at guide rows (gate, learned temperature)."}
    )
    guide_batch_size: int = field(default=64, metadata={"help": "Guide rows per look."})
    feature_weight: float = field(
        default=0.0,
        metadata={"help": "Weight >= 0 of the feature term (FitNets hint); above 0 it needs live torch teachers."},
    )
    teacher_outputs: str = field(
        default="full",
        metadata={
            "help": "Where teacher outputs come from: full (computed once, all classes on disk), topk (the same, the "
            "largest only), live (teachers run inside the loop)."
        },
    )
    teacher_outputs_topk: int = field(default=16, metadata={"help": "Classes kept per row when teacher_outputs=topk."})
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the teacher outputs; default: $HPMKD_CACHE or the memory's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind_and_schedule(self.kd_kind, self.temperature_schedule)
        _check(0 <= self.alpha <= 1, "`alpha` must lie in [0, 1]", self.alpha, "0 ignores the teachers, 1 the labels")
        _check(self.temperature > 0, "`temperature` must be above 0", self.temperature, "1 leaves logits as they are")
        _check(
            self.temperature_schedule == "constant" or 0 < self.temperature_min < self.temperature_max,
            "`temperature_min` must be above 0 and below `temperature_max`",
            (self.temperature_min, self.temperature_max),
            "swap them, or use temperature_schedule=constant for a fixed temperature",
        )
        _check(
            self.temperature_schedule != "learned" or self.temperature_min <= self.temperature <= self.temperature_max,
            "`temperature`, where `learned` starts, must lie between `temperature_min` and `temperature_max`",
            (self.temperature, self.temperature_min, self.temperature_max),
            "widen the range, or change temperature",
        )
        _check(self.gate in GATE_OBJECTIVES, f"`gate` must be one of {', '.join(GATE_OBJECTIVES)}", self.gate)
        _check(self.gate_entropy_weight >= 0, "`gate_entropy_weight` must not be negative", self.gate_entropy_weight)
        _check(0 <= self.gate_dropout < 1, "`gate_dropout` must lie in [0, 1)", self.gate_dropout)
        _check(self.gate_hidden_size >= 1, "`gate_hidden_size` must be at least 1 unit", self.gate_hidden_size)
        _check(self.gate_learning_rate > 0, "`gate_learning_rate` must be above 0", self.gate_learning_rate)
        _check(self.gate_warmup_steps >= 0, "`gate_warmup_steps` must not be negative", self.gate_warmup_steps)
        _check(self.guide_every >= 1, "`guide_every` must be at least 1 step", self.guide_every)
        _check(self.guide_batch_size >= 1, "`guide_batch_size` must be at least 1 row", self.guide_batch_size)
        _check(self.feature_weight >= 0, "`feature_weight` must not be negative", self.feature_weight)
        _check(
            self.teacher_outputs in TEACHER_OUTPUTS,
            f"`teacher_outputs` must be one of {', '.join(TEACHER_OUTPUTS)}",
            self.teacher_outputs,
        )
        _check(self.teacher_outputs_topk >= 1, "`teacher_outputs_topk` must be at least 1", self.teacher_outputs_topk)
        _check(
            self.feature_weight == 0 or self.teacher_outputs == "live",
            "`feature_weight` above 0 needs `teacher_outputs=live`, because features are not stored",
            (self.feature_weight, self.teacher_outputs),
            "set teacher_outputs=live, or feature_weight=0",
        )
        _check(
            self.teacher_outputs != "topk" or self.kd_kind != "standardized_kl",
            "`kd_kind=standardized_kl` needs the logits of all classes, because it divides by their spread",
            (self.kd_kind, self.teacher_outputs),
            "set teacher_outputs=full, or another kd_kind",
        )
        _check(
            not self.fp16 or (self.feature_weight == 0 and self.gate != "joint"),
            "`fp16` scales gradients, which gate=joint and the feature term do not undo",
            (self.gate, self.feature_weight),
            "use bf16",
        )

    @property
    def distills(self) -> bool:
        """Whether the teachers have any say in the loss."""
        return self.alpha > 0 or self.feature_weight > 0

    @property
    def needs_guide(self) -> bool:
        """Whether guide rows (labelled, unseen by the teachers) are needed."""
        return self.gate == "mixture" or self.calibrate_teachers or self.temperature_schedule == "learned"

    @property
    def needs_features(self) -> bool:
        """Whether the student's penultimate features are needed."""
        return self.gate in ("mixture", "joint") or self.temperature_schedule == "learned" or self.feature_weight > 0


def _check(holds: bool, rule: str, value: object, way_out: str | None = None) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {value}." + (f" Way out: {way_out}." if way_out else ""))
