"""Messages on their way to a real receiver: written, signed, sent, tried again, given up."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from fastapi.testclient import TestClient
from sqlalchemy import Engine as Database
from sqlmodel import col, select
from standardwebhooks import Webhook, WebhookVerificationError

from pdtrim.contract.spec import JobSpec
from pdtrim.contract.webhooks import (
    DeliveryStatus,
    DisabledReason,
    MessageFormat,
    WebhookEvent,
    WebhookMessage,
    WebhookSpec,
)
from service.app import create_app
from service.db import deliveries, webhooks
from service.db.session import connect, migrate, transaction
from service.db.tables import DeliveryRow, WebhookRow, now
from service.settings import Settings
from service.upkeep import reconciler
from service.upkeep.outbound import Outbound
from service.upkeep.webhooks import DELAYS, JITTER, LONGEST_DELAY, MAX_TRIES, policy
from tests.receiver import Received, Reply, receiving
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", webhook_allowed_networks=["127.0.0.0/8"])


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = connect(settings.database_url)
    migrate(database)
    yield database
    database.dispose()


def deliver(database: Database, settings: Settings, **options: Any) -> int:
    """Send what is due, as the reconciler does."""
    return reconciler.deliver(database, settings, Outbound(policy(settings), **options))


def new_hook(
    database: Database, url: str, *wanted: WebhookEvent, format_: MessageFormat = MessageFormat.STANDARD
) -> str:
    spec = WebhookSpec(url=url, events=wanted or (WebhookEvent.JOB_CREATED,), format=format_)
    with transaction(database) as session:
        return webhooks.create(session, spec, project="default").id


def new_job(database: Database) -> str:
    with transaction(database) as session:
        return store_job(session, SPEC).id


def hook_of(database: Database, webhook_id: str) -> WebhookRow:
    with transaction(database) as session:
        return webhooks.get(session, webhook_id)


def messages_of(database: Database, webhook_id: str) -> list[DeliveryRow]:
    with transaction(database) as session:
        return deliveries.page(session, webhook_id, limit=100)[0][::-1]


def message_of(database: Database, webhook_id: str) -> DeliveryRow:
    (row,) = messages_of(database, webhook_id)
    return row


def make_due(database: Database) -> None:
    """Let the time of every lease and delay pass."""
    with transaction(database) as session:
        for row in session.exec(select(DeliveryRow).where(col(DeliveryRow.next_attempt_at).is_not(None))):
            row.next_attempt_at = now() - timedelta(seconds=1)


def waits(row: DeliveryRow) -> float:
    """Seconds until the next attempt."""
    assert row.next_attempt_at is not None
    return (row.next_attempt_at - now()).total_seconds()


def verified(request: Received, secret: str) -> WebhookMessage:
    """The message of a request that its signature vouches for. Raises: WebhookVerificationError."""
    return WebhookMessage.model_validate(Webhook(secret).verify(request.body, dict(request.headers)))


def test_a_message_arrives_signed_and_is_done(database: Database, settings: Settings) -> None:
    with receiving(Reply(200, body=b"thanks")) as server:
        hook = new_hook(database, server.url)
        job_id = new_job(database)
        assert deliver(database, settings) == 1
        assert deliver(database, settings) == 0

    (request,) = server.requests
    message, row = verified(request, hook_of(database, hook).secret), message_of(database, hook)
    assert (message.type, message.timestamp) == ("job.created", row.created_at)
    assert message.data.model_dump()["job_id"] == job_id
    assert (request.path, request.headers["Content-Type"]) == ("/hook", "application/json")
    assert request.headers["webhook-id"] == row.id
    assert request.headers["User-Agent"].startswith("PDTrim-Service/")
    assert (row.status, row.next_attempt_at) == (DeliveryStatus.SUCCEEDED, None)
    (attempt,) = row.attempts
    assert (attempt["response_code"], attempt["error"], attempt["excerpt"]) == (200, "", "thanks")


def test_a_signature_covers_body_id_and_time(database: Database, settings: Settings) -> None:
    with receiving() as server:
        secret = hook_of(database, new_hook(database, server.url)).secret
        new_job(database)
        deliver(database, settings)

    (request,) = server.requests
    for changed in (
        Received(request.path, request.headers, request.body.replace(b"created", b"deleted")),
        Received(request.path, {**request.headers, "webhook-id": "msg_other"}, request.body),
        Received(request.path, {**request.headers, "webhook-timestamp": str(int(now().timestamp()) - 9)}, request.body),
    ):
        with pytest.raises(WebhookVerificationError):
            verified(changed, secret)
    with pytest.raises(WebhookVerificationError):
        verified(request, "whsec_" + "A" * 43 + "=")


def test_after_a_rotation_either_secret_verifies(database: Database, settings: Settings) -> None:
    with receiving() as server:
        hook = new_hook(database, server.url)
        first = hook_of(database, hook).secret
        with transaction(database) as session:
            second = webhooks.rotate(session, hook).secret
        new_job(database)
        deliver(database, settings)

    assert verified(server.requests[0], first) == verified(server.requests[0], second)


def test_cloudevents_are_what_their_library_reads(database: Database, settings: Settings) -> None:
    with receiving() as server:
        hook = new_hook(database, server.url, format_=MessageFormat.CLOUDEVENTS)
        job_id = new_job(database)
        deliver(database, settings)

    (request,) = server.requests
    Webhook(hook_of(database, hook).secret).verify(request.body, dict(request.headers))
    event = from_http_event(HTTPMessage({"content-type": request.headers["Content-Type"]}, request.body))
    row = message_of(database, hook)
    assert (event.get_specversion(), event.get_id(), event.get_type()) == ("1.0", row.id, "job.created")
    assert (event.get_source(), event.get_time()) == (f"/v1/jobs/{job_id}", row.created_at)
    assert event.get_data() == row.data


def test_a_failure_is_tried_again_with_the_same_id_and_body_until_it_arrives(
    database: Database, settings: Settings
) -> None:
    with receiving(Reply(500, body=b"down\x00"), Reply(404), Reply(204)) as server:
        hook = new_hook(database, server.url)
        new_job(database)
        for delay in DELAYS[:2]:
            deliver(database, settings)
            row = message_of(database, hook)
            assert abs(waits(row) - delay.total_seconds()) < delay.total_seconds() * JITTER + 5
            assert deliver(database, settings) == 0
            make_due(database)
        assert hook_of(database, hook).failing_since is not None
        deliver(database, settings)

    secret, row = hook_of(database, hook).secret, message_of(database, hook)
    assert [one["response_code"] for one in row.attempts] == [500, 404, 204]
    assert [one["error"] for one in row.attempts] == ["answered 500", "answered 404", ""]
    assert row.attempts[0]["excerpt"] == "down"
    assert len({(request.headers["webhook-id"], request.body) for request in server.requests}) == 1
    assert all(verified(request, secret) for request in server.requests)
    assert (row.status, hook_of(database, hook).failing_since) == (DeliveryStatus.SUCCEEDED, None)


def test_after_eight_attempts_in_about_a_day_a_message_is_given_up(database: Database, settings: Settings) -> None:
    with receiving(Reply(503)) as server:
        hook = new_hook(database, server.url)
        new_job(database)
        waited = 0.0
        while message_of(database, hook).status == DeliveryStatus.PENDING:
            make_due(database)
            assert deliver(database, settings) == 1
            row = message_of(database, hook)
            waited += waits(row) if row.next_attempt_at else 0.0

    assert (row.status, len(server.requests), MAX_TRIES) == (DeliveryStatus.FAILED, 8, 8)
    assert 20 * 3600 < waited < 27 * 3600
    assert hook_of(database, hook).enabled


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("600", 600),
        ("0", 10),
        ("999999999", LONGEST_DELAY.total_seconds()),
        ("date", 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 10),
        ("soon", 10),
        ("-5", 10),
        ("9" * 5000, 10),
    ],
)
def test_a_receiver_says_when_to_come_back(database: Database, settings: Settings, value: str, seconds: float) -> None:
    if value == "date":
        value = format_datetime(now() + timedelta(hours=1), usegmt=True)
    with receiving(Reply(429, {"Retry-After": value})) as server:
        hook = new_hook(database, server.url)
        new_job(database)
        deliver(database, settings)

    assert abs(waits(message_of(database, hook)) - seconds) < 5


def test_a_redirect_is_a_failure_that_names_it(database: Database, settings: Settings) -> None:
    with receiving() as other, receiving(Reply(302, {"Location": other.url})) as server:
        hook = new_hook(database, server.url)
        new_job(database)
        deliver(database, settings)

    (attempt,) = message_of(database, hook).attempts
    assert attempt["error"] == f"answered 302 with a redirect to {other.url}, which is not followed"
    assert (attempt["response_code"], other.connections) == (302, 0)


def test_gone_disables_the_webhook(database: Database, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with receiving(Reply(410)) as server:
        hook = new_hook(database, server.url)
        new_job(database)
        with caplog.at_level(logging.WARNING):
            deliver(database, settings)
        new_job(database)
        make_due(database)
        assert deliver(database, settings) == 0

    found = hook_of(database, hook)
    assert (found.enabled, found.disabled_reason, len(server.requests)) == (False, DisabledReason.GONE, 1)
    assert message_of(database, hook).status == DeliveryStatus.FAILED
    assert f"webhook {hook} is disabled: gone" in caplog.text


def test_days_of_nothing_but_failures_disable_the_webhook(database: Database, settings: Settings) -> None:
    with receiving(Reply(500)) as server:
        hook = new_hook(database, server.url)
        with transaction(database) as session:
            webhooks.get(session, hook).failing_since = now() - timedelta(days=2)
        new_job(database)
        deliver(database, settings)
        assert hook_of(database, hook).enabled
        make_due(database)
        deliver(database, settings.model_copy(update={"webhook_failing_days": 2.0}))

    assert hook_of(database, hook).disabled_reason == DisabledReason.FAILING


def test_no_connection_is_made_to_where_the_operator_allows_none(database: Database, settings: Settings) -> None:
    closed = settings.model_copy(update={"webhook_allowed_networks": []})
    with receiving() as server:
        hook = new_hook(database, server.url)
        new_job(database)
        assert deliver(database, closed) == 1

    row = message_of(database, hook)
    assert (server.connections, row.status) == (0, DeliveryStatus.PENDING)
    assert row.attempts[0]["response_code"] is None
    assert "not a public address" in row.attempts[0]["error"]


def test_a_slow_receiver_is_cut_and_keeps_no_other_waiting(database: Database, settings: Settings) -> None:
    with receiving() as quick, receiving() as slow:
        hooks = [new_hook(database, server.url) for server in (slow, quick)]
        new_job(database)
        slow.shutdown()  # It accepts connections, but nobody reads them.
        assert deliver(database, settings, total_seconds=2.0) == 2

    rows = [message_of(database, hook) for hook in hooks]
    assert [row.status for row in rows] == [DeliveryStatus.PENDING, DeliveryStatus.SUCCEEDED]
    assert rows[0].attempts[0]["error"] == "no answer within 2 s"
    assert rows[1].attempts[0]["seconds"] < 2.0


def test_a_name_server_that_says_nothing_keeps_no_other_receiver_waiting(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.upkeep.lookups.LOOKUP_SECONDS", 0.5)
    closing = Event()
    with receiving() as quick:
        hooks = [new_hook(database, url) for url in ("http://hooks.example.com:1/", quick.url)]
        new_job(database)
        try:
            assert deliver(database, settings, find=lambda host, port: [str(closing.wait())]) == 2
        finally:
            closing.set()

    rows = [message_of(database, hook) for hook in hooks]
    assert [row.status for row in rows] == [DeliveryStatus.PENDING, DeliveryStatus.SUCCEEDED]
    assert rows[0].attempts[0]["error"] == "hooks.example.com was not found within 0.5 s"
    assert rows[1].attempts[0]["seconds"] < 0.5


def test_who_dies_between_sending_and_recording_leaves_the_message_to_be_sent_again_under_its_id(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What nothing on the way may catch."""

    def die(*arguments: object) -> None:
        raise Killed

    with receiving() as server:
        hook = new_hook(database, server.url)
        new_job(database)
        with monkeypatch.context() as patch:
            patch.setattr(reconciler, "_record", die)
            with pytest.raises(BaseExceptionGroup):
                deliver(database, settings)
        assert message_of(database, hook).status == DeliveryStatus.PENDING
        assert deliver(database, settings) == 0
        make_due(database)
        assert deliver(database, settings) == 1

    first, second = server.requests
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert message_of(database, hook).status == DeliveryStatus.SUCCEEDED


def test_senders_side_by_side_send_every_message_once(database: Database, settings: Settings) -> None:
    with receiving() as server:
        hook = new_hook(database, server.url)
        for _ in range(20):
            new_job(database)
        together = Barrier(3)

        def send(_: int) -> int:
            together.wait()
            return deliver(database, settings)

        with ThreadPoolExecutor(3) as pool:
            sent = sum(pool.map(send, range(3)))

    ids = [request.headers["webhook-id"] for request in server.requests]
    assert (sent, len(ids), len(set(ids))) == (20, 20, 20)
    assert {row.status for row in messages_of(database, hook)} == {DeliveryStatus.SUCCEEDED}


def test_no_transaction_is_open_while_a_message_is_sent(database: Database, settings: Settings) -> None:
    written: list[str] = []

    def write_meanwhile() -> None:
        if not written:
            written.append(new_job(database))

    # SQLite has one writer at a time: while the request waits, a transaction of the sender's would keep this one out.
    with receiving(Reply(before=write_meanwhile)) as server:
        hook = new_hook(database, server.url)
        new_job(database)
        assert deliver(database, settings) == 2

    assert [row.status for row in messages_of(database, hook)] == [DeliveryStatus.SUCCEEDED] * 2


def test_a_test_is_sent_once(database: Database, settings: Settings) -> None:
    with receiving(Reply(500)) as server:
        hook = new_hook(database, server.url)
        with transaction(database) as session:
            deliveries.try_out(session, hook)
        assert deliver(database, settings) == 1

    message, row = verified(server.requests[0], hook_of(database, hook).secret), message_of(database, hook)
    assert (message.type, message.data.model_dump()["webhook_id"]) == ("webhook.test", hook)
    assert (row.status, row.next_attempt_at) == (DeliveryStatus.FAILED, None)


def test_secrets_are_not_logged(database: Database, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with receiving(Reply(410)) as server, caplog.at_level(logging.DEBUG):
        hook = new_hook(database, server.url)
        new_job(database)
        deliver(database, settings)
        with transaction(database) as session:
            (row,) = session.exec(select(DeliveryRow))
            row.next_attempt_at, row.status = now(), DeliveryStatus.PENDING
            webhooks.get(session, hook).enabled = True
            shown = repr(deliveries.claim(session, limit=1, per_webhook=1, lease=timedelta(seconds=1), max_tries=9))

    secret = hook_of(database, hook).secret
    assert secret not in caplog.text
    assert hook in shown
    assert secret not in shown


def test_a_gateway_delivers_by_itself(database: Database, settings: Settings) -> None:
    with receiving() as server:
        new_hook(database, server.url)
        new_job(database)
        with TestClient(create_app(settings.model_copy(update={"reconcile_seconds": 0.05}))):
            assert server.arrived.acquire(timeout=20)

    assert json.loads(server.requests[0].body)["type"] == "job.created"
