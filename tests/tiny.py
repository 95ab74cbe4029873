"""Tiny models and data that several test files build on, and short runs. Nothing here is downloaded or saved."""

from contextlib import contextmanager

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_hpmkd.training_args import HPMKDTrainingArguments

CLASSES = 3
NAMES = {0: "cat", 1: "dog", 2: "emu"}


class TinyImages(torch.utils.data.Dataset):
    """Rows of 8x8 grey images whose class decides which corner is bright."""

    def __init__(self, rows=44, seed=0, classes=CLASSES):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(classes, (rows,), generator=generator)
        self.pixels = torch.randn(rows, 1, 8, 8, generator=generator)
        for row, label in enumerate(self.labels.tolist()):
            top, left = divmod(label, 2)
            self.pixels[row, :, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 0.7

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}


def tiny_vit(seed=0, width=16, **settings):
    """A vision transformer without dropout: LayerNorm only, and one of the models upstream resumes wrongly."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    id2label = settings.pop("id2label", NAMES)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=id2label,
        label2id={name: label for label, name in id2label.items()},
        **settings,
    )
    model = ViTForImageClassification(config)
    torch.set_rng_state(state)
    return model


def tiny_teachers(count=2, rows=None):
    """Teachers that are right on most rows: briefly fitted on rows of their own."""
    teachers = []
    data = rows or TinyImages(200, seed=7)
    for seed in range(count):
        teacher = tiny_vit(seed=100 + seed, width=24)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
        for _ in range(40):
            loss = teacher(pixel_values=data.pixels, labels=data.labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        teachers.append(teacher.eval())
    return teachers


def arguments(folder, **settings):
    """Quiet, CPU, no saving, plain SGD (whose steps show gradient sizes as they are), cache beside the run."""
    settings = {
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "guide_every": 2,
        "guide_batch_size": 16,
        "gate_warmup_steps": 10,
        "temperature_schedule": "learned",
        "teacher_cache_dir": str(folder / "cache"),
        **settings,
    }
    return HPMKDTrainingArguments(str(folder / "run"), **settings)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


_SHORT = pytest.MonkeyPatch()


def shorten_runs():
    """Until `full_runs`, runs in this process go without what takes two thirds of a small one, and few tests look at:
    the gate warms up for a tenth of the default's steps, models are timed once, and no figure is drawn."""
    from hf_hpmkd import evaluation, report  # not above: processes that tests start need none of it
    from hf_hpmkd.components.attention_ensemble import AttentionEnsemble

    whole = AttentionEnsemble.warm_up
    default = HPMKDTrainingArguments.__dataclass_fields__["gate_warmup_steps"].default

    def warm_up(self, features, teacher_logits, labels, steps, batch_size):
        whole(self, features, teacher_logits, labels, steps // 10 if steps == default else steps, batch_size)

    _SHORT.setattr(AttentionEnsemble, "warm_up", warm_up)
    _SHORT.setattr(evaluation, "_LATENCY_ROUNDS", 1)
    _SHORT.setattr(report, "draw_plots", lambda record, folder: [])


@contextmanager
def full_runs():
    """As users have them: for tests of figures, and of runs that other processes do. Not within another."""
    _SHORT.undo()
    try:
        yield
    finally:
        shorten_runs()
