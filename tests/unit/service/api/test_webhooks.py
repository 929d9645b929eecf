"""Webhooks over HTTP. What happens to messages afterwards is tested beside `service.upkeep.webhooks`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from pdtrim.contract.errors import TooManyWebhooks
from pdtrim.contract.webhooks import MAX_WEBHOOKS, WebhookEvent
from service.db import deliveries
from service.db.session import transaction
from service.settings import Settings
from tests.gateway import Gateway, problem_of, serve

SPEC = {"url": "https://hooks.example.com/pdtrim", "events": ["job.created", "job.cancelled"]}


@pytest.fixture
def quiet(gateway_settings: Settings, model: Path) -> Iterator[Gateway]:
    """A gateway whose reconciler sleeps: these webhooks lead nowhere."""
    with serve(gateway_settings.model_copy(update={"reconcile_seconds": 3600.0}), model) as running:
        yield running


def new_hook(quiet: Gateway, **changes: Any) -> dict[str, Any]:
    response = quiet.client.post("/v1/webhooks", json={**SPEC, **changes})
    assert response.status_code == 201, response.text
    created: dict[str, Any] = response.json()
    return created


def test_a_created_webhook_shows_its_secret_once(quiet: Gateway) -> None:
    response = quiet.client.post("/v1/webhooks", json={**SPEC, "description": "ours"})

    created = response.json()
    location = response.headers["location"]
    assert (response.status_code, location) == (201, f"/v1/webhooks/{created['id']}")
    assert response.headers["cache-control"] == "no-store"
    secret = created.pop("secret")
    assert secret.startswith("whsec_")
    assert Webhook(secret)
    assert quiet.client.get(location).json() == created
    assert (created["url"], created["events"], created["description"]) == (SPEC["url"], SPEC["events"], "ours")
    assert (created["enabled"], created["format"], created["failing_since"]) == (True, "standard", None)
    for path in ("/v1/webhooks", location, f"{location}/deliveries"):
        assert secret not in quiet.client.get(path).text
    assert secret not in quiet.client.patch(location, json={"description": "theirs"}).text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"url": None}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://hooks.example.com/" + "a" * 2048}, "url"),
        ({"url": "https://a\x00b.example.com"}, "url"),
        ({"events": []}, "events"),
        ({"events": ["stage.progress"]}, "events.0"),
        ({"events": ["webhook.test"]}, "events.0"),
        ({"events": ["job.created"] * 101}, "events"),
        ({"description": "d" * 513}, "description"),
        ({"format": "xml"}, "format"),
        ({"secret": "whsec_mine"}, "secret"),
    ],
)
def test_an_invalid_field_of_a_webhook_is_named(refusing: Gateway, changes: dict[str, Any], param: str) -> None:
    body = problem_of(refusing.client.post("/v1/webhooks", json={**SPEC, **changes}), 422, "invalid_request")

    assert body["param"] == param


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/", "ftp://hooks.example.com/", "hooks.example.com", "https://127.0.0.1/",
        "https://localhost:8443/", "https://10.0.0.1/", "https://[::ffff:10.0.0.1]/", "https://169.254.169.254/latest",
        "https://2130706433/", "https://0x7f.1/", "https://user:password@hooks.example.com/",
    ],
)  # fmt: skip
def test_a_url_that_leads_inside_is_refused(refusing: Gateway, url: str) -> None:
    answer = refusing.client.post("/v1/webhooks", json={**SPEC, "url": url})

    assert problem_of(answer, 422, "url_not_allowed")["param"] == "url"
    assert "password" not in answer.text or "neither user nor password" in answer.text


def test_a_url_that_leads_inside_is_refused_on_change(quiet: Gateway) -> None:
    path = f"/v1/webhooks/{new_hook(quiet)['id']}"

    refused = quiet.client.patch(path, json={"url": "https://127.0.0.1/"})

    assert problem_of(refused, 422, "url_not_allowed")["param"] == "url"
    assert quiet.client.get(path).json()["url"] == SPEC["url"]


def test_what_the_operator_allows_is_allowed(quiet: Gateway) -> None:
    quiet.app.state.settings = Settings(webhook_allowed_networks=["10.0.0.0/8"])

    assert new_hook(quiet, url="http://10.1.2.3:8080/hook")["url"] == "http://10.1.2.3:8080/hook"
    problem_of(quiet.client.post("/v1/webhooks", json={**SPEC, "url": "http://11.0.0.1/"}), 422, "url_not_allowed")


def test_repeated_events_count_once(quiet: Gateway) -> None:
    assert new_hook(quiet, events=["job.failed", "job.created", "job.failed"])["events"] == [
        "job.created",
        "job.failed",
    ]


def test_webhooks_are_listed_newest_first_in_pages(quiet: Gateway) -> None:
    ids = [new_hook(quiet)["id"] for _ in range(3)][::-1]

    first = quiet.client.get("/v1/webhooks?limit=2").json()
    second = quiet.client.get("/v1/webhooks", params={"after": first["last_id"]}).json()

    assert [one["id"] for one in first["data"]] == ids[:2]
    assert ([one["id"] for one in second["data"]], first["has_more"], second["has_more"]) == (ids[2:], True, False)
    assert (first["first_id"], first["last_id"]) == (ids[0], ids[1])
    for after in ("nonsense", "wh_" + "0" * 32):
        problem_of(quiet.client.get("/v1/webhooks", params={"after": after}), 422, "cursor_not_found")
    for limit in (0, 101):
        problem_of(quiet.client.get("/v1/webhooks", params={"limit": limit}), 422, "invalid_request")


def test_a_change_changes_what_it_names(quiet: Gateway) -> None:
    hook = new_hook(quiet, description="ours")
    path = f"/v1/webhooks/{hook['id']}"
    del hook["secret"]

    off = quiet.client.patch(path, json={"enabled": False}).json()
    moved = quiet.client.patch(path, json={"url": "https://other.example.com/", "events": ["job.failed"]}).json()
    on = quiet.client.patch(path, json={"enabled": True, "format": "cloudevents", "description": ""}).json()
    same = quiet.client.patch(path, json={"url": None}).json()

    assert off == {**hook, "enabled": False, "disabled_reason": "requested"}
    assert moved == {**off, "url": "https://other.example.com/", "events": ["job.failed"]}
    assert on == {**moved, "enabled": True, "disabled_reason": None, "format": "cloudevents", "description": ""}
    assert same == quiet.client.get(path).json() == on
    problem_of(quiet.client.patch(path, json={"project": "other"}), 422, "invalid_request")


def test_a_deleted_webhook_is_gone(quiet: Gateway) -> None:
    path = f"/v1/webhooks/{new_hook(quiet)['id']}"
    quiet.create()

    assert quiet.client.delete(path).status_code == 204
    for answer in (
        quiet.client.get(path),
        quiet.client.delete(path),
        quiet.client.patch(path, json={"enabled": True}),
        quiet.client.get(f"{path}/deliveries"),
        quiet.client.post(f"{path}/test"),
        quiet.client.post(f"{path}/rotate-secret"),
    ):
        problem_of(answer, 404, "webhook_not_found")


@pytest.mark.parametrize("webhook_id", ["wh_1", "wh_" + "Z" * 32, "job_" + "0" * 32, "%00"])
def test_what_cannot_be_a_webhook_is_not_looked_for(refusing: Gateway, webhook_id: str) -> None:
    problem_of(refusing.client.get(f"/v1/webhooks/{webhook_id}"), 404, "webhook_not_found")


def test_a_secret_is_rotated(quiet: Gateway) -> None:
    hook = new_hook(quiet)

    response = quiet.client.post(f"/v1/webhooks/{hook['id']}/rotate-secret")

    rotated = response.json()
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    assert rotated["secret"] != hook["secret"]
    assert {**rotated, "secret": ""} == {**hook, "secret": ""}


def test_deliveries_are_listed_by_state_in_pages_and_sent_again(quiet: Gateway) -> None:
    path = f"/v1/webhooks/{new_hook(quiet)['id']}/deliveries"
    job_id = quiet.create()
    quiet.client.post(f"/v1/jobs/{job_id}/cancel")
    with transaction(quiet.database) as session:
        (claim, *_) = deliveries.claim(session, limit=1, per_webhook=1, lease=deliveries.KEPT, max_tries=8)

    first = quiet.client.get(path, params={"limit": 1}).json()
    second = quiet.client.get(path, params={"after": first["last_id"]}).json()
    again = quiet.client.post(f"{path}/{claim.id}/resend")

    assert [(one["type"], one["job_id"]) for one in first["data"]] == [("job.cancelled", job_id)]
    assert [(one["type"], one["status"]) for one in second["data"]] == [("job.created", "pending")]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert (again.status_code, again.json()["id"]) == (202, second["data"][0]["id"])
    assert again.json()["next_attempt_at"] < second["data"][0]["next_attempt_at"]
    assert len(quiet.client.get(path, params={"status": "pending"}).json()["data"]) == 2
    assert quiet.client.get(path, params={"status": "failed"}).json()["data"] == []
    for params, code in (({"after": "msg_" + "0" * 32}, "cursor_not_found"), ({"status": "lost"}, "invalid_request")):
        problem_of(quiet.client.get(path, params=params), 422, code)
    for delivery_id in ("msg_" + "0" * 32, "msg_1"):
        problem_of(quiet.client.post(f"{path}/{delivery_id}/resend"), 404, "delivery_not_found")


def test_a_disabled_webhook_is_neither_tried_out_nor_sent_anything_again(quiet: Gateway) -> None:
    path = f"/v1/webhooks/{new_hook(quiet)['id']}"
    tried = quiet.client.post(f"{path}/test")
    quiet.client.patch(path, json={"enabled": False})

    assert (tried.status_code, tried.json()["type"], tried.json()["job_id"]) == (202, "webhook.test", None)
    problem_of(quiet.client.post(f"{path}/test"), 409, "webhook_disabled")
    problem_of(quiet.client.post(f"{path}/deliveries/{tried.json()['id']}/resend"), 409, "webhook_disabled")


def test_a_webhook_too_many_is_refused(quiet: Gateway) -> None:
    for _ in range(MAX_WEBHOOKS):
        new_hook(quiet)

    problem_of(quiet.client.post("/v1/webhooks", json=SPEC), 409, TooManyWebhooks.code)


@pytest.mark.slow
def test_every_event_that_is_offered_is_in_the_document(quiet: Gateway) -> None:
    schema = quiet.client.get("/openapi.json").json()["components"]["schemas"]["WebhookEvent"]

    assert schema["enum"] == [event.value for event in WebhookEvent]
