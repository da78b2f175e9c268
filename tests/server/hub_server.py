"""A small hub on loopback: the endpoints that huggingface_hub's client asks, with what they answer.

Model info and tree, resolve with ETag and X-Repo-Commit, large files by redirect to a store that
knows ranges, and the errors: X-Error-Code for what is missing or gated, 401 for what is private.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LARGE = (".safetensors", ".bin")  # what the hub keeps in its store of large files


@dataclass
class Repo:
    """Files of one commit. `token`: what a client must present; `gated`: it must have asked."""

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    branch: str = "main"

    @property
    def sha(self) -> str:
        digest = hashlib.sha1(b"commit")
        for name in sorted(self.files):
            digest.update(name.encode() + hashlib.sha1(self.files[name]).digest())
        return digest.hexdigest()


@dataclass
class Hub:
    """The server's state: repositories by id, and the requests that came."""

    repos: dict[str, Repo] = field(default_factory=dict)
    url: str = ""
    store: str = ""  # under another name of this host, as the real one is on another host
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut: int | None = None  # bytes after which the store breaks off its next answer

    def paths(self, method: str = "GET") -> list[str]:
        return [path for verb, path, _ in self.requests if verb == method]


@contextmanager
def serve_hub(**repos: Repo) -> Iterator[Hub]:
    """A hub with repositories; their names' first underscore stands for the slash."""
    hub = Hub({name.replace("_", "/", 1): repo for name, repo in repos.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(self.path.partition("?")[0])
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append((self.command, path, headers))
            if found := re.fullmatch(r"/store/([0-9a-f]{64})", path):
                self._stored(found[1])
            elif found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
                self._describe(found[1], found[2], found[3] or "main")
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(*found.groups())
            else:
                self._fail(404, "EntryNotFound")

        def _repo(self, name: str, revision: str) -> Repo | None:
            """The repository, if the client may see it and the revision is one of its."""
            repo = hub.repos.get(name)
            given = self.headers.get("authorization")
            if repo is None or (repo.token is not None and given != f"Bearer {repo.token}"):
                self._fail(401, "RepoNotFound")
            elif revision not in (repo.branch, repo.sha):
                self._fail(404, "RevisionNotFound")
            else:
                return repo
            return None

        def _describe(self, name: str, what: str | None, revision: str) -> None:
            repo = self._repo(name, revision)
            if repo is None:
                return
            if what == "tree":
                entries = []
                for path, data in repo.files.items():
                    entry = {"type": "file", "path": path, "size": len(data), "oid": _sha1(data)}
                    if path.endswith(LARGE):
                        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
                    entries.append(entry)
                self._send(200, json.dumps(entries).encode(), {"content-type": "application/json"})
            else:
                info = {"id": name, "modelId": name, "sha": repo.sha, "private": False, "tags": []}
                info["siblings"] = [{"rfilename": path} for path in repo.files]
                self._send(200, json.dumps(info).encode(), {"content-type": "application/json"})

        def _resolve(self, name: str, revision: str, path: str) -> None:
            repo = self._repo(name, revision)
            if repo is None:
                return
            if repo.gated:
                self._fail(403, "GatedRepo")
                return
            data = repo.files.get(path)
            commit = {"X-Repo-Commit": repo.sha}
            if data is None:
                self._fail(404, "EntryNotFound", commit)
            elif path.endswith(LARGE):
                linked = {"X-Linked-ETag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
                location = {"Location": f"{hub.store}/store/{_sha256(data)}"}
                self._send(302, b"", commit | linked | location)
            else:
                self._send(200, data, commit | {"ETag": f'"{_sha1(data)}"'})

        def _stored(self, digest: str) -> None:
            files = (data for repo in hub.repos.values() for data in repo.files.values())
            data = next(data for data in files if _sha256(data) == digest)
            given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            if given is None:
                self._send(200, data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})
                return
            start, end = int(given[1]), min(int(given[2] or len(data)), len(data) - 1)
            span = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
            self._send(206, data[start : end + 1], span)

        def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self._send(status, b"", (headers or {}) | {"X-Error-Code": code})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut is not None and self.path.startswith("/store/"):
                data, hub.cut = data[: hub.cut], None
                self.close_connection = True
            self.wfile.write(data)

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    ports = [server.server_address[1] for server in servers]
    hub.url, hub.store = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
