"""Content that the gateway streams from a local folder itself."""

from __future__ import annotations

import hashlib

import pytest

from pdtrim.contract.jobs import StageName
from service.storage import content_disposition
from tests.gateway import Gateway, problem_of

CONTENT = b"0123456789"
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


@pytest.fixture
def path(gateway: Gateway) -> str:
    """Where the content of a stored artifact is."""
    job_id = gateway.create()
    gateway.store(job_id, StageName.SCORING, {"a, b (1).json": CONTENT})
    (artifact,) = gateway.client.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
    return f"/v1/jobs/{job_id}/artifacts/{artifact['id']}/content"


def test_whole_content_comes_with_its_headers(gateway: Gateway, path: str) -> None:
    response = gateway.client.get(path)

    assert (response.status_code, response.content) == (200, CONTENT)
    assert response.headers["etag"] == ETAG
    assert response.headers["content-length"] == "10"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"] == content_disposition("a, b (1).json")


def test_a_range_comes_with_its_place(gateway: Gateway, path: str) -> None:
    response = gateway.client.get(path, headers={"range": "bytes=-3"})

    assert (response.status_code, response.content) == (206, b"789")
    assert response.headers["content-range"] == "bytes 7-9/10"
    assert response.headers["content-length"] == "3"
    assert response.headers["etag"] == ETAG


def test_a_range_outside_is_416_with_the_size(gateway: Gateway, path: str) -> None:
    response = gateway.client.get(path, headers={"range": "bytes=10-"})

    problem_of(response, 416, "range_not_satisfiable")
    assert response.headers["content-range"] == "bytes */10"


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=0-1,3-4", "chapters=1-2", "bytes=x"])
def test_a_range_that_is_none_is_ignored(gateway: Gateway, path: str, asked: str) -> None:
    response = gateway.client.get(path, headers={"range": asked})

    assert (response.status_code, response.content) == (200, CONTENT)


def test_known_content_is_not_sent_again(gateway: Gateway, path: str) -> None:
    response = gateway.client.get(path, headers={"if-none-match": ETAG})

    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == ETAG


def test_a_file_that_is_gone_is_not_found(gateway: Gateway, path: str) -> None:
    gateway.app.state.store.delete_prefix("jobs")

    problem_of(gateway.client.get(path), 404, "artifact_not_found")
