"""How long a connection may keep the gateway waiting, how many there may be, and what its end means.

uvicorn bounds the length of a head and the time of an idle connection. What it leaves open is bounded here: the time of
a head, of a body and of an answer that nobody reads, and the connections themselves. Were there more of them than files
that the process may open, nothing could be accepted, and asyncio would say so again and again.

uvicorn also works on for a client that has left. Here its request is dropped where it waits: for a thread, for a check,
for the network. What runs in a thread by then goes on to its end, so nothing is left half done.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import struct
from typing import Any, Literal

from anyio import CancelScope
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.settings import Settings

MAX_HEAD_BYTES = 32 << 10
"""Longest request line with headers; the rest of a longer one is not read."""
HEAD_SECONDS = 10.0
"""From the first byte of a request, or the begin of the connection, to the end of the head."""
BODY_SECONDS = 60.0
"""From there to the end of the body."""
UNREAD_SECONDS = 60.0
"""How long nothing may be read of an answer of which much is waiting to be sent."""
IDLE_SECONDS = 75
"""Between two requests; proxies that keep connections open for a minute must not find them closed."""
OTHER_FILES = 100
"""Files of the process that are no connections to it: of the database, of sources that are checked."""
BACKLOG = 128
"""Connections that wait to be accepted, and are accepted at once."""

AT_ONCE = struct.pack("ii", 1, 0)
"""Linger: yes, for 0 s."""

Phase = Literal["head", "body", "answer"]
log = logging.getLogger(__name__)


def server_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is to be told of connections."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        files = settings.max_connections + OTHER_FILES + BACKLOG
    backlog = max(1, min(BACKLOG, files // 8))
    most = max(1, min(settings.max_connections, files - OTHER_FILES - backlog))
    return {
        "http": type("BoundedConnection", (Connection,), {"most": most}),
        "ws": "none",
        "backlog": backlog,
        "timeout_keep_alive": IDLE_SECONDS,
        # h11 bounds what it keeps of a request that has no end.
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
    }


class Connection(H11Protocol):
    """A connection that is closed when it keeps the gateway waiting; there are at most `most` at once.

    When it ends before its request is answered, the request is dropped.
    """

    most: int
    idle_since: float | None = None
    """When it began to wait for a request, while it does (seconds of the loop's clock)."""
    _request: CancelScope | None = None
    """In which the application works on the newest request."""
    _phase: Phase | None = None
    _phase_ends: asyncio.TimerHandle | None = None
    _unread_ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._application, self.app = self.app, self._answer
        self.idle_since = self.loop.time()
        self._enter("head", HEAD_SECONDS)
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look(arrived=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look(arrived=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        self.resume_writing()
        super().connection_lost(exc)
        if self._request is not None and self.cycle.disconnected:
            self._request.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_ends = self.loop.call_later(UNREAD_SECONDS, self._give_up, "answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_ends is not None:
            self._unread_ends.cancel()
            self._unread_ends = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self._give_up("answer")
        else:
            super().timeout_keep_alive_handler()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, for as long as somebody waits for its answer."""
        with CancelScope() as self._request:
            if not self.cycle.disconnected:
                await self._application(scope, receive, send)

    def _look(self, *, arrived: bool) -> None:
        """See what the connection waits for now; `arrived` says whether there was a byte of it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle_since = None
            if self.cycle.more_body:
                self._enter("body", BODY_SECONDS)
            else:
                self._enter(None)
            return
        if self.idle_since is None:
            self.idle_since = self.loop.time()
        if arrived:
            self._enter("head", HEAD_SECONDS)
        elif self._phase == "body":
            self._enter(None)

    def _enter(self, phase: Phase | None, seconds: float = 0.0) -> None:
        """Begin a phase, unless it goes on."""
        if phase == self._phase:
            return
        if self._phase_ends is not None:
            self._phase_ends.cancel()
        self._phase = phase
        self._phase_ends = None if phase is None else self.loop.call_later(seconds, self._give_up, phase)

    def _give_up(self, phase: Phase) -> None:
        log.warning("a connection is closed that kept the gateway waiting", extra={"waited_for": phase})
        if phase == "answer":
            # What the system has taken of it goes, too.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.transport.abort()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for a request; this one, where all others have one."""
        idle = [one for one in self.connections if isinstance(one, Connection) and one.idle_since is not None]
        log.warning("a connection is closed: there are more than %d", self.most)
        oldest = min(idle, key=lambda one: one.idle_since or 0.0)
        self.connections.discard(oldest)
        oldest.transport.abort()
