from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.settings import Settings
from tests.gateway import Gateway, problem_of, serve, write_model

KEY = "pdt_schlüssel"


@pytest.fixture(scope="module")
def locked(refusing_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    changes = {"api_key": SecretStr(KEY), "failed_auth_limit": "none"}
    model = write_model(tmp_path_factory.mktemp("models") / "tiny")
    with serve(refusing_settings.model_copy(update=changes), model) as running:
        yield running


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/methods"), ("GET", "/v1/nothing"), ("GET", "/v1")],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {b"authorization": b"Basic " + KEY.encode()},
        {b"authorization": b"Bearer"},
        bearer(""),
        bearer("\x00"),
    ],
)
def test_v1_needs_the_key(locked: Gateway, method: str, path: str, headers: dict[bytes, bytes]) -> None:
    response = locked.client.request(method, path, headers=headers)

    problem_of(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_key_is_asked_for_before_the_body_is_read(locked: Gateway) -> None:
    response = locked.client.post("/v1/jobs", content=b"{", headers={"content-type": "application/json"})

    problem_of(response, 401, "unauthorized")


def test_the_key_opens(locked: Gateway) -> None:
    assert locked.client.get("/v1/jobs", headers=bearer(KEY)).status_code == 200
    assert locked.client.get("/v1/jobs", headers={b"authorization": b"bearer  " + KEY.encode()}).status_code == 200


def test_health_and_documentation_need_no_key(locked: Gateway) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert locked.client.get(path).status_code == 200


def test_without_a_key_the_gateway_says_once_that_it_is_open(
    gateway_settings: Settings, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "service.api.auth"), serve(gateway_settings, model) as gateway:
        for _ in range(3):
            assert gateway.client.get("/v1/jobs").status_code == 200

    assert [record.message for record in caplog.records if record.name == "service.api.auth"] == [
        "no API key is set: everyone on this machine can use http://127.0.0.1"
    ]
