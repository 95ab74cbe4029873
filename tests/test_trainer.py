"""HPMKDTrainer: equal to plain Trainer and plain KD in the limits, the same however a step is cut, bitwise resume."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from hf_hpmkd.tasks.base import UNAUGMENTED
from hf_hpmkd.teacher_kinds import TorchTeacher
from hf_hpmkd.teachers import name_apart
from hf_hpmkd.trainer import STATE_FILE, HPMKDTrainer
from hf_hpmkd.vocabulary import KD_KINDS


@pytest.fixture(scope="module")
def teachers():
    return tiny.tiny_teachers(2)


def train(folder, teachers, model=None, resume=None, train_dataset=None, guide_dataset=None, callbacks=(), **settings):
    trainer = HPMKDTrainer(
        model or tiny.tiny_vit(),
        teachers,
        tiny.arguments(folder, **settings),
        train_dataset=train_dataset or tiny.TinyImages(),
        eval_dataset=tiny.TinyImages(20, seed=5),
        guide_dataset=guide_dataset or tiny.TinyImages(40, seed=3),
        callbacks=list(callbacks),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def taught(tmp_path_factory, teachers):
    """A training that nobody changes afterwards."""
    return train(tmp_path_factory.mktemp("taught"), teachers)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_alpha_zero_is_plain_trainer_bit_for_bit(tmp_path, teachers, steps):
    settings = {"optim": "adamw_torch", "gradient_accumulation_steps": steps}
    ours = train(tmp_path, teachers, alpha=0.0, **settings)
    plain = Trainer(tiny.tiny_vit(), tiny.arguments(tmp_path, **settings), train_dataset=tiny.TinyImages())
    plain.train()
    assert torch.equal(tiny.weights_of(ours.model), tiny.weights_of(plain.model))
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (ours, plain)]
    assert losses[0] == losses[1]


def test_no_teachers_is_plain_trainer_and_some_are_not(tmp_path, taught):
    alone = train(tmp_path, None)
    plain = Trainer(tiny.tiny_vit(), tiny.arguments(tmp_path), train_dataset=tiny.TinyImages())
    plain.train()
    assert torch.equal(tiny.weights_of(alone.model), tiny.weights_of(plain.model))
    assert not torch.allclose(tiny.weights_of(taught.model), tiny.weights_of(plain.model), atol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_uniform_teacher_is_plain_kd_written_by_hand(tmp_path, teachers, smoothing):
    rows = tiny.TinyImages(32)
    settings = {"per_device_train_batch_size": 32, "num_train_epochs": 3, "alpha": 0.7, "temperature": 3.0}
    trainer = train(
        tmp_path, teachers[0], train_dataset=rows, gate="uniform", calibrate_teachers=False,
        temperature_schedule="constant", label_smoothing_factor=smoothing, **settings,
    )  # fmt: skip
    student = tiny.tiny_vit()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with torch.no_grad():
        soft = F.softmax(teachers[0](pixel_values=rows.pixels).logits / 3.0, -1)
    for _ in range(3):
        logits = student(pixel_values=rows.pixels).logits
        kd = F.kl_div(F.log_softmax(logits / 3.0, -1), soft, reduction="batchmean") * 9.0
        labels = (1 - smoothing) * F.one_hot(rows.labels, logits.shape[1]) + smoothing / logits.shape[1]
        loss = 0.7 * kd - 0.3 * (labels * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Stored outputs are half precision, so equal to about three digits of the change.
    assert torch.allclose(tiny.weights_of(trainer.model), tiny.weights_of(student), atol=3e-4)


@pytest.mark.parametrize(
    ("kind", "gate"),
    [(kind, "mixture") for kind in KD_KINDS]
    + [("forward_kl", gate) for gate in ("joint", "label", "uniform")]
    + [("js", "joint")],
)
def test_every_kind_and_gate_trains_and_logs(tmp_path, teachers, kind, gate):
    trainer = train(tmp_path, teachers, kd_kind=kind, gate=gate, temperature_schedule="constant", learning_rate=0.01)
    row = next(row for row in trainer.state.log_history if "kd_loss" in row)
    names = [f"weight/{name}" for name in trainer.distiller.outputs.names]
    assert sum(row[name] for name in names) == pytest.approx(1.0, abs=1e-5)
    assert {"loss", "ce_loss", "temperature", "alpha"} <= set(row)
    assert torch.isfinite(tiny.weights_of(trainer.model)).all()


# ---- the same however a step is cut ----------------------------------------------------------------------------------


def test_accumulation_does_not_change_the_result(tmp_path, teachers, taught):
    """44 rows in steps of 16: the last step is ragged for every way to cut it."""
    whole = taught
    for batch, steps in ((4, 4), (2, 8)):
        cut = train(tmp_path, teachers, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        assert cut.state.global_step == whole.state.global_step
        assert torch.allclose(tiny.weights_of(cut.model), tiny.weights_of(whole.model), atol=2e-6)
        assert cut.distiller.scheduler.temperature == pytest.approx(whole.distiller.scheduler.temperature, rel=1e-4)


_TWO_PROCESSES = """
import sys
from functools import partial
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import tiny
from accelerate import PartialState
from hf_hpmkd.trainer import HPMKDTrainer
from two_ranks import in_two_ranks
torch.set_num_threads(1)

def train(folder, settings):
    arguments = tiny.arguments(folder, per_device_train_batch_size=8, **settings)
    if arguments.fsdp:  # which accelerate has for GPUs alone, though gloo does as well
        assert arguments.device.type == "cpu"
        arguments.use_cpu = False
        PartialState._shared_state["distributed_type"] = "MULTI_GPU"
    trainer = HPMKDTrainer(
        tiny.tiny_vit(), tiny.tiny_teachers(2), arguments,
        train_dataset=tiny.TinyImages(48), guide_dataset=tiny.TinyImages(40, seed=3),
    )
    trainer.train()
    assert trainer.args.world_size == 2, trainer.args.world_size
    assert trainer.accelerator.is_fsdp2 == bool(arguments.fsdp)
    trainer.save_model(folder / "student")
    gate = trainer.distiller.ensemble.gate
    flat = torch.cat([p.detach().flatten() for p in gate.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(both, flat)
    assert torch.equal(*both)
    trainer.accelerator.wait_for_everyone()
    saved = type(tiny.tiny_vit()).from_pretrained(folder / "student")
    result = [tiny.weights_of(saved), trainer.distiller.scheduler.temperature]
    torch.save(result, folder / f"rank{{trainer.args.process_index}}.pt")

for name, settings in {ways!r}.items():
    folder = Path({folder!r}) / name
    folder.mkdir()
    in_two_ranks(partial(train, folder, settings))
"""
_WAYS = {
    "default": {},
    "joint": {"gate": "joint", "temperature_schedule": "loss", "gate_dropout": 0.0},  # dropout is drawn per process
    "fsdp2": {"fsdp": "full_shard", "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}},
}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """A folder for each way."""
    folder = tmp_path_factory.mktemp("two")
    tests = str(Path(__file__).parent)
    (folder / "two.py").write_text(_TWO_PROCESSES.format(tests=tests, folder=str(folder), ways=_WAYS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tests).parent)}
    command = [sys.executable, str(folder / "two.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("way", _WAYS)
def test_two_processes_equal_one(tmp_path, of_two_processes, way):
    alone = {name: value for name, value in _WAYS[way].items() if not name.startswith("fsdp")}
    one = train(tmp_path, tiny.tiny_teachers(2), train_dataset=tiny.TinyImages(48), **alone)
    for rank in range(2):
        weights, temperature = torch.load(of_two_processes / way / f"rank{rank}.pt")
        assert torch.allclose(weights, tiny.weights_of(one.model), atol=2e-6)
        assert temperature == pytest.approx(one.distiller.scheduler.temperature, rel=1e-3)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class _StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": "joint", "temperature_schedule": "loss"},
        {"temperature_schedule": "auto", "gate": "label"},
        {"teacher_outputs": "live", "feature_weight": 0.5},
    ],
    ids=["default", "joint", "auto", "features"],
)
def test_resume_is_bitwise(tmp_path, teachers, settings):
    settings = {"optim": "adamw_torch", "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 4, **settings}
    whole = train(tmp_path / "whole", teachers, **settings)
    train(tmp_path / "cut", teachers, callbacks=[_StopAfter(5)], **settings)
    checkpoint = tmp_path / "cut" / "run" / "checkpoint-4"
    resumed = train(tmp_path / "cut", teachers, model=tiny.tiny_vit(seed=9), resume=str(checkpoint), **settings)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert torch.equal(tiny.weights_of(resumed.model), tiny.weights_of(whole.model))
    (one, one_meta), (two, two_meta) = whole.distiller.state_dict(), resumed.distiller.state_dict()
    assert json.loads(one_meta["hpmkd"]) == json.loads(two_meta["hpmkd"])
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_checkpoint_holds_the_student_alone_and_the_rest_beside_it(tmp_path, teachers):
    train(tmp_path, teachers, save_strategy="steps", save_steps=3)
    folder = tmp_path / "run" / "checkpoint-3"
    keys = load_file(folder / "model.safetensors").keys()
    assert keys and all(key.startswith(("vit.", "classifier.")) for key in keys)
    assert any(key.startswith("ensemble.gate.") for key in load_file(folder / STATE_FILE))


def test_best_model_is_really_loaded(tmp_path, teachers):
    """Upstream leaves most of a ViT's weights as they were (STATE: transformers#43701)."""
    trainer = train(
        tmp_path, teachers, num_train_epochs=4, learning_rate=0.5, load_best_model_at_end=True, save_strategy="steps",
        save_steps=3, eval_strategy="steps", eval_steps=3, metric_for_best_model="eval_loss",
    )  # fmt: skip
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    saved = type(trainer.model).from_pretrained(tmp_path / "run" / f"checkpoint-{best}")
    assert torch.equal(tiny.weights_of(trainer.model), tiny.weights_of(saved))


def test_checkpoint_of_a_run_without_teachers_is_refused(tmp_path, teachers):
    train(tmp_path, None, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="no hpmkd_state.safetensors"):
        train(tmp_path, teachers, resume=str(tmp_path / "run" / "checkpoint-3"))


# ---- teachers that deserve different weights -------------------------------------------------------------------------


class _Specialist(torch.nn.Module):
    """Right wherever the label is one of `knows`, certain of a wrong class elsewhere. Reads the label off the image."""

    def __init__(self, knows, seed):
        super().__init__()
        self.knows = torch.tensor(knows)
        self.config = SimpleNamespace(id2label={label: f"class {label}" for label in range(4)})
        self.seed = torch.nn.Parameter(torch.tensor(float(seed)), requires_grad=False)

    def forward(self, pixel_values):
        corners = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)[:, :4]
        label = corners.argmax(-1)
        wrong = (label + 1 + (pixel_values.flatten(1)[:, 0] * 1e4).long().abs() % 3) % 4
        said = torch.where(torch.isin(label, self.knows), label, wrong)
        return {"logits": 8.0 * F.one_hot(said, 4).float()}


def four_classes(rows, seed):
    """A bright pixel in another patch for each class, and at another place of it, so that untrained features tell."""
    data = tiny.TinyImages(rows, seed=seed, classes=4)
    data.pixels[torch.arange(rows), 0, 5 * (data.labels // 2) + 1, 5 * (data.labels % 2) + 1] += 12.0
    return data


def specialists_student(tmp_path, gate):
    names = {label: f"class {label}" for label in range(4)}
    trainer = HPMKDTrainer(
        tiny.tiny_vit(id2label=names),
        [_Specialist([0, 1], 0), _Specialist([2, 3], 1)],
        tiny.arguments(
            tmp_path, gate=gate, num_train_epochs=12, optim="adamw_torch", learning_rate=3e-3, alpha=1.0,
            temperature_schedule="constant", temperature=2.0, gate_warmup_steps=800, logging_steps=100,
        ),
        train_dataset=four_classes(400, 0), guide_dataset=four_classes(200, 1), eval_dataset=four_classes(400, 2),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_gate_gives_specialists_their_classes_and_the_student_gains(tmp_path):
    """alpha = 1: all the student knows comes from the teachers, each of which is wrong on half of the classes."""
    gated, uniform = specialists_student(tmp_path, "mixture"), specialists_student(tmp_path, "uniform")
    weights = torch.tensor(gated.distiller.class_weights())
    assert weights[0, :2].mean() > 0.75 and weights[1, 2:].mean() > 0.75
    assert gated.evaluate()["eval_accuracy"] > uniform.evaluate()["eval_accuracy"] + 0.02


class _Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(id2label=tiny.NAMES)
        self.row = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]), requires_grad=False)

    def forward(self, pixel_values):
        return {"logits": self.row.expand(len(pixel_values), 3)}


class _Shuffled(torch.nn.Module):
    """Another teacher's answers to other rows of the batch."""

    def __init__(self, teacher):
        super().__init__()
        self.config = SimpleNamespace(id2label=tiny.NAMES)
        self.teacher = teacher

    def forward(self, pixel_values):
        return {"logits": self.teacher(pixel_values=pixel_values).logits.roll(7, 0)}


def test_constant_and_shuffled_teachers_get_no_weight_and_cost_nothing(tmp_path, teachers):
    settings = {"num_train_epochs": 8, "gate_warmup_steps": 800, "optim": "adamw_torch", "learning_rate": 3e-3}
    settings |= {"guide_dataset": tiny.TinyImages(200, seed=3)}  # of few, constant answers may be worth a hedge
    rows = tiny.TinyImages(300)
    clean = train(tmp_path, teachers, train_dataset=rows, **settings)
    spoilt = train(tmp_path, [*teachers, _Constant(), _Shuffled(teachers[0])], train_dataset=rows, **settings)
    last = [row for row in spoilt.state.log_history if "kd_loss" in row][-20:]
    for name in ("_Constant", "_Shuffled"):
        assert sum(row[f"weight/{name}"] for row in last) / len(last) < 0.05
    accuracies = [one.evaluate(tiny.TinyImages(600, seed=11))["eval_accuracy"] for one in (clean, spoilt)]
    assert accuracies[1] > accuracies[0] - 0.04  # two standard errors of a difference on so many rows


# ---- a drop-in for Trainer -------------------------------------------------------------------------------------------


def test_evaluate_and_predict_leave_the_teachers_out(tmp_path, teachers):
    trainer = train(tmp_path, teachers)
    plain = Trainer(trainer.model, tiny.arguments(tmp_path), eval_dataset=trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    ours, theirs = trainer.predict(trainer.eval_dataset), plain.predict(trainer.eval_dataset)
    assert np.array_equal(ours.predictions, theirs.predictions)


def test_live_teachers_give_what_stored_outputs_give(tmp_path, teachers, taught):
    stored, live = taught, train(tmp_path, teachers, teacher_outputs="live")
    topk = train(tmp_path, teachers, teacher_outputs="topk", teacher_outputs_topk=2)
    assert torch.allclose(tiny.weights_of(stored.model), tiny.weights_of(live.model), atol=1e-3)
    assert torch.allclose(tiny.weights_of(stored.model), tiny.weights_of(topk.model), atol=1e-3)


def image_dataset(rows=24):
    pixels = (tiny.TinyImages(rows).pixels.clamp(-2, 2).add(2).mul(60)).to(torch.uint8).squeeze(1).numpy()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(tiny.NAMES.values()))}
    )
    labels = tiny.TinyImages(rows).labels.tolist()
    return datasets.Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)


def to_pixels(batch):
    arrays = [torch.tensor(np.array(image), dtype=torch.float32)[None] / 60 - 2 for image in batch["image"]]
    return {"pixel_values": arrays, "labels": batch["label"]}


def test_a_hub_dataset_with_a_transform_and_somebodys_collator(tmp_path, teachers):
    """`remove_unused_columns` is left at its default, and the collator fails on keys that it does not know."""

    def collate(samples):
        assert all(set(sample) <= {"pixel_values", "labels"} for sample in samples)
        return {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in samples[0]}

    data = image_dataset().with_transform(to_pixels)
    trainer = HPMKDTrainer(
        tiny.tiny_vit(), teachers, tiny.arguments(tmp_path), data_collator=collate,
        train_dataset=data, guide_dataset=data,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4


def test_raw_images_are_not_decoded_for_a_student_that_reads_pixels(tmp_path, teachers, monkeypatch):
    """As upstream does it: columns that the model does not take are dropped before a batch is read."""
    raw = image_dataset()
    data = raw.add_column("pixel_values", [x.tolist() for x in to_pixels(raw[:])["pixel_values"]]).with_format("torch")
    trainer = HPMKDTrainer(
        tiny.tiny_vit(), teachers, tiny.arguments(tmp_path, num_train_epochs=3), train_dataset=data, guide_dataset=data
    )
    decoded = []
    whole = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *args, **more: decoded.append(1) or whole(*args, **more)
    )
    loader = trainer.get_train_dataloader()
    assert all(set(batch) == {"pixel_values", "labels", "hpmkd_row", "hpmkd_view"} for batch in loader) and not decoded


def tiny_bert(width, vocab_size, **settings):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(width)
    names = {0: "cat", 1: "dog"}
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label=names, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    return BertForSequenceClassification(config)


def test_a_tokenised_text_dataset_that_kept_its_columns(tmp_path):
    """The ordinary fine-tuning script: `map(tokenize)`, text and id still there, the tokenizer as processing class."""
    from hf_hpmkd.tasks.text import train_tokenizer

    words = ["a cat sat", "the dog ran far", "one more cat", "dogs and a dog", "cat on a mat"] * 6
    tokenizer = train_tokenizer(words, vocab_size=100)
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    columns = {"id": [str(i) for i in range(30)], "text": words, "label": [int("dog" in text) for text in words]}
    data = datasets.Dataset.from_dict(columns, features=features).map(lambda row: tokenizer(row["text"]))
    vocab_size = len(tokenizer)
    trainer = HPMKDTrainer(
        tiny_bert(8, vocab_size), [tiny_bert(16, vocab_size)], tiny.arguments(tmp_path),
        train_dataset=data, guide_dataset=data, eval_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_a_teacher_with_its_own_tokenizer_reads_the_raw_text_or_says_that_it_is_gone(tmp_path):
    from hf_hpmkd.tasks.text import train_tokenizer

    words = ["a cat sat", "the dog ran far", "one more cat", "dogs and a dog"] * 6
    other = train_tokenizer([text.upper() + " zebra" for text in words], vocab_size=110)
    tiny_bert(16, len(other)).save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    tokenizer = train_tokenizer(words, vocab_size=100)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"text": words, "label": [int("dog" in text) for text in words]}
    data = datasets.Dataset.from_dict(columns, features=features).map(lambda row: tokenizer(row["text"]))

    def train_on(rows):
        HPMKDTrainer(
            tiny_bert(8, len(tokenizer)), str(tmp_path / "teacher"), tiny.arguments(tmp_path),
            train_dataset=rows, guide_dataset=rows, processing_class=tokenizer,
        ).train()  # fmt: skip

    train_on(data)
    with pytest.raises(ValueError, match="text"):
        train_on(data.remove_columns("text"))


def test_a_teacher_that_reads_text_itself_reads_both_of_a_pair(tmp_path):
    """The student sees the first text alone; what the teacher says depends on the second."""
    from hf_hpmkd.dataset_rows import DatasetRows
    from hf_hpmkd.tasks.text import train_tokenizer

    premises, hypotheses = ["a cat sat", "the dog ran far"] * 4, ["cat", "a dog", "the mat", "no cat"] * 2
    tokenizer = train_tokenizer(premises + hypotheses, vocab_size=100)
    teacher = tiny_bert(16, len(tokenizer)).eval()
    with torch.no_grad():
        for weight in teacher.parameters():  # or it says nearly the same of everything
            weight.mul_(10 if weight.dim() == 2 else 1)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    features = {name: datasets.Value("string") for name in ("premise", "hypothesis")}
    features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    columns = {"premise": premises, "hypothesis": hypotheses, "label": [0, 1] * 4}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    seen = data.map(lambda row: tokenizer(row["premise"]))
    trainer = HPMKDTrainer(
        tiny_bert(8, len(tokenizer)), str(tmp_path / "teacher"), tiny.arguments(tmp_path),
        train_dataset=seen, guide_dataset=seen, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        both = teacher(**tokenizer(premises, hypotheses, padding=True, return_tensors="pt")).logits
        first = teacher(**tokenizer(premises, padding=True, return_tensors="pt")).logits
    found = trainer._outputs.lookup(torch.arange(8), torch.full((8,), -1))[0]
    torch.testing.assert_close(found, both, atol=1e-3, rtol=1e-3)  # they are kept as float16
    assert (both - first).abs().amax(1).min() > 0.01

    with pytest.raises(ValueError, match="read premise, hypothesis and of the guide rows premise. Keep the same"):
        HPMKDTrainer(
            tiny_bert(8, len(tokenizer)), str(tmp_path / "teacher"), tiny.arguments(tmp_path), train_dataset=seen,
            guide_dataset=seen.remove_columns("hypothesis"), processing_class=tokenizer,
        ).train()  # fmt: skip

    def raw(rows):
        known = DatasetRows(rows, lambda samples: {"labels": torch.tensor([one["label"] for one in samples])}, None)
        known.will_be_read_raw()
        return known.fingerprint

    assert raw(data) == raw(data) != raw(data.map(lambda row: {"hypothesis": row["hypothesis"] + "!"}))
    with pytest.raises(ValueError, match="1 of 8 rows of column 'hypothesis' have none"):
        raw(data.map(lambda row, place: {"hypothesis": None if place == 3 else "cat"}, with_indices=True))


def test_a_plain_module_can_be_the_student(tmp_path, teachers):
    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(64, 3)

        def forward(self, pixel_values, labels=None):
            logits = self.head(pixel_values.flatten(1))
            return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})

    with pytest.raises(ValueError, match="names of the classes are needed"):
        train(tmp_path, teachers, model=Student())
    data = image_dataset().with_transform(to_pixels)
    trainer = HPMKDTrainer(
        Student(), teachers, tiny.arguments(tmp_path), train_dataset=data, guide_dataset=data,
        data_collator=lambda samples: {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4


def test_random_inputs_cannot_have_stored_outputs(tmp_path, teachers):
    class Noisy(tiny.TinyImages):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "pixel_values": torch.randn(1, 8, 8)}

    with pytest.raises(ValueError, match="different inputs for the same row twice"):
        train(tmp_path, teachers, train_dataset=Noisy())
    with pytest.raises(ValueError, match="The guide dataset gives .* so pass it without augmentation"):
        train(tmp_path, teachers, guide_dataset=Noisy())


def test_a_student_that_cannot_be_trained_is_found_out_before_a_teacher_answers(tmp_path, teachers, monkeypatch):
    monkeypatch.setattr(TorchTeacher, "_outputs", lambda *words: pytest.fail("a teacher was asked"))
    student = tiny.tiny_vit()
    with pytest.raises(ValueError, match="the student cannot be its own. Pass a copy"):
        train(tmp_path, [student], model=student)
    assert all(weight.requires_grad for weight in student.parameters())
    two = tiny.tiny_vit(id2label={0: "LABEL_0", 1: "LABEL_1"})
    data = image_dataset().with_transform(to_pixels)
    with pytest.raises(ValueError, match=r"it has 2 and they have \d. Make it with num_labels=\d"):
        train(tmp_path, teachers, model=two, train_dataset=data)
    four = tiny.tiny_vit()
    four.config.num_labels = 2  # somebody's own model, whose config says nothing of its outputs
    with pytest.raises(pytest.fail.Exception, match="a teacher was asked"):
        train(tmp_path, teachers, model=four, train_dataset=data)


def test_a_student_may_answer_with_a_tuple(tmp_path, teachers, taught):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.tiny_vit()
            self.config = self.inner.config

        def forward(self, pixel_values, labels=None):
            answer = self.inner(pixel_values, labels=labels)
            return (answer.logits,) if labels is None else (answer.loss, answer.logits)

    bare = train(tmp_path, teachers, Bare())
    assert torch.equal(tiny.weights_of(taught.model), tiny.weights_of(bare.model))


def test_a_student_whose_names_are_in_another_order_is_refused(tmp_path, teachers):
    """Its answers would be right by number, and wrong by name once it is saved."""
    names = list(tiny.NAMES.values())
    rows = image_dataset().cast_column("label", datasets.ClassLabel(names=names[::-1]))
    pixels = rows.with_transform(lambda batch: {
        "pixel_values": [torch.from_numpy(np.array(image)).float()[None] for image in batch["image"]],
        "labels": batch["label"],
    })  # fmt: skip
    trainer = HPMKDTrainer(tiny.tiny_vit(), teachers, tiny.arguments(tmp_path), train_dataset=pixels,
                           guide_dataset=tiny.TinyImages(40, seed=3))  # fmt: skip
    with pytest.raises(ValueError, match="student's names .`id2label`. must have the classes of the training rows"):
        trainer.train()


def test_a_constant_temperature_may_change_where_a_training_goes_on(tmp_path, teachers):
    settings = {"temperature_schedule": "constant", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    train(tmp_path, teachers, callbacks=[_StopAfter(2)], temperature=4.0, **settings)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = train(tmp_path, teachers, resume=checkpoint, temperature=2.0, **settings)
    told = [row["temperature"] for row in resumed.state.log_history if "temperature" in row]
    assert told[0] == 4 and set(told[2:]) == {2.0}


def test_teachers_of_one_name_are_told_apart():
    teachers = [SimpleNamespace(name=name) for name in ("a", "a", "a-2", "b", "a")]
    name_apart(teachers)
    assert [teacher.name for teacher in teachers] == ["a", "a-3", "a-2", "b", "a-4"]


def test_a_streaming_dataset_is_refused_by_its_kind(tmp_path, teachers):
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 4

        def __iter__(self):
            yield from tiny.TinyImages(4)

    with pytest.raises(ValueError, match="must have a length and be indexable, got Stream"):
        train(tmp_path, teachers, train_dataset=Stream())


def test_settings_that_need_guide_rows_say_so_before_training(tmp_path, teachers):
    trainer = HPMKDTrainer(tiny.tiny_vit(), teachers, tiny.arguments(tmp_path), train_dataset=tiny.TinyImages())
    with pytest.raises(ValueError, match="guide_dataset="):
        trainer.train()


def test_what_changed_between_two_trainings_is_seen(tmp_path, teachers):
    """As in a search over hyperparameters, or where rows are added: a trainer may be asked again."""
    settings = {"gate": "uniform", "calibrate_teachers": False, "temperature_schedule": "constant"}
    trainer = train(tmp_path, teachers, **settings)
    first, distiller = trainer._outputs, trainer.distiller
    trainer.train()
    assert trainer._outputs is first and trainer.distiller is not distiller
    trainer.train_dataset = tiny.TinyImages(30, seed=8)
    trainer.train()
    assert trainer._outputs is not first and trainer._outputs.num_rows == 30
    second = trainer._outputs
    trainer.teachers = teachers[:1]
    trainer.train()
    assert trainer._outputs is not second and len(trainer._outputs.names) == 1
    trainer.args.alpha = 0.0
    trainer.train()
    assert trainer.distiller is None and not trainer.loss_is_scaled_for_ga
    trainer.args.alpha = 0.5
    trainer.train()
    assert trainer.distiller is not None


def test_a_search_over_alpha_may_begin_with_labels_alone(tmp_path, teachers):
    class Search(HPMKDTrainer):
        def _inner_training_loop(self, *args, **kwargs):
            self.args.alpha = 0.5  # where upstream has set a trial's values
            return super()._inner_training_loop(*args, **kwargs)

    trainer = Search(
        tiny.tiny_vit(), teachers, tiny.arguments(tmp_path, alpha=0.0), train_dataset=tiny.TinyImages(),
        guide_dataset=tiny.TinyImages(40, seed=3),
    )  # fmt: skip
    trainer.train()
    assert trainer.distiller is not None and trainer.loss_is_scaled_for_ga


def test_guide_rows_of_other_classes_are_refused(tmp_path, teachers):
    data = image_dataset()

    def trainer(names):
        guide = data.cast_column("label", datasets.ClassLabel(names=names)).with_transform(to_pixels)
        return HPMKDTrainer(
            tiny.tiny_vit(), teachers, tiny.arguments(tmp_path), train_dataset=data.with_transform(to_pixels),
            guide_dataset=guide, data_collator=lambda rows: {
                "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
                "labels": torch.tensor([row["labels"] for row in rows]),
            },
        )  # fmt: skip

    for names in (["Dog", "cat", "emu"], ["cat", "dog", "emu", "fox"]):
        with pytest.raises(ValueError, match="guide rows must have the classes of the training rows"):
            trainer(names).train()
    assert not (tmp_path / "cache").exists()  # no teacher was asked
    trainer(["CAT", "dog", "bird"]).train()  # written otherwise, or of another name: nothing says that it is another


def test_a_loss_of_ones_own_is_refused_beside_teachers(tmp_path, teachers):
    with pytest.raises(ValueError, match="`compute_loss_func` does not go with teachers"):
        HPMKDTrainer(tiny.tiny_vit(), teachers, tiny.arguments(tmp_path), compute_loss_func=lambda *a, **k: None)
    HPMKDTrainer(tiny.tiny_vit(), None, tiny.arguments(tmp_path), compute_loss_func=lambda *a, **k: None)


def text_rows(texts, tokenizer, **columns):
    features = {name: datasets.Value("string") for name in ("text", *columns)}
    features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    known = {"text": texts, "label": [int("dog" in text.lower()) for text in texts], **columns}
    data = datasets.Dataset.from_dict(known, features=datasets.Features(features))
    return data.map(lambda row: tokenizer(row["text"].lower()))


def test_stored_answers_are_of_the_raw_text_and_not_of_what_the_student_sees(tmp_path):
    from transformers import DataCollatorWithPadding

    from hf_hpmkd.dataset_rows import DatasetRows
    from hf_hpmkd.tasks.text import train_tokenizer

    texts = ["a cat sat", "the dog ran far"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=100)
    collate = DataCollatorWithPadding(tokenizer)

    def rows(data):
        tokens = data.remove_columns([name for name in data.column_names if name not in ("text", "label", *seen)])
        return DatasetRows(
            tokens, lambda samples: collate([{k: s[k] for k in (*seen, "label")} for s in samples]), None
        )

    seen = tokenizer.model_input_names
    one, again = rows(text_rows(texts, tokenizer)), rows(text_rows(texts, tokenizer))
    other = rows(text_rows([text.upper() for text in texts], tokenizer))
    assert one.fingerprint == again.fingerprint == other.fingerprint
    for each in (one, again, other):
        each.will_be_read_raw()
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(one.batch([0])["input_ids"], other.batch([0])["input_ids"])  # the student sees no difference


def test_images_in_an_archive_are_read_raw_too(tmp_path):
    import zipfile

    from hf_hpmkd.dataset_rows import DatasetRows

    image_dataset(2)[0]["image"].save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [f"zip://a.png::{tmp_path / 'x.zip'}", None, str(tmp_path / "a.png")], "label": [0, 1, 0]}
    data = datasets.Dataset.from_dict(columns, features=features)
    rows = DatasetRows(data, lambda samples: {"labels": torch.tensor([one["label"] for one in samples])}, None)
    before = rows.fingerprint
    rows.will_be_read_raw()
    assert rows.fingerprint != before


def test_a_teacher_of_texts_that_gets_one_of_two_columns_is_warned_of(tmp_path):
    from hf_hpmkd.tasks.text import train_tokenizer

    texts = ["a cat sat", "the dog ran far"] * 6
    tokenizer = train_tokenizer(texts, vocab_size=100)
    tiny_bert(16, len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")

    def train_on(teacher, **columns):
        rows = text_rows(texts, tokenizer, **columns)
        HPMKDTrainer(
            tiny_bert(8, len(tokenizer)), teacher, tiny.arguments(tmp_path, max_steps=1), train_dataset=rows,
            guide_dataset=rows, processing_class=tokenizer,
        ).train()  # fmt: skip

    with pytest.warns(UserWarning, match="given 'text' and not 'question'. Where a text"):
        train_on(str(tmp_path / "teacher"), question=["which"] * 12, row_id=["x"] * 12)
    train_on(str(tmp_path / "teacher"), row_id=["x"] * 12)  # (warnings are errors)
    train_on(tiny_bert(16, len(tokenizer)), question=["which"] * 12)  # it takes the student's inputs


def test_zscores_of_two_classes_are_warned_of(tmp_path):
    names = {0: "cat", 1: "dog"}
    rows = tiny.TinyImages(24, classes=2)
    trainer = HPMKDTrainer(
        tiny.tiny_vit(id2label=names), [tiny.tiny_vit(seed=1, id2label=names)],
        tiny.arguments(tmp_path, kd_kind="standardized_kl", temperature_schedule="constant"),
        train_dataset=rows, guide_dataset=rows,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="teaches nothing about two classes"):
        trainer.train()


def test_teacher_with_other_classes_is_refused(tmp_path):
    stranger = tiny.tiny_vit(id2label={0: "cat", 1: "dog", 2: "fox"})
    with pytest.raises(ValueError, match=r"emu[\s\S]*fox|fox[\s\S]*emu"):
        train(tmp_path, [stranger])


def test_permuted_teacher_classes_are_put_right(tmp_path, teachers):
    permuted = tiny.tiny_vit(width=24, id2label={0: "emu", 1: "cat", 2: "dog"})
    permuted.load_state_dict(teachers[0].state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            part = getattr(teachers[0].classifier, name)
            getattr(permuted.classifier, name).copy_(part[[2, 0, 1]])
    straight, turned = train(tmp_path, [teachers[0]]), train(tmp_path, [permuted])
    assert torch.equal(tiny.weights_of(straight.model), tiny.weights_of(turned.model))


def test_foreign_arguments_are_refused(tmp_path, teachers):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="must be HPMKDTrainingArguments, got TrainingArguments"):
        HPMKDTrainer(tiny.tiny_vit(), teachers, TrainingArguments(str(tmp_path), report_to="none"))


class _Pairs(torch.utils.data.Dataset):
    """Somebody's dataset of tuples, as torchvision has them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images.pixels[index], int(self.images.labels[index])


def test_a_dataset_of_tuples_trains_with_its_own_collator(tmp_path, teachers, taught):
    def collate(samples):
        pixels, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

    trainer = HPMKDTrainer(
        tiny.tiny_vit(),
        teachers,
        tiny.arguments(tmp_path, remove_unused_columns=False),
        train_dataset=_Pairs(tiny.TinyImages()),
        guide_dataset=_Pairs(tiny.TinyImages(40, seed=3)),
        data_collator=collate,
    )
    trainer.train()
    torch.testing.assert_close(tiny.weights_of(trainer.model), tiny.weights_of(taught.model))


@pytest.mark.parametrize("outputs", ["full", "live"])
def test_a_teacher_gets_the_columns_that_it_takes_and_the_student_does_not(tmp_path, outputs):
    """Segment ids, which tell a BERT the two texts of a pair apart."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "num_labels": 2}
    bert = BertConfig(**sizes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    teacher = BertForSequenceClassification(bert).eval()
    teacher.bert.embeddings.token_type_embeddings.weight.data *= 50
    teacher.classifier.weight.data *= 100
    distilbert = DistilBertConfig(**sizes, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    student = _TakesIds(DistilBertForSequenceClassification(distilbert))
    rows = {
        "input_ids": torch.randint(1, 30, (24, 6)).tolist(),
        "attention_mask": torch.ones(24, 6, dtype=torch.long).tolist(),
        "token_type_ids": torch.randint(0, 2, (24, 6)).tolist(),
        "labels": [0, 1] * 12,
        "idx": list(range(24)),
    }
    data = Dataset.from_dict(rows)
    args = tiny.arguments(tmp_path, gate="uniform", calibrate_teachers=False, temperature_schedule="constant")
    args.teacher_outputs = outputs
    trainer = HPMKDTrainer(student, teacher, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    every = torch.arange(24)
    inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask", "token_type_ids")}
    answers = trainer._outputs.lookup(every, torch.full_like(every, UNAUGMENTED), inputs)
    with torch.no_grad():
        torch.testing.assert_close(answers[0], teacher(**inputs).logits, atol=2e-2, rtol=0)
    assert "eval_loss" in trainer.evaluate()


class _TakesIds(torch.nn.Module):
    """Takes ids and mask alone, and says so."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask, labels=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
