"""A hub for tests: the few addresses of it that are used, with repositories in memory."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]


@dataclass
class Repository:
    """All versions of a repository."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        number = hashlib.sha1(f"{len(self.commits)}{branch}".encode()).hexdigest()
        self.commits[number] = files
        self.branches[branch] = number
        return number

    def resolve(self, revision: str) -> str | None:
        number = self.branches.get(revision, revision)
        return number if number in self.commits else None


@dataclass
class Hub:
    """What the hub holds, and what it was asked for."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)

    def files(self, name: str, branch: str = "main") -> Files:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]


class Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        token = self.headers.get("authorization")
        self.hub.tokens.append(token)
        if found := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/([^/]+))?", path):
            self._listed(*found.groups(), token)
        elif found := re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/([^/]+)", path):
            self._file(*found.groups(), token)
        else:
            self._refuse(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.hub.tokens.append(self.headers.get("authorization"))
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'user'}/{given['name']}"
            url = {"url": f"{self.hub.address}/{name}"}
            if name in self.hub.repositories:
                return self._answer(url, 409)
            is_private = given.get("private") or given.get("visibility") == "private"
            made = Repository(private=bool(is_private))
            made.commit("main", {".gitattributes": b""})
            self.hub.repositories[name] = made
            return self._answer(url)
        if path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        found = re.fullmatch(r"/api/models/(\w+/\w+)/(branch|preupload|commit)/([^/]+)", path)
        if found is None or found[1] not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        repository = self.hub.repositories[found[1]]
        if found[2] == "branch":
            if found[3] in repository.branches:
                return self._answer({}, 409)
            repository.branches[found[3]] = repository.branches["main"]
            return self._answer({})
        if found[2] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            keys = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [{"path": path, **keys} for path in paths]})
        number = repository.commit(found[3], self._changed(repository, found[3], body))
        url = f"{self.hub.address}/{found[1]}/commit/{number}"
        return self._answer({"commitUrl": url, "commitOid": number, "success": True})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def _changed(self, repository: Repository, branch: str, body: bytes) -> Files:
        files = dict(repository.commits[repository.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        return files

    def _readable(self, name: str, token: str | None) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token is None):
            return None
        return repository

    def _listed(self, name: str, what: str | None, revision: str | None, token: str | None) -> None:
        repository = self._readable(name, token)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        number = repository.resolve(revision or "main")
        if number is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[number]
        if what == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
            return self._answer(entries)
        siblings = [{"rfilename": path} for path in files]
        return self._answer({"id": name, "modelId": name, "sha": number, "siblings": siblings})

    def _file(self, name: str, revision: str, path: str, token: str | None) -> None:
        repository = self._readable(name, token)
        number = None if repository is None else repository.resolve(revision)
        if repository is None or number is None:
            return self._refuse(404, "RepoNotFound")
        if repository.gated and token is None:
            return self._refuse(403, "GatedRepo")
        if path not in repository.commits[number]:
            return self._refuse(404, "EntryNotFound")
        content = repository.commits[number][path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag(content)}"')
        self.send_header("X-Repo-Commit", number)
        self.end_headers()
        if self.command == "GET":
            self.hub.fetched.append(path)
            self.wfile.write(content)
        return None

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused")
        self.send_header("Content-Length", "0")
        self.end_headers()


def etag(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    patch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
