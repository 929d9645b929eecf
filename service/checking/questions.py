"""What is asked before a job is queued, in threads of their own: few at once, and not for long.

The gateway's other threads answer everything else. A hub that says nothing, or specifications that take long to read,
would take one after the other of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pdtrim.contract.errors import DependencyUnavailable
from pdtrim.contract.spec import JobSpec
from service.checking import preflight
from service.settings import Settings
from service.sources import ModelDescription
from service.stopping import begun

ASKED_SECONDS = 12.0
"""How long a request waits for its answer; sources have given up by then."""
WAITING = 200
"""Questions that wait for a thread, at most."""
AT_ONCE_HERE = 4
"""Few: while they compute, whatever else the process does waits for its turn."""
AT_ONCE_OUTSIDE = 16
OUTSIDE = ("hf://", "s3://")

Answer = TypeVar("Answer")


class Room:
    """Threads for at most `at_once` questions. One that nobody waits for any more keeps its thread until it ends."""

    def __init__(self, at_once: int, seconds: float = ASKED_SECONDS, waiting: int = WAITING) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._seconds, self._most = seconds, at_once + waiting
        self._asked = 0

    async def ask(self, question: Callable[[], Answer]) -> Answer:
        """What `question` returns, or raises. Raises: DependencyUnavailable when that takes too long."""
        if self._asked >= self._most:
            raise DependencyUnavailable("Too many jobs are being checked at once. Try again in a few seconds.")
        self._asked += 1
        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._free.acquire()
                return await self._begun(question)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DependencyUnavailable(
                f"The job could not be checked within {self._seconds:g} s: the source of its model or its text does "
                "not answer, or holds up the checks of others. Try again."
            ) from error
        finally:
            self._asked -= 1

    def _begun(self, question: Callable[[], Answer]) -> asyncio.Future[Answer]:
        loop, answer = asyncio.get_running_loop(), begun(question, "question")

        def release(answered: object) -> None:
            with suppress(RuntimeError):  # The gateway has stopped.
                loop.call_soon_threadsafe(self._free.release)

        answer.add_done_callback(release)
        return asyncio.wrap_future(answer)


@dataclass(frozen=True)
class Questions:
    """Two rooms, so that a hub or a store that says nothing holds up no job that needs neither."""

    here: Room = field(default_factory=lambda: Room(AT_ONCE_HERE))
    outside: Room = field(default_factory=lambda: Room(AT_ONCE_OUTSIDE))

    async def check(self, spec: JobSpec, settings: Settings) -> ModelDescription:
        """As `preflight.check`. Raises: what that raises; DependencyUnavailable when it takes too long."""
        leads_outside = spec.model.source.startswith(OUTSIDE) or spec.data.origin.startswith(OUTSIDE)
        room = self.outside if leads_outside else self.here
        return await room.ask(partial(preflight.check, spec, settings))
