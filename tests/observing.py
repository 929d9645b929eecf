"""What a process under test logs."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from service.observing import logs
from service.settings import Settings


@contextmanager
def logged(settings: Settings) -> Iterator[io.StringIO]:
    """Everything that is logged as the service logs it; afterwards logging is as it was."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    before = [(one, one.handlers[:], one.propagate, one.level) for one in (logging.root, *loggers)]
    hooks = sys.excepthook, threading.excepthook
    stream = io.StringIO()
    logs.configure(settings, stream)
    try:
        yield stream
    finally:
        logging.captureWarnings(False)
        sys.excepthook, threading.excepthook = hooks
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """The log's lines, each of which must be a JSON object."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]
