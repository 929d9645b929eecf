"""A gateway on a real port that can be stopped and started again, and a relay that breaks connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx2
import uvicorn

from service.api.connections import server_options
from service.app import create_app
from service.db.session import connect, migrate
from service.settings import Settings
from service.storage import open_store
from tests import databases
from tests.gateway import Gateway
from tests.servers import free_ports


class LiveGateway:
    """uvicorn in a thread. `played` plays the worker on its database."""

    def __init__(self, settings: Settings, model: Path) -> None:
        self.settings = settings
        self.url = f"http://127.0.0.1:{settings.port}"
        databases.provide(settings.database_url)
        database = connect(settings.database_url)
        migrate(database)
        app = create_app(settings)
        app.state.store = open_store(settings.artifacts_url)
        spec = {"model": model.as_uri(), "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
        self.played = Gateway(httpx2.Client(base_url=self.url, trust_env=False), app, settings, database, spec)
        self.start()

    def start(self) -> None:
        options = server_options(self.settings)
        config = uvicorn.Config(create_app(self.settings), port=self.settings.port, log_level="error", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)

    @property
    def requests(self) -> int:
        """How many requests have come since the last start."""
        return self._server.server_state.total_requests

    @property
    def under_way(self) -> int:
        """How many requests are worked on now."""
        return len(self._server.server_state.tasks)

    def stop(self) -> None:
        """Stop at once; open streams break."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


@contextmanager
def live(settings: Settings, model: Path) -> Iterator[LiveGateway]:
    gateway = LiveGateway(settings.model_copy(update={"port": free_ports(1)[0]}), model)
    try:
        yield gateway
    finally:
        gateway.stop()
        gateway.played.client.close()
        gateway.played.database.dispose()


class Relay:
    """Passes connections on to a port, and breaks the first ones after `break_after` bytes of answer each."""

    def __init__(self, port: int, break_after: list[int]) -> None:
        self.requests: list[bytes] = []
        self._port, self._break_after = port, break_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                allowed = self._break_after.pop(0) if self._break_after else None
                far = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._forward, args=(near, far), daemon=True).start()
                threading.Thread(target=self._answer, args=(far, near, allowed), daemon=True).start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while request := near.recv(65536):
                self.requests.append(request)
                far.sendall(request)

    def _answer(self, far: socket.socket, near: socket.socket, allowed: int | None) -> None:
        with closing(far), closing(near), suppress(OSError):
            while piece := far.recv(min(65536, allowed or 65536)):
                near.sendall(piece)
                if allowed is not None:
                    allowed -= len(piece)
                    if allowed <= 0:
                        near.shutdown(socket.SHUT_RDWR)
                        return


@contextmanager
def relay(port: int, *, break_after: list[int]) -> Iterator[Relay]:
    with closing(Relay(port, break_after)) as running:
        yield running
