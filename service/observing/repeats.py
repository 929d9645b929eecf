"""Log lines that repeat are counted: what anyone can cause, anyone could fill a disk with."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from threading import Lock

AS_THEY_ARE = 20
"""Warnings of one kind that are logged within a window. A kind is a logger, a level, a message without its values."""
WINDOW_SECONDS = 60.0
KINDS = 1000
"""Kinds that are remembered."""


@dataclass
class _Window:
    began: float
    logged: int = 0
    left_out: int = 0


class Repeats(logging.Filter):
    """Lets warnings and errors of a kind through until they are too many; the next window's first says how many more
    there were, as `left_out`. What is less than a warning, such as the line of a request, always passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = Lock()
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind, now = (record.name, record.levelno, str(record.msg)), time.monotonic()
        with self._lock:
            window = self._windows.get(kind)
            if window is None or now - window.began >= WINDOW_SECONDS:
                if window is not None and window.left_out:
                    record.left_out = window.left_out
                if len(self._windows) >= KINDS:
                    self._windows.clear()
                window = self._windows[kind] = _Window(now)
            window.logged += 1
            if window.logged > AS_THEY_ARE:
                window.left_out += 1
                return False
            if window.logged == AS_THEY_ARE:
                record.repeats = f"more of these within {WINDOW_SECONDS:g} s are counted, not logged"
            return True
