"""A stand-in for the Hugging Face hub: the answers that `huggingface_hub` needs to resolve and download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub with one repository; `downloads` are the files that were asked for, `broken` breaks it off half-way."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    kind: str = "models"
    refusal: tuple[int, str] | None = None
    broken: set[str] = field(default_factory=set)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def serve_hub(files: dict[str, bytes], kind: str = "models") -> Iterator[Hub]:
    """A hub with `files` in REPOSITORY at COMMIT, which the branch `main` and the tag `v1` name."""
    hub = Hub(files=dict(files), kind=kind)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            wanted = json.loads(body).get("paths", []) if body.startswith(b"{") else []
            self._json([_entry(hub, name) for name in wanted if name in hub.files])

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            prefix = "" if hub.kind == "models" else f"{hub.kind}/"
            api, resolve = f"/api/{hub.kind}/{REPOSITORY}", f"/{prefix}{REPOSITORY}/resolve/"
            if hub.refusal is not None:
                status, code = hub.refusal
                self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
            elif path == api or path in {f"{api}/revision/{name}" for name in ("main", "v1", COMMIT)}:
                siblings = [
                    {"rfilename": name, "size": len(data), "blobId": _oid(data)} for name, data in hub.files.items()
                ]
                self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0})
            elif path.startswith(f"{api}/tree/"):
                self._json([_entry(hub, name) for name in hub.files])
            elif path.startswith(f"{api}/revision/"):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(resolve):
                self._file(path.removeprefix(resolve).partition("/")[2])
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _file(self, name: str) -> None:
            if name not in hub.files:
                self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            data, wanted = hub.files[name], self.headers.get("Range")
            headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.command == "GET":
                hub.downloads.append((name, wanted))
            if wanted is None:
                self._answer(200, data, headers, sent=len(data) // 2 if name in hub.broken else len(data))
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            self._answer(206, data[start:stop], headers)

        def _json(self, content: object) -> None:
            self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:sent])
            if sent is not None and sent < len(body):
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(hub: Hub, name: str) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(hub.files[name]), "oid": _oid(hub.files[name])}
