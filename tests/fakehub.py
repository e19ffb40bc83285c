"""A model hub on 127.0.0.1: it speaks the endpoints that files are resolved and fetched by, and misbehaves on request."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee00" * 5


@dataclass
class Asked:
    """One request: where it went (`hub` or `cdn`), what it asked for, and its headers in small letters."""

    where: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class FakeHub:
    """Files by repository and path; large ones are redirected to a second server, as the hub does to its CDN.

    `refuse` answers with a status and error code; `cut` sends only so many bytes of a file, once, and then is down for
    `down` requests; `swap` sends other content than it promises; `ranges` says whether ranges are honoured.
    """

    address: str = ""
    cdn: str = ""
    files: dict[tuple[str, str], bytes | Path] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    refuse: tuple[int, str] | None = None
    cut: int | None = None
    down: int = 0
    swap: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    bare: bool = False

    def put(self, repo: str, path: str, content: bytes | Path, *, small: bool = False) -> str:
        """Add a file; return its sha256."""
        self.files[repo, path] = content
        if small:
            self.small.add(path)
        return hashlib.sha256(self.read(content)).hexdigest()

    @staticmethod
    def read(content: bytes | Path) -> bytes:
        return content if isinstance(content, bytes) else content.read_bytes()

    def etag(self, path: str, content: bytes | Path) -> str:
        data = self.read(content)
        if path in self.small:
            return git_sha1(data)
        return hashlib.sha256(data).hexdigest()

    def gets(self, where: str = "cdn") -> list[Asked]:
        return [each for each in self.asked if each.method == "GET" and each.where == where]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running() -> Iterator[FakeHub]:
    """Run a hub and its CDN on two free ports."""
    hub = FakeHub()

    class OfHub(_Handler):
        state, where = hub, "hub"

    class OfCdn(_Handler):
        state, where = hub, "cdn"

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (OfHub, OfCdn)]
    hub.address, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub
    where: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.state
        headers = {key.casefold(): value for key, value in self.headers.items()}
        hub.asked.append(Asked(self.where, self.command, self.path, headers))
        if self.where == "cdn":
            self._send(self.path.removeprefix("/"))
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if hub.refuse is not None:
            self._status(hub.refuse[0], hub.refuse[1])
        elif found is None or (found[1], found[3]) not in hub.files:
            self._status(404, "EntryNotFound" if found else "")
        elif hub.bare:
            self._headers(200, {"Content-Length": "0"})
        else:
            self._resolve(found[1], found[3])

    def _resolve(self, repo: str, path: str) -> None:
        hub = self.state
        content = hub.files[repo, path]
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etag(path, content)}"'}
        if path in hub.small:
            self._send(f"{repo}/{path}", about)
        else:
            about = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{hub.etag(path, content)}"', "X-Linked-Size": str(size),
                     "Location": f"{hub.cdn}/{repo}/{path}"}  # fmt: skip
            self._headers(302, {**about, "Content-Length": "0"})

    def _send(self, name: str, about: dict[str, str] | None = None) -> None:
        hub = self.state
        owner, repo, path = name.split("/", 2)
        data = hub.swap.get(path) if path in hub.swap else hub.read(hub.files[f"{owner}/{repo}", path])
        assert data is not None
        if self.command == "GET" and hub.cut is None and hub.down:
            hub.down -= 1
            self._status(503, "")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked and hub.ranges else 0
        extra = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if asked and hub.ranges else {}
        rest = data[first:]
        self._headers(206 if extra else 200, {**(about or {}), **extra, "Content-Length": str(len(rest))})
        if self.command == "GET":
            if hub.cut is not None:
                rest, hub.cut = rest[: hub.cut], None
                self.close_connection = True
            self.wfile.write(rest)

    def _status(self, status: int, code: str) -> None:
        self._headers(status, {"Content-Length": "0", **({"X-Error-Code": code} if code else {})})

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
