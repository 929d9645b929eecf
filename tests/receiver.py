"""A real HTTP server on this machine that webhooks are sent to: it answers as told and remembers everything."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """A request as it arrived."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Reply:
    """What to answer, and what to do before; with `stream`, that writes the body."""

    status: int = 204
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    stream: Callable[[Callable[[bytes], object]], None] | None = None
    before: Callable[[], object] = bool


class Receiver(ThreadingHTTPServer):
    """Answers with `replies` in turn, the last of them for ever."""

    daemon_threads = True

    def __init__(self, host: str, replies: list[Reply], tls: ssl.SSLContext | None) -> None:
        self.replies, self.connections = replies, 0
        self.requests: list[Received] = []
        self.arrived = threading.Semaphore(0)
        self._tls = tls
        super().__init__((host, 0), _Handler)
        self.port: int = self.server_address[1]
        self.url = f"http://{host}:{self.port}/hook"

    def get_request(self) -> Any:
        near, address = super().get_request()
        self.connections += 1
        return near, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is not None:
            try:
                request = self._tls.wrap_socket(request, server_side=True)
            except OSError:
                return  # The client did not like the certificate.
        with suppress(ConnectionError, ssl.SSLError):
            super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        raise


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(Received(self.path, dict(self.headers.items()), body))
        reply = self.server.replies[0] if len(self.server.replies) == 1 else self.server.replies.pop(0)
        self.server.arrived.release()
        reply.before()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.stream is None:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)
        if reply.stream is not None:
            reply.stream(self.wfile.write)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the tests look at `requests`."""


@contextmanager
def receiving(*replies: Reply, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A running receiver; without replies it answers 204."""
    with Receiver(host, list(replies) or [Reply()], tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
