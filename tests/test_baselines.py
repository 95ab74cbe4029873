"""Each baseline against a second implementation, written from its equations: the loss, and whole steps of training."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, TinyImages, arguments, tiny_vit, weights_of

from hf_hpmkd.baselines import DISTILLERS, curriculum_temperature
from hf_hpmkd.baselines.attention_transfer import attention_loss
from hf_hpmkd.baselines.base import Baseline
from hf_hpmkd.baselines.curriculum_temperature import adversary_strength
from hf_hpmkd.baselines.fitnets import hint_loss, regressor
from hf_hpmkd.baselines.stages import StageReader, channels, stages
from hf_hpmkd.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hf_hpmkd.trainer import HPMKDTrainer

STEPS, RATE = 3, 0.05


def resnet(seed, depth=8, width=4):
    torch.manual_seed(seed)
    config = CifarResNetConfig(
        depth=depth, width=width, num_channels=1, id2label=NAMES, label2id={name: i for i, name in NAMES.items()}
    )
    return CifarResNetForImageClassification(config)


def maps_of(model, pixels):
    """Stage by stage by hand, without hooks: the maps and the logits."""
    x = F.relu(model.bn1(model.conv1(pixels)))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3):
        x = stage(x)
        maps.append(x)
    return maps, model.linear(x.mean(dim=(2, 3)))


def trained(folder, name, student, teachers, **settings):
    """The student after training; every step sees all rows, so that their order does not matter."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 44,
        "learning_rate": RATE,
        "gate": "uniform",
        "calibrate_teachers": False,
        "temperature_schedule": "constant",
        "alpha": 0.5,
        "teacher_outputs": "live",
        **settings,
    }
    resume = settings.pop("resume", None)
    trainer = HPMKDTrainer(student, teachers, arguments(folder, **settings), train_dataset=TinyImages())
    trainer.distiller_class = DISTILLERS[name]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def descend(loss, *modules):
    parameters = [one for module in modules for one in module.parameters()]
    for one, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        one.data -= RATE * gradient


def close(one, other):
    return torch.allclose(weights_of(one), weights_of(other), atol=2e-5)


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_attention_loss_by_its_equation():
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 3, 4, 4)), random.normal(size=(2, 5, 4, 4))
    expected = []
    for s, t in zip(student, teacher, strict=True):
        unit = [q.sum(0).ravel() / np.sqrt((q.sum(0) ** 2).sum()) for q in (s**2, t**2)]
        expected.append(((unit[0] - unit[1]) ** 2).sum() / 16)
    found = attention_loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert found.numpy() == pytest.approx(np.array(expected))
    same = torch.from_numpy(teacher)
    assert float(attention_loss(same, 7 * same.repeat(1, 2, 1, 1)).max()) < 1e-12  # where, not how strongly


def test_hint_loss_by_its_equation():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 5, 4, 4)), random.normal(size=(2, 5, 4, 4))
    expected = [((one[i] - other[i]) ** 2).sum() / (5 * 4 * 4) for i in range(2)]
    assert hint_loss(torch.from_numpy(one), torch.from_numpy(other)).numpy() == pytest.approx(np.array(expected))


@pytest.mark.parametrize("loss", [attention_loss, hint_loss])
def test_maps_of_different_sizes_are_refused(loss):
    with pytest.raises(ValueError, match=r"same height and width, got \(4, 4\) and \(8, 8\)"):
        loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8))


def test_the_adversary_grows_as_in_equation_9():
    def equation(epoch, loops=10):
        return 0.5 * (1 + math.cos((1 + min(epoch, loops) / loops) * math.pi))

    for epoch in (0, 1, 5, 9, 10, 11, 240):
        assert adversary_strength(epoch / 240) == pytest.approx(equation(epoch))


# ---- whole steps -----------------------------------------------------------------------------------------------------


def test_attention_transfer_step_by_step(tmp_path):
    data, teacher, student = TinyImages(), resnet(1, depth=14, width=6), resnet(2)
    mine = copy.deepcopy(student).train()
    for _ in range(STEPS):
        maps, logits = maps_of(mine, data.pixels)
        with torch.no_grad():
            guides, _ = maps_of(teacher.eval(), data.pixels)
        terms = []
        for s, t in zip(maps, guides, strict=True):
            units = [F.normalize(x.pow(2).sum(1).flatten(1)) for x in (s, t)]
            terms.append((units[0] - units[1]).pow(2).mean())
        descend(0.5 * F.cross_entropy(logits, data.labels) + 0.5 * 1000 * sum(terms), mine)
    assert close(trained(tmp_path, "at", student, teacher).model, mine)


def test_fitnets_step_by_step(tmp_path):
    data, teacher, student = TinyImages(), resnet(1, depth=14, width=6), resnet(2)
    mine = copy.deepcopy(student).train()
    torch.manual_seed(42)  # the arguments' seed
    regress = regressor(8, 12).train()
    for _ in range(STEPS):
        maps, logits = maps_of(mine, data.pixels)
        with torch.no_grad():
            guides, _ = maps_of(teacher.eval(), data.pixels)
        hint = (regress(maps[1]) - guides[1]).pow(2).mean()
        descend(0.5 * F.cross_entropy(logits, data.labels) + 0.5 * 100 * hint, mine, regress)
    trainer = trained(tmp_path, "fitnets", student, teacher)
    assert close(trainer.model, mine)
    assert close(trainer.distiller.extras, torch.nn.ModuleList([regress]))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mutual_learning_step_by_step(tmp_path, smoothing):
    data, student, peer = TinyImages(), tiny_vit(2), tiny_vit(3)
    mine, other = copy.deepcopy(student).train(), copy.deepcopy(peer).train()
    for _ in range(STEPS):
        logits, others = (model(pixel_values=data.pixels).logits for model in (mine, other))
        p, q = logits.softmax(-1), others.softmax(-1)
        for_me = (q.detach() * (q.detach().log() - p.log())).sum(-1).mean()
        for_other = (p.detach() * (p.detach().log() - q.log())).sum(-1).mean()
        smoothed = (1 - smoothing) * F.one_hot(data.labels, p.shape[1]) + smoothing / p.shape[1]
        descend(-0.5 * (smoothed * p.log()).sum(-1).mean() + 0.5 * for_me, mine)
        descend(-0.5 * (smoothed * q.log()).sum(-1).mean() + 0.5 * for_other, other)
    trainer = trained(tmp_path, "dml", student, peer, label_smoothing_factor=smoothing)
    assert close(trainer.model, mine) and close(trainer.distiller.peer, other)


def test_a_peer_that_is_the_student_stays_the_student(tmp_path):
    """So it has the student's optimizer, schedule, weight decay and clipping."""
    settings = {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.01,
        "learning_rate": 0.01,
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
    }
    trainer = trained(tmp_path, "dml", tiny_vit(2), tiny_vit(2), **settings)
    assert not close(trainer.model, tiny_vit(2))
    assert torch.allclose(weights_of(trainer.model), weights_of(trainer.distiller.peer), atol=1e-6)


def test_curriculum_temperature_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum_temperature, "RAMP", 0.9)  # so that λ moves within three steps
    data, student, teachers = TinyImages(), tiny_vit(2), [tiny_vit(5), tiny_vit(6)]
    for teacher in teachers:
        teacher.classifier.weight.data *= 100  # who is sure of something gives the temperature something to learn
    mine, place = copy.deepcopy(student).train(), torch.ones((), requires_grad=True)
    with torch.no_grad():
        answers = [teacher.eval()(pixel_values=data.pixels).logits for teacher in teachers]
    for step in range(STEPS):
        strength = 0.5 * (1 - math.cos(math.pi * min(step / STEPS / 0.9, 1)))
        logits = mine(pixel_values=data.pixels).logits
        temperature = 1 + 20 / (1 + torch.exp(-place))
        target = sum((answer / temperature).softmax(-1) for answer in answers) / 2
        kl = (target * (target.log() - (logits / temperature).log_softmax(-1))).sum(-1).mean() * temperature**2
        (upwards,) = torch.autograd.grad(kl, [place], retain_graph=True)
        descend(0.1 * F.cross_entropy(logits, data.labels) + 0.9 * kl, mine)
        place.data += RATE * strength * 0.9 * upwards
    trainer = trained(tmp_path, "ctkd", student, teachers, alpha=0.9)
    assert close(trainer.model, mine)
    learned = trainer.distiller.global_temperature.place
    assert learned.item() == pytest.approx(place.item(), abs=1e-6) and abs(place.item() - 1) > 1e-4
    assert trainer.distiller.temperature == pytest.approx(1 + 20 * torch.sigmoid(place).item(), abs=1e-4)


def test_the_printed_loss_teaches_less_the_higher_the_temperature(tmp_path):
    """alpha KL + (1 - alpha) CE, and nothing that makes up for T."""
    student, teacher, data = tiny_vit(2), tiny_vit(3), TinyImages()
    mine = copy.deepcopy(student)
    with torch.no_grad():
        target = (teacher.eval()(pixel_values=data.pixels).logits / 3).softmax(-1)
    for _ in range(STEPS):
        logits = mine(pixel_values=data.pixels).logits
        kl = (target * (target.log() - (logits / 3).log_softmax(-1))).sum(-1).mean()
        descend(0.3 * F.cross_entropy(logits, data.labels) + 0.7 * kl, mine)
    trainer = trained(tmp_path, "as-printed", student, [teacher], alpha=0.7, temperature=3.0)
    assert close(trainer.model, mine)


@pytest.mark.parametrize("name", ["ctkd", "fitnets", "dml", "at"])
def test_a_resumed_run_ends_the_same(tmp_path, name):
    def run(folder, resume=None):
        maps = name in ("fitnets", "at")
        student, teacher = (resnet(2), resnet(1, depth=14)) if maps else (tiny_vit(2), tiny_vit(3))
        settings = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 6, "per_device_train_batch_size": 16}
        settings |= {"save_strategy": "steps", "save_steps": 3, "resume": resume}
        return trained(folder, name, student, teacher, **settings)

    whole, resumed = run(tmp_path / "a"), run(tmp_path / "b", str(tmp_path / "a" / "run" / "checkpoint-3"))
    assert torch.equal(weights_of(whole.model), weights_of(resumed.model))
    if whole.distiller.extras is not None:
        assert torch.equal(weights_of(whole.distiller.extras), weights_of(resumed.distiller.extras))


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_stages_are_read_and_left_alone_afterwards():
    model = resnet(1).eval()
    reader = StageReader(model)
    pixels = TinyImages().pixels
    model(pixel_values=pixels)
    for found, expected in zip(reader.read(), maps_of(model, pixels)[0], strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    reader.close()
    assert not any(stage._forward_hooks for stage in stages(model))
    assert [channels(stage) for stage in stages(model)] == [4, 8, 16]


def test_models_without_stages_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ViTForImageClassification has none. Leave the methods fitnets and at out"):
        trained(tmp_path, "at", tiny_vit(1), resnet(1))


def test_stored_outputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs teacher_outputs=live"):
        trained(tmp_path, "at", resnet(1), resnet(2), teacher_outputs="full")


def test_fp16_is_refused_where_something_is_trained_beside_the_student():
    """Its gradients would be cut while they are scaled."""
    scaled = SimpleNamespace(args=SimpleNamespace(fp16=True))
    with pytest.raises(ValueError, match="fp16 scales gradients"):
        Baseline.own_extras(scaled, torch.nn.Linear(1, 1))


def test_a_peer_is_alone(tmp_path):
    with pytest.raises(ValueError, match="one peer in the teacher's place, got 2"):
        trained(tmp_path, "dml", tiny_vit(1), [tiny_vit(2), tiny_vit(3)])
