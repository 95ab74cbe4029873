"""The run record: written whole or not at all, read back the same, and silent about the machine."""

import getpass
import json
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from hf_hpmkd.run_environment import environment
from hf_hpmkd.run_record import ModelRecord, RunRecord, TeacherRecord, hide_paths

# A file of format 1, as written. It stays as it is: later versions must go on reading it.
FORMAT_1 = """{
 "format_version": 1, "status": "completed", "recipe": {"data": {"path": "sklearn:digits"}}, "recipe_fingerprint": "f0",
 "seed": 3, "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:01:00Z", "versions": {"python": "3.11.7"},
 "hardware": {"cpu": "a cpu", "cores": 2, "gpus": []}, "commits": {"data": null},
 "parts": {"kind": "sklearn", "parts": {"test": {"split": "train", "rows": 360, "how": "stratified"}}},
 "teachers": [{"name": "big", "source": "mlp-256", "kind": "transformers", "num_params": 1000, "trained_here": true,
   "license": null, "commit": null, "accuracy": {"test": 0.96}, "calibration_temperature": 1.2, "mean_weight": 1.0,
   "latency_ms": 0.5, "seconds": 12.5, "warnings": []}],
 "models": {"student": {"name": "student", "num_params": 100, "metrics": {"test": {"accuracy": 0.9}},
   "retention": 0.9375, "compression": 10.0, "seconds": 3, "latency_ms": 0.2}},
 "curves": {"student": [{"step": 10, "loss": "NaN", "temperature": 4.0}]}, "class_weights": [[1.0, 1.0]],
 "class_names": ["a", "b"], "seconds": {"data": 0.5}, "warnings": ["w"], "events": [{"time": "t", "text": "e"}],
 "error": null
}"""


@pytest.fixture
def record():
    return RunRecord.from_dict(json.loads(FORMAT_1))


def test_a_file_of_format_1_is_read(record):
    assert record.teachers[0] == TeacherRecord(
        "big", "mlp-256", "transformers", 1000, True, None, None, {"test": 0.96}, 1.2, 1.0, 0.5, 12.5, []
    )
    assert record.models["student"].accuracy() == 0.9
    assert record.num_rows("test") == 360 and record.num_rows("guide") is None
    assert math.isnan(record.curves["student"][0]["loss"])


def test_saving_and_loading_changes_nothing(record, tmp_path):
    record.curves["student"] = [{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 0.1}]
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_the_file_is_strict_json(record, tmp_path):
    record.save(tmp_path / "record.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    tree = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert list(tree)[0] == "format_version"


def test_numbers_of_numpy_are_stored_as_numbers(record, tmp_path):
    record.seconds["data"] = np.float32(0.5)
    record.class_weights = np.full((1, 2), 0.25)
    record.save(tmp_path / "record.json")
    loaded = RunRecord.load(tmp_path / "record.json")
    assert (loaded.seconds["data"], loaded.class_weights) == (0.5, [[0.25, 0.25]])


@pytest.mark.parametrize("stage", ["replace", "fsync"])
def test_a_save_that_fails_leaves_the_old_file_and_no_litter(record, tmp_path, monkeypatch, stage):
    path = tmp_path / "record.json"
    record.save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, stage, fail)
    record.status = "failed"
    with pytest.raises(OSError, match="disk full"):
        record.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_back_is_not_saved(record, tmp_path):
    path = tmp_path / "record.json"
    record.save(path)
    record.status = "finished"
    with pytest.raises(ValueError, match="status: Input should be 'running', 'completed'"):
        record.save(path)
    record.status = "completed"
    record.recipe["where"] = Path("x")
    with pytest.raises(TypeError, match=r"record\.recipe\.where.*PosixPath|WindowsPath"):
        record.save(path)
    assert RunRecord.load(path).status == "completed"


def test_the_file_mode_follows_the_umask(record, tmp_path):
    mask = os.umask(0o027)
    try:
        record.save(tmp_path / "record.json")
    finally:
        os.umask(mask)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2, this version of hf_hpmkd reads up to 1. Update"),
        ({"format_version": None}, "whole `format_version`"),
        ({"speed": 1}, "does not know: speed"),
        ({"models": {"student": {"name": "student", "colour": "red"}}}, r"does not know: models\.student\.colour"),
        ({"teachers": [{"name": "x"}]}, r"teachers\.0\.source"),
        ({"seed": "many"}, "seed: Input should be a valid integer"),
        ({"class_weights": [["heavy"]]}, r"class_weights\.0\.0"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(FORMAT_1) | change))
    with pytest.raises(ValueError, match=message):
        RunRecord.load(path)


@pytest.mark.parametrize("content", [FORMAT_1[:200].encode(), b"", b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_file_is_a_clear_error(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json"):
        RunRecord.load(path)


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunRecord.load(tmp_path / "none.json")


def test_ratios_are_relative_to_the_best_and_to_the_largest_teacher():
    small = TeacherRecord("small", "s", "timm", num_params=50, accuracy={"test": 0.8, "validation": 0.1})
    large = TeacherRecord("large", "l", "timm", num_params=400, accuracy={"test": 0.5, "validation": 0.9})
    uncounted = TeacherRecord("forest", "f", "sklearn", accuracy={"guide": 1.0})
    record = RunRecord(teachers=[large, small, uncounted], models={"student": ModelRecord("student", 40)})
    assert record.best_teacher() is small and record.best_teacher("validation") is large
    assert record.retention(0.6) == pytest.approx(0.75)
    assert record.compression(40) == 10
    assert record.compression(None) is None and record.retention(None) is None
    assert RunRecord(teachers=[uncounted]).retention(0.6) is None
    assert RunRecord(teachers=[uncounted]).compression(40) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane/x/data.csv", "data.csv"),
        ("No such file: '/home/Jane Doe/a b/c.bin'.", "No such file: 'c.bin'."),
        ("read (/srv/data/x), then ~/y/z", "read (x), then z"),
        ("C:\\Users\\jane\\m.skops is bad", "m.skops is bad"),
        ("\\\\server\\share\\x", "x"),
        ("file:///home/jane/a.csv", "a.csv"),
        ("../../jane/secret", "secret"),
        ("local-dir:/home/jane/model", "local-dir:model"),
        ("see https://huggingface.co/a/b and hf://x/y/z", "see https://huggingface.co/a/b and hf://x/y/z"),
        ("owner/name on sklearn:digits, and/or 3/4 rows/s", "owner/name on sklearn:digits, and/or 3/4 rows/s"),
        ("http://host:8080/a/b", "http://host:8080/a/b"),
    ],
)
def test_hide_paths(text, expected):
    assert hide_paths(text) == expected


def test_a_public_record_holds_no_path_and_the_private_one_keeps_them(record):
    record.recipe = {"data": {"path": "/home/Jane Doe/my data"}, "output": {"dir": "/mnt/jane/out"}}
    record.teachers[0].source = "/home/jane/teacher.safetensors"
    record.error = "OSError: [Errno 2] No such file: '/home/jane/x'"
    record.warnings = [f"{Path.home()}/some where/file is slow"]
    record.events = [{"time": "t", "text": "saved /home/jane/y"}]
    public = json.dumps(record.public().to_dict())
    assert "jane" not in public.lower() and "/mnt" not in public and str(Path.home()) not in public
    assert record.public().recipe == {"data": {"path": "my data"}, "output": {"dir": "out"}}
    assert record.teachers[0].source == "/home/jane/teacher.safetensors"


def test_the_environment_does_not_tell_which_machine(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr("platform.node", lambda: "secret-host")
    versions, hardware = environment()
    text = json.dumps([versions, hardware])
    assert versions["python"] and versions["torch"]
    assert hardware["cores"] >= 1 and hardware["cpu"] and isinstance(hardware["gpus"], list)
    assert set(hardware) == {"cpu", "cores", "gpus", "system"}
    assert "secret-host" not in text and os.uname().nodename not in text
    assert os.getcwd() not in text and str(Path.home()) + "/" not in text
    if len(getpass.getuser()) > 4:  # shorter ones ("root") may be part of other words
        assert getpass.getuser() not in text


def test_gpu_names_are_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU {index}")
    assert environment()[1]["gpus"] == ["GPU 0", "GPU 1"]
