"""A Hub on loopback for tests: the routes that the client of huggingface_hub uses, over plain HTTP, all in memory.

Speaks LFS, not Xet, so its clients set HF_HUB_DISABLE_XET=1. `requests` keeps what was asked, `fail` makes it ill.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

TOKEN = "hf_test"
READ_TOKEN = "hf_test_that_may_only_read"
USER = "tester"
LARGE = (".safetensors", ".bin", ".png", ".parquet", ".arrow")
TYPES = "models|datasets"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.sha1


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]
    changed: list[str] = field(default_factory=list)


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.add("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, [".gitattributes"])

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def add(self, title: str, files: dict[str, Blob], changed: list[str]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {title} {id(self)} {time.time()}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files, changed))
        return self.head


@dataclass
class Request:
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


@dataclass
class Fault:
    """How requests go wrong: `times` of them get `status` and `text`, no answer for `delay` seconds, or a connection
    that is cut "before" or "after" the server has done what was asked."""

    method: str
    pattern: str
    status: int
    times: int
    text: str
    delay: float
    cut: str | None = None


class Cut(Exception):
    """The connection ends without an answer."""


class Reply(Exception):
    """An answer that ends the handling of a request."""

    def __init__(self, status: int, body: object = b"", **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`. `TOKEN` may enter and write as USER, `READ_TOKEN` may enter."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: object) -> dict[str, str]:
        """Variables with which a process of its own talks to this server and to nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(
        self,
        method: str,
        pattern: str,
        status: int = 500,
        times: int = 1,
        text: str = "made ill",
        delay: float = 0.0,
        cut: str | None = None,
    ) -> None:
        """The next requests whose path matches `pattern` go wrong."""
        self.faults.append(Fault(method, pattern, status, times, text, delay, cut))

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[kind, repo_id].head.files.items()}

    def asked(self, method: str, pattern: str) -> list[Request]:
        return [one for one in self.requests if one.method == method and re.search(pattern, one.path)]


def point_client(hub: HubServer, monkeypatch: Any, folder: Path) -> None:
    """This process's client talks to the server. It read its settings at import, so they are set where it has them."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        try:
            self._send(self._reply(self._body()))
        except Cut:
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):  # the client has given up
            self.close_connection = True

    def _reply(self, body: bytes) -> Reply:
        address = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        self.hub.requests.append(Request(self.command, self.path, body, dict(self.headers)))
        cut_after = False
        try:
            cut_after = self._fall_ill(address.path)
            with self.hub.lock:
                self._route(unquote(address.path), query, body)
        except Reply as reply:
            if cut_after:
                raise Cut from reply
            return reply
        return Reply(404, {"error": f"no route for {self.command} {self.path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body)), **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def _fall_ill(self, path: str) -> bool:
        """Whether the answer shall be lost after the work is done."""
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                fault.times -= 1
                threading.Event().wait(fault.delay)  # not time.sleep, which tests patch for the client
                if fault.cut == "after":
                    return True
                if fault.cut:
                    raise Cut
                raise Reply(fault.status, {"error": fault.text}, X_Error_Message=fault.text)
        return False

    # ---- routes ----------------------------------------------------------------------------------------------------

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path.startswith("/lfs/"):  # an address that was signed: no token needed, as with the Hub's store
            self._large(path.removeprefix("/lfs/"), body)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_TOKEN):
            text = "Invalid credentials in Authorization header"
            raise Reply(401, {"error": text}, X_Error_Message=text)
        writes = "/repos/create" in path or "/commit/" in path or "/objects/batch" in path or "/preupload/" in path
        if token == READ_TOKEN and writes:
            text = "This token may only read"
            raise Reply(403, {"error": text}, X_Error_Message=text)
        if path == "/api/whoami-v2":
            raise Reply(200 if token else 401, {"type": "user", "name": USER, "orgs": []})
        if path == "/api/validate-yaml":
            raise Reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self._create(json.loads(body), token)
        if found := re.fullmatch(rf"/api/({TYPES})/([^/]+/[^/]+)(?:/(\S+?))?", path):
            kind, repo_id, rest = found[1], found[2], found[3] or ""
            self._api(kind, repo_id, self._repo(kind, repo_id, token), rest, query, body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repo("datasets" if found[1] else "models", found[2], token)
            self._large_batch(json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self._repo("datasets" if found[1] else "models", found[2], token)
            self._resolve(self._revision(repo, found[3]), found[4])

    def _repo(self, kind: str, repo_id: str, token: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not token):
            raise Reply(404 if token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if self.command in ("POST", "PUT") and not token:
            raise Reply(401, {"error": "a token is needed"})
        return repo

    def _revision(self, repo: Repo, revision: str) -> Commit:
        for commit in repo.commits:
            if commit.oid == revision:
                return commit
        if revision != "main":
            raise Reply(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return repo.head

    def _create(self, asked: dict, token: str) -> None:
        owner = asked.get("organization") or USER
        if not token:
            raise Reply(401, {"error": "a token is needed"})
        if owner != USER:
            text = f"You don't have the rights to create a model under the namespace {owner}"
            raise Reply(403, {"error": text}, X_Error_Message=text)
        kind, repo_id = f"{asked.get('type', 'model')}s", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            raise Reply(409, {"error": "You already created this repo", "url": url})
        self.hub.repos[kind, repo_id] = Repo(private=asked.get("visibility") == "private")
        raise Reply(200, {"url": url, "name": repo_id})

    def _api(self, kind: str, repo_id: str, repo: Repo, rest: str, query: dict[str, str], body: bytes) -> None:
        verb, _, rest = rest.partition("/")
        if verb == "refs":
            raise Reply(200, {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.oid}],
                              "tags": [], "converts": []})  # fmt: skip
        revision, _, folder = rest.partition("/")
        commit = self._revision(repo, revision or "main")
        if verb in ("", "revision"):
            raise Reply(200, {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.oid, "tags": [],
                              "private": repo.private, "downloads": 0, "likes": 0, "lastModified": DATE,
                              "siblings": [{"rfilename": path} for path in commit.files]})  # fmt: skip
        if verb == "tree":
            raise Reply(200, _listing(commit, folder, query.get("recursive", "").lower() in ("1", "true")))
        if verb == "paths-info":
            asked = parse_qs(body.decode()).get("paths", [])
            raise Reply(200, [_entry(path, commit.files[path]) for path in asked if path in commit.files])
        if verb == "commits":
            raise Reply(200, [{"id": one.oid, "title": one.title, "message": "", "date": DATE,
                               "authors": [{"user": USER}]} for one in reversed(repo.commits)])  # fmt: skip
        if verb == "preupload":
            asked = json.loads(body)["files"]
            raise Reply(200, {"files": [{"path": one["path"], "shouldIgnore": False,
                                         "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                                         "oid": commit.files[one["path"]].etag if one["path"] in commit.files else None}
                                        for one in asked]})  # fmt: skip
        if verb == "commit":
            made = self._commit(repo, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.url}/{repo_id}/commit/{made.oid}"
            raise Reply(200, {"success": True, "commitOid": made.oid, "commitUrl": url})

    def _commit(self, repo: Repo, lines: list[dict]) -> Commit:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.head.oid):
            raise Reply(412, {"error": "A commit has happened since. Please refresh and try again."})
        files, changed = dict(repo.head.files), []
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Reply(400, {"error": f"{path} points to a large file that was not uploaded"})
                files[path] = Blob(self.hub.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                raise Reply(400, {"error": f"{line['key']} is not known here"})
            changed.append(path)
        return repo.add(header["summary"], files, changed)

    def _large_batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            href = f"{self.hub.url}/lfs/{one['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            objects.append(one if one["oid"] in self.hub.large else {**one, "actions": actions})
        raise Reply(200, {"transfer": "basic", "objects": objects})

    def _large(self, rest: str, body: bytes) -> None:
        oid, _, verb = rest.partition("/")
        if verb == "verify":
            there = self.hub.large.get(oid)
            raise Reply(200 if there is not None and len(there) == json.loads(body)["size"] else 422, {})
        if hashlib.sha256(body).hexdigest() != oid:
            raise Reply(422, {"error": "the content does not have that SHA-256"})
        self.hub.large[oid] = body
        raise Reply(200, {})

    def _resolve(self, commit: Commit, path: str) -> None:
        blob = commit.files.get(path)
        if blob is None:
            raise Reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content, status = blob.content, 200
        headers = {"ETag": f'"{blob.etag}"', "X_Repo_Commit": commit.oid, "Content_Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X_Linked_ETag": f'"{blob.etag}"', "X_Linked_Size": str(len(content))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "HEAD":
            headers["Content_Length"] = str(len(content))
        raise Reply(status, content, **headers)


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.sha1}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return entry


def _listing(commit: Commit, folder: str, recursive: bool) -> list[dict]:
    prefix = f"{folder}/" if folder else ""
    below = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
    if folder and not below:
        raise Reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
    entries, folders = [], set()
    for path, blob in below.items():
        parts = path.removeprefix(prefix).split("/")
        deepest = len(parts) if recursive else min(len(parts), 2)
        folders |= {prefix + "/".join(parts[:depth]) for depth in range(1, deepest)}
        if recursive or len(parts) == 1:
            entries.append(_entry(path, blob))
    return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
