"""The only writer of models to the Hub: publishes a finished run as one commit, and reads back that it arrived.

Of ours it imports run_record, model_card and hub_client alone. Trains nothing, changes nothing in the run's folder.
"""

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from hf_hpmkd import hub_client
from hf_hpmkd.hub_client import FAILURES, HubFile, HubPushError, RepositoryError, check_repo_id, push_error
from hf_hpmkd.public_record import named_sources
from hf_hpmkd.run_record import RECORD_FILE, RunRecord

# The run's card stands for the student's copy of it. `training_args.bin` is Trainer's pickle: it runs code when read
# and holds local paths; the recipe is in the record.
_NOT_PUBLISHED = ("README.md", "training_args.bin")
# What a push sent, as a JSON list of paths, so that the next one deletes nothing of anybody else's.
_SENT_FILE = ".hpmkd_files.json"
# Files at the root that from_pretrained looks for. One of an earlier model would be loaded together with this one's.
_LOADED = (".bin", ".json", ".model", ".py", ".safetensors")


def push_run(
    run_dir: Path, repo_id: str, private: bool = True, token: str | None = None, say: Callable[[str], None] = print
) -> str:
    """Publishes the run in `run_dir` and returns the URL of its repository.

    The repository is made if it is missing. In one commit it gets the files of `student/` at its root, so that
    `from_pretrained(repo_id)` works, the stages in `chain/` for `subfolder="chain/STAGE"`, the card, `plots/`, and the
    run record without local paths. What it holds already is not sent again, nor a large file that a push before sent
    before it failed; what an earlier push sent and this one lacks is deleted in the same commit, and nothing else.
    repo_id: "user/name". private: True makes a new repository private and refuses a public one; False makes a new one
    public and leaves a private one private. token: None takes HF_TOKEN or the login. say: gets a line about what is
    deleted, what an earlier version left behind, and a repository that is still private.

    Before anything is sent: FileNotFoundError where the folder lacks a part of a run, ValueError for a run that is not
    completed or a repo_id of another form, HubPushError without a token. Whatever fails later is a HubPushError: HTTP
    errors after the client's retries, no connection, no answer within TIMEOUT_SECONDS, a repository that is public,
    holds a model of other origin or was changed meanwhile, and files that did not arrive as they were sent.
    """
    run_dir = Path(run_dir)
    files = _published_files(run_dir)
    check_repo_id(repo_id)
    again = shlex.join(["hpmkd", "push", str(run_dir), repo_id, *([] if private else ["--public"])])
    kept = f"The finished run stays in {run_dir} in full. Publish it later with:  {again}"
    token = token or get_token()
    if not token:
        raise HubPushError(f"Publishing {repo_id} needs a Hub token: set HF_TOKEN, or `hf auth login`. {kept}")
    api = HfApi(token=token, library_name="hf_hpmkd")
    try:
        with hub_client.patience(hub_client.TIMEOUT_SECONDS):
            return _push(api, repo_id, private, files, say)
    except FAILURES as error:
        told, cause = push_error(f"Publishing {repo_id} on {api.endpoint}", error, kept, token)
        raise told from cause


def check_can_push(repo_id: str) -> None:
    """What can be known before a long run: ValueError for a repo_id of another form, HubPushError without a token."""
    check_repo_id(repo_id)
    if not get_token():
        raise HubPushError(
            f"Publishing {repo_id} at the end needs a Hub token: set HF_TOKEN, or `hf auth login`; or leave `hub.push` "
            "out and publish later with `hpmkd push`."
        )


# ---- what is published -----------------------------------------------------------------------------------------------


def _published_files(run_dir: Path) -> list[HubFile]:
    record_file, student, card = run_dir / RECORD_FILE, run_dir / "student", run_dir / "README.md"
    if not record_file.is_file():
        raise FileNotFoundError(
            f"A run to publish is a folder that `hpmkd distill` wrote, {run_dir} has no {RECORD_FILE}. Give the run's "
            "folder (its `output.dir`)."
        )
    record = RunRecord.load(record_file)
    if record.status != "completed":
        raise ValueError(
            f"Only a completed run can be published, the one in {run_dir} is {record.status}. The command that began "
            "it resumes it."
        )
    if missing := [str(path.relative_to(run_dir)) for path in (student / "config.json", card) if not path.is_file()]:
        raise FileNotFoundError(
            f"The run in {run_dir} is recorded as completed but lacks {' and '.join(missing)}. Restore it from a copy, "
            "or run again with `output.overwrite=true`."
        )
    public = json.dumps(named_sources(record.public()).to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = [HubFile(path, local) for path, local in _files_below(student) if path not in _NOT_PUBLISHED]
    files += [HubFile(f"chain/{path}", local) for path, local in _stage_files(run_dir / "chain")]
    files += [HubFile(f"plots/{path}", local) for path, local in _files_below(run_dir / "plots")]
    return [*files, HubFile("README.md", card), HubFile(RECORD_FILE, public.encode())]


def _stage_files(chain: Path) -> Iterator[tuple[str, Path]]:
    """The files of the models below a chain's folder, one folder each; checkpoints and other traces of training are
    left out.
    """
    for config in sorted(chain.rglob("config.json")):
        folder = config.parent.relative_to(chain)
        if not any(part.startswith(("checkpoint", ".")) for part in folder.parts):
            for path, local in _files_below(config.parent):
                if "/" not in path and path not in _NOT_PUBLISHED:
                    yield (folder / path).as_posix(), local


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files under a folder with their paths in it; hidden ones, bytecode and checkpoints are left out."""
    for local in sorted(folder.rglob("*")):
        path = local.relative_to(folder)
        left_out = any(part.startswith(".") or part in ("__pycache__", "checkpoints") for part in path.parts)
        if local.is_file() and not left_out:
            yield path.as_posix(), local


# ---- the upload ------------------------------------------------------------------------------------------------------


def _push(api: HfApi, repo_id: str, private: bool, files: list[HubFile], say: Callable[[str], None]) -> str:
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    before = api.model_info(repo_id)
    if private and before.private is False:
        raise RepositoryError(
            "the repository exists and is public, while a private one was asked for. Name another one, make it "
            "private, or publish with --public (`hub.private=false`)."
        )
    held = [sibling.rfilename for sibling in before.siblings or []]
    sent = {file.path for file in files}
    strange = _not_sent(held, sent)
    if RECORD_FILE not in held and (others := sorted({*strange, *(path for path in held if _is_loaded(path))})):
        raise RepositoryError(
            f"the repository holds a model that no run of hpmkd pushed ({', '.join(others)}), which this student would "
            "replace or be loaded together with. Name another repository, or delete them there."
        )
    earlier = _sent_before(api, repo_id, before.sha) if _SENT_FILE in held else None
    stale = sorted((earlier or set()) & set(held) - sent)
    files = [*files, HubFile(_SENT_FILE, json.dumps(sorted(sent), indent=1).encode())]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in stale]
    operations += [file.operation for file in files]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload the student of an HPM-KD run", parent_commit=before.sha
    )
    hub_client.verify(api, repo_id, commit.oid, files)
    if stale:
        say(f"Deleted in {repo_id}, as an earlier push sent them and this run has none: {', '.join(stale)}.")
    if earlier is None and strange:
        say(
            f"Left in {repo_id}, which has no list of what an earlier push sent: {', '.join(strange)}. Delete there "
            "what is of an earlier model: it may be loaded together with this one."
        )
    if not private and before.private:
        say(f"{repo_id} existed and is still private, though --public was given. Change it in {url}/settings.")
    return str(url)


def _sent_before(api: HfApi, repo_id: str, revision: str | None) -> set[str] | None:
    """The paths that the last push sent; None where the list is none that a push wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(api.hf_hub_download(repo_id, _SENT_FILE, revision=revision, local_dir=folder))
        try:
            paths = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            return None
    return set(paths) if isinstance(paths, list) and all(isinstance(path, str) for path in paths) else None


def _not_sent(held: list[str], sent: set[str]) -> list[str]:
    """Paths that this push does not send and an earlier one may have: plots, and files at the root or of a stage that
    would be loaded with these."""
    left = (PurePosixPath(path) for path in held if path not in sent and path not in (RECORD_FILE, _SENT_FILE))
    return [
        str(path)
        for path in left
        if _is_loaded(str(path))
        or (path.parts[0] == "plots" and path.suffix == ".png")
        or (path.parts[0] == "chain" and path.suffix in _LOADED)
    ]


def _is_loaded(path: str) -> bool:
    return "/" not in path and PurePosixPath(path).suffix in _LOADED
