"""The API suite once more, on PostgreSQL, Valkey and S3, and what only these can show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import redis

from pdtrim.contract.jobs import StageName
from service.queue import QUEUE
from service.settings import Settings
from service.storage import content_disposition, open_store
from tests import servers
from tests.gateway import Gateway, gateway, model, problem_of, refusing, serve
from tests.unit.service.api.test_access import *  # noqa: F403
from tests.unit.service.api.test_artifacts import *  # noqa: F403
from tests.unit.service.api.test_event_stream import *  # noqa: F403
from tests.unit.service.api.test_events import *  # noqa: F403
from tests.unit.service.api.test_health import *  # noqa: F403
from tests.unit.service.api.test_idempotency import *  # noqa: F403
from tests.unit.service.api.test_jobs import *  # noqa: F403
from tests.unit.service.api.test_webhooks import *  # noqa: F403

__all__ = ["gateway", "model", "refusing"]

# What a scope opens is no matter of the servers, and what the rest refuse does not get as far as them.
del test_a_key_opens_what_its_scope_allows  # noqa: F821
del test_a_url_that_leads_inside_is_refused  # noqa: F821
del test_an_invalid_field_of_a_webhook_is_named  # noqa: F821
del test_invalid_field_is_named  # noqa: F821
del test_what_cannot_be_a_key_is_refused  # noqa: F821
# A table that is missing looks like an outage on SQLite alone; real ones are part of the fault run.
del test_a_stream_waits_for_a_database_that_is_away  # noqa: F821


@pytest.fixture(scope="module")
def module_settings(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_url: str,
    migrated_database: str,
    redis_url: str,
    s3: servers.S3Server,
) -> Callable[[str], AbstractContextManager[Settings]]:
    """Settings for one gateway of this module, with a database and artifacts of its own, by its name."""

    @contextmanager
    def settings(name: str) -> Iterator[Settings]:
        with (
            servers.postgres_database(postgres_url, template=migrated_database) as database_url,
            pytest.MonkeyPatch.context() as monkeypatch,
        ):
            for variable, value in s3.environment.items():
                monkeypatch.setenv(variable, value)
            yield Settings(
                data_dir=tmp_path_factory.mktemp(name),
                database_url=database_url,
                broker_url=redis_url,
                artifacts_url=f"s3://{s3.bucket}/{name}",
                s3_endpoint_url=s3.endpoint_url,
                reconcile_seconds=3600.0,
            )

    return settings


@pytest.fixture(scope="module")
def refusing_settings(module_settings: Callable[[str], AbstractContextManager[Settings]]) -> Iterator[Settings]:
    with module_settings("refusing") as settings:
        yield settings


@pytest.fixture(scope="module")
def guarded_settings(module_settings: Callable[[str], AbstractContextManager[Settings]]) -> Iterator[Settings]:
    with module_settings("guarded") as settings:
        yield settings


@pytest.fixture
def gateway_settings(
    tmp_path: Path,
    postgres_database_url: str,
    empty_redis_url: str,
    s3: servers.S3Server,
    s3_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Settings(
        data_dir=tmp_path / "data",
        database_url=postgres_database_url,
        broker_url=empty_redis_url,
        artifacts_url=s3_url,
        s3_endpoint_url=s3.endpoint_url,
        allowed_sources=["reference", "builtin:", (tmp_path / "models").as_uri()],
    )


def test_a_created_job_wakes_a_worker(gateway: Gateway) -> None:
    job_id = gateway.create()

    with redis.Redis.from_url(gateway.settings.broker_url) as broker:
        (message,) = broker.lrange(QUEUE, 0, -1)
    assert b"pdtrim.scoring" in message
    assert job_id.encode() in message


def test_content_is_a_redirect_to_a_link_that_needs_no_credentials(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.store(job_id, StageName.SCORING, {"decode/plan (1).json": b"{}"})
    (artifact,) = gateway.client.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]

    response = gateway.client.get(f"/v1/jobs/{job_id}/artifacts/{artifact['id']}/content", follow_redirects=False)
    followed = httpx.get(response.headers["location"])

    assert (response.status_code, response.headers["cache-control"]) == (307, "no-store")
    assert (followed.status_code, followed.content) == (200, b"{}")
    assert followed.headers["content-disposition"] == content_disposition("plan (1).json")


def test_a_store_without_its_bucket_is_named(gateway: Gateway) -> None:
    gateway.app.state.store = open_store("s3://missing/prefix", endpoint_url=gateway.settings.s3_endpoint_url)

    body = problem_of(gateway.client.get("/readyz"), 503, "dependency_unavailable")

    assert not body["checks"]["store"]["ok"]
    assert "missing" in body["checks"]["store"]["detail"]


@pytest.mark.server
def test_a_stopped_database_is_503_and_named(gateway_settings: Settings, model: Path) -> None:
    with ExitStack() as stack:
        with servers.postgres() as url:
            settings = gateway_settings.model_copy(update={"database_url": url})
            gateway = stack.enter_context(serve(settings, model))
        # The gateway outlives its database.
        problem_of(gateway.client.get("/v1/jobs"), 503, "dependency_unavailable")
        body = problem_of(gateway.client.get("/readyz"), 503, "dependency_unavailable")

    assert {name: check["ok"] for name, check in body["checks"].items()} == {
        "database": False,
        "broker": True,
        "store": True,
    }
