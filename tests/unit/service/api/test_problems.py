"""No input gets a 5xx, and every refusal is a problem."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.app import create_app
from service.settings import Settings
from service.storage import StoreUnavailable
from tests.gateway import Gateway, problem_of, serve

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [b"{", b"{'a': 1}", b"\xff\xfe", b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000],
)
def test_unreadable_body_is_400(refusing: Gateway, body: bytes) -> None:
    problem_of(refusing.client.post("/v1/jobs", content=body, headers=JSON), 400, "malformed_body")


@pytest.mark.parametrize(
    "body",
    [b"null", b"[]", b'"text"', b"7", b'{"\\ud800": 1}', b'{"model": "\xed\xa0\x80"}', b'{"a": {"a": {"a": []}}}', b""],
)
def test_json_that_is_no_specification_is_422(refusing: Gateway, body: bytes) -> None:
    problem_of(refusing.client.post("/v1/jobs", content=body, headers=JSON), 422, "invalid_request")


def test_deep_nesting_within_the_parser_s_limit_is_422(refusing: Gateway) -> None:
    deep = b'{"model": ' + b"[" * 400 + b"]" * 400 + b"}"

    problem_of(refusing.client.post("/v1/jobs", content=deep, headers=JSON), 422, "invalid_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json", ""])
def test_body_that_is_not_json_is_415(refusing: Gateway, kind: str) -> None:
    response = refusing.client.post("/v1/jobs", content=b"{}", headers={"content-type": kind})

    problem_of(response, 415, "unsupported_media_type")


def test_json_media_types_with_parameters_or_a_suffix_are_taken(refusing: Gateway) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.pdtrim+json"):
        response = refusing.client.post("/v1/jobs", content=b"{}", headers={"content-type": kind})
        problem_of(response, 422, "invalid_request")


def test_too_large_a_body_is_413_declared_or_not(refusing: Gateway) -> None:
    size = refusing.settings.max_body_bytes + 1

    declared = refusing.client.post("/v1/jobs", content=b" " * size, headers=JSON)
    chunked = refusing.client.post("/v1/jobs", content=(b" " * 1000 for _ in range(size // 1000 + 1)), headers=JSON)

    for response in (declared, chunked):
        assert str(refusing.settings.max_body_bytes) in problem_of(response, 413, "body_too_large")["detail"]


def test_unknown_path_is_404(refusing: Gateway) -> None:
    for path in ("/v1", "/v1/jobs/", "/v2/jobs", "/%00", "/v1/jobs/a/b"):
        problem_of(refusing.client.get(path), 404, "not_found")


def test_wrong_method_is_405_and_names_the_right_ones(gateway: Gateway) -> None:
    job = f"/v1/jobs/{gateway.create()}"
    for path, allowed in (
        ("/v1/jobs", "GET, POST"),
        (job, "GET, DELETE"),
        (f"{job}/cancel", "POST"),
        (f"{job}/artifacts/art_{'0' * 32}/content", "GET, HEAD"),
    ):
        response = gateway.client.patch(path)

        problem_of(response, 405, "method_not_allowed")
        assert response.headers["allow"] == allowed


def test_a_request_id_is_made_or_taken_over(refusing: Gateway) -> None:
    made = refusing.client.get("/healthz").headers["x-request-id"]
    taken = refusing.client.get("/healthz", headers={"x-request-id": "trace-1.a:b"}).headers["x-request-id"]
    refused = refusing.client.get("/healthz", headers={"x-request-id": "a b\t<script>"}).headers["x-request-id"]
    long = refusing.client.get("/healthz", headers={"x-request-id": "a" * 129}).headers["x-request-id"]

    assert taken == "trace-1.a:b"
    assert len({made, refused, long}) == 3
    assert all(len(one) == 32 for one in (made, refused, long))


def test_unexpected_exception_is_a_500_without_internals_and_logged(
    gateway_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(gateway_settings)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret internals")

    with TestClient(app, raise_server_exceptions=False) as client, caplog.at_level(logging.ERROR):
        response = client.get("/broken", headers={"x-request-id": "trace-1"})

    problem_of(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "request trace-1 failed: GET /broken" in caplog.text
    assert "secret internals" in caplog.text


@pytest.mark.parametrize(
    "error", [StoreUnavailable("bucket secret at http://10.0.0.1"), PoolTimeout("secret pool is used up")]
)
def test_a_server_that_fails_is_a_503_that_does_not_say_where_it_is(gateway: Gateway, error: Exception) -> None:
    @gateway.app.get("/broken")
    def broken() -> None:
        raise error

    response = gateway.client.get("/broken")

    problem_of(response, 503, "dependency_unavailable")
    assert "secret" not in response.text


def test_unreachable_database_is_503(gateway: Gateway, tmp_path: Path) -> None:
    gateway.app.state.database = create_engine(f"sqlite:///{tmp_path}/missing/pdtrim.db")

    response = gateway.client.get("/v1/jobs")

    problem_of(response, 503, "dependency_unavailable")
    assert response.headers["retry-after"] == "5"


def test_unreachable_broker_does_not_keep_a_job_from_being_accepted(gateway_settings: Settings, model: Path) -> None:
    settings = gateway_settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})

    with serve(settings, model) as gateway:
        job_id = gateway.create()

        assert gateway.client.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"


def test_strange_host_header_harms_nothing(refusing: Gateway) -> None:
    problem_of(refusing.client.get("/v1/nothing", headers={"host": "["}), 404, "not_found")
