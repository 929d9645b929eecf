"""Work that takes long and may have to stop in its middle: what it asks, and how to wait for what cannot ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

Check = Callable[[], None]
"""Asked again and again by what takes long; it raises when that is to stop. Any thread may call it."""
Answer = TypeVar("Answer")
POLL_S = 0.2
ENDING_S = 1.5
"""How long a call that was told to stop is waited for, so that it can clear up."""


def go_on() -> None:
    """The check of work that nothing stops."""


class Interrupted(BaseException):
    """Carries what a check raised past libraries that take every Exception for a fault of the network."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def interrupt(check: Check) -> None:
    """Ask `check` where a library is the caller. Raises: Interrupted."""
    try:
        check()
    except Exception as reason:
        raise Interrupted(reason) from reason


@contextmanager
def reasons() -> Iterator[None]:
    """What is Interrupted inside raises outside what the check had raised."""
    try:
        yield
    except Interrupted as stop:
        raise stop.reason from None


def interruptible(check: Check, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises. It runs in a thread of its own, so that what `check` raises is raised at once.

    The call is then left behind; it should ask `check` too, and come to an end soon.
    """
    check()
    done: Future[Answer] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001  (the border of the thread: whoever waits gets it)
            done.set_exception(error)

    # A daemon, so that a server that says nothing keeps no process from ending; in the context of log lines and traces.
    thread = Thread(target=copy_context().run, args=(run,), name="interruptible", daemon=True)
    thread.start()
    try:
        while not wait({done}, timeout=POLL_S).done:
            check()
    except BaseException:
        thread.join(ENDING_S)
        raise
    return done.result()
