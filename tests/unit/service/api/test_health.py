from __future__ import annotations

from pathlib import Path

from sqlalchemy import text

from service.settings import Settings
from tests.gateway import Gateway, problem_of, serve


def test_alive(gateway: Gateway) -> None:
    assert gateway.client.get("/healthz").json() == {"status": "ok"}


def test_ready_when_database_broker_and_store_are(gateway: Gateway) -> None:
    response = gateway.client.get("/readyz")

    assert response.status_code == 200
    assert response.json()["status"] == "ready"
    assert {name: check["ok"] for name, check in response.json()["checks"].items()} == {
        "database": True,
        "broker": True,
        "store": True,
    }


def test_an_unreachable_broker_is_named(gateway_settings: Settings, model: Path) -> None:
    settings = gateway_settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})

    with serve(settings, model) as gateway:
        body = problem_of(gateway.client.get("/readyz"), 503, "dependency_unavailable")

    assert {name: check["ok"] for name, check in body["checks"].items()} == {
        "database": True,
        "broker": False,
        "store": True,
    }
    assert "refused" in body["checks"]["broker"]["detail"]
    assert body["detail"].startswith("broker: ")


def test_an_outdated_schema_is_named(gateway: Gateway) -> None:
    with gateway.database.begin() as connection:
        connection.execute(text("DELETE FROM alembic_version"))

    body = problem_of(gateway.client.get("/readyz"), 503, "dependency_unavailable")

    assert "schema" in body["checks"]["database"]["detail"]
