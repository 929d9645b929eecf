"""OpenTelemetry traces of a job: the HTTP request, each Celery message, each stage.

FastAPI makes the request's span by itself. The job keeps the headers that carry the trace on (W3C Trace Context), for
all its stages: the message that woke a worker may have been another job's. The Celery instrumentation of
opentelemetry-python-contrib never ends the span of a task that is sent by its name alone, as the gateway sends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
log = logging.getLogger(__name__)
_tracer = trace.get_tracer("pdtrim")


def configure(service_name: str) -> None:
    """Export this process's spans as `OTEL_*` says; nothing happens unless it names an exporter or an endpoint.

    To be called in the process that makes the spans: the thread that exports does not survive a fork.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, ENDPOINTS)) else "none")
    if exporter == "none":
        return
    try:
        from service.observing import exporters as spans
    except ImportError:
        log.warning("no traces without the extra: pip install 'pdtrim[otel]'")
        return
    try:
        trace.set_tracer_provider(spans.exporting(exporter, service_name))
    except ValueError as error:
        log.warning("no traces: %s", error)


def flush() -> None:
    """Export what is not exported yet; for processes that end without Python's exit handlers."""
    provider = trace.get_tracer_provider()
    if hasattr(provider, "force_flush"):
        provider.force_flush()


def carried() -> dict[str, str]:
    """Headers that make what is done elsewhere part of this trace; none where nothing is traced."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


@contextmanager
def sending(task: str) -> Iterator[None]:
    """The span of a message that is sent."""
    with _span(f"send {task}", SpanKind.PRODUCER):
        yield


@contextmanager
def receiving(task: str, headers: Mapping[str, str]) -> Iterator[None]:
    """The span of work, a child of the one that `headers` came from."""
    with _span(task, SpanKind.CONSUMER, headers):
        yield


def describe(**attributes: str | int) -> None:
    """Put attributes on the current span, named `pdtrim.…`."""
    trace.get_current_span().set_attributes({f"pdtrim.{name}": value for name, value in attributes.items()})


def fail() -> None:
    """Mark the current span as failed."""
    trace.get_current_span().set_status(StatusCode.ERROR)


@contextmanager
def _span(name: str, kind: SpanKind, headers: Mapping[str, str] | None = None) -> Iterator[None]:
    parent = None if headers is None else propagate.extract(headers)
    # Messages of exceptions may hold secrets; the log has them, redacted, under the trace's id.
    with _tracer.start_as_current_span(name, parent, kind, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except BaseException:
            fail()
            raise
