"""hub_store: one private commit that from_pretrained opens, nothing sent twice, failures that leave the run whole."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
from hub_server import READ_TOKEN, TOKEN, Blob, HubServer, Repo, point_client
from huggingface_hub import HfApi, constants, get_session
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_hpmkd import hub_client
from hf_hpmkd.hub_store import HubPushError, push_run
from hf_hpmkd.public_record import named_sources
from hf_hpmkd.run_record import ChainRecord, ModelRecord, RunRecord, StageRecord, TeacherRecord

# huggingface_hub 2.4 sends large files by LFS with a parameter that httpx2 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "tester/small-student"
CARD = "---\nlibrary_name: transformers\n---\n\n# A student\n\n![curves](plots/learning_curves.png)\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    point_client(hub, monkeypatch, tmp_path)
    return hub


@pytest.fixture
def run_dir(tmp_path):
    """A finished run as `distill` leaves it, with what must not be published beside what must."""
    folder = tmp_path / "my run"
    student = folder / "student"
    tiny.tiny_vit().save_pretrained(student)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(student)
    (student / "README.md").write_text(CARD)
    (student / "training_args.bin").write_bytes(b"a pickle")
    (student / ".cache").mkdir()
    (student / ".cache" / "lock").write_text("")
    (folder / "plots").mkdir()
    (folder / "plots" / "learning_curves.png").write_bytes(PNG)
    (folder / "README.md").write_text(CARD)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_bytes(b"x")
    save_record(folder, "completed")
    return folder


def save_record(folder, status):
    RunRecord(
        status=status,
        recipe={"output": {"dir": "/home/jane/out"}, "hub": {"repo_id": None}},
        teachers=[TeacherRecord("big", "/home/jane/teachers/big", "transformers", 1000)],
        models={"student": ModelRecord("student", 100)},
    ).save(folder / "run_record.json")


def state(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(run_dir, repo_id=REPO, command=None, **settings):
    """The message of the HubPushError that this push ends in, after the checks that hold for every one of them."""
    before = state(run_dir)
    with pytest.raises(HubPushError) as caught:
        push_run(run_dir, repo_id, **settings)
    assert state(run_dir) == before
    message = str(caught.value)
    assert f"stays in {run_dir} in full" in message
    assert "mozilla" not in message and ".." not in message
    assert message.endswith(command or f"hpmkd push '{run_dir}' {repo_id}")
    assert (settings.get("token") or TOKEN) not in message
    return message


# ---- what arrives ----------------------------------------------------------------------------------------------------


def test_a_run_arrives_whole_private_and_in_one_commit(client, run_dir):
    before = state(run_dir)
    assert push_run(run_dir, REPO) == f"{client.url}/{REPO}"
    assert state(run_dir) == before
    repo = client.repos["models", REPO]
    assert repo.private and len(repo.commits) == 2
    files = client.files(REPO)
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "plots/learning_curves.png",
        "preprocessor_config.json", "run_record.json", ".hpmkd_files.json",
    }  # fmt: skip
    for path in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert files[path] == (run_dir / "student" / path).read_bytes()
    assert files["README.md"].decode() == CARD and files["plots/learning_curves.png"] == PNG


def test_the_published_record_names_no_local_path(client, run_dir):
    push_run(run_dir, REPO)
    text = client.files(REPO)["run_record.json"].decode()
    assert "/home" not in text and str(run_dir) not in text
    record = RunRecord.from_dict(json.loads(text))
    assert record == named_sources(RunRecord.load(run_dir / "run_record.json").public())


def test_the_published_record_names_no_folder_that_paths_led_through(client, run_dir):
    record = RunRecord.load(run_dir / "run_record.json")
    record.parts = {"path": "clients/x/churn.csv", "kind": "files"}
    record.recipe |= {"data": {"path": "clients/x/churn.csv"}, "student": {"model": "clients/x/small"}}
    record.recipe |= {"teachers": [{"model": "clients/x/big.skops"}], "output": {"dir": "clients/x/out"}}
    record.teachers = [TeacherRecord("big", "clients/x/big.skops", "skops", None)]
    stage = StageRecord("stage-1", "clients/x/small[hidden_size=40]", 9)
    record.chain = ChainRecord([stage])
    record.save(run_dir / "run_record.json")
    push_run(run_dir, REPO)
    text = client.files(REPO)["run_record.json"].decode()
    published = RunRecord.from_dict(json.loads(text))
    assert "clients" not in text and "output" not in published.recipe
    assert published.parts["path"] == published.recipe["data"]["path"] == "churn.csv"
    assert published.teachers[0].source == published.recipe["teachers"][0]["model"] == "big.skops"
    assert published.recipe["student"]["model"] == "small"


def test_checkpoints_that_a_stop_left_are_not_published(client, run_dir):
    tiny.tiny_vit(seed=9).save_pretrained(run_dir / "student" / "checkpoints" / "checkpoint-3")
    push_run(run_dir, REPO)
    assert "model.safetensors" in client.files(REPO)
    assert not [path for path in client.files(REPO) if "checkpoint" in path]


def test_a_public_repository_is_made_only_if_asked_for(client, run_dir):
    push_run(run_dir, REPO, private=False)
    assert not client.repos["models", REPO].private


def test_what_did_not_change_is_not_sent_again(client, run_dir):
    push_run(run_dir, REPO)
    sent = len(client.asked("PUT", "/lfs/"))
    assert sent == 2  # weights and plot
    push_run(run_dir, REPO)
    assert len(client.repos["models", REPO].commits) == 2
    (run_dir / "README.md").write_text(CARD + "\nOne more line.\n")
    push_run(run_dir, REPO)
    assert client.repos["models", REPO].head.changed == ["README.md"]
    assert len(client.asked("PUT", "/lfs/")) == sent


def test_what_an_earlier_run_left_is_deleted_in_the_same_commit(client, run_dir):
    push_run(run_dir, REPO)
    (run_dir / "student" / "preprocessor_config.json").unlink()
    (run_dir / "plots" / "learning_curves.png").rename(run_dir / "plots" / "temperature.png")
    repo = client.repos["models", REPO]
    repo.add("by hand", {**repo.head.files, "LICENSE": Blob(b"x", False)}, ["LICENSE"])
    push_run(run_dir, REPO)
    assert len(repo.commits) == 4
    assert sorted(repo.head.changed) == [
        ".hpmkd_files.json", "plots/learning_curves.png", "plots/temperature.png", "preprocessor_config.json"
    ]  # fmt: skip
    assert "LICENSE" in repo.head.files


MINE = ("handler.py", "my_evaluation.json", "chain/notes.json", "plots/mine.png")


def test_a_second_push_deletes_nothing_of_the_users_and_says_what_it_deletes(client, run_dir):
    push_run(run_dir, REPO)
    repo = client.repos["models", REPO]
    repo.add("by hand", {**repo.head.files, **{path: Blob(b"x", False) for path in MINE}}, list(MINE))
    (run_dir / "plots" / "learning_curves.png").unlink()
    told = []
    push_run(run_dir, REPO, say=told.append)
    assert set(MINE) <= set(repo.head.files) and "plots/learning_curves.png" not in repo.head.files
    assert len(told) == 1 and told[0].startswith(f"Deleted in {REPO}") and "has none: plots/learning" in told[0]
    push_run(run_dir, REPO, say=told.append)
    assert len(told) == 1 and set(MINE) <= set(repo.head.files)


@pytest.mark.parametrize("listed", [None, b"[" * 100_000, b'{"a": 1}', b"[1]"])
def test_without_a_list_of_what_was_sent_nothing_is_deleted_and_what_remains_is_named(client, run_dir, listed):
    push_run(run_dir, REPO)
    files = client.repos["models", REPO].head.files
    del files[".hpmkd_files.json"]
    files |= {"model.safetensors.index.json": Blob(b"{}", False), "handler.py": Blob(b"", False)}
    files |= {} if listed is None else {".hpmkd_files.json": Blob(listed, False)}
    told = []
    push_run(run_dir, REPO, say=told.append)
    assert {"model.safetensors.index.json", "handler.py", ".hpmkd_files.json"} <= set(client.files(REPO))
    assert len(told) == 1 and "model.safetensors.index.json, handler.py. Delete there" in told[0]


def add_stage(run_dir, name, seed):
    folder = run_dir / "chain" / name
    tiny.tiny_vit(seed=seed).save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    tiny.tiny_vit(seed=9).save_pretrained(folder / "checkpoints" / "checkpoint-3")
    (run_dir / "chain" / f"{name}.trained.json").write_text("{}")


def test_the_stages_of_a_chain_load_from_their_subfolders(client, run_dir, tmp_path):
    add_stage(run_dir, "stage-1", seed=1)
    add_stage(run_dir, "stage-2", seed=2)
    push_run(run_dir, REPO)
    repo = client.repos["models", REPO]
    assert len(repo.commits) == 2
    assert {path for path in client.files(REPO) if path.startswith("chain/")} == {
        f"chain/stage-{stage}/{name}" for stage in (1, 2) for name in ("config.json", "model.safetensors")
    }
    for seed in (1, 2):
        settings = {"subfolder": f"chain/stage-{seed}", "cache_dir": tmp_path / "cache"}
        again = AutoModelForImageClassification.from_pretrained(REPO, **settings)
        assert (tiny.weights_of(again) == tiny.weights_of(tiny.tiny_vit(seed=seed))).all()
    shutil.rmtree(run_dir / "chain" / "stage-2")
    push_run(run_dir, REPO)
    assert sorted(repo.head.changed) == [
        ".hpmkd_files.json", "chain/stage-2/config.json", "chain/stage-2/model.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("fault", [{"status": 500}, {"cut": "before"}, {"cut": "after"}])
def test_a_push_that_broke_is_completed_without_sending_the_weights_again(client, run_dir, fault):
    client.fail("POST", "/commit/", **fault)
    refused(run_dir)
    sent = len(client.asked("PUT", "/lfs/"))
    assert sent == 2
    push_run(run_dir, REPO)
    assert "model.safetensors" in client.files(REPO) and len(client.asked("PUT", "/lfs/")) == sent
    changed = [path for commit in client.repos["models", REPO].commits for path in commit.changed]
    assert changed.count("model.safetensors") == 1


def test_a_token_that_may_only_read(client, run_dir):
    assert "refused the token (403)" in refused(run_dir, token=READ_TOKEN)
    push_run(run_dir, REPO)
    assert "model.safetensors" in client.files(REPO)


def test_the_command_publishes_and_a_fresh_process_loads_the_student(hub, run_dir, tmp_path):
    """With nothing set but the environment, as a user would: the client's own reading of it is tested too."""
    code = f"""if True:
        import json
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        from hf_hpmkd.cli import main
        assert main(["push", {str(run_dir)!r}, {REPO!r}]) == 0
        model, told = AutoModelForImageClassification.from_pretrained({REPO!r}, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"], told
        processor = AutoImageProcessor.from_pretrained({REPO!r}, backend="pil")
        assert processor.size["height"] == 8, processor
        print(json.dumps([float(parameter.detach().sum()) for parameter in model.parameters()]))
    """
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert f"Published as {hub.url}/{REPO}." in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    sums = [float(parameter.detach().sum()) for parameter in tiny.tiny_vit().parameters()]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(sums, rel=1e-5)


# ---- before anything is sent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_only_a_completed_run_is_published(client, run_dir, status):
    save_record(run_dir, status)
    with pytest.raises(ValueError, match=f"Only a completed run .* is {status}"):
        push_run(run_dir, REPO)
    assert not client.requests


def test_a_folder_that_is_no_run_or_lacks_a_part_is_told(client, run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no run_record.json"):
        push_run(tmp_path, REPO)
    (run_dir / "README.md").unlink()
    (run_dir / "student" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks student/config.json and README.md"):
        push_run(run_dir, REPO)
    assert not client.requests


@pytest.mark.parametrize("repo_id", ["", "small", "a/b/c", "tester/", "tester/a b", "tester/a--b", "../x", "a/x.git"])
def test_a_wrong_repository_id_is_told(client, run_dir, repo_id):
    with pytest.raises(ValueError, match=f"form user/name, got {re.escape(repr(repo_id))}"):
        push_run(run_dir, repo_id)
    assert not client.requests


def test_no_token(client, run_dir, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN" in refused(run_dir)
    assert not client.requests


def test_offline(client, run_dir, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(run_dir)
    assert not client.requests


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_refused_token_and_a_foreign_user(client, run_dir):
    assert "refused the token (401)" in refused(run_dir, token="hf_wrong")
    assert "refused the token (403)" in refused(run_dir, "somebody/else", command=f"push '{run_dir}' somebody/else")
    assert not client.repos


def test_a_token_that_the_server_repeats_is_not_shown(client, run_dir):
    client.fail("POST", "/commit/", status=403, text=f"{TOKEN} may not write")
    with pytest.raises(HubPushError, match=r"\(token\) may not write") as caught:
        push_run(run_dir, REPO)
    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None
    assert len(client.repos["models", REPO].commits) == 1


def test_a_failing_server_then_the_command_completes_it(client, run_dir):
    client.fail("POST", "/commit/", status=503)
    assert "cannot take it at present (503)" in refused(run_dir)
    repo = client.repos["models", REPO]
    assert len(repo.commits) == 1
    push_run(run_dir, REPO)
    assert "model.safetensors" in repo.head.files


def test_the_client_retries_a_large_file(client, run_dir, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client.fail("PUT", "/lfs/", status=502, times=2)
    push_run(run_dir, REPO)
    assert "model.safetensors" in client.files(REPO)
    (run_dir / "plots" / "learning_curves.png").write_bytes(PNG * 2)
    client.fail("PUT", "/lfs/", status=502, times=100)
    assert "cannot take it at present (502)" in refused(run_dir)
    assert len(client.repos["models", REPO].commits) == 2


def test_a_server_that_does_not_answer(client, run_dir, monkeypatch):
    monkeypatch.setattr(hub_client, "TIMEOUT_SECONDS", 0.3)
    before = get_session().timeout
    client.fail("POST", "/commit/", delay=2.0)
    assert "no answer within 0.3 s" in refused(run_dir)
    assert get_session().timeout == before


def test_no_server(client, run_dir, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no connection (ConnectError)" in refused(run_dir)


def test_a_public_repository_is_not_taken_for_a_private_one(client, run_dir):
    client.repos["models", REPO] = Repo(private=False)
    assert "is public" in refused(run_dir)
    assert len(client.repos["models", REPO].commits) == 1
    push_run(run_dir, REPO, private=False)


def test_a_private_repository_that_was_asked_for_as_public_is_said_to_be_private(client, run_dir):
    told = []
    push_run(run_dir, REPO, private=False, say=told.append)
    assert not told
    client.repos["models", REPO].private = True
    push_run(run_dir, REPO, private=False, say=told.append)
    assert told == [
        f"{REPO} existed and is still private, though --public was given. Change it in {client.url}/{REPO}/settings."
    ]


def test_the_command_of_a_public_push_says_so(client, run_dir):
    client.fail("POST", "/api/repos/create")
    refused(run_dir, private=False, command=f"hpmkd push '{run_dir}' {REPO} --public")


def test_a_model_of_other_origin_is_not_mixed_with_the_student(client, run_dir):
    repo = client.repos["models", REPO] = Repo(private=True)
    repo.add("by hand", {**repo.head.files, "adapter_config.json": Blob(b"{}", False)}, ["adapter_config.json"])
    assert "adapter_config.json), which this student would replace or be loaded together with" in refused(run_dir)
    assert len(repo.commits) == 2


def test_a_model_of_other_origin_is_not_replaced(client, run_dir):
    repo = client.repos["models", REPO] = Repo(private=True)
    same = {name: Blob(b"{}", False) for name in ("config.json", "model.safetensors", "README.md")}
    repo.add("push_to_hub", {**repo.head.files, **same}, list(same))
    assert "no run of hpmkd pushed (config.json, model.safetensors)" in refused(run_dir)
    assert len(repo.commits) == 2
    repo = client.repos["models", REPO] = Repo(private=True)
    repo.add("by hand", {**repo.head.files, "plots/mine.png": Blob(PNG, False)}, ["plots/mine.png"])
    assert "plots/mine.png" in refused(run_dir) and "plots/mine.png" in repo.head.files


def test_a_commit_by_someone_else_meanwhile(client, run_dir, monkeypatch):
    create = HfApi.create_commit

    def late(self, *args, **kwargs):
        repo = client.repos["models", REPO]
        repo.add("someone else's", dict(repo.head.files), [])
        return create(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    assert "changed by someone else" in refused(run_dir)


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("config.json", None, "config.json (missing)"),
        ("README.md", b"# other", "README.md (differs)"),
        ("model.safetensors", b"cut off", "model.safetensors (differs)"),
    ],
)
def test_what_did_not_arrive_is_noticed(client, run_dir, monkeypatch, path, content, told):
    create = HfApi.create_commit

    def lossy(self, *args, **kwargs):
        done = create(self, *args, **kwargs)
        files = client.repos["models", REPO].head.files
        blob = files.pop(path)
        if content is not None:
            length = len(blob.content)
            files[path] = Blob(content.ljust(length)[:length], blob.lfs)  # the size alone would not tell
        return done

    monkeypatch.setattr(HfApi, "create_commit", lossy)
    assert told in refused(run_dir)
