"""The memory in a folder: append-only and content-named, whole after any stop, small without taking what is in use."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import load_dataset
from filelock import Timeout
from memory_rows import row

from hf_hpmkd import memory_files, memory_index, memory_records
from hf_hpmkd.cli import main
from hf_hpmkd.components.optimization_memory import OptimizationMemory, default_outputs_root
from hf_hpmkd.memory_records import SCHEMA, BadRecordError, memory_row, read_row, row_bytes, row_id
from hf_hpmkd.run_record import RunRecord

RUNS = sorted((Path(__file__).parents[1] / "model_cards" / "runs").glob("*.json"))


@pytest.fixture
def memory(tmp_path):
    return OptimizationMemory(tmp_path / "memory")


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "a model"
    tiny.tiny_vit().save_pretrained(folder)
    (folder / "stage.json").write_text('{"accuracy": 0.5}')
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


def outputs_file(memory, number, nbytes=1000, folder=None, age=0):
    """A file with the name of teacher outputs, last used `age` seconds ago."""
    folder = folder or memory.outputs_root
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:064x}.safetensors"
    path.write_bytes(b"x" * nbytes)
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_published_run_is_remembered_as_it_was(memory, path):
    record = RunRecord.load(path)
    memory.add_record(memory_row(record))
    [found], faults = memory.records()
    assert not faults
    assert found == memory_row(record)
    assert found["test_accuracy"] == record.models["student"].accuracy()
    assert found["direct_test_accuracy"] == record.models["direct"].accuracy()
    assert found["retention"] == record.models["student"].retention
    assert found["train_rows"] == record.num_rows("train") and found["classes"] == len(record.class_names)
    assert found["alpha"] == record.recipe["distillation"]["alpha"] and found["seed"] == record.seed
    assert json.loads(found["configuration"])["data"] == record.recipe["data"]
    assert [one["accuracy"] for one in json.loads(found["teachers"])] == [one.accuracy for one in record.teachers]


def test_records_tell_no_path_and_are_small(memory):
    memory.add_record(row())
    [path] = (memory.root / "records").iterdir()
    assert "/home" not in json.dumps(memory.records()[0])
    assert path.stat().st_size < 40_000


def test_only_completed_runs_are_remembered():
    with pytest.raises(ValueError, match="Only completed runs .* status failed"):
        row(status="failed")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_place_on_the_hub_is_no_folder(kind, monkeypatch, capsys):
    place = "hf://datasets/user/name"
    with pytest.raises(ValueError, match=f"got {place}. A run uses .* `memory.path` .* `hpmkd memory pull`"):
        OptimizationMemory(kind(place))
    assert main(["memory", "ls", "--memory", place]) == 2 and place in capsys.readouterr().err
    monkeypatch.setenv("HPMKD_MEMORY", place)
    monkeypatch.delenv("HPMKD_CACHE")
    with pytest.raises(ValueError, match=r"\$HPMKD_MEMORY must be a folder of this machine"):
        OptimizationMemory()
    with pytest.raises(ValueError, match=r"\$HPMKD_MEMORY must be a folder of this machine"):
        default_outputs_root()


def test_a_run_is_remembered_once(memory):
    assert memory.add_record(row()) and not memory.add_record(row())
    assert memory.add_record(row(seed=1))
    assert len(memory.records()[0]) == 2


def test_the_folder_is_a_data_set(memory):
    for seed in range(3):
        memory.add_record(row(seed))
    loaded = load_dataset(str(memory.root), split="train", cache_dir=str(memory.root.parent / "cache"))
    assert sorted(loaded["seed"]) == [0, 1, 2]
    assert set(loaded["test_accuracy"]) == {0.8}
    assert loaded.column_names == SCHEMA.names


def write_bad(path, change):
    """A record's file with something wrong, under the name that its id would give it."""
    good = row()
    table = pa.Table.from_pylist([good], schema=SCHEMA)
    if change == "cut":
        path.write_bytes(row_bytes(good)[:-100])
    elif change == "not parquet":
        path.write_bytes(b"PAR1 not at all PAR1")
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "two rows":
        pq.write_table(pa.concat_tables([table, table]), path)
    elif change == "no rows":
        pq.write_table(table.slice(0, 0), path)
    elif change == "other columns":
        pq.write_table(table.append_column("extra", pa.array([1])), path)
    elif change == "other type":
        pq.write_table(table.set_column(0, "format_version", pa.array(["1"])), path)
    elif change == "large":
        path.write_bytes(row_bytes(good) + b"\0" * memory_records.MAX_BYTES)
    elif change == "bomb":
        changed = {**good, "details": "a" * (20 * 2**20)}
        path = path.with_stem(row_id(changed))
        table = pa.Table.from_pylist([{**changed, "id": row_id(changed)}], schema=SCHEMA)
        pq.write_table(table, path, compression="zstd")
        assert path.stat().st_size < memory_records.MAX_BYTES
    elif change == "changed":
        path.write_bytes(row_bytes({**good, "test_accuracy": 0.99}))
    elif change == "NaN":
        path.write_bytes(row_bytes({**good, "test_accuracy": float("nan")}))
    elif change == "newer":
        changed = {**good, "format_version": 2}
        path = path.with_stem(row_id(changed))
        path.write_bytes(row_bytes({**changed, "id": row_id(changed)}))
    elif change == "link":
        target = path.with_name("target")
        target.write_bytes(row_bytes(good))
        path.symlink_to(target)


BAD = {
    "cut": "cannot be read",
    "not parquet": "cannot be read",
    "empty": "cannot be read",
    "two rows": "2 rows",
    "no rows": "0 rows",
    "other columns": "columns are not those",
    "other type": "columns are not those",
    "large": "at most 1,048,576 bytes",
    "bomb": "it is compressed",
    "changed": "not those that its name stands for",
    "NaN": "not those that its name stands for",
    "newer": "format 2, this version of hf_hpmkd reads 1",
    "link": "is a link",
}


@pytest.mark.parametrize(("change", "told"), BAD.items(), ids=list(BAD))
def test_a_bad_record_is_skipped_and_named(memory, change, told):
    memory.add_record(row(seed=7))
    write_bad(memory.root / "records" / f"{row()['id']}.parquet", change)
    rows, faults = memory.records()
    assert [one["seed"] for one in rows] == [7]
    assert any(told in fault for fault in faults), faults
    assert memory.faults() == faults


@pytest.mark.parametrize("name", ["x.parquet", "evil\x1b[2Jname", "A" * 64 + ".parquet", "a" * 64 + ".parquet.py"])
def test_a_strange_name_is_skipped_and_shown_escaped(memory, name):
    memory.add_record(row())
    (memory.root / "records" / name).write_bytes(row_bytes(row(seed=1)))
    rows, [fault] = memory.records()
    assert len(rows) == 1
    assert "\x1b" not in fault and len(fault) < 200


def test_a_disk_that_fails_under_records_leaves_the_others(memory, monkeypatch):
    def failing(folder):
        raise OSError(5, "Input/output error")

    memory.add_record(row())
    loop = memory.root / "records" / f"{1:064x}.parquet"
    loop.symlink_to(loop)
    rows, faults = memory.records()
    assert rows == [row()] and len(faults) == 1 and f"records/{loop.name}: " in faults[0]
    monkeypatch.setattr(Path, "iterdir", failing)
    assert memory.records() == ([], ["records: [Errno 5] Input/output error"])


def test_a_record_of_format_1_stays_readable():
    """The file in the repository was written by the first version; it must open for ever."""
    [path] = (Path(__file__).parent / "data").glob("*.parquet")
    assert read_row(path)["seed"] == 0


@pytest.fixture
def many(memory, monkeypatch):
    """A memory of five records that is indexed, and the names of the records that are read one by one from now on."""
    monkeypatch.setattr(memory_index, "MOST_APART", 4)
    for seed in range(5):
        memory.add_record(row(seed))
    memory.records()
    found, read = [], memory_records.read_row
    monkeypatch.setattr(memory_records, "read_row", lambda path: found.append(path.name) or read(path))
    return found


def test_indexed_records_are_read_at_once_and_new_ones_beside(memory, many):
    memory.add_record(row(5))
    rows, faults = memory.records()
    assert many == [row(5)["id"] + ".parquet"] and not faults
    assert sorted(map(row_id, rows)) == sorted(row(seed)["id"] for seed in range(6))
    assert {one["id"]: one for one in rows} == {row(seed)["id"]: row(seed) for seed in range(6)}


def test_a_record_that_was_changed_or_removed_is_not_taken_from_the_index(memory, many):
    first, second = sorted((memory.root / "records").iterdir())[:2]
    first.write_bytes(first.read_bytes().replace(b"mlp-2", b"mlp-3"))
    second.unlink()
    rows, faults = memory.records()
    assert len(rows) == 3 and len(faults) == 1 and first.name in faults[0] and many == [first.name]


@pytest.mark.parametrize("harm", ["empty", "no table", "another table", "a flipped bit"])
def test_without_a_sound_index_there_are_the_records(memory, many, harm):
    index = memory.root / memory_index.NAME
    content = bytearray(index.read_bytes())
    content[len(content) // 8] ^= 1
    other = BytesIO()
    pq.write_table(pa.table({"file_name": ["x"]}), other)
    harmed = {
        "empty": b"",
        "no table": b"no table",
        "another table": hashlib.sha256(other.getvalue()).digest() + other.getvalue(),
        "a flipped bit": content,
    }
    index.write_bytes(harmed[harm])
    assert len(memory.records()[0]) == len(many) == 5
    many.clear()
    assert len(memory.records()[0]) == 5 and not many  # indexed again


def test_an_index_that_is_out_of_date_is_made_anew(memory, many):
    for path in (memory.root / "records").iterdir():
        os.utime(path, (0, 0))
    for reads in (5, 0):
        many.clear()
        assert len(memory.records()[0]) == 5 and len(many) == reads


@pytest.mark.parametrize("error", [OSError(30, "read-only"), Timeout("held")])
def test_where_no_index_can_be_written_there_are_the_records_without_a_word(memory, monkeypatch, error, recwarn):
    monkeypatch.setattr(memory_index, "MOST_APART", 0)
    memory.add_record(row(0))

    def locked(root):
        raise error

    monkeypatch.setattr(memory_files, "lock_all", locked)
    assert len(memory.records()[0]) == 1 and not list(recwarn)
    assert not (memory.root / memory_index.NAME).exists()


def test_a_check_reads_every_record(memory, many):
    assert memory.faults() == [] and len(many) == 5


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_its_key_and_loads(memory, model_folder):
    assert memory.find_model("stage-1") is None
    kept = memory.keep_model("stage-1", model_folder)
    found = memory.find_model("stage-1")
    assert found == kept and found.parent == memory.root / "models"
    again = type(tiny.tiny_vit()).from_pretrained(found)
    assert (tiny.weights_of(again) == tiny.weights_of(tiny.tiny_vit())).all()
    assert json.loads((found / "stage.json").read_text()) == {"accuracy": 0.5}
    assert (memory.models_found, memory.models_computed) == (1, 1)


def test_a_model_that_may_only_be_read_is_used(memory, model_folder, monkeypatch, recwarn):
    kept = memory.keep_model("a", model_folder)

    def refuse(*words, **settings):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert memory.find_model("a") == kept and (memory.models_found, memory.models_computed) == (1, 0)
    assert not list(recwarn)


def test_a_kept_model_is_data_alone(memory, model_folder):
    names = {path.name for path in memory.keep_model("a", model_folder).iterdir()}
    assert names == {"config.json", "model.safetensors", "stage.json", "memory.json"}


def test_the_first_model_of_a_key_stays(memory, model_folder, tmp_path):
    kept = memory.keep_model("a", model_folder)
    other = tmp_path / "other"
    tiny.tiny_vit(seed=5).save_pretrained(other)
    before = (kept / "model.safetensors").read_bytes()
    assert memory.keep_model("a", other) == kept
    assert (kept / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("key", ["", "..", "a/b", "../a", ".hidden", "a b", "a..b", "x" * 129, "a\n"])
def test_a_key_is_one_plain_name(memory, model_folder, key):
    with pytest.raises(ValueError, match="key is up to 128 letters"):
        memory.find_model(key)
    with pytest.raises(ValueError, match="key is up to 128 letters"):
        memory.keep_model(key, model_folder)


def test_a_folder_without_a_model_is_not_kept(memory, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json and .safetensors"):
        memory.keep_model("a", tmp_path)
    assert not (memory.root / "models").exists() and not list((memory.root / ".tmp").iterdir())


@pytest.mark.parametrize("harm", ["flip", "cut", "extra", "missing", "link", "manifest", "outside"])
def test_a_damaged_model_is_removed_and_can_be_made_again(memory, model_folder, harm):
    kept = memory.keep_model("a", model_folder)
    weights, manifest = kept / "model.safetensors", kept / "memory.json"
    content = weights.read_bytes()
    if harm == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        weights.write_bytes(content[:-1])
    elif harm == "extra":
        (kept / "tokenizer.py").write_text("")
    elif harm == "missing":
        (kept / "stage.json").unlink()
    elif harm == "link":
        weights.rename(memory.root / "elsewhere")
        weights.symlink_to(memory.root / "elsewhere")
    elif harm == "manifest":
        manifest.write_text("[" * 10000)
    else:
        manifest.write_text(manifest.read_text().replace("stage.json", "../stage.json"))
    assert len(memory.faults()) == 1
    with pytest.warns(UserWarning, match="The model a .* is damaged"):
        assert memory.find_model("a") is None
    assert memory.keep_model("a", model_folder) == memory.find_model("a")
    assert not memory.faults()


@pytest.mark.parametrize(
    "index",
    ['{"weight_map": {"w": "../../secret.safetensors"}}', '{"weight_map": {"w": "config.json"}}', "[]", "[" * 99999,
     '{"weight_map": {"w": ["model.safetensors"]}}'],
    ids=["outside", "no weights", "other form", "deep", "lists"],
)  # fmt: skip
def test_weights_lie_in_the_models_own_folder(memory, model_folder, index):
    (model_folder / "model.safetensors.index.json").write_text(index)
    memory.keep_model("a", model_folder)
    with pytest.warns(UserWarning, match="model.safetensors.index.json"):
        assert memory.find_model("a") is None


def test_a_model_of_no_use_makes_room_for_the_next(memory, model_folder, tmp_path):
    memory.keep_model("a", model_folder)
    assert memory.find_model("a")
    with pytest.warns(UserWarning, match="The model a of the memory is not used and is removed: it is odd"):
        memory.refuse_model("a", "it is odd")
    assert (memory.models_found, memory.models_computed) == (0, 1)
    other = tmp_path / "other"
    tiny.tiny_vit(seed=5).save_pretrained(other)
    kept = memory.keep_model("a", other)
    assert (kept / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("lost", [".tmp", ".lock", ".jobs", "models", "making"])
def test_a_memory_that_breaks_while_a_run_uses_it_ends_nothing(memory, model_folder, lost):
    memory.limit_bytes = 10**9
    broken = memory.root / lost
    with pytest.warns(UserWarning, match="The memory cannot .* The run goes on without that"), memory.running():
        if broken.is_dir():
            shutil.rmtree(broken)
        broken.unlink(missing_ok=True)
        broken.mkdir() if lost == ".lock" else broken.write_text("a file where a folder should be")
        with memory.making("a"):
            assert memory.find_model("a") is None
            memory.keep_model("a", model_folder)
        memory.use("something")
        memory.make_room(10)


def test_a_model_that_another_run_makes_is_waited_for_or_not(memory):
    order = []

    def wait():
        with OptimizationMemory(memory.root).making("a"):
            order.append("waited for")

    other = threading.Thread(target=wait)
    with memory.making("a"):
        with OptimizationMemory(memory.root).making("a", wait=False), memory.making("b"):
            order.append("not waited for")
        other.start()
        other.join(0.3)  # long enough to go in, if it could
        order.append("made")
    other.join(60)
    assert order == ["not waited for", "made", "waited for"]


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_merging_is_a_union(memory, model_folder, tmp_path):
    other = OptimizationMemory(tmp_path / "other")
    for one, seeds in ((memory, (0, 1)), (other, (1, 2))):
        for seed in seeds:
            one.add_record(row(seed))
    other.keep_model("a", model_folder)
    outputs_file(other, 1)
    outputs_file(memory, 2)
    gained = memory.merge(other.root)
    assert (gained.records, gained.models, gained.outputs, gained.skipped) == (1, 1, 1, [])
    assert {one["seed"] for one in memory.records()[0]} == {0, 1, 2}
    assert memory.find_model("a") is not None
    again = memory.merge(other.root)
    assert (again.records, again.models, again.outputs) == (0, 0, 0)
    other.merge(memory.root)
    assert {one["id"] for one in memory.records()[0]} == {one["id"] for one in other.records()[0]}


def test_outputs_from_elsewhere_wait_to_be_checked(memory, tmp_path):
    other = OptimizationMemory(tmp_path / "other")
    path = outputs_file(other, 1)
    memory.merge(other.root)
    assert not (memory.outputs_root / path.name).exists()
    assert memory.unchecked_outputs(path.name, max_bytes=1000) == memory.root / "unchecked" / path.name
    told = []
    memory.say = told.append
    assert memory.unchecked_outputs(path.name, max_bytes=999) is None
    assert "too large (1,000 bytes)" in told[0]


def test_what_is_hostile_in_a_merged_memory_is_skipped_and_named(memory, model_folder, tmp_path):
    other = OptimizationMemory(tmp_path / "other")
    other.add_record(row(seed=3))
    write_bad(other.root / "records" / f"{row()['id']}.parquet", "changed")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    kept = other.keep_model("a", model_folder)
    manifest = (kept / "memory.json").read_text()
    for name, text in {
        "out": manifest.replace("stage.json", "../../secret"),
        "code": manifest.replace("stage.json", "modeling.py"),
        "huge": manifest.replace('"bytes": 17', '"bytes": 1000000000000'),
        "nested": "[" * 100_000,
    }.items():
        folder = other.root / "models" / name
        folder.mkdir()
        for path in model_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "memory.json").write_text(text)
    linked = other.root / "models" / "linked"
    linked.mkdir()
    (linked / "memory.json").write_text(manifest)
    for name in ("config.json", "model.safetensors", "stage.json"):
        (linked / name).symlink_to(secret)
    (other.root / "models" / "a b").mkdir()
    outputs_file(other, 1).rename(other.outputs_root / "run.sh")
    (other.outputs_root / f"{2:064x}.safetensors").symlink_to(secret)
    (other.outputs_root / f"{3:064x}.lock").touch()
    gained = memory.merge(other.root)
    assert (gained.records, gained.models, gained.outputs) == (1, 1, 0)
    assert len(gained.skipped) == 9, gained.skipped
    told = "\n".join(gained.skipped)
    for word in ("models/out: it names ../../secret", "models/code: it names modeling.py", "models/huge", "models/a b",
                 "is a link", "teacher_outputs/run.sh", "models/nested"):  # fmt: skip
        assert word in told, told
    assert {path.name for path in (memory.root / "models").iterdir()} == {"a"}
    assert not memory.faults()


def test_a_memory_to_merge_must_be_there(memory, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none at"):
        memory.merge(tmp_path / "none")
    (tmp_path / "run" / "student").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="run has none of them"):
        memory.merge(tmp_path / "run")


# ---- the limit -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_and_records_stay(memory, model_folder):
    memory.add_record(row())
    old, older = outputs_file(memory, 1, age=100), outputs_file(memory, 2, age=200)
    kept = memory.keep_model("a", model_folder)
    size = sum(item.nbytes for item in memory.items())
    freed = memory.evict(size - 1)
    assert freed.names == [older.name] and freed.nbytes == 1000 and not older.exists()
    os.utime(kept / "memory.json", (0, 0))
    memory.find_model("a")  # now it is the latest used
    freed = memory.evict(size - 1500)
    assert freed.names == [old.name] and kept.exists()
    assert memory.evict(0).names == ["models/a"]
    assert len(memory.records()[0]) == 1 and not memory.items()


def test_what_a_running_job_uses_is_never_evicted(memory, model_folder):
    path, unused = outputs_file(memory, 1, age=100), outputs_file(memory, 2)
    other = OptimizationMemory(memory.root)  # as another process would see it
    memory.keep_model("a", model_folder)
    with memory.running():
        memory.use(path.name)
        assert memory.find_model("a")
        freed = other.evict(0)
        assert freed.names == [unused.name]
        assert freed.over == sum(item.nbytes for item in other.items()) > 1000
        assert path.exists() and memory.find_model("a")
    assert len(other.evict(0).names) == 2
    assert not list((memory.root / ".jobs").iterdir())


def test_room_is_made_within_the_limit(memory, tmp_path):
    limited = OptimizationMemory(memory.root, limit_bytes=2500)
    paths = [outputs_file(memory, number, age=100 - number) for number in range(2)]
    limited.make_room(500)
    assert all(path.exists() for path in paths)
    limited.make_room(501)
    assert [path.exists() for path in paths] == [False, True]
    with pytest.raises(ValueError, match="`limit_bytes` must be 0 or more, got -1"):
        OptimizationMemory(tmp_path, limit_bytes=-1)


# ---- stopped at any moment -------------------------------------------------------------------------------------------

# Stops itself, as by kill -9, before the n-th call that changes a file; says what it had finished.
STOPPED_AT = """if True:
    import os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    sys.argv[0] = "hpmkd"  # as the command line, which does not load torch at once
    import pandas, pyarrow.compute  # which writing a table loads: here once, not in every child
    from memory_rows import row
    from hf_hpmkd.components.optimization_memory import OptimizationMemory

    root, model = Path(sys.argv[1]), sys.argv[2]
    names = ["replace", "rename", "unlink", "mkdir", "fsync", "rmdir"]
    originals = {name: getattr(os, name) for name in names}
    rows = [row(seed) for seed in range(2)]

    def job(stop_at):
        calls = 0

        def counted(name):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == stop_at:
                    os._exit(9)
                return originals[name](*args, **kwargs)
            return call

        for name in names:
            setattr(os, name, counted(name))
        memory = OptimizationMemory(root / str(stop_at), limit_bytes=10**9)
        with memory.running():
            for row in rows:
                memory.add_record(row)
                os.write(1, f"{stop_at} {row['id']}\\n".encode())
            memory.keep_model("a", model)
            os.write(1, f"{stop_at} model\\n".encode())
            memory.evict(0)
        os.write(1, f"{stop_at} done\\n".encode())
        os._exit(0)

    for stop_at in range(1, 1000):
        child = os.fork() or job(stop_at)
        if os.waitpid(child, 0)[1] == 0:
            break
"""


def test_a_writer_stopped_before_any_of_its_steps_leaves_a_readable_memory(tmp_path, model_folder):
    command = [sys.executable, "-c", STOPPED_AT, tmp_path / "memories", model_folder, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.split() for line in done.stdout.splitlines()]
    stops = max(int(stop) for stop, _ in said)
    assert stops > 30 and [str(stops), "done"] in said
    for stop in range(1, stops + 1):
        memory = OptimizationMemory(tmp_path / "memories" / str(stop))
        rows, faults = memory.records()
        assert not faults and not memory.faults(), (stop, faults)
        assert {one["id"] for one in rows} >= {word for at, word in said if at == str(stop) and len(word) == 64}
        memory.add_record(row(seed=9))
        memory.keep_model("b", model_folder)
        assert memory.find_model("b")
        memory.evict()  # and what the stopped writer left is cleared away
        left = [path for name in (".tmp", ".jobs") for path in (memory.root / name).glob("*")]
        assert not left, (stop, left)


KILLED = """if True:
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    sys.argv[0] = "hpmkd"  # as the command line, which does not load torch at once
    import pandas, pyarrow.compute  # which writing a table loads: here once, not in every child
    from memory_rows import row
    from hf_hpmkd.components.optimization_memory import OptimizationMemory

    root, model = Path(sys.argv[1]), sys.argv[2]
    blank = row()

    def job(start):
        from hf_hpmkd.memory_records import row_id
        memory = OptimizationMemory(root, limit_bytes=10**6)
        with memory.running():
            for number in range(start, start + 10**6):
                one = {**blank, "seed": number}
                one["id"] = row_id(one)
                memory.add_record(one)
                os.write(1, f"{one['id']}\\n".encode())
                os.write(tell, b".")
                memory.keep_model(f"m{number}", model)

    random.seed(0)
    for round in range(25):
        told, tell = os.pipe()
        child = os.fork() or job(10**7 * round)
        os.close(tell)
        if round % 5 == 0:
            os.read(told, 1)  # this one has finished a run when it is killed, however slow the machine is
        time.sleep(random.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
"""


def test_a_memory_whose_writer_was_killed_again_and_again_holds_all_it_was_told(tmp_path, model_folder):
    root = tmp_path / "memory"
    command = [sys.executable, "-c", KILLED, root, model_folder, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    memory = OptimizationMemory(root)
    rows, faults = memory.records()
    assert not faults and not memory.faults()
    told = set(done.stdout.split())
    assert told and told <= {one["id"] for one in rows}
    memory.evict()
    assert not list((root / ".tmp").iterdir()) and not list((root / ".jobs").iterdir())


def test_a_full_disk_leaves_the_memory_as_it_was(memory, monkeypatch):
    memory.add_record(row())

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            memory.add_record(row(seed=1))
    assert len(memory.records()[0]) == 1 and not memory.faults()
    assert not list((memory.root / ".tmp").iterdir())


def test_reading_a_file_that_is_gone_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_row(tmp_path / "none.parquet")
    with pytest.raises(BadRecordError):
        (tmp_path / "x.parquet").write_bytes(b"")
        read_row(tmp_path / "x.parquet")
