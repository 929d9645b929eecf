from __future__ import annotations

import hashlib
from typing import Any

import pytest

from pdtrim.contract.jobs import StageName
from service.storage import content_disposition
from tests.gateway import Gateway, problem_of

CONTENT = bytes(range(256)) * 8200  # More than the store reads at once.
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def job_id(gateway: Gateway) -> str:
    """A job whose first two stages left files."""
    created = gateway.create()
    gateway.store(created, StageName.SCORING, {"scores.json": b"{}", "windows.safetensors": CONTENT, "empty": b""})
    gateway.store(created, StageName.REMOVAL, {"plan (final).json": b'{"removed": []}'})
    return created


def content_path(gateway: Gateway, job_id: str, name: str) -> str:
    listed = gateway.client.get(f"/v1/jobs/{job_id}/artifacts", params={"limit": 100}).json()["data"]
    (artifact,) = (one for one in listed if one["name"] == name)
    return f"/v1/jobs/{job_id}/artifacts/{artifact['id']}/content"


def names(page: dict[str, Any]) -> list[str]:
    return [artifact["name"] for artifact in page["data"]]


def test_artifacts_are_listed_with_size_and_digest(gateway: Gateway, job_id: str) -> None:
    page = gateway.client.get(f"/v1/jobs/{job_id}/artifacts").json()

    assert names(page) == ["scores.json", "windows.safetensors", "empty", "plan (final).json"]
    assert (page["data"][1]["size"], page["data"][1]["sha256"]) == (len(CONTENT), SHA256)
    assert page["data"][1]["stage"] == "scoring"
    assert page["data"][1]["uri"].startswith(gateway.settings.artifacts_url)


def test_artifacts_are_paged_and_filtered_by_stage(gateway: Gateway, job_id: str) -> None:
    path = f"/v1/jobs/{job_id}/artifacts"

    first = gateway.client.get(path, params={"limit": 2, "stage": "scoring"}).json()
    rest = gateway.client.get(path, params={"limit": 2, "stage": "scoring", "after": first["last_id"]}).json()
    removal = gateway.client.get(path, params={"stage": "removal"}).json()

    assert (names(first), first["has_more"]) == (["scores.json", "windows.safetensors"], True)
    assert (names(rest), rest["has_more"]) == (["empty"], False)
    assert names(removal) == ["plan (final).json"]


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("stage=packing", "invalid_request", "stage"),
        ("after=art_%00", "cursor_not_found", "after"),
        (f"after=art_{'0' * 32}", "cursor_not_found", "after"),
        ("limit=0", "invalid_request", "limit"),
    ],
)
def test_invalid_artifact_query_is_named(gateway: Gateway, job_id: str, query: str, code: str, param: str) -> None:
    assert problem_of(gateway.client.get(f"/v1/jobs/{job_id}/artifacts?{query}"), 422, code)["param"] == param


def test_content_is_downloaded_whole(gateway: Gateway, job_id: str) -> None:
    for name, content in (("windows.safetensors", CONTENT), ("empty", b""), ("scores.json", b"{}")):
        response = gateway.download(content_path(gateway, job_id, name))

        assert (response.status_code, response.content) == (200, content)


def test_a_range_of_the_content_is_downloaded(gateway: Gateway, job_id: str) -> None:
    path = content_path(gateway, job_id, "windows.safetensors")

    response = gateway.download(path, headers={"range": "bytes=100-1099999"})

    assert (response.status_code, response.content) == (206, CONTENT[100:1_100_000])


@pytest.mark.parametrize("artifact_id", ["x", "art_%00", "art_" + "0" * 32])
def test_unknown_content_is_not_found(gateway: Gateway, job_id: str, artifact_id: str) -> None:
    path = f"/v1/jobs/{job_id}/artifacts/{artifact_id}/content"

    problem_of(gateway.client.get(path), 404, "artifact_not_found")
    assert gateway.client.head(path).status_code == 404


def test_another_job_s_content_is_not_found(gateway: Gateway, job_id: str) -> None:
    path = content_path(gateway, job_id, "scores.json").replace(job_id, gateway.create())

    problem_of(gateway.client.get(path), 404, "artifact_not_found")


def test_headers_alone_tell_size_digest_and_name(gateway: Gateway, job_id: str) -> None:
    response = gateway.client.head(content_path(gateway, job_id, "windows.safetensors"), follow_redirects=False)

    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["etag"] == f'"{SHA256}"'
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"] == content_disposition("windows.safetensors")
