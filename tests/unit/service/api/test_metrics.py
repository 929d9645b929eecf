from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from pdtrim.contract.jobs import ErrorInfo, StageName
from service.app import create_app
from service.db.session import transaction
from service.db.tables import EventRow
from service.settings import Settings
from tests.gateway import Gateway, serve


@pytest.fixture(autouse=True)
def _read_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.metrics.READ_SECONDS", 0.0)
    monkeypatch.setattr("service.api.metrics.IDLE_SHARE", 0.0)


def scrape(client: httpx2.Client) -> dict[tuple[str, ...], float]:
    """Every sample, by its name and the values of its labels."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {
        (one.name, *(one.labels[name] for name in sorted(one.labels))): one.value
        for family in families
        for one in family.samples
    }


def test_requests_are_counted_by_route_not_by_path(gateway: Gateway) -> None:
    job_id = gateway.create()
    for _ in range(3):
        gateway.client.get(f"/v1/jobs/{job_id}")
    gateway.client.get("/v1/jobs/job_none")
    gateway.client.get("/nowhere/else")
    gateway.client.put("/v1/jobs")
    gateway.client.request("BREW", "/v1/jobs")

    found = scrape(gateway.client)

    requests = {key[1:]: count for key, count in found.items() if key[0] == "pdtrim_http_requests_total"}
    assert requests == {
        ("POST", "/v1/jobs", "201"): 1,
        ("GET", "/v1/jobs/{job_id}", "200"): 3,
        ("GET", "/v1/jobs/{job_id}", "404"): 1,
        ("GET", "unmatched", "404"): 1,
        ("PUT", "/v1/jobs", "405"): 1,
        ("OTHER", "/v1/jobs", "405"): 1,
    }
    assert found["pdtrim_http_request_duration_seconds_count", "GET", "/v1/jobs/{job_id}"] == 4
    assert found["pdtrim_http_request_duration_seconds_sum", "GET", "/v1/jobs/{job_id}"] > 0


def test_a_request_that_breaks_counts_as_500(gateway: Gateway) -> None:
    @gateway.app.get("/broken/{thing}")
    def broken(thing: str) -> None:
        raise RuntimeError

    gateway.client.get("/broken/a")

    assert scrape(gateway.client)["pdtrim_http_requests_total", "GET", "/broken/{thing}", "500"] == 1


def test_jobs_are_shown_by_state_and_the_queue_by_its_oldest(gateway: Gateway) -> None:
    waiting, failed = gateway.create(), gateway.create()
    gateway.fail(failed, StageName.SCORING, ErrorInfo(code="x", message="y"))
    with transaction(gateway.database) as session:
        session.get_one(EventRow, (waiting, 1)).created_at -= timedelta(seconds=100)

    found = scrape(gateway.client)

    assert (found["pdtrim_jobs", "queued"], found["pdtrim_jobs", "failed"], found["pdtrim_jobs", "paused"]) == (1, 1, 0)
    assert found["pdtrim_stages_queued", "default", "scoring"] == 1
    assert 100 <= found["pdtrim_stages_queued_oldest_age_seconds", "default", "scoring"] < 200
    assert found["pdtrim_stages_queued_oldest_age_seconds", "default", "export"] == 0
    assert found["pdtrim_database_up",] == 1
    assert found["pdtrim_leases_expired_total",] == 0


def test_nothing_is_named(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.client.get(f"/v1/jobs/{job_id}")
    shown = gateway.client.get("/metrics").text
    assert job_id not in shown
    assert "job_0" not in shown
    assert "project" not in shown


def test_without_a_database_the_gateways_own_figures_stay(gateway: Gateway) -> None:
    with gateway.database.begin() as connection:
        connection.execute(text("ALTER TABLE stages RENAME TO hidden"))

    found = scrape(gateway.client)

    assert found["pdtrim_database_up",] == 0
    assert not [key for key in found if key[0] == "pdtrim_jobs"]
    assert found["pdtrim_leases_expired_total",] == 0


def test_however_often_it_is_scraped_the_database_is_read_once_in_a_while(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.metrics.READ_SECONDS", 60.0)
    gateway.create()
    first = scrape(gateway.client)["pdtrim_jobs", "queued"]
    gateway.create()
    assert scrape(gateway.client)["pdtrim_jobs", "queued"] == first == 1
    monkeypatch.setattr("service.api.metrics.READ_SECONDS", 0.0)
    assert scrape(gateway.client)["pdtrim_jobs", "queued"] == 2


def test_the_longer_the_database_takes_the_less_often_it_is_read(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.create()
    scrape(gateway.client)
    monkeypatch.setattr("service.api.metrics.IDLE_SHARE", 1e6)
    gateway.create()
    assert scrape(gateway.client)["pdtrim_jobs", "queued"] == 1


def test_a_lease_that_the_reconciler_takes_back_is_counted(gateway_settings: Settings, model: Path) -> None:
    settings = gateway_settings.model_copy(update={"reconcile_seconds": 0.02})
    with serve(settings, model) as gateway:
        gateway.claim(gateway.create(), StageName.SCORING)
        with gateway.database.begin() as connection:
            connection.execute(text("UPDATE stages SET lease_expires_at = '2020-01-01' WHERE status = 'running'"))
        for _ in range(500):
            if counted := scrape(gateway.client)["pdtrim_leases_expired_total",]:
                break
    assert counted == 1


def test_metrics_need_no_key_and_come_as_openmetrics_too(gateway_settings: Settings) -> None:
    settings = Settings(**{**gateway_settings.model_dump(), "api_key": "a-long-secret"})
    with TestClient(create_app(settings)) as client:
        assert client.get("/v1/jobs").status_code == 401
        response = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
