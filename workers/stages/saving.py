"""States saved while a stage works on: copied by the stage, written and uploaded by one thread.

A store puts a file whole or not at all, so that one state under one name suffices: a process that dies while the next
is under way leaves the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial

from torch import Tensor

from workers.stages.context import StageContext

COST_SHARE = 0.05
"""Of a stage's time, that may go into copying its state."""
POLL_S = 0.2
Tensors = dict[str, Tensor]


class Saver:
    """Saves one state after the other. What goes wrong is raised when next somebody asks whether it is busy."""

    def __init__(self, save: Callable[[str, Tensors], None]) -> None:
        self._save = save
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._under_way: list[Future[None]] = []

    def is_busy(self) -> bool:
        """Whether a state is under way. Raises: what saving one raised."""
        for done in [one for one in self._under_way if one.done()]:
            self._under_way.remove(done)
            done.result()
        return bool(self._under_way)

    def save(self, name: str, state: Tensors) -> None:
        """Save a state, which nobody changes any more, after those under way."""
        self.then(partial(self._save, name, state))

    def then(self, save: Callable[[], None]) -> None:
        """Save something else, after what is under way."""
        # In the context of log lines and traces.
        self._under_way.append(self._thread.submit(copy_context().run, save))

    def close(self, check: Callable[[], None]) -> None:
        """End with the state that is under way; those behind it are not wanted any more.

        Raises: as `is_busy`; what `check` raises.
        """
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._under_way = [one for one in self._under_way if not one.cancelled()]
        while self.is_busy():
            wait(self._under_way, timeout=POLL_S)
            check()

    def abandon(self) -> None:
        """End after a fault that is worth more than any of saving."""
        self._thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def saving(context: StageContext) -> Iterator[Saver]:
    """A saver of the stage's states; none is under way afterwards."""
    saver = Saver(context.save_tensors)
    try:
        yield saver
        saver.close(context.check)
    finally:
        saver.abandon()


class Pace:
    """When to save: every so many seconds, and so seldom that copying takes no more than COST_SHARE of the time."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = time.monotonic() + interval_s

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def paid(self) -> Iterator[None]:
        """Around what a save costs the stage."""
        start = time.monotonic()
        yield
        now = time.monotonic()
        self._next = now + max(self._interval_s, (now - start) / COST_SHARE)
