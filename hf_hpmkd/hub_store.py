"""The only writer to the Hub: publishes a finished run as one commit, and reads back that it arrived.

Imports run_record alone. Trains nothing, changes nothing in the run's folder.
"""

import hashlib
import json
import re
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_hpmkd.run_record import RECORD_FILE, RunRecord

# The client has no timeout of its own: a server that accepts a request and never answers would hold a run for ever.
TIMEOUT_SECONDS = 180.0

# The run's card stands for the student's copy of it. `training_args.bin` is Trainer's pickle: it runs code when read
# and holds local paths; the recipe is in the record.
_NOT_PUBLISHED = ("README.md", "training_args.bin")
# Files at the root that from_pretrained looks for. One of an earlier model would be loaded together with this one's.
_LOADED = (".bin", ".json", ".model", ".py", ".safetensors")


class HubPushError(OSError):
    """Publishing failed; the run on disk is whole. The message tells why and the command that completes it."""


class _RepositoryError(Exception):
    """The repository is not one that this run may be pushed to, or does not hold what was sent."""


def push_run(run_dir: Path, repo_id: str, private: bool = True, token: str | None = None) -> str:
    """Publishes the run in `run_dir` and returns the URL of its repository.

    The repository is made if it is missing. In one commit it gets the files of `student/` at its root, so that
    `from_pretrained(repo_id)` works, the card, `plots/`, and the run record without local paths. What it holds already
    is not sent again; what an earlier run pushed and this one lacks is deleted in the same commit. repo_id:
    "user/name". private: True makes a new repository private and refuses a public one; False makes a new one public.
    token: None takes HF_TOKEN or the login.

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
        with _patience(TIMEOUT_SECONDS):
            return _push(api, repo_id, private, files)
    # RuntimeError is what the client raises for a large file that failed, ValueError for an answer it cannot read.
    except (HTTPError, OSError, RuntimeError, ValueError, _RepositoryError) as error:
        reason = f"Publishing {repo_id} on {api.endpoint} failed: {_reason(error)}"
        leaks = token in "".join(traceback.format_exception(error))
        raise HubPushError(f"{reason.replace(token, '(token)')} {kept}") from (None if leaks else error)


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless the id has the form user/name that the Hub takes."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"A repository's id has the form user/name, got {repo_id!r}. {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"A repository's id has the form user/name, got {repo_id!r}. Name the user or organization.")


def check_can_push(repo_id: str) -> None:
    """What can be known before a long run: ValueError for a repo_id of another form, HubPushError without a token."""
    check_repo_id(repo_id)
    if not get_token():
        raise HubPushError(
            f"Publishing {repo_id} at the end needs a Hub token: set HF_TOKEN, or `hf auth login`; or leave `hub.push` "
            "out and publish later with `hpmkd push`."
        )


# ---- what is published -----------------------------------------------------------------------------------------------


@dataclass
class _File:
    """One file to publish: its path in the repository, and where its bytes are."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def equals(self, there: RepoFile) -> bool:
        """Whether the Hub's file has the same size and content: SHA-256 for large files, git's SHA-1 for the others."""
        if there.size != self.size:
            return False
        if there.lfs is not None:
            return there.lfs.sha256 == self._digest(hashlib.sha256())
        return there.blob_id == self._digest(hashlib.sha1(f"blob {self.size}\0".encode()))

    def _digest(self, digest: "hashlib._Hash") -> str:
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with open(self.content, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


def _published_files(run_dir: Path) -> list[_File]:
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
    public = json.dumps(record.public().to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = [_File(path, local) for path, local in _files_below(student) if path not in _NOT_PUBLISHED]
    files += [_File(f"plots/{path}", local) for path, local in _files_below(run_dir / "plots")]
    return [*files, _File("README.md", card), _File(RECORD_FILE, public.encode())]


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files under a folder with their paths in it, hidden ones and bytecode left out."""
    for local in sorted(folder.rglob("*")):
        path = local.relative_to(folder)
        if local.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in path.parts):
            yield path.as_posix(), local


# ---- the upload ------------------------------------------------------------------------------------------------------


def _push(api: HfApi, repo_id: str, private: bool, files: list[_File]) -> str:
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    before = api.model_info(repo_id)
    if private and before.private is False:
        raise _RepositoryError(
            "the repository exists and is public, while a private one was asked for. Name another one, make it "
            "private, or publish with --public (`hub.private=false`)."
        )
    held = [sibling.rfilename for sibling in before.siblings or []]
    stale = _stale(held, {file.path for file in files})
    if stale and RECORD_FILE not in held:
        raise _RepositoryError(
            f"the repository holds a model that no run of hpmkd pushed, and its {', '.join(stale)} would be loaded "
            "together with this student. Name another repository, or delete them there."
        )
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in stale]
    operations += [CommitOperationAdd(file.path, file.content) for file in files]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload the student of an HPM-KD run", parent_commit=before.sha
    )
    _verify(api, repo_id, commit.oid, files)
    return str(url)


def _stale(held: list[str], sent: set[str]) -> list[str]:
    """Paths that an earlier push left: plots, and files at the root that would be loaded with this student."""
    left = (PurePosixPath(path) for path in held if path not in sent and path != RECORD_FILE)
    return [
        str(path)
        for path in left
        if (len(path.parts) == 1 and path.suffix in _LOADED) or (path.parts[0] == "plots" and path.suffix == ".png")
    ]


def _verify(api: HfApi, repo_id: str, revision: str, files: list[_File]) -> None:
    answer = api.get_paths_info(repo_id, [file.path for file in files], revision=revision)
    there = {info.path: info for info in answer if isinstance(info, RepoFile)}
    faults = [
        f"{file.path} ({'differs' if file.path in there else 'missing'})"
        for file in files
        if file.path not in there or not file.equals(there[file.path])
    ]
    if faults:
        raise _RepositoryError(f"after the upload the repository does not hold what was sent: {', '.join(faults)}.")


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Within the block the client waits for an answer so long at most; its own setting comes back afterwards."""
    client = get_session()
    before = client.timeout
    client.timeout = seconds
    try:
        yield
    finally:
        client.timeout = before


def _reason(error: BaseException) -> str:
    """What failed, in words that tell what to do."""
    while error.__cause__ is not None and not isinstance(error, (HTTPError, OSError, _RepositoryError)):
        error = error.__cause__  # the client wraps a failed large file in a RuntimeError
    if isinstance(error, OfflineModeIsEnabled):
        return "the client is offline, because HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set. Unset it."
    text = re.sub(r"For more information check: \S+", "", str(error))  # httpx's pointer to what a status code is
    text = " ".join(text.split()) or type(error).__name__
    text = text if text.endswith((".", "!")) else f"{text}."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return f"the Hub refused the token ({status}): it must be valid and allowed to write there. {text}"
    if status == 412:
        return f"the repository was changed by someone else meanwhile ({status}). {text}"
    if status == 429 or (status or 0) >= 500:
        return f"the Hub cannot take it at present ({status}). {text}"
    if "Timeout" in type(error).__name__:
        return f"no answer within {TIMEOUT_SECONDS:g} s ({type(error).__name__}). {text}"
    if isinstance(error, HTTPError) and status is None:
        return f"no connection ({type(error).__name__}). {text}"
    return text
