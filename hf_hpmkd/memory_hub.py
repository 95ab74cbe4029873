"""A memory shared through a Hub dataset repository: read by key, appended to in one commit per run.

The only writer of datasets to the Hub. What comes from there is data by whoever may write there: names, sizes and forms
are checked before anything is opened, and whatever fails is skipped and named. No failure of the Hub stops a run.
"""

import os
import random
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm

from hf_hpmkd import hub_client, memory_files
from hf_hpmkd.components.optimization_memory import CARD, Gained, OptimizationMemory
from hf_hpmkd.hub_client import FAILURES, HubFile, HubPushError, RepositoryError, check_repo_id, push_error
from hf_hpmkd.memory_files import MANIFEST, DamagedModelError, shown
from hf_hpmkd.memory_records import MAX_BYTES, BadRecordError, Row, is_record_name, read_row

PREFIX = "hf://datasets/"
READ_SECONDS = 30.0  # a run waits for a memory no longer than that; what it does not get it computes
_STALE_TRIES = 40
_ILL_TRIES = 4
_MANIFEST_BYTES = 2**20
_MOST_RECORDS = 100_000
_MOST_NAMED = 10

Answer = TypeVar("Answer")


def is_hub_place(where: str) -> bool:
    """Whether a text names a memory on the Hub: hf://datasets/USER/NAME."""
    return where.startswith("hf://")


def repo_of(where: str) -> str:
    """USER/NAME of hf://datasets/USER/NAME, or of itself. Raises ValueError for another form."""
    if is_hub_place(where) and not where.startswith(PREFIX):
        raise ValueError(f"A shared memory is a dataset repository, {PREFIX}USER/NAME, got {where!r}.")
    repo_id = where.removeprefix(PREFIX).rstrip("/")
    check_repo_id(repo_id)
    return repo_id


@dataclass
class Names:
    """What to push, as names in the memory."""

    records: Sequence[str] = ()
    models: Sequence[str] = ()
    outputs: Sequence[str] = ()


class HubMemory(OptimizationMemory):
    """A local memory, and behind it a shared one. where: hf://datasets/USER/NAME. The other arguments are those of
    `OptimizationMemory`. share_models, share_outputs: what `share` adds besides the record. private: a new repository
    is made private and a public one is not written to; False makes it public. token: None takes HF_TOKEN or the login.
    """

    def __init__(
        self,
        where: str,
        root: str | Path | None = None,
        *,
        limit_bytes: int | None = None,
        outputs_root: str | Path | None = None,
        on_message: Callable[[str], None] | None = None,
        share_models: bool = True,
        share_outputs: bool = False,
        private: bool = True,
        token: str | None = None,
    ) -> None:
        super().__init__(root, limit_bytes, outputs_root, on_message)
        self.repo_id = repo_of(where)
        self.share_models, self.share_outputs, self.private = share_models, share_outputs, private
        # The records of others stay apart, so that pushing this memory elsewhere publishes nothing of theirs.
        self.copy = OptimizationMemory(self.root / "shared" / self.repo_id.replace("/", "--"))
        self._token = token or get_token()
        self._api = HfApi(token=self._token, library_name="hf_hpmkd")
        self._reachable = True
        self._made: list[str] = []  # keys of models that this process kept
        self._refused: set[str] = set()  # keys of models there that are of no use

    @property
    def where(self) -> str:
        return PREFIX + self.repo_id

    # ---- reading -----------------------------------------------------------------------------------------------------

    def records(self) -> tuple[list[Row], list[str]]:
        """As of the local memory, with those of the shared one that `refresh` has brought here."""
        (own, faults), (others, more) = super().records(), self.copy.records()
        rows = {row["id"]: row for row in (*others, *own)}
        return sorted(rows.values(), key=lambda row: (row["finished"] or "", row["id"]), reverse=True), faults + more

    def refresh(self) -> int:
        """Brings new records here and returns how many; what is no record is told once, the first ten by name, and
        never asked for again."""
        gained = self._read("its records", lambda: self._pull_records(self.copy))
        skipped = [] if gained is None else gained.skipped
        for line in skipped[:_MOST_NAMED]:
            self.say(f"Memory: {self.where}/{line}; skipped.")
        if len(skipped) > _MOST_NAMED:
            self.say(f"Memory: {self.where}: and {len(skipped) - _MOST_NAMED} more; skipped.")
        return 0 if gained is None else gained.records

    def pull(self, models: bool = False, outputs: bool = False) -> Gained:
        """Takes the shared records, and if asked all models and outputs, into the local memory.

        Raises HubPushError, without the token in it, where the Hub cannot be read.
        """
        try:
            with hub_client.patience(hub_client.TIMEOUT_SECONDS):
                gained = self._pull_records(self)
                if models:
                    self._pull_models(gained)
                if outputs:
                    self._pull_outputs(gained)
                return gained
        except FAILURES as error:
            told, cause = push_error(f"Reading {self.where}", error, "What arrived before is kept.", self._token)
            raise told from cause

    def _pull_records(self, into: OptimizationMemory) -> Gained:
        gained = Gained()
        refused = into.root / "refused.txt"
        known = set(refused.read_text(encoding="utf-8").splitlines()) if refused.is_file() else set()
        known |= {*into.known_names()["records"], *self.known_names()["records"]}
        news, bad = [], []
        for entry in self._listing("records")[:_MOST_RECORDS]:
            name = entry.path.removeprefix("records/")
            if shown(name) in known:
                continue
            if not is_record_name(name):
                gained.skipped.append(f"records/{shown(name)}: its name is not that of a record")
                bad.append(shown(name))
            elif entry.size > MAX_BYTES:
                gained.skipped.append(f"records/{name}: it is too large ({entry.size:,} bytes)")
                bad.append(name)
            else:
                news.append(entry)
        for entry in news:
            with memory_files.staging(into.root) as folder:
                path = self._download(entry, folder)
                try:
                    read_row(path)
                except BadRecordError as error:
                    gained.skipped.append(f"{entry.path}: {error}")
                    bad.append(path.name)
                    continue
                gained.records += into._add_record_file(path.read_bytes(), path.name)
        if bad:
            refused.parent.mkdir(parents=True, exist_ok=True)
            with open(refused, "a", encoding="utf-8") as file:
                file.write("".join(f"{name}\n" for name in bad))
        return gained

    def _pull_models(self, gained: Gained) -> None:
        keys = {parts[1] for entry in self._listing("models") if len(parts := entry.path.split("/")) == 3}
        for key in sorted(keys):
            if not memory_files.is_key(key):
                gained.skipped.append(f"models/{shown(key)}: it has no name of a model")
            elif not (self.root / "models" / key).exists():
                try:
                    gained.models += self._download_model(key) is not None
                except DamagedModelError as error:
                    gained.skipped.append(f"models/{key}: {error}")

    def _pull_outputs(self, gained: Gained) -> None:
        for entry in self._listing("teacher_outputs"):
            name = entry.path.removeprefix("teacher_outputs/")
            if not memory_files.is_output_name(name):
                gained.skipped.append(f"teacher_outputs/{shown(name)}: it is no file of outputs")
            elif not any((folder / name).exists() for folder in (self.outputs_root, self.root / "unchecked")):
                with memory_files.staging(self.root) as folder:
                    gained.outputs += self._place_unchecked(self._download(entry, folder))

    def unchecked_outputs(self, name: str, max_bytes: int) -> Path | None:
        return super().unchecked_outputs(name, max_bytes) or self._read(
            f"teacher outputs {name[:12]}", lambda: self._fetch_outputs(name, max_bytes)
        )

    def _fetch_outputs(self, name: str, max_bytes: int) -> Path | None:
        entry = self._there([f"teacher_outputs/{name}"]).get(f"teacher_outputs/{name}")
        if entry is None:
            return None
        if entry.size > max_bytes:
            self.say(f"Memory: {self.where}/{entry.path} is too large ({entry.size:,} bytes) and not used.")
            return None
        with memory_files.staging(self.root) as folder:
            self._place_unchecked(self._download(entry, folder))
        return super().unchecked_outputs(name, max_bytes)

    def _place_unchecked(self, path: Path) -> bool:
        target = self.root / "unchecked" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        return True

    def refuse_model(self, key: str, why: str) -> None:
        super().refuse_model(key, why)
        self._refused.add(key)

    def _fetch_model(self, key: str) -> Path | None:
        if key in self._refused:
            return None
        return self._read(f"model {key[:40]}", lambda: self._sound_model(key))

    def _sound_model(self, key: str) -> Path | None:
        try:
            return self._download_model(key)
        except DamagedModelError:
            self._refused.add(key)
            raise

    def _download_model(self, key: str) -> Path | None:
        """Manifest first: it says which files there are and how large, and they are asked for by these names alone."""
        folder = f"models/{key}"
        manifest_there = self._there([f"{folder}/{MANIFEST}"]).get(f"{folder}/{MANIFEST}")
        if manifest_there is None:
            return None
        if manifest_there.size > _MANIFEST_BYTES:
            raise DamagedModelError(f"its {MANIFEST} is too large")
        target = self.root / "models" / key
        with memory_files.staging(self.root) as place:
            (place / "model").mkdir()
            manifest_file = self._download(manifest_there, place / "model")
            manifest = memory_files.read_manifest(manifest_file.read_bytes())
            there = self._there([f"{folder}/{name}" for name in manifest])
            for name, about in manifest.items():
                entry = there.get(f"{folder}/{name}")
                if entry is None or entry.size != about["bytes"]:
                    raise DamagedModelError(f"its {name} is missing or has another size")
                self._download(entry, place / "model")
            memory_files.check_model(place / "model")
            memory_files.mark_origin(place / "model", self.where)
            self.make_room(memory_files.folder_bytes(place))
            self._move_model(place / "model", target)
        self.say(f"Memory: model {key[:40]} taken from {self.where}.")
        return target

    def _read(self, what: str, job: Callable[[], Answer]) -> Answer | None:
        """What a run asks for: whatever goes wrong is told, and None. A Hub that failed is not asked again."""
        if not self._reachable:
            return None
        try:
            with hub_client.patience(READ_SECONDS):
                return job()
        except DamagedModelError as error:
            self.say(f"Memory: {what} in {self.where} is not used: {error}.")
        except RepositoryNotFoundError:
            self._reachable = False
            token = "" if self._token else " (or needs a token: set HF_TOKEN, or `hf auth login`)"
            self.say(f"Memory: {self.where} is not there yet{token}.")
        except FAILURES as error:
            self._reachable = False
            why = hub_client.hide_token(hub_client.reason(error, READ_SECONDS), self._token)
            self.say(f"Memory: {what} could not be read from {self.where}: {why} The run goes on with what is here.")
        return None

    def _listing(self, folder: str) -> list[RepoFile]:
        """The files below a folder of the repository, by path; none where there is no such folder."""
        try:
            tree = list(self._api.list_repo_tree(self.repo_id, folder, recursive=True, repo_type="dataset"))
        except EntryNotFoundError:
            return []
        return sorted((entry for entry in tree if isinstance(entry, RepoFile)), key=lambda entry: entry.path)

    def _there(self, paths: Sequence[str], revision: str | None = None) -> dict[str, RepoFile]:
        return hub_client.files_there(self._api, self.repo_id, paths, revision, repo_type="dataset")

    def _download(self, entry: RepoFile, folder: Path) -> Path:
        """One file whose name and size were checked, into a folder under its last name, and compared with the Hub's
        checksum."""
        with memory_files.staging(self.root) as place:
            got = self._api.hf_hub_download(
                self.repo_id, entry.path, repo_type="dataset", local_dir=place, tqdm_class=_NoBar
            )
            if not HubFile(entry.path, Path(got)).equals(entry):
                raise RepositoryError(f"{entry.path} did not arrive as the Hub has it.")
            target = folder / Path(entry.path).name
            shutil.move(got, target)
        return target

    # ---- writing -----------------------------------------------------------------------------------------------------

    def keep_model(self, key: str, folder: str | Path) -> Path | None:
        kept = super().keep_model(key, folder)
        if kept is not None:
            self._made.append(key)
        return kept

    def share(self, row: Row, outputs: Sequence[str] = ()) -> str:
        """Adds a finished run to the shared memory, in one commit: its record, the models it kept (in the place of any
        that it found to be of no use), and the outputs it used if they are shared. Returns the repository's URL; raises
        HubPushError as `push` does.
        """
        models = list(dict.fromkeys(self._made)) if self.share_models else []
        return self.push(Names([f"{row['id']}.parquet"], models, outputs if self.share_outputs else ()))

    def push(self, names: Names) -> str:
        """Sends what the repository lacks of these, in one commit, and reads back that it arrived. It is made if it is
        missing. Another writer's commit in between is waited out; so is a Hub that is ill for a moment. Large files
        that were sent before a failure are not sent again.

        Raises ValueError for names that this memory lacks and damaged models, HubPushError without a token and for what
        does not pass.
        """
        files = self._files_of(names)
        words = [*(name.removesuffix(".parquet")[:16] for name in names.records), *names.models, *names.outputs]
        words += ["--memory", str(self.root), *([] if self.private else ["--public"])]
        if names.outputs and self.outputs_root != self.root / "teacher_outputs":
            words += ["--cache-dir", str(self.outputs_root)]
        command = shlex.join(["hpmkd", "memory", "push", self.repo_id, *words])
        kept = f"Everything stays in the local memory. Add it later with:  {command}"
        if not self._token:
            raise HubPushError(f"Writing to {self.where} needs a Hub token: set HF_TOKEN, or `hf auth login`. {kept}")
        try:
            with hub_client.patience(hub_client.TIMEOUT_SECONDS):
                return self._push_patiently(files)
        except FAILURES as error:
            told, cause = push_error(f"Writing to {self.where} on {self._api.endpoint}", error, kept, self._token)
            raise told from cause

    def _files_of(self, names: Names) -> list[HubFile]:
        files = [HubFile(f"records/{name}", self.root / "records" / name) for name in names.records]
        files += [HubFile(f"teacher_outputs/{name}", self.outputs_root / name) for name in names.outputs]
        for key in names.models:
            folder = self.root / "models" / key
            if folder.is_dir():
                try:
                    memory_files.check_model(folder)
                except DamagedModelError as error:
                    raise DamagedModelError(
                        f"models/{key}: {error}. Nothing was sent; name what to push, or delete it (`hpmkd memory "
                        "verify` names all that are damaged)."
                    ) from error
                # The manifest last and with the others in one commit: a model is there as a whole or not at all.
                paths = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST)
                files += [HubFile(f"models/{key}/{path.name}", path) for path in paths]
            else:
                files.append(HubFile(f"models/{key}", folder))
        if lacking := [file.path for file in files if not Path(str(file.content)).is_file()]:
            raise ValueError(f"The memory in {self.root} has no {', '.join(lacking[:5])}. See `hpmkd memory ls`.")
        return files

    def _push_patiently(self, files: list[HubFile]) -> str:
        stale = ill = 0
        while True:
            try:
                return self._push_once(files)
            except (HTTPError, OSError, RuntimeError) as error:
                status = hub_client.status_code(error)
                if status == 412 and stale < _STALE_TRIES:
                    stale += 1
                    # Writers that met once should not meet again: each waits for a time of its own.
                    time.sleep(random.uniform(0.05, 0.2 * min(stale, 20)))
                elif (status is None or status == 429 or status >= 500) and ill < _ILL_TRIES and _is_http(error):
                    ill += 1
                    time.sleep(2.0**ill * random.uniform(0.25, 0.5))
                else:
                    raise

    def _push_once(self, files: list[HubFile]) -> str:
        try:
            before = self._api.dataset_info(self.repo_id)
        except RepositoryNotFoundError:
            self._api.create_repo(self.repo_id, repo_type="dataset", private=self.private, exist_ok=True)
            before = self._api.dataset_info(self.repo_id)
        url = f"{self._api.endpoint}/datasets/{self.repo_id}"
        if self.private and before.private is False:
            raise RepositoryError(
                "the repository exists and is public, while memories are private unless asked otherwise. Name another "
                "one, make it private, or write to it with --public (`memory.private=false`)."
            )
        there = self._there(["README.md", *(file.path for file in files)], before.sha)
        # What is there stays, save a model that was found to be of no use.
        replaced = tuple(f"models/{key}/" for key in self._refused)
        missing = [
            file
            for file in files
            if file.path not in there or (file.path.startswith(replaced) and not file.equals(there[file.path]))
        ]
        if not missing:
            return url
        if "README.md" not in there:
            missing.append(HubFile("README.md", CARD.encode()))
        operations: list[CommitOperationAdd] = [file.operation for file in missing]
        commit = self._api.create_commit(
            self.repo_id,
            operations,
            commit_message=f"Add {len(missing)} files to the memory",
            repo_type="dataset",
            parent_commit=before.sha,
        )
        hub_client.verify(self._api, self.repo_id, commit.oid, missing, repo_type="dataset")
        return url


class _NoBar(tqdm):
    """Records are many and small; a bar for each would bury the run's own lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _is_http(error: BaseException) -> bool:
    """Whether the Hub, or the way to it, is to blame; waiting does not mend a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (HTTPError, HfHubHTTPError)):
            return True
        seen = seen.__cause__
    return False
