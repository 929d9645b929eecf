"""The outbox, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from threading import Barrier, Event, Thread

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import event
from sqlmodel import Session, col, select

from pdtrim.contract.errors import DeliveryNotFound, TooManyWebhooks, WebhookDisabled, WebhookNotFound
from pdtrim.contract.jobs import ErrorInfo, StageName
from pdtrim.contract.spec import JobSpec
from pdtrim.contract.webhooks import (
    MAX_MESSAGE,
    MAX_WEBHOOKS,
    DeliveryAttempt,
    DeliveryStatus,
    DisabledReason,
    JobFacts,
    WebhookChange,
    WebhookEvent,
    WebhookSpec,
)
from service.db import deliveries, events, jobs, stages, webhooks
from service.db.deliveries import DeliveryClaim
from service.db.session import transaction
from service.db.tables import DeliveryRow, EventRow, WebhookRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate(
    {
        "model": "reference",
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": 2},
        "metadata": {"team": "serving"},
    }
)
LEASE = timedelta(seconds=60)
DAY = timedelta(days=1)


def new_hook(database: Database, *wanted: WebhookEvent, project: str = "default") -> str:
    spec = WebhookSpec(url="https://hooks.example.com/", events=wanted or tuple(WebhookEvent))
    with transaction(database) as session:
        return webhooks.create(session, spec, project=project).id


def new_job(database: Database, project: str = "default") -> str:
    with transaction(database) as session:
        return store_job(session, SPEC, project=project).id


def written(database: Database, webhook_id: str) -> list[DeliveryRow]:
    """The messages to a webhook, oldest first."""
    with transaction(database) as session:
        return deliveries.page(session, webhook_id, limit=100)[0][::-1]


def types(database: Database, webhook_id: str) -> list[str]:
    return [row.type for row in written(database, webhook_id)]


def take(database: Database, *, limit: int = 100, per_webhook: int = 100, max_tries: int = 8) -> list[DeliveryClaim]:
    with transaction(database) as session:
        return deliveries.claim(session, limit=limit, per_webhook=per_webhook, lease=LEASE, max_tries=max_tries)


def make_due(database: Database) -> None:
    """Let the time of every lease and delay pass."""
    with transaction(database) as session:
        for row in session.exec(select(DeliveryRow).where(col(DeliveryRow.next_attempt_at).is_not(None))):
            row.next_attempt_at = now() - timedelta(seconds=1)


def made(claim: DeliveryClaim, code: int = 500) -> DeliveryAttempt:
    return DeliveryAttempt(number=claim.attempt, at=now(), seconds=0.1, response_code=code, error="", excerpt="")


def fail(
    database: Database,
    claim: DeliveryClaim,
    *,
    retry_in: timedelta | None = DAY,
    gone: bool = False,
    limit: timedelta = DAY,
) -> DisabledReason | None:
    with transaction(database) as session:
        return deliveries.fail(session, claim, made(claim), retry_in=retry_in, gone=gone, failing_limit=limit)


def succeed(database: Database, claim: DeliveryClaim) -> None:
    with transaction(database) as session:
        deliveries.succeed(session, claim, made(claim, 200))


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """The SQL that runs in the block."""
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        seen.append(statement)

    event.listen(database, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(database, "before_cursor_execute", note)


def test_a_message_is_committed_with_its_event_or_not_at_all(database: Database) -> None:
    hook = new_hook(database)
    job_id = new_job(database)
    with Session(database) as session:
        jobs.request_cancel(session, job_id)
        assert [row.type for row in deliveries.page(session, hook, limit=9)[0]] == ["job.cancelled", "job.created"]
        session.rollback()

    (row,) = written(database, hook)
    with transaction(database) as session:
        (happened,) = events.page(session, job_id, after=0, limit=10)[0]
    assert (row.type, row.job_id, row.created_at) == ("job.created", job_id, happened.created_at)
    assert (row.status, row.attempt, row.attempts) == (DeliveryStatus.PENDING, 0, [])


def test_a_message_says_what_happened_and_how_the_job_stands(database: Database) -> None:
    hook = new_hook(database)
    job_id = new_job(database)
    with transaction(database) as session:
        claim = stages.claim(session, job_id, StageName.SCORING, worker="secret-host", lease_seconds=60)
        assert claim is not None
        stages.fail(session, claim, ErrorInfo(code="out_of_memory", message="m" * 5000, param="model"))

    created, started, _, failed = (JobFacts.model_validate(row.data) for row in written(database, hook))
    assert types(database, hook) == ["job.created", "stage.started", "stage.failed", "job.failed"]
    assert (created.job_id, created.status, created.metadata) == (job_id, "queued", {"team": "serving"})
    assert (started.stage, started.attempt, started.status, started.number) == ("scoring", 1, "running", 2)
    assert (failed.status, failed.number, failed.stage) == ("failed", 4, None)
    assert failed.error == ErrorInfo(code="out_of_memory", message="m" * MAX_MESSAGE, param="model")
    assert not any("secret-host" in str(row.data) for row in written(database, hook))


def test_a_message_and_what_was_answered_are_kept_without_secrets(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_FAILED)
    job_id, leaked = new_job(database), "hf_abcdefghijklmnopqrstuv"
    with transaction(database) as session:
        claim = stages.claim(session, job_id, StageName.SCORING, worker="w", lease_seconds=60)
        assert claim is not None
        stages.fail(session, claim, ErrorInfo(code="source_unreadable", message=f"the hub refused {leaked}"))
    (claimed,) = take(database)
    answered = made(claimed).model_copy(update={"excerpt": f"who is {leaked}?"})
    with transaction(database) as session:
        deliveries.fail(session, claimed, answered, retry_in=DAY, gone=False, failing_limit=DAY)

    (row,) = written(database, hook)
    assert leaked not in str([claimed.data, row.data, row.attempts])
    assert row.attempts[0]["excerpt"] == "who is hf_***?"


def test_every_event_of_a_jobs_life_but_progress_can_be_announced(database: Database) -> None:
    new_hook(database)
    ended, stopped = new_job(database), new_job(database)
    with transaction(database) as session:
        for stage in StageName:
            claim = stages.claim(session, ended, stage, worker="w", lease_seconds=60)
            assert claim is not None
            stages.record_progress(session, claim, progress=0.5, message="", data={})
            stages.complete(session, claim, artifacts=[], metrics={"loss": 1.0}, versions={})
        for ask in (jobs.request_pause, jobs.request_cancel):
            jobs.resume(session, stopped) if ask is jobs.request_cancel else None
            claim = stages.claim(session, stopped, StageName.SCORING, worker="w", lease_seconds=60)
            assert claim is not None
            stages.release(session, claim, "It broke", max_attempts=5, pause_seconds=10)
            claim = stages.claim(session, stopped, StageName.SCORING, worker="w", lease_seconds=60)
            assert claim is not None
            ask(session, stopped)
            stages.stopped(session, claim)
        jobs.resume(session, stopped)
        claim = stages.claim(session, stopped, StageName.SCORING, worker="w", lease_seconds=60)
        assert claim is not None
        stages.fail(session, claim, ErrorInfo(code="x", message="x"))
        happened = set(session.exec(select(EventRow.type)))
        announced = set(session.exec(select(DeliveryRow.type)))

    assert announced == {event.value for event in WebhookEvent}
    assert happened == announced | {"stage.progress"}


def test_only_enabled_webhooks_of_the_project_that_want_an_event_hear_of_it(database: Database) -> None:
    all_of_it, ends = new_hook(database), new_hook(database, WebhookEvent.JOB_CANCELLED)
    others, disabled = new_hook(database, project="other"), new_hook(database)
    with transaction(database) as session:
        webhooks.change(session, disabled, WebhookChange(enabled=False))
    job_id = new_job(database)
    with transaction(database) as session:
        jobs.request_cancel(session, job_id)

    assert types(database, all_of_it) == ["job.created", "job.cancelled"]
    assert types(database, ends) == ["job.cancelled"]
    assert types(database, others) == types(database, disabled) == []


def test_progress_asks_nothing_and_other_events_ask_once_where_there_is_no_webhook(database: Database) -> None:
    new_hook(database, project="other")
    job_id = new_job(database)
    with transaction(database) as session:
        claim = stages.claim(session, job_id, StageName.SCORING, worker="w", lease_seconds=60)
        assert claim is not None
    with statements(database) as seen, transaction(database) as session:
        stages.record_progress(session, claim, progress=0.5, message="", data={})
    assert not any("webhook" in statement for statement in seen)

    with statements(database) as seen, transaction(database) as session:
        events.append(session, job_id, "job.paused", "")
    assert sum("webhook" in statement for statement in seen) == 1


def test_a_webhook_deleted_meanwhile_does_not_fail_the_event(database: Database) -> None:
    if database.dialect.name == "sqlite":
        pytest.skip("SQLite runs one writing transaction after the other")
    hook = new_hook(database)
    deleted = Event()

    def delete() -> None:
        with transaction(database) as session:
            webhooks.delete(session, hook)
        deleted.set()

    deleting = Thread(target=delete)

    def begin_to_delete(connection: object, cursor: object, statement: str, *rest: object) -> None:
        """Between the look at the webhooks and the messages to them."""
        if "FROM webhooks" in statement and deleting.ident is None:
            deleting.start()
            assert not deleted.wait(0.5)

    event.listen(database, "after_cursor_execute", begin_to_delete)
    new_job(database)
    deleting.join()

    with pytest.raises(WebhookNotFound), transaction(database) as session:
        webhooks.get(session, hook)


def test_many_senders_at_once_claim_every_message_once(database: Database) -> None:
    hooks = [new_hook(database, WebhookEvent.JOB_CREATED) for _ in range(3)]
    for _ in range(10):
        new_job(database)
    together = Barrier(4)

    def claim_all(_: int) -> list[DeliveryClaim]:
        claimed: list[DeliveryClaim] = []
        together.wait()
        while len(claimed) < 30 and (more := take(database, limit=4, per_webhook=2)):
            claimed += more
        return claimed

    with ThreadPoolExecutor(4) as pool:
        found = [one.id for part in pool.map(claim_all, range(4)) for one in part]
    found += [one.id for one in take(database)]  # Who found a webhook's first rows locked by others gave up early.

    assert sorted(found) == sorted(row.id for hook in hooks for row in written(database, hook))
    assert take(database) == []


def test_a_claim_locks_nothing_that_another_sender_waits_for(database: Database) -> None:
    if database.dialect.name == "sqlite":
        pytest.skip("SQLite runs one writing transaction after the other")
    new_hook(database, WebhookEvent.JOB_CREATED)
    for _ in range(2):
        new_job(database)
    with transaction(database) as session:
        (first,) = deliveries.claim(session, limit=1, per_webhook=9, lease=LEASE, max_tries=8)
        with ThreadPoolExecutor(1) as pool:
            (second,) = pool.submit(take, database).result(timeout=10)

    assert first.id != second.id


def test_a_webhook_with_many_messages_leaves_room_for_others(database: Database) -> None:
    busy = new_hook(database, WebhookEvent.JOB_CREATED, project="busy")
    for _ in range(5):
        new_job(database, "busy")
    calm = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)

    claimed = take(database, limit=3, per_webhook=2)

    assert [one.webhook_id for one in claimed] == [busy, busy, calm]


def test_a_lease_hides_a_message_and_fences_out_a_sender_that_comes_too_late(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    (late,) = take(database)
    assert take(database) == []
    make_due(database)
    (again,) = take(database)

    fail(database, late)
    succeed(database, late)
    assert written(database, hook)[0].attempts == []
    succeed(database, again)

    (row,) = written(database, hook)
    assert (late.id, late.attempt, again.attempt) == (again.id, 1, 2)
    assert [(one["number"], one["response_code"]) for one in row.attempts] == [(2, 200)]
    assert (row.status, row.next_attempt_at) == (DeliveryStatus.SUCCEEDED, None)
    make_due(database)
    assert take(database) == []


def test_a_message_that_no_sender_lives_to_record_is_given_up(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    for _ in range(3):
        assert len(take(database, max_tries=3)) == 1
        make_due(database)

    assert take(database, max_tries=3) == []
    (row,) = written(database, hook)
    assert (row.status, row.next_attempt_at) == (DeliveryStatus.FAILED, None)


def test_a_failure_is_noted_and_the_message_falls_due_again_or_is_given_up(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    (claim,) = take(database)
    fail(database, claim, retry_in=timedelta(hours=1))
    (row,) = written(database, hook)
    assert row.next_attempt_at is not None
    assert timedelta(minutes=59) < row.next_attempt_at - now() < timedelta(minutes=61)
    with transaction(database) as session:
        assert webhooks.get(session, hook).failing_since is not None
    make_due(database)

    (claim,) = take(database)
    fail(database, claim, retry_in=None)

    (row,) = written(database, hook)
    assert (row.status, row.next_attempt_at, claim.tries) == (DeliveryStatus.FAILED, None, 2)
    assert [one["number"] for one in row.attempts] == [1, 2]


def test_the_notes_on_attempts_are_bounded(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    for _ in range(deliveries.KEPT_ATTEMPTS + 3):
        (claim,) = take(database, max_tries=100)
        fail(database, claim)
        make_due(database)

    (row,) = written(database, hook)
    assert [one["number"] for one in row.attempts] == list(range(4, deliveries.KEPT_ATTEMPTS + 4))


def test_a_receiver_that_is_gone_disables_its_webhook_and_what_waits_is_given_up(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    new_job(database)
    first, second = take(database)

    assert fail(database, first, gone=True) is DisabledReason.GONE
    assert fail(database, second) is None
    with transaction(database) as session:
        found = webhooks.get(session, hook)
        assert (found.enabled, found.disabled_reason) == (False, DisabledReason.GONE)
        with pytest.raises(WebhookDisabled):
            deliveries.resend(session, hook, first.id)
        with pytest.raises(WebhookDisabled):
            deliveries.try_out(session, hook)

    assert [row.status for row in written(database, hook)] == [DeliveryStatus.FAILED] * 2


def test_what_falls_due_while_a_webhook_is_disabled_is_given_up_and_what_falls_due_later_is_sent(
    database: Database,
) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    with transaction(database) as session:
        webhooks.change(session, hook, WebhookChange(enabled=False))
        assert webhooks.get(session, hook).disabled_reason == DisabledReason.REQUESTED
    assert take(database) == []
    (row,) = written(database, hook)
    assert (row.status, row.attempts[0]["error"]) == (DeliveryStatus.FAILED, "The webhook is disabled.")

    with transaction(database) as session:
        webhooks.change(session, hook, WebhookChange(enabled=True))
        deliveries.resend(session, hook, row.id)
    assert [claim.id for claim in take(database)] == [row.id]


def test_nothing_but_failures_for_days_disables_a_webhook_and_a_success_in_between_does_not(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)

    def failing_since(days: float) -> None:
        with transaction(database) as session:
            session.get_one(WebhookRow, hook).failing_since = now() - timedelta(days=days)

    for _ in range(4):
        new_job(database)
    first, second, third, fourth = take(database)
    fail(database, first, limit=timedelta(days=5))
    failing_since(4.9)
    assert fail(database, second, limit=timedelta(days=5)) is None
    failing_since(6)
    succeed(database, third)
    assert fail(database, fourth, limit=timedelta(days=5)) is None
    failing_since(5.1)
    make_due(database)
    (again, *_) = take(database)

    assert fail(database, again, limit=timedelta(days=5)) is DisabledReason.FAILING
    with transaction(database) as session:
        webhooks.change(session, hook, WebhookChange(enabled=True))
        found = webhooks.get(session, hook)
        assert (found.enabled, found.disabled_reason, found.failing_since) == (True, None, None)


def test_a_resent_message_keeps_its_id_and_has_all_attempts_before_it(database: Database) -> None:
    hook, other = new_hook(database, WebhookEvent.JOB_CREATED), new_hook(database, WebhookEvent.JOB_FAILED)
    new_job(database)
    (claim,) = take(database)
    succeed(database, claim)
    with transaction(database) as session:
        with pytest.raises(DeliveryNotFound):
            deliveries.resend(session, other, claim.id)
        with pytest.raises(DeliveryNotFound):
            deliveries.resend(session, hook, "msg_" + "0" * 32)
        deliveries.resend(session, hook, claim.id)

    (again,) = take(database)

    assert (again.id, again.attempt, again.tries) == (claim.id, 2, 1)
    succeed(database, claim)
    assert [one["number"] for one in written(database, hook)[0].attempts] == [1]


def test_a_message_resent_while_it_is_being_sent_is_sent_again(database: Database) -> None:
    new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    (claim,) = take(database)
    with transaction(database) as session:
        deliveries.resend(session, claim.webhook_id, claim.id)
    (again,) = take(database)
    succeed(database, claim)
    succeed(database, again)

    (row,) = written(database, claim.webhook_id)
    assert (row.status, [one["number"] for one in row.attempts]) == (DeliveryStatus.SUCCEEDED, [2])


def test_a_deleted_webhook_takes_its_messages_along_and_its_senders_record_nothing(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    new_job(database)
    (claim,) = take(database)
    with transaction(database) as session:
        webhooks.delete(session, hook)
        with pytest.raises(WebhookNotFound):
            webhooks.delete(session, hook)

    assert fail(database, claim) is None
    succeed(database, claim)
    with transaction(database) as session:
        assert session.exec(select(DeliveryRow)).all() == []


def test_messages_outlive_their_job_and_are_forgotten_after_a_month(database: Database) -> None:
    hook = new_hook(database, WebhookEvent.JOB_CREATED)
    old, young = new_job(database), new_job(database)
    with transaction(database) as session:
        session.delete(jobs.get(session, young))
    with transaction(database) as session:
        for row in session.exec(select(DeliveryRow)):
            row.created_at = now() - timedelta(days=31 if row.job_id == old else 29)
    with transaction(database) as session:
        deliveries.forget(session)

    assert [row.job_id for row in written(database, hook)] == [young]


def test_after_a_rotation_both_secrets_sign_for_a_day(database: Database) -> None:
    hook = new_hook(database)
    with transaction(database) as session:
        first = webhooks.get(session, hook).secret
        second = webhooks.rotate(session, hook).secret
    with transaction(database) as session:
        row = webhooks.get(session, hook)
        assert webhooks.signing_secrets(row) == (second, first)
        row.previous_secret_until = now() - timedelta(seconds=1)
        assert webhooks.signing_secrets(row) == (second,)
    assert first != second


def test_a_project_has_a_bounded_number_of_webhooks(database: Database) -> None:
    for _ in range(MAX_WEBHOOKS):
        new_hook(database)
    with pytest.raises(TooManyWebhooks):
        new_hook(database)
    assert new_hook(database, project="other")
