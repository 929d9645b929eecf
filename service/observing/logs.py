"""Logs of every process: the standard library's loggers, rendered by structlog as JSON lines or for a terminal.

Code logs with `logging` and gives figures as `extra`. What holds for a while (a request, a stage) is bound once with
`structlog.contextvars` and is then on every line, also on those of libraries.
"""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Literal, TextIO

import structlog
from opentelemetry import trace
from structlog.types import EventDict, Processor, WrappedLogger

from service.observing.redaction import scrub
from service.observing.repeats import Repeats
from service.settings import Settings

log = logging.getLogger(__name__)


def chosen_format(settings: Settings, stream: TextIO) -> Literal["json", "console"]:
    """The format that is set, else the one for who reads `stream`."""
    return settings.log_format or ("console" if stream.isatty() else "json")


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (stderr), in one format and without secrets.

    Libraries that brought handlers of their own lose them; so do uncaught exceptions their raw traceback.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.addFilter(Repeats())
    handler.setFormatter(_formatter(console=chosen_format(settings, stream) == "console", colors=stream.isatty()))
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.root.handlers = [handler]
    logging.root.setLevel(settings.log_level)
    # One line for each look at the schema's version, which every readiness probe takes.
    logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _formatter(*, console: bool, colors: bool) -> logging.Formatter:
    renderer: Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _redact,
            renderer,
        ],
    )


def _add_trace(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"], event["span_id"] = trace.format_trace_id(span.trace_id), trace.format_span_id(span.span_id)
    return event


def _redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # Uvicorn says everything twice.
    clean: EventDict = scrub(event)
    return clean


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        log.critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None and not isinstance(given.exc_value, SystemExit):
        log.critical("uncaught exception", exc_info=(given.exc_type, given.exc_value, given.exc_traceback))
