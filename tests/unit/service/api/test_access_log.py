from __future__ import annotations

import pytest

from tests.gateway import Gateway
from tests.observing import lines, logged


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", "/v1/jobs?limit=1", 200, "/v1/jobs"),
        ("GET", "/v1/jobs/job_1/events", 404, "/v1/jobs/{job_id}/events"),
        ("GET", "/nowhere/job_1", 404, "unmatched"),
        ("GET", "/broken", 500, "/broken"),
    ],
)
def test_every_request_leaves_one_line(gateway: Gateway, method: str, path: str, status: int, route: str) -> None:
    @gateway.app.get("/broken")
    def broken() -> None:
        raise RuntimeError("broken")

    settings = gateway.settings.model_copy(update={"log_format": "json"})
    with logged(settings) as stream:
        response = gateway.client.request(method, path, headers={"x-request-id": "r-1"})

    assert response.status_code == status
    ours = [line for line in lines(stream) if line["logger"].startswith("service.")]
    (line,) = [line for line in ours if line["event"] == "request"]
    assert {key: line[key] for key in ("method", "route", "status", "request_id")} == {
        "method": method, "route": route, "status": status, "request_id": "r-1",
    }  # fmt: skip
    assert 0 < line["duration_ms"] < 60_000
    assert {line["request_id"] for line in ours} == {"r-1"}


def test_lines_of_a_route_that_runs_in_a_thread_carry_the_requests_id(gateway: Gateway) -> None:
    settings = gateway.settings.model_copy(update={"log_format": "json"})
    gateway.app.state.settings = gateway.settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    with logged(settings) as stream:
        gateway.client.post("/v1/jobs", json=dict(gateway.spec), headers={"x-request-id": "r-2"})
    (line,) = [line for line in lines(stream) if line["logger"] == "service.queue"]
    assert line["level"] == "warning"
    assert line["request_id"] == "r-2"


def test_an_event_stream_leaves_its_line_when_it_ends(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.run(job_id)
    settings = gateway.settings.model_copy(update={"log_format": "json"})
    with logged(settings) as stream:
        gateway.client.get(f"/v1/jobs/{job_id}/events", headers={"accept": "text/event-stream"})
    (line,) = [line for line in lines(stream) if line["event"] == "request"]
    assert (line["route"], line["status"]) == ("/v1/jobs/{job_id}/events", 200)
