"""A shared memory, through the real client and real HTTP: nothing is lost, nothing is trusted, no fault stops a run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hub_server import READ_TOKEN, TOKEN, Blob, HubServer, Repo, point_client
from huggingface_hub import HfApi, constants
from memory_rows import row
from test_optimization_memory import BAD, outputs_file, write_bad

from hf_hpmkd import hub_client, memory_hub
from hf_hpmkd.cli import main
from hf_hpmkd.components.optimization_memory import OptimizationMemory
from hf_hpmkd.hub_client import HubPushError
from hf_hpmkd.memory_hub import HubMemory, Names
from hf_hpmkd.memory_records import row_bytes

# huggingface_hub 2.4 sends large files by LFS with a parameter that httpx2 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "tester/shared"
PLACE = f"hf://datasets/{REPO}"
KEY = ("datasets", REPO)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        point_client(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def here(hub, tmp_path):
    return HubMemory(PLACE, tmp_path / "here")


@pytest.fixture
def there(hub, tmp_path):
    """The memory of somebody else who shares the repository."""
    return HubMemory(PLACE, tmp_path / "there", on_message=lambda line: None)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "a model"
    tiny.tiny_vit().save_pretrained(folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """No waiting between tries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def share(memory, seed=0, **changes):
    one = row(seed, **changes)
    memory.add_record(one)
    memory.share(one)
    return one


def put(hub, files):
    """Files in the repository that no client of ours wrote."""
    repo = hub.repos.setdefault(KEY, Repo(private=True))
    blobs = {path: Blob(content, path.endswith((".parquet", ".safetensors"))) for path, content in files.items()}
    repo.add("by hand", {**repo.head.files, **blobs}, list(blobs))


def refused(memory, seed=0):
    """The message of the HubPushError that sharing a run ends in; the run stays in the local memory."""
    one = row(seed)
    memory.add_record(one)
    with pytest.raises(HubPushError) as caught:
        memory.share(one)
    assert one in OptimizationMemory(memory.root).records()[0]
    message = str(caught.value)
    assert "Everything stays in the local memory" in message
    assert message.endswith(f"hpmkd memory push {REPO} {one['id'][:16]} --memory {memory.root}")
    assert TOKEN not in message and READ_TOKEN not in message
    return message


# ---- sharing ---------------------------------------------------------------------------------------------------------


def test_a_run_is_shared_privately_in_one_commit(hub, here, model_folder):
    here.keep_model("stage-1", model_folder)
    outputs_file(here, 1)
    one = share(here)
    repo = hub.repos[KEY]
    assert repo.private and len(repo.commits) == 2
    assert set(hub.files(REPO, "datasets")) == {
        ".gitattributes", "README.md", f"records/{one['id']}.parquet", "models/stage-1/config.json",
        "models/stage-1/model.safetensors", "models/stage-1/memory.json",
    }  # fmt: skip
    share(here, seed=1)
    assert len(repo.commits) == 3 and len(repo.head.changed) == 1


def test_outputs_and_models_are_shared_as_asked(hub, tmp_path, model_folder):
    memory = HubMemory(PLACE, tmp_path / "here", share_models=False, share_outputs=True)
    memory.keep_model("stage-1", model_folder)
    path = outputs_file(memory, 1)
    one = row()
    memory.add_record(one)
    memory.share(one, [path.name])
    assert f"teacher_outputs/{path.name}" in hub.files(REPO, "datasets")
    assert not any(name.startswith("models/") for name in hub.files(REPO, "datasets"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command_after_a_failure_sends_what_the_run_would_have_sent(hub, tmp_path, capsys, elsewhere):
    outputs = tmp_path / "outputs" if elsewhere else None
    memory = HubMemory(PLACE, tmp_path / "here", outputs_root=outputs, share_models=False, share_outputs=True)
    mine, foreign = outputs_file(memory, 1), outputs_file(memory, 2)
    one = row()
    memory.add_record(one)
    memory._token = None
    with pytest.raises(HubPushError) as caught:
        memory.push(Names([f"{one['id']}.parquet"], outputs=[mine.name]))
    command = str(caught.value).partition("Add it later with:  ")[2]
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    sent = hub.files(REPO, "datasets")
    assert {f"records/{one['id']}.parquet", f"teacher_outputs/{mine.name}"} <= set(sent)
    assert f"teacher_outputs/{foreign.name}" not in sent


def test_others_read_what_was_shared_and_only_what_they_ask_for(hub, here, there, model_folder):
    there.keep_model("stage-1", model_folder)
    there.keep_model("stage-2", model_folder)
    one = share(there)
    assert here.refresh() == 1
    assert here.records()[0] == [one]
    asked = len(hub.asked("GET", "/resolve/"))
    assert here.refresh() == 0
    assert len(hub.asked("GET", "/resolve/")) == asked, "a record is fetched once"
    found = here.find_model("stage-1")
    assert found == here.root / "models" / "stage-1" and not here.faults()
    again = type(tiny.tiny_vit()).from_pretrained(found)
    assert (tiny.weights_of(again) == tiny.weights_of(tiny.tiny_vit())).all()
    assert here.find_model("stage-3") is None
    assert not [one for one in hub.requests if "stage-2" in one.path], "read by key, never as a whole"
    requests = len(hub.requests)
    assert here.find_model("stage-1") == found and len(hub.requests) == requests


def test_records_of_others_are_not_published_elsewhere(hub, here, there, tmp_path):
    share(there)
    here.refresh()
    assert here.records()[0] and not here.known_names()["records"]


@pytest.mark.parametrize("how", ["by key", "pull", "merge"])
def test_models_of_others_are_not_published_elsewhere_unless_named(
    hub, here, there, model_folder, tmp_path, capsys, how
):
    there.keep_model("theirs", model_folder)
    share(there)
    here.pull(models=True) if how != "by key" else here.find_model("theirs")
    if how == "merge":
        here, fetched = OptimizationMemory(tmp_path / "third"), here
        here.merge(fetched.root)
    here.keep_model("mine", model_folder)
    here.add_record(row(seed=1))
    words, rest = ["memory", "push", "hf://datasets/tester/other"], ["--models", "--memory", str(here.root)]
    assert main([*words, *rest]) == 0
    sent = hub.files("tester/other", "datasets")
    assert "models/mine/config.json" in sent and not [path for path in sent if path.startswith("models/theirs")]
    assert f"Left out: models/theirs, fetched from {PLACE}. Name it to push it." in capsys.readouterr().out
    assert main([*words, "theirs", *rest]) == 0
    assert "models/theirs/config.json" in hub.files("tester/other", "datasets")
    assert "Left out" not in capsys.readouterr().out and not here.faults()


def test_pull_takes_everything_in_and_push_sends_everything(hub, here, there, model_folder):
    there.keep_model("stage-1", model_folder)
    path = outputs_file(there, 1)
    for seed in range(3):
        there.add_record(row(seed))
    names = there.known_names()
    there.push(Names(names["records"], names["models"], names["outputs"]))
    assert len(hub.repos[KEY].commits) == 2
    gained = here.pull(models=True, outputs=True)
    assert (gained.records, gained.models, gained.outputs, gained.skipped) == (3, 1, 1, [])
    assert len(here.known_names()["records"]) == 3 and here.known_names()["models"] == ["stage-1"]
    assert (here.root / "unchecked" / path.name).exists() and not (here.outputs_root / path.name).exists()
    again = here.pull(models=True, outputs=True)
    assert (again.records, again.models, again.outputs) == (0, 0, 0)


def test_what_is_there_is_not_sent_again(hub, here):
    share(here)
    sent = len(hub.asked("PUT", "/lfs/"))
    here.share(row())
    assert len(hub.repos[KEY].commits) == 2 and len(hub.asked("PUT", "/lfs/")) == sent


def test_names_that_the_memory_lacks_are_told(here):
    with pytest.raises(ValueError, match="has no records/nothing.parquet, models/none"):
        here.push(Names(["nothing.parquet"], ["none"]))


def test_a_damaged_model_is_named_and_nothing_is_sent(hub, here, model_folder):
    for key in ("stage-1", "stage-2"):
        here.keep_model(key, model_folder)
    (here.root / "models" / "stage-2" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^models/stage-2: its config.json .*\. Nothing was sent"):
        here.push(Names(models=["stage-1", "stage-2"]))
    assert not hub.repos


@pytest.mark.parametrize(
    "where", ["hf://models/a/b", "hf://datasets/a", "a", "hf://datasets/a/b/c", "hf://datasets/../b"]
)
def test_another_form_of_place_is_told(where, tmp_path):
    with pytest.raises(ValueError, match="shared memory is a dataset|form user/name"):
        HubMemory(where, tmp_path)


# ---- several writers -------------------------------------------------------------------------------------------------

WRITERS = """if True:
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    sys.argv[0] = "hpmkd"  # as the command line, which does not load torch at once
    from memory_rows import row
    from hf_hpmkd.memory_hub import HubMemory

    rows = [[row(10 * writer + run) for run in range(3)] for writer in range(8)]

    def write(writer):
        memory = HubMemory("hf://datasets/tester/shared", Path(sys.argv[1]) / str(writer))
        for one in rows[writer]:
            memory.add_record(one)
            memory.share(one)
        os._exit(0)

    children = [os.fork() or write(writer) for writer in range(8)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_processes_append_at_once_and_nothing_is_lost(hub, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", WRITERS, tmp_path / "writers", Path(__file__).parent]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {row(10 * writer + run)["id"] for writer in range(8) for run in range(3)}
    reader = HubMemory(PLACE, tmp_path / "reader")
    assert reader.refresh() == 24
    assert {one["id"] for one in reader.records()[0]} == expected
    assert len(hub.repos[KEY].commits) == 25, "one commit per run"
    assert len(hub.asked("POST", "/commit/")) > 24, "no two of them ever met: the test proves nothing"
    assert TOKEN not in done.stdout + done.stderr


def test_a_stale_parent_is_tried_again(hub, here, monkeypatch, quick):
    create, times = HfApi.create_commit, []

    def late(self, *args, **kwargs):
        if len(times) < 3:
            times.append(1)
            put(hub, {f"records/{row(seed=50 + len(times))['id']}.parquet": row_bytes(row(seed=50 + len(times)))})
        return create(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    share(here)
    assert len([name for name in hub.files(REPO, "datasets") if name.startswith("records/")]) == 4


def test_a_parent_that_stays_stale_ends(hub, here, quick, monkeypatch):
    monkeypatch.setattr(memory_hub, "_STALE_TRIES", 3)
    hub.fail("POST", "/commit/", status=412, times=1000)
    assert "changed by someone else" in refused(here)


# ---- a Hub that is ill -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_short_illness_is_waited_out(hub, here, quick, status):
    hub.fail("POST", "/commit/", status=status, times=2)
    one = share(here)
    assert f"records/{one['id']}.parquet" in hub.files(REPO, "datasets")


def test_a_long_illness_loses_nothing_and_push_completes_it(hub, here, quick):
    hub.fail("POST", "/commit/", status=503, times=5)
    assert "cannot take it at present (503)" in refused(here)
    here.push(Names([f"{row()['id']}.parquet"]))
    assert f"records/{row()['id']}.parquet" in hub.files(REPO, "datasets")


@pytest.mark.parametrize("cut", ["before", "after"])
@pytest.mark.parametrize("pattern", ["/commit/", "/preupload/", "/paths-info/"])
def test_a_cut_connection_is_tried_again_and_nothing_is_written_twice(hub, here, quick, pattern, cut):
    share(here, seed=9)
    hub.fail("POST", pattern, cut=cut)
    one = share(here)
    changed = [path for commit in hub.repos[KEY].commits for path in commit.changed]
    assert changed.count(f"records/{one['id']}.parquet") == 1


def test_a_connection_that_stays_cut_ends(hub, here, quick, monkeypatch):
    monkeypatch.setattr(memory_hub, "_ILL_TRIES", 0)
    hub.fail("POST", "/commit/", times=1, cut="before")
    assert "no connection" in refused(here)


def test_a_hub_that_does_not_answer_in_time(hub, here, monkeypatch):
    monkeypatch.setattr(hub_client, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(memory_hub, "_ILL_TRIES", 0)
    hub.fail("POST", "/commit/", delay=1.5)
    assert "no answer within 0.3 s" in refused(here)
    assert hub.asked("POST", "/commit/")


def test_a_listing_that_does_not_come_in_time(hub, here, quick, monkeypatch):
    share(here)
    monkeypatch.setattr(memory_hub, "READ_SECONDS", 0.2)
    hub.fail("GET", "/tree/", times=20, delay=0.6)
    told = []
    here.say = told.append
    here.refresh()
    assert "no answer within 0.2 s" in told[0]


def test_what_did_not_arrive_is_noticed(hub, here, monkeypatch):
    create = HfApi.create_commit

    def lossy(self, *args, **kwargs):
        done = create(self, *args, **kwargs)
        files = hub.repos[KEY].head.files
        path = next(name for name in files if name.endswith(".parquet"))
        files[path] = Blob(b"x" * len(files[path].content), True)
        return done

    monkeypatch.setattr(HfApi, "create_commit", lossy)
    assert "(differs)" in refused(here)


def test_no_token_and_one_that_may_only_read(hub, tmp_path, monkeypatch, there):
    share(there, seed=4)
    reader = HubMemory(PLACE, tmp_path / "reader", token=READ_TOKEN)
    assert reader.refresh() == 1
    assert "refused the token (403)" in refused(reader)
    monkeypatch.delenv("HF_TOKEN")
    told = []
    nobody = HubMemory(PLACE, tmp_path / "nobody", on_message=told.append)
    assert nobody.refresh() == 0
    assert "set HF_TOKEN" in told[0]
    assert "set HF_TOKEN" in refused(nobody)
    with pytest.raises(HubPushError, match="Reading hf://datasets/tester/shared failed: "):
        nobody.pull()


def test_a_token_that_the_server_repeats_is_not_shown(hub, here, quick):
    share(here, seed=8)
    hub.fail("POST", "/commit/", status=403, text=f"{TOKEN} may not write")
    assert "(token) may not write" in refused(here)
    told = []
    here.say = told.append
    hub.fail("GET", "/tree/", status=403, text=f"{TOKEN} may not read")
    here.refresh()
    assert "(token) may not read" in told[0] and TOKEN not in told[0]


def test_a_public_memory_is_written_to_only_if_asked(hub, here, tmp_path):
    hub.repos[KEY] = Repo(private=False)
    assert "is public" in refused(here)
    public = HubMemory(PLACE, tmp_path / "public", private=False)
    share(public)
    assert len(hub.repos[KEY].commits) == 2


@pytest.mark.parametrize("ill", ["500", "cut", "offline", "no server", "no repository"])
def test_reading_never_stops_a_run(hub, here, there, monkeypatch, quick, ill):
    if ill != "no repository":
        share(there)
    if ill == "500":
        hub.fail("GET", "/api/", status=500, times=100)
    elif ill == "cut":
        hub.fail("GET", "/api/", cut="before", times=100)
    elif ill == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif ill == "no server":
        here._api.endpoint = "http://127.0.0.1:9"
    told = []
    here.say = told.append
    assert here.refresh() == 0
    assert here.find_model("a") is None
    assert here.unchecked_outputs("0" * 64 + ".safetensors", 10**6) is None
    assert len(told) == 1, "told once, and not asked again"
    assert "goes on with what is here" in told[0] or "is not there yet" in told[0]
    with pytest.raises(HubPushError, match="Reading hf://datasets/tester/shared failed"):
        here.pull()


# ---- hostile files ---------------------------------------------------------------------------------------------------


def test_hostile_records_are_skipped_named_and_not_asked_for_again(hub, here, there, tmp_path):
    one = share(there)
    files = {}
    for number, change in enumerate(BAD):
        if change != "link":
            folder = tmp_path / f"bad{number}"
            folder.mkdir()
            write_bad(folder / f"{number:064x}.parquet", change)
            files |= {f"records/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hostile = len(files)
    names = ["evil\x1b[2J.parquet", "../../outside.parquet", "sub/" + "a" * 64 + ".parquet", "x.py", "n" * 300]
    put(hub, {**files, **{f"records/{name}": row_bytes(row(seed=3)) for name in names}})
    told = []
    here.say = told.append
    assert here.refresh() == 1
    assert here.records() == ([one], [])
    assert len(told) == 11 and told[-1] == f"Memory: {PLACE}: and {hostile + len(names) - 10} more; skipped."
    assert all("\x1b" not in line and len(line) < 300 for line in told)
    assert "too large" in "".join(HubMemory(PLACE, tmp_path / "third").pull().skipped)
    inside = [path for path in tmp_path.rglob("*outside*")]
    assert not inside
    asked = len(hub.asked("GET", "/resolve/"))
    told.clear()
    here.refresh()
    assert not told and len(hub.asked("GET", "/resolve/")) == asked
    assert not hub.asked("GET", "outside|x.py|evil")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("outside", "names ../../x.json"),
        ("code", "names modeling.py"),
        ("pickle", "names pytorch_model.bin"),
        ("changed", "another checksum"),
        ("lacking", "missing or has another size"),
        ("huge", "are too large"),
        ("json", "cannot be read"),
        ("newer", "has format 9"),
    ],
)
def test_a_hostile_model_is_not_taken(hub, here, there, model_folder, harm, told):
    there.keep_model("stage-1", model_folder)
    share(there)
    folder = "models/stage-1"
    manifest = hub.files(REPO, "datasets")[f"{folder}/memory.json"].decode()
    weights = hub.files(REPO, "datasets")[f"{folder}/model.safetensors"]
    if harm == "changed":
        put(hub, {f"{folder}/model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    elif harm == "lacking":
        put(hub, {f"{folder}/model.safetensors": b""})
    else:
        text = {
            "outside": manifest.replace('"config.json"', '"config.json": {"bytes": 1, "sha256": "0"}, "../../x.json"'),
            "code": manifest.replace('"config.json"', '"config.json": {"bytes": 1, "sha256": "0"}, "modeling.py"'),
            "pickle": manifest.replace(
                '"config.json"', '"config.json": {"bytes": 1, "sha256": "0"}, "pytorch_model.bin"'
            ),
            "huge": re.sub(r'"bytes": \d+', '"bytes": 1000000000000', manifest),
            "json": "[" * 100_000,
            "newer": manifest.replace('"format_version": 1', '"format_version": 9'),
        }[harm]
        put(hub, {f"{folder}/memory.json": text.encode()})
    said = []
    here.say = said.append
    assert here.find_model("stage-1") is None
    assert told in said[0], said
    assert not (here.root / "models").exists() or not list((here.root / "models").iterdir())
    gained = here.pull(models=True)
    assert gained.models == 0 and told in gained.skipped[0]


@pytest.mark.parametrize("fault", ["of no use", "damaged"])
def test_a_bad_model_there_is_not_fetched_again_and_replaced(hub, here, there, model_folder, tmp_path, fault):
    there.keep_model("stage-1", model_folder)
    share(there)
    weights = "models/stage-1/model.safetensors"
    if fault == "damaged":
        sound = hub.files(REPO, "datasets")[weights]
        put(hub, {weights: sound[:-1] + bytes([sound[-1] ^ 1])})
        assert here.find_model("stage-1") is None
    else:
        assert here.find_model("stage-1")
        with pytest.warns(UserWarning, match="stage-1 of the memory is not used"):
            here.refuse_model("stage-1", "it is no better than chance")
    asked = len(hub.requests)
    assert here.find_model("stage-1") is None and len(hub.requests) == asked
    other = tmp_path / "other"
    tiny.tiny_vit(seed=5).save_pretrained(other)
    here.keep_model("stage-1", other)
    share(here, seed=1)
    assert hub.files(REPO, "datasets")[weights] == (other / "model.safetensors").read_bytes()
    assert HubMemory(PLACE, tmp_path / "third").find_model("stage-1")


def test_shared_outputs_that_are_too_large_are_not_fetched(hub, here, there):
    path = outputs_file(there, 1)
    there.push(Names(outputs=[path.name]))
    told = []
    here.say = told.append
    assert here.unchecked_outputs(path.name, 999) is None
    assert "too large (1,000 bytes)" in told[0] and not hub.asked("GET", "/resolve/")
    assert here.unchecked_outputs(path.name, 1000).read_bytes() == path.read_bytes()


def test_the_card_opens_the_records(hub, here, tmp_path):
    """`load_dataset(REPO)` in a fresh process, as somebody would who has not our package."""
    for seed in range(2):
        share(here, seed)
    code = f"import json, datasets; print(json.dumps(datasets.load_dataset({REPO!r}, split='train')['seed'][:]))"
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(json.loads(done.stdout.splitlines()[-1])) == [0, 1]
