"""Runs and their memory, small and end to end: what the second finds, says and leaves alone."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import READ_TOKEN, HubServer, Repo, point_client
from safetensors.torch import save_file
from test_teacher_cache import image_rows, teacher

from hf_hpmkd.cli import main
from hf_hpmkd.components.optimization_memory import OptimizationMemory
from hf_hpmkd.recipe import RecipeError, fingerprint, read_recipe, recipe_schema
from hf_hpmkd.run_memory import outputs_folder
from hf_hpmkd.run_record import RunRecord
from hf_hpmkd.teacher_cache import TeacherCache
from hf_hpmkd.trainer import HPMKDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

PLACE = "hf://datasets/tester/shared"


@pytest.fixture(autouse=True)
def no_cache_of_its_own(monkeypatch):
    monkeypatch.delenv("HPMKD_CACHE")


def recipe(folder):
    """Wine, two quick teachers, one epoch."""
    path = folder / "recipe.yaml"
    tree = {
        "data": {"path": "sklearn:wine"},
        "teachers": [{"model": "mlp-8", "epochs": 1}, {"model": "sklearn:LogisticRegression", "folds": 0}],
        "student": {"model": "mlp-2"},
        "distillation": {"direct": False, "gate": "uniform"},
        "training": {"epochs": 1, "batch_size": 64, "evaluations": 1},
        "output": {"dir": str(folder / "run")},
    }
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def distill(folder, *words, name="run", code=0):
    assert main(["distill", recipe(folder), f"output.dir={folder / name}", *words]) == code
    return RunRecord.load(folder / name / "run_record.json")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        point_client(server, monkeypatch, tmp_path)
        yield server


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_second_student_finds_the_teachers_outputs(tmp_path, capsys):
    memory = OptimizationMemory()
    first = distill(tmp_path, name="one")
    said = capsys.readouterr().out
    assert (
        "Memory (local): 0 runs are known." in said
        and "0 of 8 files of teacher outputs were there; 0 of 1 models" in said
    )
    assert first.memory["outputs_computed"] == 8  # two teachers on four parts
    second = distill(tmp_path, "student.model=mlp-3", name="two")
    said = capsys.readouterr().out
    assert "Memory (local): 1 runs are known." in said and "8 of 8 files of teacher outputs were there; " in said
    assert "Teacher outputs to compute" not in said
    assert (second.memory["outputs_found"], second.memory["outputs_computed"]) == (8, 0)
    sizes = [path.stat().st_size for path in memory.outputs_root.glob("*.safetensors")]
    assert second.memory["bytes_saved"] == sum(sizes) and second.memory["seconds_saved"] > 0
    rows, faults = memory.records()
    rows.sort(key=lambda row: row["student"], reverse=True)
    assert not faults and [row["student"] for row in rows] == ["mlp-3", "mlp-2"]
    assert rows[0]["outputs_found"] == 8 and rows[0]["test_accuracy"] == second.models["student"].accuracy()
    for row in rows:  # the student lies beside its record
        assert (memory.find_model(row["id"]) / "model.safetensors").is_file()
    assert "tabular.py" not in {path.name for path in memory.find_model(rows[0]["id"]).iterdir()}


def test_a_run_may_push_its_student(hub, tmp_path, capsys, monkeypatch):
    words = ["hub.push=true", "hub.repo_id=tester/student", "hub.license=apache-2.0"]
    distill(tmp_path, *words)
    assert "tester/student" in capsys.readouterr().out
    files = hub.files("tester/student")
    assert {"README.md", "config.json", "model.safetensors", "run_record.json", "tabular.py"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "run/student/model.safetensors").read_bytes()
    assert hub.repos["models", "tester/student"].private
    assert b"\nlicense: apache-2.0\n" in files["README.md"]
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    assert main(["distill", recipe(tmp_path), f"output.dir={tmp_path / 'two'}", *words]) == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "two").exists() and len(hub.requests) == asked, "told before anything is done"


def test_a_network_that_teaches_is_trained_once(tmp_path, capsys, monkeypatch):
    trainings = []
    train = HPMKDTrainer.train

    def counted(self, *args, **kwargs):
        trainings.append(Path(self.args.output_dir).parent.name)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(HPMKDTrainer, "train", counted)
    first = distill(tmp_path, name="one")
    assert trainings == ["mlp-8", "student"] and first.memory["models_found"] == 0
    trainings.clear()
    capsys.readouterr()
    second = distill(tmp_path, "student.model=mlp-3", "distillation.alpha=0.5", name="two")
    said = capsys.readouterr().out
    assert "Teacher mlp-8 was trained before and is in the memory." in said and "1 of 1 models were there" in said
    assert trainings == ["student"] and second.memory["models_found"] == 1
    assert second.memory["model_seconds_saved"] == pytest.approx(second.teachers[0].seconds, abs=1e-3) != 0
    assert second.teachers[0].accuracy == first.teachers[0].accuracy
    weights = [(tmp_path / run / "teachers/mlp-8/model.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] == weights[1]
    trainings.clear()
    distill(tmp_path, "training.seed=1", name="three")
    assert trainings == ["mlp-8", "student"]


_IMAGES = ("data.path=sklearn:digits", "data.max_train_rows=96", 'teachers=[{"model":"cifar-resnet-8x4","epochs":1}]')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "students", "files", "here"),  # here: files that the first process computes at least
    [((), ("mlp-2", "mlp-3"), 8, 1), (_IMAGES, ("cifar-resnet-8x2", "cifar-resnet-8x3"), 9, 0)],
)
def test_two_launched_processes_use_one_memory(tmp_path, words, students, files, here):
    """Each run in two processes that share its rows out; the second finds what the first one left. A network whose
    batch statistics differ from process to process has one name and one answer in both.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m", "hf_hpmkd", "distill"]
    records = []
    for name, student in zip(("one", "two"), students, strict=True):
        asked = [recipe(tmp_path), f"output.dir={tmp_path / name}", f"student.model={student}", *words]
        done = subprocess.run([*launch, *asked], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Remembered as") == 1
        records.append(RunRecord.load(tmp_path / name / "run_record.json"))
    memory = OptimizationMemory()
    assert len(memory.records()[0]) == 2 and not memory.faults()
    assert len(memory.known_names()["outputs"]) == files and not list((memory.root / ".jobs").iterdir())
    assert records[0].memory["outputs_computed"] >= here
    assert records[0].memory["outputs_found"] + records[0].memory["outputs_computed"] == files
    assert records[0].memory["models_computed"] == 1
    assert (records[1].memory["outputs_found"], records[1].memory["models_found"]) == (files, 1)


def test_a_folder_of_outputs_alone_is_taken_in(tmp_path, monkeypatch, capsys):
    """As runs left them before there was a memory, or with $HPMKD_CACHE."""
    old = tmp_path / "old cache"
    with monkeypatch.context() as patch:
        patch.setenv("HPMKD_CACHE", str(old))
        distill(tmp_path, "--no-memory", name="one")
    (old / "notes.txt").write_text("mine")
    assert main(["memory", "merge", str(old)]) == 0
    assert "0 runs, 0 models, 8 files of outputs are new" in capsys.readouterr().out
    assert len(list(old.glob("*.safetensors"))) == 8, "it is read alone"
    record = distill(tmp_path, "student.model=mlp-3", name="two")
    assert (record.memory["outputs_found"], record.memory["outputs_computed"]) == (8, 0)


def test_a_run_is_remembered_once_even_if_it_was_stopped_before(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(OptimizationMemory, "add_record", lambda self, row: (_ for _ in ()).throw(OSError("disk full")))
        record = distill(tmp_path)
    assert record.status == "completed"
    assert "could not be remembered: disk full" in capsys.readouterr().out
    assert not OptimizationMemory().records()[0]
    for _ in range(2):  # the same command completes it
        distill(tmp_path)
    assert len(OptimizationMemory().records()[0]) == 1
    assert capsys.readouterr().out.count("Remembered as") == 1


def test_without_memory_nothing_of_it_is_touched(tmp_path):
    memory = OptimizationMemory()
    record = distill(tmp_path, "--no-memory")
    assert record.memory == {} and not memory.root.exists()
    assert len(list((tmp_path / "run" / "teacher_outputs").glob("*.safetensors"))) == 8


def test_a_memory_elsewhere(tmp_path):
    distill(tmp_path, "--memory", str(tmp_path / "mine"))
    mine = OptimizationMemory(tmp_path / "mine")
    assert len(mine.records()[0]) == 1 and len(mine.known_names()["outputs"]) == 8
    assert not OptimizationMemory().root.exists()


def test_a_memory_that_cannot_be_written_stops_no_run(tmp_path, capsys):
    (tmp_path / "mine").write_text("a file")
    record = distill(tmp_path, "--memory", str(tmp_path / "mine"))
    assert record.status == "completed" and record.memory == {}
    assert "cannot be used" in capsys.readouterr().out


def test_strange_records_are_named_and_stop_no_run(tmp_path, capsys):
    records = OptimizationMemory().root / "records"
    records.mkdir(parents=True)
    (records / "evil\x1b[2J.parquet").write_bytes(b"x")
    (records / f"{1:064x}.parquet").symlink_to(records / f"{1:064x}.parquet")
    assert distill(tmp_path).status == "completed"
    said = capsys.readouterr().out
    assert "its name is not that of a record; skipped." in said and "\x1b" not in said
    assert f"Memory: records/{1:064x}.parquet: [Errno" in said
    assert main(["memory", "ls"]) == 0


def test_a_limit_evicts_after_the_run_but_nothing_it_uses(tmp_path, capsys):
    distill(tmp_path, "memory.limit_gb=0")
    assert "above its limit, all in use by running jobs" in capsys.readouterr().out
    assert len(OptimizationMemory().known_names()["outputs"]) == 8
    assert main(["memory", "gc", "--limit-gb", "0"]) == 0
    assert not OptimizationMemory().known_names()["outputs"]
    assert len(OptimizationMemory().records()[0]) == 1


# ---- shared runs -----------------------------------------------------------------------------------------------------


def test_a_shared_run_is_one_commit_and_the_next_knows_it(tmp_path, hub, capsys, monkeypatch):
    distill(tmp_path, "--memory", PLACE, name="one")
    repo = hub.repos["datasets", "tester/shared"]
    assert repo.private and len(repo.commits) == 2
    names = {path.split("/")[0] for path in hub.files("tester/shared", "datasets")}
    assert names == {".gitattributes", "README.md", "records", "models"}, "outputs stay here unless asked for"
    capsys.readouterr()
    monkeypatch.setenv("HPMKD_MEMORY", str(tmp_path / "another machine"))
    distill(tmp_path, "--memory", PLACE, "student.model=mlp-3", "memory.share_outputs=true", name="two")
    said = capsys.readouterr().out
    assert f"Memory: 1 new records from {PLACE}." in said and f"Memory ({PLACE}): 1 runs are known." in said
    assert len(repo.commits) == 3
    assert len([path for path in hub.files("tester/shared", "datasets") if path.startswith("teacher_outputs/")]) == 8
    monkeypatch.setenv("HPMKD_MEMORY", str(tmp_path / "a third machine"))
    record = distill(tmp_path, "--memory", PLACE, "student.model=mlp-4", name="three")
    assert record.memory["outputs_found"] == 8 and record.memory["outputs_computed"] == 0
    assert f"[`{PLACE}`](https://huggingface.co/datasets/tester/shared)" in (tmp_path / "three/README.md").read_text()


def test_a_hub_that_is_ill_loses_no_run_and_push_completes_it(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setattr("hf_hpmkd.memory_hub._ILL_TRIES", 0)
    hub.fail("POST", "/commit/", status=503, times=1)
    assert distill(tmp_path, "--memory", PLACE).status == "completed"
    said = capsys.readouterr().out
    assert "cannot take it at present (503)" in said and "could not be remembered" not in said
    command = re.search(r"Add it later with:  hpmkd (.*)", said)[1].split()
    assert main(command) == 0
    [row] = OptimizationMemory().records()[0]
    files = hub.files("tester/shared", "datasets")
    assert f"records/{row['id']}.parquet" in files and f"models/{row['id']}/config.json" in files


@pytest.mark.parametrize("token", [None, READ_TOKEN])
def test_a_missing_or_read_only_token_stops_no_run(tmp_path, hub, capsys, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        hub.repos["datasets", "tester/shared"] = Repo(private=True)
        monkeypatch.setenv("HF_TOKEN", token)
    assert distill(tmp_path, "--memory", PLACE).status == "completed"
    said = capsys.readouterr().out
    assert ("refused the token (403)" if token else "needs a Hub token") in said
    assert f"hpmkd memory push tester/shared {OptimizationMemory().records()[0][0]['id'][:16]}" in said
    everything = said + "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*.json"))
    assert READ_TOKEN not in everything


# ---- outputs from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def merged(tmp_path):
    """A memory that took another's outputs of a teacher in, and what it said."""
    rows, one = image_rows(), teacher()
    other = OptimizationMemory(tmp_path / "other")
    TeacherCache(other.outputs_root).outputs([one], rows, 0, progress=False)
    said = []
    memory = OptimizationMemory(tmp_path / "memory", on_message=said.append)
    memory.merge(other.root)
    [path] = (memory.root / "unchecked").iterdir()
    return memory, path, rows, one, said


def test_outputs_from_elsewhere_are_used_once_they_are_checked(merged):
    memory, path, rows, one, said = merged
    cache = TeacherCache(memory.outputs_root, source=memory)
    outputs = cache.outputs([one], rows, 0, progress=False)
    assert (outputs.hits, outputs.misses) == (1, 0) and not said
    assert not path.exists() and (memory.outputs_root / path.name).exists()
    everything = torch.arange(len(rows))
    found = outputs.lookup(everything, torch.full_like(everything, -1))[0]
    assert torch.allclose(found, one.logits(rows, everything).cpu(), atol=1e-2)


@pytest.mark.parametrize("full", [False, True])
def test_outputs_from_elsewhere_reach_a_folder_on_another_disk(merged, tmp_path, monkeypatch, full):
    memory, path, rows, one, said = merged
    replace, copy = os.replace, shutil.copyfile

    def on_two_disks(source, target):
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    def until_full(source, target):
        copy(source, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", on_two_disks)
    monkeypatch.setattr(os, "rename", on_two_disks)
    cache = TeacherCache(tmp_path / "elsewhere", source=memory)
    if full:
        monkeypatch.setattr(shutil, "copyfile", until_full)
        with pytest.warns(UserWarning, match="No space left on device. They are computed again"):
            assert cache.outputs([one], rows, 0, progress=False).hits == 0
        assert path.exists()
    else:
        assert cache.outputs([one], rows, 0, progress=False).hits == 1
        assert not path.exists()
    assert [file.name for file in cache.root.iterdir() if file.suffix != ".lock"] == [path.name] and not said


def forge(path, change):
    """Rewrites a file with other tensors and the checksum that fits them."""
    from safetensors import safe_open

    from hf_hpmkd.teacher_output_file import _checksum

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        tensors = {"logits": opened.get_tensor("logits").clone()}
    tensors["logits"] = change(tensors["logits"])
    metadata["checksum"] = _checksum(metadata["fields"], metadata["about"], tensors)
    save_file(tensors, path, metadata=metadata)


FORGERIES = {
    "other answers": (lambda logits: logits.flip(1), "answers .* rows otherwise"),
    "a third of the rows": (lambda logits: torch.where(torch.arange(len(logits))[:, None] % 3 == 0, -logits, logits),
                            "answers .* rows otherwise"),
    "sharper": (lambda logits: logits * 3, "answers .* rows otherwise"),
    "NaN": (lambda logits: logits * torch.nan, "they hold NaN"),
    "other shape": (lambda logits: logits[:, :-1].contiguous(), "other shapes"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_outputs_are_refused_named_and_computed(merged, name):
    memory, path, rows, one, said = merged
    change, told = FORGERIES[name]
    forge(path, change)
    outputs = TeacherCache(memory.outputs_root, source=memory).outputs([one], rows, 0, progress=False)
    assert (outputs.hits, outputs.misses) == (0, 1)
    assert re.search(told, said[0]) and len(said) == 1
    assert not path.exists()


@pytest.mark.parametrize("harm", ["cut", "not safetensors", "other key", "no metadata", "deep"])
def test_broken_outputs_from_elsewhere_are_refused(merged, harm):
    memory, path, rows, one, said = merged
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif harm == "not safetensors":
        path.write_bytes(b"\x80\x04cos\nsystem\n")
    elif harm == "other key":
        content = path.read_bytes()
        path.write_bytes(content.replace(b'\\"view\\": -1', b'\\"view\\": -2'))
        assert path.read_bytes() != content
    elif harm == "no metadata":
        save_file({"logits": torch.zeros(2, 2)}, path)
    else:
        save_file({"logits": torch.zeros(2, 2)}, path, metadata={"fields": "[" * 99999, "about": "[", "checksum": "x"})
    outputs = TeacherCache(memory.outputs_root, source=memory).outputs([one], rows, 0, progress=False)
    assert (outputs.hits, outputs.misses) == (0, 1) and len(said) == 1, said


# ---- the recipe ------------------------------------------------------------------------------------------------------

SOUND = {"data": {"path": "sklearn:wine"}, "teachers": [{"model": "mlp-8"}], "student": {"model": "mlp-2"}}


def test_the_memory_of_a_recipe_changes_no_result():
    plain = read_recipe(SOUND, "x")
    assert plain.memory.use and plain.memory.path is None and not plain.memory.share_outputs
    short = read_recipe({**SOUND, "memory": PLACE}, "x")
    assert short.memory.path == PLACE and fingerprint(short) == fingerprint(plain)
    assert recipe_schema()["properties"]["memory"]["anyOf"]
    with pytest.raises(RecipeError, match="memory.path: a shared memory is a dataset repository"):
        read_recipe({**SOUND, "memory": "hf://models/a/b"}, "x")
    with pytest.raises(RecipeError, match="memory.limit_gb"):
        read_recipe(SOUND, "x", ["memory.limit_gb=-1"])


def test_where_the_outputs_lie(monkeypatch, tmp_path):
    def folder(*words):
        return outputs_folder(read_recipe(SOUND, "x", [*words, "output.dir=out"]))

    root = Path(os.environ["HPMKD_MEMORY"])
    assert folder() == folder(f"memory.path={PLACE}") == root / "teacher_outputs"
    assert folder("memory.path=mine") == Path("mine/teacher_outputs")
    assert folder("memory.use=false") == Path("out/teacher_outputs")
    monkeypatch.setenv("HPMKD_CACHE", "chosen")
    assert folder() == folder("memory.use=false") == folder("memory.path=mine") == Path("chosen")
    assert folder("distillation.cache_dir=elsewhere") == Path("elsewhere")


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, hub, capsys):
    distill(tmp_path, name="one")
    distill(tmp_path, "student.model=mlp-3", name="two")
    known = {row["student"]: row for row in OptimizationMemory().records()[0]}
    one, two = known["mlp-2"], known["mlp-3"]

    def said(*words, code=0):
        capsys.readouterr()
        assert main(["memory", *words]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    listed = said("ls").splitlines()
    # The last one first, but both may end within a second, which is all that records tell.
    assert {line.split()[0] for line in listed[1:3]} == {two["id"][:12], one["id"][:12]}
    assert "2 runs, 3 models, 8 files of outputs" in listed[3]
    shown = said("show", one["id"][:8])
    assert one["id"] in shown and "student: mlp-2" in shown and "model.safetensors" in shown
    assert "begins none" in said("show", "zzz", code=2)
    assert "13 records, models and files of outputs checked, all sound" in said("verify")
    stats = said("stats")
    assert "runs: 2" in stats and "teacher outputs found: 8 of 16 (50%)" in stats and "spared: " in stats
    assert "1 runs, 1 models, 0 files" in said("push", "tester/shared", one["id"][:16])
    assert "2 runs, 3 models, 8 files" in said("push", PLACE, "--models", "--outputs")
    assert "begins with zzz" in said("push", PLACE, "zzz", code=2)
    elsewhere = ["--memory", str(tmp_path / "elsewhere")]
    assert "2 runs, 0 models, 0 files of outputs are new from hf://" in said("pull", PLACE, *elsewhere)
    assert "0 runs, 3 models, 8 files" in said("pull", PLACE, "--models", "--outputs", *elsewhere)
    assert "0 runs, 0 models, 0 files" in said("merge", str(OptimizationMemory().root), *elsewhere)
    assert "0 files and models deleted" in said("gc")
    assert "11 files and models deleted" in said("gc", "--limit-gb", "0", *elsewhere)
    assert "must be a number from 0 on, got -1" in said("gc", "--limit-gb", "-1", code=2)
    path = next(OptimizationMemory().outputs_root.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert f"teacher_outputs/{path.name}" in said("verify", code=2)


def test_the_commands_of_an_empty_memory(capsys):
    for words in (["ls"], ["verify"], ["stats"], ["gc"]):
        assert main(["memory", *words]) == 0
    assert "No runs are remembered yet." in capsys.readouterr().out
    assert not OptimizationMemory().root.exists(), "looking makes nothing"


def test_memory_and_no_memory_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["distill", recipe(tmp_path), "--memory", "x", "--no-memory"])
    assert "not allowed with" in capsys.readouterr().err
