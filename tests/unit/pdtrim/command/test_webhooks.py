"""`pdtrim webhooks` and `client.webhooks` on a real gateway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from standardwebhooks import Webhook
from typer.testing import CliRunner, Result

from pdtrim.client import Client, ServiceError
from pdtrim.command import app
from pdtrim.command.connection import console
from pdtrim.command.webhooks import COMMANDS
from pdtrim.contract.webhooks import DeliveryStatus, WebhookChange, WebhookEvent, WebhookSpec
from service.settings import Settings
from tests.gateway import model
from tests.live_gateway import LiveGateway, live
from tests.processes import wait_until
from tests.receiver import Reply, receiving
from tests.servers import free_ports

pytestmark = pytest.mark.server

__all__ = ["model"]

Command = Callable[..., Result]


@pytest.fixture
def gateway(tmp_path: Path, model: Path) -> Iterator[LiveGateway]:
    settings = Settings(
        data_dir=tmp_path / "data",
        allowed_sources=["builtin:", model.as_uri()],
        webhook_allowed_networks=["127.0.0.0/8"],
        reconcile_seconds=0.05,
    )
    with live(settings, model) as running:
        yield running


@pytest.fixture
def pdtrim_webhooks(gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(console, "width", 240)  # it has read COLUMNS already
    environment = {"PDTRIM_URL": gateway.url}
    return lambda *arguments: CliRunner().invoke(app, ["webhooks", *arguments], env=environment)


def test_every_command_teaches_with_an_example() -> None:
    for name in COMMANDS:
        help_text = CliRunner().invoke(app, ["webhooks", name, "--help"]).output
        assert f"pdtrim webhooks {name}" in help_text.split("Example:")[1]


def test_a_webhook_is_made_tried_out_listed_and_deleted(pdtrim_webhooks: Command) -> None:
    with receiving(Reply(204), Reply(410)) as server:
        hook, secret = pdtrim_webhooks("create", server.url, "--description", "[bold]ours").output.split()
        told = pdtrim_webhooks("test", hook).output
        assert server.arrived.acquire(timeout=20)
        pdtrim_webhooks("test", hook)
        assert server.arrived.acquire(timeout=20)
        wait_until(lambda: "disabled (gone)" in pdtrim_webhooks("list").output, seconds=20)
        table = pdtrim_webhooks("deliveries", hook).output
        failed = json.loads(pdtrim_webhooks("deliveries", hook, "--status", "failed", "--json").output)["data"]
        listed = pdtrim_webhooks("list").output
        refused = pdtrim_webhooks("resend", hook, failed[0]["id"])
        enabled = pdtrim_webhooks("enable", hook).output
        pdtrim_webhooks("resend", hook, failed[0]["id"])
        assert server.arrived.acquire(timeout=20)

    assert Webhook(secret).verify(server.requests[0].body, dict(server.requests[0].headers))
    assert "will be sent in seconds" in told
    assert all(part in table for part in ("webhook.test", "204", "answered 410", "succeeded", "failed"))
    assert [one["attempts"][0]["response_code"] for one in failed] == [410]
    assert all(part in listed for part in (hook, "[bold]ours", server.url, "job.succeeded"))
    assert secret not in listed
    assert (refused.exit_code, "disabled" in refused.output) == (1, True)
    assert "is enabled" in enabled
    assert server.requests[2].headers["webhook-id"] == failed[0]["id"]
    assert "is deleted" in pdtrim_webhooks("delete", hook).output
    assert hook not in pdtrim_webhooks("list").output


def test_json_is_what_the_interface_gives(gateway: LiveGateway, pdtrim_webhooks: Command) -> None:
    made = json.loads(
        pdtrim_webhooks(
            "create", "https://hooks.example.com/", "--event", "job.failed", "--format", "cloudevents", "--json"
        ).output
    )
    with Client(gateway.url) as client:
        found = client.webhooks.get(made["id"])

    assert {**found.model_dump(mode="json"), "secret": made["secret"]} == made
    assert (made["events"], made["format"]) == (["job.failed"], "cloudevents")
    assert json.loads(pdtrim_webhooks("list", "--json").output)["data"] == [found.model_dump(mode="json")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", "https://10.0.0.1/"], 1, "not a public address"),
        (["create", "https://hooks.example.com/", "--event", "stage.progress"], 2, "stage.progress"),
        (["delete", "wh_1"], 1, "No such webhook"),
        (["deliveries", "wh_1"], 1, "No such webhook"),
        (["resend", "wh_1", "msg_1"], 1, "No such webhook"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], code: int, message: str, pdtrim_webhooks: Command) -> None:
    refused = pdtrim_webhooks(*arguments)

    assert (refused.exit_code, message in refused.output) == (code, True), refused.output


def test_the_client_does_what_the_interface_does(gateway: LiveGateway) -> None:
    spec = WebhookSpec(url=f"http://127.0.0.1:{free_ports(1)[0]}/", events=(WebhookEvent.JOB_CREATED,))
    with Client(gateway.url) as client:
        created = client.webhooks.create(spec)
        second = client.webhooks.create({"url": spec.url, "events": ["job.failed"]})
        assert [hook.id for hook in client.webhooks.page(limit=1).data] == [second.id]
        assert [hook.id for hook in client.webhooks.page(after=second.id).data] == [created.id]
        assert client.webhooks.rotate_secret(created.id).secret != created.secret
        changed = client.webhooks.update(created.id, WebhookChange(description="moved"))
        assert (changed.description, changed.url) == ("moved", spec.url)
        client.create(gateway.played.spec)
        (delivery,) = client.webhooks.deliveries(created.id, status=DeliveryStatus.PENDING).data
        assert client.webhooks.resend(created.id, delivery.id).id == delivery.id
        client.webhooks.delete(created.id)
        with pytest.raises(ServiceError, match="No such webhook"):
            client.webhooks.test(created.id)
