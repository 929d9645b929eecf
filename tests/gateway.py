"""A gateway under test, and a worker played by hand: what the API suites on SQLite and on real servers share."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine as Database

from pdtrim.contract.jobs import ErrorInfo, StageName
from pdtrim.contract.results import Result
from service.api.connections import server_options
from service.app import create_app
from service.db import stages
from service.db.session import transaction
from service.settings import Settings
from tests import databases
from tests.found import BLOCKS, RESULTS
from tests.weights import safetensors_file


@dataclass(frozen=True)
class Gateway:
    """A running gateway and what it runs on."""

    client: httpx2.Client
    app: FastAPI
    settings: Settings
    database: Database
    spec: Mapping[str, Any]

    def create(self, **changes: Any) -> str:
        """The id of a new job."""
        response = self.client.post("/v1/jobs", json={**self.spec, **changes})
        assert response.status_code == 201, response.text
        job_id: str = response.json()["id"]
        return job_id

    def claim(self, job_id: str, stage: StageName) -> stages.Claim:
        """Take a queued stage as a worker does."""
        with transaction(self.database) as session:
            claim = stages.claim(session, job_id, stage, worker="test", lease_seconds=60)
        assert claim is not None
        return claim

    def report(self, claim: stages.Claim, progress: float) -> None:
        """Report a stage's progress."""
        with transaction(self.database) as session:
            stages.record_progress(session, claim, progress=progress, message="halfway", data={"loss": 1.5})

    def complete(
        self, claim: stages.Claim, artifacts: Sequence[stages.NewArtifact] = (), result: Result | None = None
    ) -> None:
        """Record a stage's success."""
        metrics = (result or RESULTS[claim.stage]).model_dump(mode="json")
        with transaction(self.database) as session:
            stages.complete(session, claim, artifacts=artifacts, metrics=metrics, versions={"torch": "2"})

    def store(self, job_id: str, stage: StageName, files: Mapping[str, bytes]) -> None:
        """Play a queued stage that leaves `files`."""
        claim, store = self.claim(job_id, stage), self.app.state.store
        recorded = []
        for name, content in files.items():
            key = f"jobs/{job_id}/{stage.value}/1/{name}"
            recorded.append(stages.NewArtifact(name=name, key=key, **vars(store.put_bytes(key, content))))
        self.complete(claim, recorded)

    def download(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        """A file's content as a user gets it: from the gateway, or from the store that it redirects to."""
        response = self.client.get(path, headers=headers, follow_redirects=False)
        if response.status_code != 307:
            return response
        return httpx.get(response.headers["location"], headers=headers)

    def run(self, job_id: str) -> None:
        """Play every stage of a queued job to its end."""
        for stage in StageName:
            self.complete(self.claim(job_id, stage))

    def fail(self, job_id: str, stage: StageName, error: ErrorInfo) -> None:
        """Fail a queued stage."""
        claim = self.claim(job_id, stage)
        with transaction(self.database) as session:
            stages.fail(session, claim, error)


def write_model(folder: Path, **config: Any) -> Path:
    """A checkpoint folder as far as the gateway looks at it: a config, a tokenizer, and a tensor of each block."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "llama", "num_hidden_layers": BLOCKS, "max_position_embeddings": 1024, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    names = [f"model.layers.{block}.weight" for block in range(BLOCKS)]
    (folder / "model.safetensors").write_bytes(safetensors_file(*names))
    return folder


@contextmanager
def serve(settings: Settings, model: Path) -> Iterator[Gateway]:
    """A gateway on `settings`, with a job specification that it accepts."""
    spec = {"model": model.as_uri(), "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
    databases.provide(settings.database_url)
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Gateway(client, app, settings, app.state.database, spec)


@contextmanager
def listening(settings: Settings) -> Iterator[str]:
    """The address of a real server with a gateway of its own."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        config = uvicorn.Config(
            create_app(settings), log_level="warning", timeout_graceful_shutdown=1, **server_options(settings)
        )
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def problem_of(response: Any, status: int, code: str) -> dict[str, Any]:
    """The problem in a response, after a look at what every problem has."""
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["code"]) == (status, code), body
    assert response.headers["content-type"] == "application/problem+json"
    assert body["type"] == f"urn:pdtrim:problem:{code}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    return body


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "models" / "tiny")


@pytest.fixture(scope="module")
def refusing(refusing_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for all of a module's requests that are refused, which leave nothing behind."""
    with serve(refusing_settings, write_model(tmp_path_factory.mktemp("models") / "tiny")) as running:
        yield running
        assert not running.client.get("/v1/jobs").json()["data"]
        assert not running.client.get("/v1/webhooks").json()["data"]


@pytest.fixture
def gateway(gateway_settings: Settings, model: Path) -> Iterator[Gateway]:
    with serve(gateway_settings, model) as running:
        yield running
