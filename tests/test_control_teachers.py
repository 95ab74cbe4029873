"""Spoiled teachers: what they answer, and that nothing mistakes them for the real ones."""

import pytest
import torch

from hf_hpmkd.classifiers import build_classifier
from hf_hpmkd.control_teachers import CONTROLS, ControlTeacher
from hf_hpmkd.data import load_parts
from hf_hpmkd.data_config import DataConfig
from hf_hpmkd.tasks.base import UNAUGMENTED
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.teacher_kinds import TorchTeacher

ROWS = torch.arange(40)


@pytest.fixture(scope="module")
def parts():
    config = DataConfig(path="sklearn:digits", augmentation="crop", views=3, max_train_rows=40)
    return load_parts(config, teachers_saw_train=False)


@pytest.fixture
def teacher(parts):
    built = build_classifier("cifar-resnet-8x4", parts.train, seed=0)
    return TorchTeacher.of("net", built, parts.train)


def spoiled(teacher, how, tmp_path):
    return ControlTeacher(teacher, how, 3, TeacherCache(tmp_path / "cache"))


@pytest.mark.parametrize("view", [UNAUGMENTED, 2])
def test_what_they_answer(parts, teacher, tmp_path, view):
    views = torch.full_like(ROWS, view)
    real = teacher.logits(parts.train, ROWS, views)
    answers = {how: spoiled(teacher, how, tmp_path).logits(parts.train, ROWS, views) for how in CONTROLS}
    assert bool((answers["constant"] == answers["constant"][0, 0]).all())
    assert torch.allclose(answers["permuted"][:, 1:], real[:, :-1], atol=0.02)  # half precision on disk
    assert torch.allclose(answers["permuted"][:, 0], real[:, -1], atol=0.02)
    distances = torch.cdist(answers["shuffled"], real)
    nearest = distances.argmin(1)
    assert float(distances.min(1).values.max()) < 0.05
    assert sorted(nearest.tolist()) == ROWS.tolist() and not bool((nearest == ROWS).any())


def test_a_part_of_the_rows_is_answered_as_the_whole(parts, teacher, tmp_path):
    control = spoiled(teacher, "shuffled", tmp_path)
    assert torch.equal(control.logits(parts.train, ROWS)[10:20], control.logits(parts.train, ROWS[10:20]))


def test_their_outputs_are_files_of_their_own(parts, teacher, tmp_path):
    everyone = [teacher, *(spoiled(teacher, how, tmp_path) for how in CONTROLS)]
    assert len({str(one.identity(parts.train)) for one in everyone}) == 4
    assert len({one.fingerprint for one in everyone}) == 4
    stored = TeacherCache(tmp_path / "cache").outputs(everyone, parts.train, 3, progress=False)
    views = torch.zeros_like(ROWS)
    for one, found in zip(everyone, stored.lookup(ROWS, views), strict=True):
        assert torch.allclose(found, one.logits(parts.train, ROWS, views), atol=0.02), one.name


def test_the_order_of_classes_is_the_datas(parts, tmp_path):
    """A teacher whose outputs stand in another order is put into the data's before its classes are exchanged."""
    built = build_classifier("cifar-resnet-8x4", parts.train, seed=0)
    names = parts.class_names[::-1]
    teacher = TorchTeacher(built.model, built.feed, name="net", data_names=parts.class_names, class_names=names)
    real, permuted = (one.logits(parts.train, ROWS) for one in (teacher, spoiled(teacher, "permuted", tmp_path)))
    assert torch.allclose(permuted, real.roll(1, dims=1), atol=0.02)


def test_other_ways_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="must be one of constant, shuffled, permuted, got 'bad'"):
        spoiled(teacher, "bad", tmp_path)
