"""A stand-in for the Hugging Face hub: the answers that `huggingface_hub` needs to resolve and download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

REPOSITORY = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub with one repository; `downloads` are the files that were asked for, with their ranges.

    Of a file in `broken` or `stalled` nothing comes from that byte on: the answer breaks off, or stays open.
    What comes of those in `damaged` is wrong. Of one in `slow` so many bytes come in a second.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    kind: str = "models"
    refusal: tuple[int, str] | None = None
    broken: dict[str, int] = field(default_factory=dict)
    stalled: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    slow: dict[str, int] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Send the hub's client to `url`, as HF_ENDPOINT does when the process starts."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def arriving_bytes(model: Path) -> int:
    """What there is of those files of a fetched model that are not whole yet."""
    sizes = []
    for path in model.glob(".pdtrim-part-*"):
        with suppress(FileNotFoundError):  # It has just become whole.
            sizes.append(path.stat().st_size)
    return sum(sizes)


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
                siblings = [{"rfilename": name, **_stored(name, data)} for name, data in hub.files.items()]
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
            data = bytes(len(data)) if name in hub.damaged else data
            headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.command == "GET":
                hub.downloads.append((name, wanted))
            if wanted is None:
                self._send(name, 200, 0, data, headers)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            self._send(name, 206, start, data[start:stop], headers)

        def _send(self, name: str, status: int, start: int, data: bytes, headers: dict[str, str]) -> None:
            end = {**hub.broken, **hub.stalled}.get(name, start + len(data))
            sent = min(max(end - start, 0), len(data))
            wait = name in hub.stalled and sent < len(data)
            self._answer(status, data, headers, sent=sent, wait=wait, rate=hub.slow.get(name))

        def _json(self, content: object) -> None:
            self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _answer(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str],
            sent: int | None = None,
            wait: bool = False,
            rate: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                step = len(body) if rate is None else max(1, rate // 10)
                with suppress(ConnectionError):
                    for start in range(0, len(body[:sent]), max(step, 1)):
                        self.wfile.write(body[:sent][start : start + step])
                        self.wfile.flush()
                        if rate is not None and hub.closing.wait(0.1):
                            break
                if wait:
                    hub.closing.wait()
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
            hub.closing.set()
            server.shutdown()
            thread.join()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _stored(name: str, data: bytes) -> dict[str, object]:
    """What the hub tells of a file: weights are in Git LFS, the rest in git."""
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"lfs": {"size": len(data), "sha256": sha256, "pointerSize": 134}} if name.endswith(".safetensors") else {}
    return {"size": len(data), "blobId": _oid(data), **lfs}


def _entry(hub: Hub, name: str) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(hub.files[name]), "oid": _oid(hub.files[name])}
