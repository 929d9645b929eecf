"""What names stand for, looked up in threads of their own: few, and not waited for long.

The system's resolver cannot be interrupted. A look-up whose server says nothing keeps its thread until the resolver
gives up, which may take a minute, and keeps nobody waiting but those who ask for the same name.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Lock

from service.stopping import begun

LOOKUP_SECONDS = 3.0
AT_ONCE = 64
Resolve = Callable[[str, int], Sequence[str]]
"""Host and port to addresses. Raises: OSError."""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system finds them. Raises: OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host} cannot be a name") from error
    return [str(one[4][0]) for one in found]


class Lookups:
    """Looks names up by `find`, each once at a time. Safe to use from many threads and event loops."""

    def __init__(self, find: Resolve = resolve, *, at_once: int = AT_ONCE, seconds: float | None = None) -> None:
        self._find, self._most = find, at_once
        self._seconds = LOOKUP_SECONDS if seconds is None else seconds
        self._changing = Lock()
        self._under_way: dict[tuple[str, int], Future[Sequence[str]]] = {}

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """What `find` finds. Raises: OSError, also when that takes too long, or too many names do."""
        try:
            async with asyncio.timeout(self._seconds) as limit:
                return await asyncio.wrap_future(self._begun(host, port))
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise OSError(f"{host} was not found within {self._seconds:g} s") from error

    def _begun(self, host: str, port: int) -> Future[Sequence[str]]:
        key = (host, port)
        with self._changing:
            if (under_way := self._under_way.get(key)) is not None:
                return under_way
            if len(self._under_way) >= self._most:
                raise OSError(f"{host} is not looked up: {self._most} names are, and no answer comes")
            found = self._under_way[key] = begun(partial(self._find, host, port), "lookup")
        found.add_done_callback(lambda _: self._end(key))
        return found

    def _end(self, key: tuple[str, int]) -> None:
        with self._changing:
            del self._under_way[key]
