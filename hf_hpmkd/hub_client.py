"""What conversations with the Hub need: files that can be compared with those there, patience, plain reasons, and what
a card says of its licence.

Imports nothing of ours. Sends nothing by itself.
"""

import hashlib
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

# The client has no timeout of its own: a server that accepts a request and never answers would hold a run for ever.
TIMEOUT_SECONDS = 180.0
_PATHS_PER_REQUEST = 500


class HubPushError(OSError):
    """Publishing failed; what was to be published is whole on disk. The message tells why and how to complete it."""


class RepositoryError(Exception):
    """The repository is not one that this may be pushed to, or does not hold what was sent."""


# RuntimeError is what the client raises for a large file that failed, ValueError for an answer it cannot read.
FAILURES = (HTTPError, OSError, RuntimeError, ValueError, RepositoryError)


@dataclass
class HubFile:
    """One file to publish: its path in the repository, and where its bytes are."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def operation(self) -> CommitOperationAdd:
        return CommitOperationAdd(self.path, self.content)

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


def files_there(
    api: HfApi, repo_id: str, paths: Iterable[str], revision: str | None = None, repo_type: str | None = None
) -> dict[str, RepoFile]:
    """What the repository says of these paths; those that it lacks are left out."""
    wanted, found = list(paths), {}
    for start in range(0, len(wanted), _PATHS_PER_REQUEST):
        part = wanted[start : start + _PATHS_PER_REQUEST]
        answer = api.get_paths_info(repo_id, part, revision=revision, repo_type=repo_type)
        found.update({info.path: info for info in answer if isinstance(info, RepoFile)})
    return found


def verify(api: HfApi, repo_id: str, revision: str, files: list[HubFile], repo_type: str | None = None) -> None:
    """Raises RepositoryError unless the repository holds these files, byte for byte."""
    there = files_there(api, repo_id, [file.path for file in files], revision, repo_type)
    faults = [
        f"{file.path} ({'differs' if file.path in there else 'missing'})"
        for file in files
        if file.path not in there or not file.equals(there[file.path])
    ]
    if faults:
        raise RepositoryError(f"after the upload the repository does not hold what was sent: {', '.join(faults)}.")


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless the id has the form user/name that the Hub takes."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"A repository's id has the form user/name, got {repo_id!r}. {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"A repository's id has the form user/name, got {repo_id!r}. Name the user or organization.")


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block the client waits for an answer so long at most; its own setting comes back afterwards."""
    client = get_session()
    before, hooks = client.timeout, client.event_hooks
    client.timeout = seconds
    limits = client.timeout.as_dict()

    def limit(request: Any) -> None:
        if not any(request.extensions.get("timeout", {}).values()):  # listings ask for no limit at all
            request.extensions["timeout"] = limits

    client.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
    try:
        yield
    finally:
        client.timeout, client.event_hooks = before, hooks


def push_error(
    what: str, error: BaseException, kept: str, token: str | None
) -> tuple[HubPushError, BaseException | None]:
    """The error to raise and its cause: without the token, and without a cause that shows it."""
    leaks = bool(token) and str(token) in "".join(traceback.format_exception(error))
    return HubPushError(f"{hide_token(f'{what} failed: {reason(error)}', token)} {kept}"), None if leaks else error


def hide_token(text: str, token: str | None) -> str:
    """The text without the token, whoever has put it there."""
    return text.replace(token, "(token)") if token else text


def status_code(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client, however it wraps it; None for no answer at all."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return seen.response.status_code
        seen = seen.__cause__
    return None


def reason(error: BaseException, seconds: float | None = None) -> str:
    """What failed, in words that tell what to do. seconds: how long an answer was waited for; None: TIMEOUT_SECONDS."""
    while error.__cause__ is not None and not isinstance(error, (HTTPError, OSError, RepositoryError)):
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
        return f"no answer within {seconds or TIMEOUT_SECONDS:g} s ({type(error).__name__}). {text}"
    if isinstance(error, HTTPError) and status is None:
        return f"no connection ({type(error).__name__}). {text}"
    return text


def card_license(metadata: CardData | Mapping[str, Any]) -> str | None:
    """The licence that a card's metadata state, by its own name where they say "other"; several are joined. None where
    they state none.
    """
    license = metadata.get("license")
    if license == "other":
        license = metadata.get("license_name") or license
    if license is None or license == [] or license == "":
        return None
    return ", ".join(str(item) for item in license) if isinstance(license, list) else str(license)
