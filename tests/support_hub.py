"""A stand-in for the Hugging Face hub: the few endpoints its client uses, on 127.0.0.1, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MAIN_COMMIT = "1" * 40


@dataclass
class Repo:
    """Files of each commit, and which commit each branch means. Names in ``lfs`` are announced with their sha256."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str] = field(default_factory=lambda: {"main": MAIN_COMMIT})
    lfs: set[str] = field(default_factory=set)
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """The server's state, and what was asked of it: (method, path, Range header)."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    datasets: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    #: file name -> absolute position after which the connection breaks
    break_at: dict[str, int] = field(default_factory=dict)
    #: file name -> absolute position after which nothing more is sent, the connection staying open
    stall_at: dict[str, int] = field(default_factory=dict)
    #: file name -> the sha256 announced instead of the true one
    false_sha256: dict[str, str] = field(default_factory=dict)
    #: file name -> the content the announced git id belongs to, instead of the true one
    altered: dict[str, bytes] = field(default_factory=dict)
    #: answered to every request when set
    status: int | None = None

    def add(self, name: str, files: dict[str, bytes], **settings: object) -> Repo:
        self.repos[name] = Repo({MAIN_COMMIT: files}, **settings)  # type: ignore[arg-type]
        return self.repos[name]

    def add_dataset(self, name: str, files: dict[str, bytes], **settings: object) -> Repo:
        self.datasets[name] = Repo({MAIN_COMMIT: files}, **settings)  # type: ignore[arg-type]
        return self.datasets[name]

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for verb, path, _ in self.requests if "/resolve/" in path
                and verb == "GET"}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            return self._error(self.hub.status, "Unavailable")
        parts = path.strip("/").split("/")
        repos = self.hub.datasets if "datasets" in parts[:2] else self.hub.repos
        if parts[:1] == ["datasets"]:
            parts = parts[1:]
        if parts[:2] in (["api", "models"], ["api", "datasets"]) and len(parts) >= 4:
            repo = self._repo(repos, "/".join(parts[2:4]))
            if repo is None:
                return None
            return self._info("/".join(parts[2:4]), repo, parts[5] if len(parts) > 5 else "main")
        if len(parts) >= 5 and parts[2] == "resolve":
            repo = self._repo(repos, "/".join(parts[:2]))
            return None if repo is None else self._file(repo, parts[3], "/".join(parts[4:]), body)
        return self._error(404, "EntryNotFound")

    def _repo(self, repos: dict[str, Repo], name: str) -> Repo | None:
        repo = repos.get(name)
        if repo is None:
            self._error(404, "RepoNotFound")
        elif repo.gated:
            self._error(403, "GatedRepo")
            return None
        return repo

    def _info(self, name: str, repo: Repo, revision: str) -> None:
        commit = repo.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        siblings = []
        for file, data in repo.commits[commit].items():
            entry: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": self._git_id(file, data)}
            if file in repo.lfs:
                entry["lfs"] = {"sha256": self._sha256(file, data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        text = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        return None

    def _git_id(self, file: str, data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + self.hub.altered.get(file, data)).hexdigest()

    def _sha256(self, file: str, data: bytes) -> str:
        return self.hub.false_sha256.get(file, hashlib.sha256(data).hexdigest())

    def _file(self, repo: Repo, revision: str, file: str, body: bool) -> None:
        commit = repo.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if file not in repo.commits[commit]:
            return self._error(404, "EntryNotFound")
        data = repo.commits[commit][file]
        begin = 0
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{self._sha256(file, data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if not body:
            return None
        end = min(self.hub.break_at.get(file, len(data)), self.hub.stall_at.get(file, len(data)))
        self.wfile.write(data[begin:end])
        self.wfile.flush()
        while self.hub.stall_at.get(file, len(data)) < len(data):
            time.sleep(0.02)
        if end < len(data):
            self.close_connection = True
        return None

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"stand-in: {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve() -> Iterator[Hub]:
    """A running stand-in; its ``url`` is for ``HF_ENDPOINT``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stall_at.clear()
        server.shutdown()
        server.server_close()
        thread.join()
