"""What makes and exports spans. Needs the extra `otel`."""

from __future__ import annotations

import os
import sys

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

from service.observing.redaction import redact


class Redacting(SpanProcessor):
    """Masks secrets in what a span begins with: paths and queries of requests."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        for name, value in dict(span.attributes or {}).items():
            if isinstance(value, str):
                span.set_attribute(name, redact(value))


def exporting(exporter: str, service_name: str) -> TracerProvider:
    """A provider that exports as OTEL_TRACES_EXPORTER says. Raises: ValueError for an exporter that is not known."""
    chosen: SpanExporter
    match exporter:
        case "otlp":
            chosen = OTLPSpanExporter()
        case "console":
            chosen = ConsoleSpanExporter(out=sys.stderr)
        case _:
            raise ValueError(f"OTEL_TRACES_EXPORTER is {exporter!r}, neither otlp, console nor none")
    return provider(service_name, BatchSpanProcessor(chosen))


def provider(service_name: str, processor: SpanProcessor) -> TracerProvider:
    """A provider whose spans reach `processor` without secrets; OTEL_SERVICE_NAME overrides the name."""
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or service_name})
    made = TracerProvider(resource=resource)
    made.add_span_processor(Redacting())
    made.add_span_processor(processor)
    return made
