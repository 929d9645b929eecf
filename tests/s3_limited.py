"""A store as some that speak S3's protocol are, in front of a real one: without bulk delete, without a list of
uploads, and with the whole object's checksum on a part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>not here</Message></Error>'
WRONG_CHECKSUM = "AAAAAA=="
"""The CRC32 of the whole object, as far as a part's reader can see."""


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that went away."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@dataclass
class LimitedStore:
    """`refused` are the calls that it refused, while it is `limiting`."""

    url: str = ""
    limiting: bool = True
    refused: list[str] = field(default_factory=list)


@contextmanager
def limited_store(
    endpoint_url: str, *, delete_objects: tuple[int, str], list_uploads: tuple[int, str]
) -> Iterator[LimitedStore]:
    """The store at `endpoint_url`, but that it answers two calls with a status and a code."""
    behind = urlsplit(endpoint_url).netloc
    limited = LimitedStore()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
            if not limited.limiting:
                self._pass_on(body)
            elif self.command == "POST" and "delete" in query:
                self._refuse("DeleteObjects", *delete_objects)
            elif self.command == "GET" and "uploads" in query:
                self._refuse("ListMultipartUploads", *list_uploads)
            else:
                self._pass_on(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

        def _refuse(self, call: str, status: int, code: str) -> None:
            limited.refused.append(call)
            body = ERROR.format(code=code).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _pass_on(self, body: bytes) -> None:
            connection = HTTPConnection(behind, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            # Signed with the request: the name by which this one is called stays.
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            if limited.limiting and "Range" in self.headers:
                self.send_header("x-amz-checksum-crc32", WRONG_CHECKSUM)
            self.end_headers()
            self.wfile.write(content)
            connection.close()

    with _Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        limited.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield limited
        finally:
            server.shutdown()
            thread.join()
