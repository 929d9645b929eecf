"""Keys, scopes, and the border between projects, which every route under /v1 is tried across."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr

from pdtrim.contract.access import Scope
from pdtrim.contract.jobs import StageName
from service.app import create_app
from service.db import keys
from service.db.session import transaction
from service.db.tables import now
from service.settings import Settings
from tests.gateway import Gateway, problem_of, serve, write_model

OPERATOR_KEY = "operator"
CALLS = sorted(
    (method, re.sub(r":\w+}", "}", route.path))
    for route in iter_route_contexts(create_app(Settings()).routes)
    if route.path is not None and route.path.startswith("/v1")
    for method in route.methods or ()
)
"""Every operation under /v1, by being there."""
NOBODYS = {
    "job_id": "job_" + "0" * 32,
    "artifact_id": "art_" + "0" * 32,
    "webhook_id": "wh_" + "0" * 32,
    "delivery_id": "msg_" + "0" * 32,
}
WEBHOOK = {"url": "https://hooks.example.com/", "events": ["job.created"]}


@pytest.fixture(scope="module")
def guarded(guarded_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that asks for a key, and whose reconciler sleeps: the webhooks here lead nowhere."""
    model = write_model(tmp_path_factory.mktemp("models") / "tiny")
    changes = {
        "allowed_sources": ["reference", "builtin:", model.parent.as_uri()],
        "api_key": SecretStr(OPERATOR_KEY),
        "reconcile_seconds": 3600.0,
    }
    with serve(guarded_settings.model_copy(update=changes), model) as running:
        yield running


@pytest.fixture
def ours() -> str:
    """A project that no other test has."""
    return f"ours-{uuid4().hex}"


@pytest.fixture
def theirs() -> str:
    """Another one."""
    return f"theirs-{uuid4().hex}"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def new_key(gateway: Gateway, project: str, *scopes: Scope, days: float | None = None) -> str:
    expires_at = None if days is None else now() + timedelta(days=days)
    with transaction(gateway.database) as session:
        return keys.create(session, project=project, name="test", scopes=scopes, expires_at=expires_at)[1]


def owned(gateway: Gateway, owner: dict[str, str]) -> dict[str, str]:
    """The ids of a job with an artifact and a webhook that announced it, by the name of their part of a path."""
    webhook_id = gateway.client.post("/v1/webhooks", json=WEBHOOK, headers=owner).json()["id"]
    created = gateway.client.post("/v1/jobs", json={**gateway.spec, "metadata": {"whose": "ours"}}, headers=owner)
    job_id = created.json()["id"]
    gateway.store(job_id, StageName.SCORING, {"plan.json": b"{}"})
    (artifact,) = gateway.client.get(f"/v1/jobs/{job_id}/artifacts", headers=owner).json()["data"]
    (delivery,) = gateway.client.get(f"/v1/webhooks/{webhook_id}/deliveries", headers=owner).json()["data"]
    return {
        "job_id": job_id,
        "artifact_id": artifact["id"],
        "webhook_id": webhook_id,
        "delivery_id": delivery["id"],
    }


def body_of(gateway: Gateway, method: str, path: str) -> dict[str, Any] | None:
    """What an operation takes."""
    if method in ("GET", "HEAD"):
        return None
    if path.startswith("/v1/webhooks"):
        return WEBHOOK
    if path.endswith("/exports"):
        return {name: gateway.spec[name] for name in ("prefill", "decode")}
    return dict(gateway.spec)


def query_of(path: str) -> dict[str, str]:
    """What an operation wants of the query."""
    return {"runtime": "vllm"} if path.endswith("/manifests") else {}


def shown(response: Any, ids: dict[str, str]) -> tuple[int, str]:
    """A response without what differs from request to request."""
    text = response.text.replace(response.headers["x-request-id"], "")
    for name, value in ids.items():
        text = text.replace(value, name)
    return response.status_code, text


def test_the_table_of_routes_is_read() -> None:
    assert ("POST", "/v1/jobs/{job_id}/cancel") in CALLS
    assert len(CALLS) >= 9


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_another_projects_things_are_as_if_they_did_not_exist(
    guarded: Gateway, ours: str, theirs: str, method: str, path: str
) -> None:
    owner = bearer(new_key(guarded, ours, Scope.ADMIN))
    stranger = bearer(new_key(guarded, theirs, Scope.ADMIN))
    ids = owned(guarded, owner)
    seen = [f"/v1/jobs/{ids['job_id']}", f"/v1/webhooks/{ids['webhook_id']}"]
    before = [guarded.client.get(url, headers=owner).json() for url in seen]

    def ask(who: dict[str, str], named: dict[str, str]) -> Any:
        body = body_of(guarded, method, path)
        return guarded.client.request(
            method, path.format(**named), json=body, headers=who, params=query_of(path), follow_redirects=False
        )

    answer = ask(stranger, ids)

    if re.search(r"\{\w+\}", path):
        assert answer.status_code == 404
        assert shown(answer, ids) == shown(ask(stranger, NOBODYS), NOBODYS)
    assert not any(value in answer.text for value in ids.values() if "{" not in path)
    assert [guarded.client.get(url, headers=owner).json() for url in seen] == before


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_key_opens_what_its_scope_allows(guarded: Gateway, ours: str, method: str, path: str) -> None:
    needed, other = (Scope.READ, Scope.SUBMIT) if method in ("GET", "HEAD") else (Scope.SUBMIT, Scope.READ)
    owner, body = bearer(new_key(guarded, ours, Scope.ADMIN)), body_of(guarded, method, path)

    def ask(scope: Scope, ids: dict[str, str]) -> Any:
        url, key = path.format(**ids), new_key(guarded, ours, scope)
        return guarded.client.request(
            method, url, json=body, headers=bearer(key), params=query_of(path), follow_redirects=False
        )

    first, second = owned(guarded, owner), owned(guarded, owner)
    refused, opened = ask(other, first), [ask(needed, first), ask(Scope.ADMIN, second)]

    assert refused.status_code == 403
    assert refused.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{needed}"'
    if method != "HEAD":
        problem_of(refused, 403, "missing_scope")
    # What the job's state forbids is refused behind the key, so that is open too.
    assert all(answer.status_code < 400 or answer.status_code == 409 for answer in opened)


def test_another_projects_job_is_no_cursor(guarded: Gateway, ours: str, theirs: str) -> None:
    stranger = bearer(new_key(guarded, theirs, Scope.ADMIN))
    ids = owned(guarded, bearer(new_key(guarded, ours, Scope.ADMIN)))

    for job_id in (ids["job_id"], NOBODYS["job_id"]):
        problem_of(guarded.client.get(f"/v1/jobs?after={job_id}", headers=stranger), 422, "cursor_not_found")


def test_an_event_stream_stops_at_the_border(guarded: Gateway, ours: str, theirs: str) -> None:
    ids = owned(guarded, bearer(new_key(guarded, ours, Scope.ADMIN)))
    headers = {**bearer(new_key(guarded, theirs, Scope.ADMIN)), "Accept": "text/event-stream"}

    problem_of(guarded.client.get(f"/v1/jobs/{ids['job_id']}/events", headers=headers), 404, "job_not_found")


def test_projects_share_no_idempotency_keys(guarded: Gateway, ours: str, theirs: str) -> None:
    created = [
        guarded.client.post(
            "/v1/jobs",
            json=dict(guarded.spec),
            headers={**bearer(new_key(guarded, project, Scope.SUBMIT)), "Idempotency-Key": "one"},
        )
        for project in (ours, theirs, ours)
    ]

    first, second, again = (answer.json()["id"] for answer in created)
    assert first != second
    assert first == again


def test_what_does_not_open_is_refused_without_telling_why(guarded: Gateway, ours: str) -> None:
    good = new_key(guarded, ours, Scope.ADMIN, days=1)
    expired = new_key(guarded, ours, Scope.ADMIN, days=-1)
    revoked = new_key(guarded, ours, Scope.ADMIN)
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    with transaction(guarded.database) as session:
        keys.revoke(session, revoked.split("_")[1])

    answers = [
        guarded.client.get("/v1/jobs", headers=bearer(key))
        for key in (wrong, expired, revoked, "pdt_" + "0" * 12 + "_" + "0" * 64, good.upper(), "nonsense", "")
    ]

    assert guarded.client.get("/v1/jobs", headers=bearer(good)).status_code == 200
    assert all(problem_of(answer, 401, "unauthorized") for answer in answers)
    assert len({shown(answer, {}) for answer in answers}) == 1


def test_the_configured_key_is_the_default_projects(guarded: Gateway) -> None:
    mine = bearer(new_key(guarded, "default", Scope.READ))
    job_id = guarded.client.post("/v1/jobs", json=dict(guarded.spec), headers=bearer(OPERATOR_KEY)).json()["id"]

    assert guarded.client.get(f"/v1/jobs/{job_id}", headers=mine).status_code == 200


def test_the_first_key_closes_an_open_gateway_and_revoking_it_does_not_open_it(gateway: Gateway) -> None:
    job_id = gateway.create()
    key = new_key(gateway, "default", Scope.ADMIN)
    opened = gateway.client.get(f"/v1/jobs/{job_id}", headers=bearer(key))
    problem_of(gateway.client.get("/v1/jobs"), 401, "unauthorized")
    with transaction(gateway.database) as session:
        keys.revoke(session, key.split("_")[1])

    assert opened.status_code == 200
    problem_of(gateway.client.get("/v1/jobs"), 401, "unauthorized")
