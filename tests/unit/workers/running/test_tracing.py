"""One trace from the request to the last stage, through real messages and a real Celery worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pdtrim.contract.jobs import JobStatus, StageName
from service.app import PROBES
from service.observing import exporters as spans
from service.observing import tracing
from service.queue import message_name
from service.settings import Settings
from service.upkeep.reconciler import sweep
from tests.gateway import Gateway, serve, write_model
from tests.processes import wait_until
from tests.running import run_stage, working
from workers.running.attempt import Worker
from workers.stages import STAGES
from workers.stages.context import StageContext

pytestmark = pytest.mark.server


@cache
def _exporter() -> InMemorySpanExporter:
    """A process takes one tracer provider for ever, so that the tests that follow have it too."""
    exporter = InMemorySpanExporter()
    trace.set_tracer_provider(spans.provider("test", SimpleSpanProcessor(exporter)))
    return exporter


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """The spans that end during the test."""
    _exporter().clear()
    yield _exporter()
    _exporter().clear()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the tasks' module reads from the environment."""
    monkeypatch.setenv("PDTRIM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PDTRIM_ALLOWED_SOURCES", json.dumps(["builtin:", (tmp_path / "models").as_uri()]))
    monkeypatch.setenv("PDTRIM_RECONCILE_SECONDS", "600")
    return Settings()


@pytest.fixture
def gateway(settings: Settings, tmp_path: Path) -> Iterator[Gateway]:
    with serve(settings, write_model(tmp_path / "models" / "tiny")) as running:
        yield running


def finished(gateway: Gateway, job_id: str) -> None:
    def final() -> bool:
        return JobStatus(gateway.client.get(f"/v1/jobs/{job_id}").json()["status"]).final

    wait_until(final, seconds=60, what="the job to end")


def by_name(ended: tuple[ReadableSpan, ...], job_id: str) -> dict[str, ReadableSpan]:
    """The spans of a job's messages and stages, and of the request that made it."""
    of_stages = [span for span in ended if (span.attributes or {}).get("pdtrim.job_id") == job_id]
    traces = {span.context.trace_id for span in of_stages if span.context}
    return {span.name: span for span in ended if span.context and span.context.trace_id in traces}


def parent_name(span: ReadableSpan, among: Mapping[str, ReadableSpan]) -> str | None:
    """The name of a span's parent; None of a root."""
    if span.parent is None:
        return None
    return next(name for name, other in among.items() if other.context and other.context.span_id == span.parent.span_id)


def test_one_job_is_one_trace_from_the_request_to_the_last_stage(
    exporter: InMemorySpanExporter, gateway: Gateway, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with working(settings, monkeypatch):
        job_id = gateway.create()
        finished(gateway, job_id)

    found = by_name(exporter.get_finished_spans(), job_id)
    assert len({span.context.trace_id for span in found.values() if span.context}) == 1
    assert {name: parent_name(span, found) for name, span in found.items()} == {
        "POST /v1/jobs": None,
        **{message_name(stage): "POST /v1/jobs" for stage in StageName},
        f"send {message_name(StageName.SCORING)}": "POST /v1/jobs",
        **{f"send {message_name(after)}": message_name(before) for before, after in pairwise(StageName)},
    }
    for stage in StageName:
        attributes = dict(found[message_name(stage)].attributes or {})
        assert attributes["pdtrim.attempt"] == 1
        assert attributes["pdtrim.outcome"] == "succeeded"


def test_a_job_whose_message_was_lost_stays_in_its_trace(
    exporter: InMemorySpanExporter, gateway: Gateway, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = gateway.create()
    for message in (settings.data_dir / "broker" / "messages").iterdir():
        message.unlink()
    again = settings.model_copy(update={"resend_seconds": 0.001})
    wait_until(lambda: sweep(gateway.database, again, gateway.app.state.metrics.leases_expired) == 1, seconds=10)
    with working(settings, monkeypatch):
        finished(gateway, job_id)

    found = by_name(exporter.get_finished_spans(), job_id)
    assert len({span.context.trace_id for span in found.values() if span.context}) == 1
    assert [name for name, span in found.items() if span.parent is None] == ["POST /v1/jobs"]
    assert "pdtrim.evaluation" in found


def test_a_stage_that_fails_is_an_error_without_its_message(
    exporter: InMemorySpanExporter, gateway: Gateway, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(context: StageContext) -> dict[str, Any]:
        raise RuntimeError("private")

    monkeypatch.setitem(STAGES, StageName.SCORING, fail)
    job_id = gateway.create()
    run_stage(Worker(settings, gateway.database, gateway.app.state.store, "w"), job_id, StageName.SCORING)

    span = by_name(exporter.get_finished_spans(), job_id)["pdtrim.scoring"]
    assert not span.status.is_ok
    assert (span.attributes or {})["pdtrim.outcome"] == "failed"
    assert "private" not in span.to_json()


def test_requests_are_traced_without_secrets_and_probes_not_at_all(
    exporter: InMemorySpanExporter, gateway: Gateway
) -> None:
    gateway.client.get("/v1/jobs?X-Amz-Signature=hidden&sig=hidden&metadata[api_key]=hidden")
    for path in PROBES:
        gateway.client.get(path)
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET /v1/jobs"
    assert "hidden" not in span.to_json()


@pytest.mark.parametrize(
    ("environment", "exports"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, False),
        ({"OTEL_TRACES_EXPORTER": "carrier-pigeon"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SERVICE_NAME": "mine"}, True),
    ],
)
def test_spans_are_exported_only_where_the_environment_asks_for_it(
    environment: dict[str, str], exports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME", *tracing.ENDPOINTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    providers: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", providers.append)
    tracing.configure("pdtrim-gateway")
    names = [provider.resource.attributes["service.name"] for provider in providers]
    assert names == ([environment.get("OTEL_SERVICE_NAME", "pdtrim-gateway")] if exports else [])
    for provider in providers:
        provider.shutdown()


def test_without_the_extra_the_log_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.delattr("service.observing.exporters", raising=False)
    monkeypatch.setitem(sys.modules, "service.observing.exporters", None)
    tracing.configure("pdtrim-gateway")
    assert "pdtrim[otel]" in caplog.text
