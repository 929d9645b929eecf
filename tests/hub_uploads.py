"""A stand-in for the part of the Hugging Face hub that takes uploads: git commits, and files in Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class UploadHub:
    """Repositories by name, each a list of commits with all files; `uploads` are the contents that came into LFS."""

    url: str = ""
    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refusal: int | None = None

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository][-1]


@contextmanager
def serve_upload_hub() -> Iterator[UploadHub]:
    """A hub without repositories, which takes any token."""
    hub = UploadHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._take(b"")

        def do_POST(self) -> None:
            self._take(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def do_PUT(self) -> None:
            self._take(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _take(self, body: bytes) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/upload/"):
                assert hashlib.sha256(body).hexdigest() == path.removeprefix("/upload/")
                hub.lfs[path.removeprefix("/upload/")] = body
                hub.uploads.append(path.removeprefix("/upload/"))
                return self._answer({})
            if path == "/api/validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if path.startswith(("/api/models/", "/api/repos/")):
                hub.tokens.add(self.headers.get("Authorization"))
            if hub.refusal is not None:
                return self._answer({"error": "refused"}, hub.refusal)
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if path.endswith("/info/lfs/objects/batch"):
                return self._answer({"objects": [self._lfs(one) for one in json.loads(body)["objects"]]})
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            repository = f"{owner}/{name}"
            if rest[:1] == ["preupload"]:
                return self._answer({"files": [_mode(hub, repository, one) for one in json.loads(body)["files"]]})
            if rest[:1] == ["commit"]:
                return self._commit(repository, [json.loads(line) for line in body.splitlines()])
            siblings = [{"rfilename": name, **_stored(name, data)} for name, data in hub.files(repository).items()]
            return self._answer({"id": repository, "sha": _sha(hub, repository), "siblings": siblings, "tags": []})

        def _create(self, asked: dict[str, Any]) -> None:
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in hub.repositories:
                return self._answer({"url": f"{hub.url}/{repository}"}, 409)
            hub.repositories[repository] = [{".gitattributes": b""}]
            hub.private[repository] = asked.get("visibility") == "private"
            return self._answer({"url": f"{hub.url}/{repository}"})

        def _lfs(self, asked: dict[str, Any]) -> dict[str, Any]:
            if asked["oid"] in hub.lfs:
                return asked
            return {**asked, "actions": {"upload": {"href": f"{hub.url}/upload/{asked['oid']}"}}}

        def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
            files = dict(hub.files(repository))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            hub.repositories[repository].append(files)
            sha = _sha(hub, repository)
            self._answer({"commitOid": sha, "commitUrl": f"{hub.url}/{repository}/commit/{sha}", "success": True})

        def _answer(self, content: object, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

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


def _sha(hub: UploadHub, repository: str) -> str:
    return f"{len(hub.repositories[repository]):040x}"


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _mode(hub: UploadHub, repository: str, asked: dict[str, Any]) -> dict[str, Any]:
    path, held = asked["path"], hub.files(repository).get(asked["path"])
    lfs = path.endswith(".safetensors")
    oid = None if held is None else hashlib.sha256(held).hexdigest() if lfs else _oid(held)
    return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}


def _stored(name: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"lfs": {"size": len(data), "sha256": sha256, "pointerSize": 134}} if name.endswith(".safetensors") else {}
    return {"size": len(data), "blobId": _oid(data), **lfs}
