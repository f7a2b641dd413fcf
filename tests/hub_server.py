"""A Hub on loopback: repositories with commits, over the part of the Hub's HTTP interface that its client calls.

Files are sent and received as the Hub does without Xet storage: small ones inside of a commit, the others by Git LFS.
What the real Hub does besides (Xet, quotas, scans of what is uploaded, rate limits) is not here.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import datasets.config
import huggingface_hub.hf_api
import huggingface_hub.utils._http as hub_http
import pytest
import transformers.utils.hub
from huggingface_hub import constants, file_download

from rlkd_trl.settings.hub import require_on_hub

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS = (".safetensors", ".bin", ".parquet", ".png")
USER, TOKEN = "owner", "hf_" + "SecretOfOwner1234567890"
READER = "hf_" + "ReadsOnly1234567890abcd"  # of the same account, without the right to write


@dataclass
class Repository:
    """Its commits, each with all files, and the branches and tags that name some of them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], message: str = "", ref: str = "main") -> str:
        """The new commit of these files alone."""
        content = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())]
        sha = hashlib.sha1(repr((len(self.commits), content)).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


class Refusal(Exception):
    """An answer of the Hub that is an error, with its code in a header."""

    def __init__(self, status: int, code: str = "", message: str = "", **content: str):
        super().__init__(status, code)
        self.status, self.code, self.content = status, code, {"error": message, **content}


class LoopbackHub:
    """The server.

    asked: each request's method and path. authorized: the tokens that requests had. lost: whether the network is,
    so that every connection ends without an answer. cut_after: bytes after which the next answer with a longer file
    breaks off; lost_after_cut: whether the network is lost then. lost_for: a part of paths for which it is lost.
    sent_from: the first byte of each such file that was sent.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.authorized: set[str | None] = set()
        self.lost, self.lost_for, self.lost_after_cut = False, "", False
        self.cut_after: int | None = None
        self.sent_from: list[int] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, repo_id: str, files: Mapping[str, bytes], kind: str = "model", **options) -> Repository:
        """A new repository with one commit."""
        repository = self.repositories[kind, repo_id] = Repository(**options)
        repository.commit(files)
        return repository

    def add_directory(self, repo_id: str, directory: Path, **options) -> Repository:
        """A new repository with a directory's files."""
        return self.add(repo_id, {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}, **options)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if self.hub.lost or (self.hub.lost_for and self.hub.lost_for in path):
            self.close_connection = True
            return
        self.hub.asked.append((self.command, path))
        self.hub.authorized.add(token)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.route(path, token, body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.content["error"]}
            self.send(json.dumps(refusal.content).encode(), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, path: str, token: str | None, body: bytes) -> None:
        if path == "/api/whoami-v2":
            return self.send_json(self.whoami(token))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(token, json.loads(body))
        if stored := re.fullmatch(r"/lfs/(\w+)", path):
            if self.command == "PUT":
                self.hub.blobs[stored[1]] = body
                return self.send(b"")
            return self.send_file(self.hub.blobs[stored[1]])
        if batch := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self.repository("model", batch[1], token, write=True)
            return self.send_json(
                {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]}
            )
        if found := re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(KINDS[found[1] or "models"], found[2], found[3], found[4], token)
        if found := re.fullmatch(r"/api/(\w+)/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            return self.api(
                KINDS.get(found[1], ""), found[2], found[3] or "info", found[4], found[5] or "", token, body
            )
        raise Refusal(404, "", f"no route {path}")

    def api(self, kind: str, repo_id: str, what: str, revision: str | None, path: str, token: str | None, body: bytes):
        writes = what in ("preupload", "commit", "branch") or (what == "auth-check" and revision == "write")
        repository = self.repository(kind, repo_id, token, write=writes)
        if what == "auth-check":
            return self.send_json({})
        if what == "branch":
            if revision in repository.refs:
                raise Refusal(409, "", "Reference already exists")
            repository.refs[revision] = repository.refs["main"]
            return self.send_json({})
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repository.refs.items()]
            return self.send_json({"branches": branches, "tags": [], "converts": []})
        files = repository.files(revision or "main")
        if files is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = repository.refs.get(revision or "main", revision)
        if what in ("info", "revision"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self.send_json({"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings})
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "shouldIgnore": False, "uploadMode": _mode(f["path"])} for f in asked]
            return self.send_json({"files": modes})
        if what == "commit":
            return self.commit(repository, repo_id, revision, dict(files), body)
        if what == "tree":
            inside = {name: data for name, data in files.items() if not path or name.startswith(f"{path}/")}
            return self.send_json([_entry(name, data) for name, data in sorted(inside.items())])
        if what == "paths-info":
            asked = json.loads(body)["paths"]
            return self.send_json([_entry(name, files[name]) for name in asked if name in files])
        raise Refusal(404, "", f"no {what}")

    def whoami(self, token: str | None) -> dict:
        if token not in (TOKEN, READER):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, token: str | None, asked: dict) -> None:
        self.whoami(token)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        key = asked.get("type") or "model", repo_id
        if token == READER or not repo_id.startswith(f"{USER}/"):
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")
        url = f"{self.hub.endpoint}/{repo_id}"
        if key in self.hub.repositories:
            raise Refusal(409, "", "You already created this model repo", url=url)
        repository = self.hub.repositories[key] = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": b""}, "initial commit")
        self.send_json({"url": url, "id": repo_id})

    def repository(self, kind: str, repo_id: str, token: str | None, *, write: bool = False) -> Repository:
        repository, is_known = self.hub.repositories.get((kind, repo_id)), token in (TOKEN, READER)
        is_owners = repo_id.startswith(f"{USER}/")
        if repository is None or (repository.private and not (is_known and is_owners)):
            raise Refusal(404 if is_known else 401, "RepoNotFound", "Repository not found")
        if write and not (token == TOKEN and is_owners):
            raise Refusal(403, "", "You need to be an author or maintainer of this repository")
        return repository

    def upload(self, asked: dict) -> dict:
        href = f"{self.hub.endpoint}/lfs/{asked['oid']}"
        known = asked["oid"] in self.hub.blobs
        return asked if known else {**asked, "actions": {"upload": {"href": href, "header": {}}}}

    def commit(
        self, repository: Repository, repo_id: str, revision: str, files: dict[str, bytes], body: bytes
    ) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repository.commit(files, header["value"]["summary"], revision)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}"})

    def resolve(self, kind: str, repo_id: str, revision: str, name: str, token: str | None) -> None:
        repository = self.repository(kind, repo_id, token)
        if repository.gated and not (token in (TOKEN, READER) and repo_id.startswith(f"{USER}/")):
            raise Refusal(401 if token is None else 403, "GatedRepo", "Access to this model is restricted")
        files = repository.files(revision)
        if files is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": repository.refs.get(revision, revision)}
        if name not in files:
            return self.send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        data = files[name]
        if _mode(name) == "regular":
            return self.send_file(data, {**headers, "ETag": f'"{_blob_id(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.hub.blobs[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        storage = self.hub.endpoint.replace("127.0.0.1", "localhost")  # another host, which is sent no token
        return self.send(b"", 302, {**headers, **linked, "Location": f"{storage}/lfs/{oid}"})

    def send_file(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Answers with the file, or its part from the byte that was asked for; once no more than `cut_after` bytes."""
        wanted, cut = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""), self.hub.cut_after
        first = int(wanted[1]) if wanted else 0
        if self.command == "GET" and _is_large(data):
            self.hub.sent_from.append(first)
        part = data[first:]
        if wanted:
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        is_cut = cut is not None and self.command == "GET" and len(part) > cut
        self.send(part, 206 if wanted else 200, headers, shown=part[:cut] if is_cut else part)
        if is_cut:
            self.hub.cut_after, self.hub.lost = None, self.hub.lost_after_cut
            self.close_connection = True

    def send_json(self, content: object) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def send(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, shown: bytes | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if shown is None else shown)


def _mode(name: str) -> str:
    return "lfs" if name.endswith(LFS) else "regular"


def _is_large(data: bytes) -> bool:
    return len(data) > 10_000


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
    if _mode(name) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def use_endpoint(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the libraries of this process ask this endpoint, with a cache of their own and without an account.

    As the environment variables HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE=0, HF_HUB_DISABLE_XET=1 would, which the
    libraries read when they are imported. Retries do not wait.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_ENDPOINT": endpoint,
        "HUB_DATASETS_URL": endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    for module in (hub_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    require_on_hub.cache_clear()


@contextmanager
def loopback_hub(cache: Path) -> Iterator[LoopbackHub]:
    """Within it the libraries ask this Hub and no other."""
    server = LoopbackHub()
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            use_endpoint(server.endpoint, cache, monkeypatch)
            yield server
    finally:
        server.close()
