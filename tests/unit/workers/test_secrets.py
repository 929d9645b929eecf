"""Secrets of every kind, planted wherever they may come from, show up nowhere."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from sqlalchemy import text

from pdtrim.contract.errors import ModelUnsupported
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Result
from service.app import create_app
from service.observing import redaction
from service.settings import Settings
from service.storage import StoreUnavailable
from tests.found import RESULTS
from tests.gateway import write_model
from tests.observing import lines, logged
from tests.running import run_stage
from workers.running.attempt import Worker
from workers.stages import STAGES
from workers.stages.context import StageContext

IN_ENVIRONMENT = {
    "PDTRIM_API_KEY": "operators-own-key",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzEXAMPLE",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJr//////////wEaDEXAMPLE",
    "HF_TOKEN": "hf_" + "aB3dE5fG7h" * 3,
}
DATABASE_PASSWORD, BROKER_PASSWORD = "p-of-database", "p-of-broker"
ISSUED_KEY = "pdt_1f3b6a4c7de0_" + "5e" * 32
WEBHOOK_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
SIGNATURE = "9c1185a5c5e9fc54612808977ee8f548b2258d31"
BEARER = "eyJhbGciOiJIUzI1NiJ9.e30.kXvP"
OTHER_PASSWORD = "p-of-a-stranger"
SECRETS = (
    *IN_ENVIRONMENT.values(),
    DATABASE_PASSWORD,
    BROKER_PASSWORD,
    ISSUED_KEY,
    WEBHOOK_SECRET,
    SIGNATURE,
    BEARER,
    OTHER_PASSWORD,
)
URL = f"https://bucket.s3.example/key?X-Amz-Expires=60&X-Amz-Signature={SIGNATURE}"
EVERYTHING = "; ".join(
    [
        *IN_ENVIRONMENT.values(),
        f"postgresql+psycopg://postgres:{DATABASE_PASSWORD}@db/pdtrim and bare {DATABASE_PASSWORD}",
        f"redis://:{BROKER_PASSWORD}@broker/0",
        f"mysql://stranger:{OTHER_PASSWORD}@elsewhere/db",
        ISSUED_KEY,
        WEBHOOK_SECRET,
        URL,
        f"Authorization: Bearer {BEARER}",
    ]
)


@dataclass
class Scene:
    """A gateway and a worker whose environment is full of secrets, and what they log."""

    client: TestClient
    worker: Worker
    log: io.StringIO
    spec: dict[str, Any]

    def create(self) -> str:
        response = self.client.post("/v1/jobs", json=self.spec)
        assert response.status_code == 201, response.text
        job_id: str = response.json()["id"]
        return job_id

    def shown(self, job_id: str) -> str:
        """All that the interface and the database say of a job."""
        answers = [self.client.get(f"/v1/jobs/{job_id}{rest}").text for rest in ("", "/events?limit=100")]
        with self.worker.database.connect() as connection:
            rows = [
                str(connection.execute(text(f"SELECT * FROM {name}")).all()) for name in ("jobs", "stages", "events")
            ]
        return "\n".join(answers + rows)


@pytest.fixture
def scene(postgres_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    for name, value in IN_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # The server trusts everyone, so that any password will do.
    database = postgres_database_url.replace("postgres@", f"postgres:{DATABASE_PASSWORD}@")
    assert DATABASE_PASSWORD in database
    monkeypatch.setenv("PDTRIM_DATABASE_URL", database)
    monkeypatch.setenv("PDTRIM_BROKER_URL", f"redis://:{BROKER_PASSWORD}@127.0.0.1:1/0")
    monkeypatch.setenv("PDTRIM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PDTRIM_ALLOWED_SOURCES", json.dumps([tmp_path.as_uri(), "builtin:"]))
    monkeypatch.setenv("PDTRIM_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("PDTRIM_LOG_FORMAT", "json")
    redaction._known.cache_clear()
    settings = Settings()
    app = create_app(settings)
    spec = {
        "model": write_model(tmp_path / "model").as_uri(),
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": 2},
    }
    bearer = {"authorization": f"Bearer {IN_ENVIRONMENT['PDTRIM_API_KEY']}"}
    with logged(settings) as log, TestClient(app, headers=bearer, raise_server_exceptions=False) as client:
        yield Scene(client, Worker(settings, app.state.database, app.state.store, "w"), log, spec)
    redaction._known.cache_clear()


def without_secrets(shown: str) -> bool:
    return [secret for secret in SECRETS if secret in shown or secret.lower() in shown.lower()] == []


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (RuntimeError(EVERYTHING), "job.failed"),
        (ValueError(EVERYTHING), "job.failed"),
        (ModelUnsupported(EVERYTHING, param=EVERYTHING), "job.failed"),
        (StoreUnavailable(EVERYTHING), "stage.requeued"),
    ],
)
def test_what_a_stage_raises(error: Exception, event: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(context: StageContext) -> Result:
        context.publish(0.5, EVERYTHING, {"note": EVERYTHING, "password": OTHER_PASSWORD, "loss": 1.5})
        raise error

    monkeypatch.setitem(STAGES, StageName.SCORING, stage)
    job_id = scene.create()
    run_stage(scene.worker, job_id, StageName.SCORING)

    shown = scene.shown(job_id)
    assert event in shown
    assert without_secrets(shown)
    assert "bucket.s3.example" in shown
    assert '"loss":1.5' in shown
    assert without_secrets(scene.log.getvalue())
    assert [line for line in lines(scene.log) if "exception" in line and "bucket.s3.example" in line["exception"]]
    assert without_secrets(generate_latest(scene.worker.metrics.registry).decode())


def test_what_a_request_brings_and_a_route_raises(scene: Scene) -> None:
    def broken() -> None:
        raise RuntimeError(EVERYTHING)

    def refused() -> None:
        raise ModelUnsupported(EVERYTHING, param=EVERYTHING)

    app: Any = scene.client.app
    app.get("/broken")(broken)
    app.get("/refused")(refused)

    headers = {"x-request-id": ISSUED_KEY, "x-api-key": BEARER, "x-note": WEBHOOK_SECRET}
    query = f"?token={BEARER}&X-Amz-Signature={SIGNATURE}&metadata[secret]={OTHER_PASSWORD}"
    other = {"authorization": f"Bearer {ISSUED_KEY}"}
    answers = [
        scene.client.get(f"/broken{query}", headers=headers),
        scene.client.get(f"/refused{query}", headers=headers),
        scene.client.get(f"/v1/jobs{query}", headers=headers | other),
        scene.client.get(f"/v1/jobs/{ISSUED_KEY}{query}", headers=headers),  # Parameters that it does not take.
        scene.client.get(f"/{ISSUED_KEY}/{WEBHOOK_SECRET}", headers=headers),
        scene.client.post("/v1/jobs", json={**scene.spec, "seed": ISSUED_KEY}, headers=headers),
        scene.client.post("/v1/jobs", json={**scene.spec, "seed": f"redis://:{BROKER_PASSWORD}@b"}, headers=headers),
        scene.client.get("/readyz", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [500, 422, 401, 422, 404, 422, 422, 503]
    for answer in answers:
        assert without_secrets(answer.text + str(answer.headers)), answer.text
    problem = answers[1].json()
    assert "bucket.s3.example" in problem["detail"]
    assert problem["type"] == "urn:pdtrim:problem:model_unsupported"
    assert without_secrets(scene.log.getvalue())
    assert sum(line["event"] == "request" for line in lines(scene.log)) == len(answers)
    assert without_secrets(scene.client.get("/metrics").text)


def test_what_a_database_quotes_when_it_refuses(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(context: StageContext) -> Result:
        with scene.worker.database.connect() as connection:
            connection.execute(text("SELECT * FROM nowhere WHERE a = :a"), {"a": EVERYTHING})
        return RESULTS[StageName.SCORING]

    monkeypatch.setitem(STAGES, StageName.SCORING, stage)
    job_id = scene.create()
    run_stage(scene.worker, job_id, StageName.SCORING)
    assert "nowhere" in scene.shown(job_id)
    assert without_secrets(scene.shown(job_id))
    assert without_secrets(scene.log.getvalue())
