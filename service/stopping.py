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


def begun(call: Callable[[], Answer], name: str) -> Future[Answer]:
    """What `call` will return or raise. It runs in a thread of its own, in the context of log lines and traces.

    It cannot be cancelled, but it may be left behind: the thread ends with the process. Python waits for the threads of
    a pool before it ends, however long a server says nothing.
    """
    answer: Future[Answer] = Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001  (the border of the thread: whoever waits gets it)
            answer.set_exception(error)

    Thread(target=copy_context().run, args=(run,), name=name, daemon=True).start()
    return answer


def interruptible(check: Check, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises. It runs in a thread of its own, so that what `check` raises is raised at once.

    The call is then left behind; it should ask `check` too, and come to an end soon.
    """
    check()
    answer = begun(call, "interruptible")
    try:
        while not wait({answer}, timeout=POLL_S).done:
            check()
    except BaseException:
        wait({answer}, timeout=ENDING_S)
        raise
    return answer.result()
