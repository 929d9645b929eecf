"""The outbox: messages to webhooks, and the attempts to deliver them.

A claim moves a message's due time on by a lease and numbers the attempt; nothing is locked while it is sent. Who dies
on the way leaves the message to fall due again, under the same id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func
from sqlmodel import Session, col, select
from uuid_utils import uuid7

from pdtrim.contract.errors import CursorNotFound, DeliveryNotFound, WebhookDisabled, WebhookNotFound
from pdtrim.contract.jobs import ErrorInfo, JobStatus
from pdtrim.contract.webhooks import (
    MAX_MESSAGE,
    TEST_EVENT,
    DeliveryAttempt,
    DeliveryStatus,
    DisabledReason,
    JobFacts,
    MessageFormat,
    TrialFacts,
    WebhookEvent,
)
from service.db import webhooks
from service.db.tables import DeliveryRow, EventRow, WebhookRow, now

KEPT = timedelta(days=30)
KEPT_ATTEMPTS = 20
ANNOUNCED = frozenset(WebhookEvent)


@dataclass(frozen=True)
class DeliveryClaim:
    """The right to make one attempt at a message, and what it takes. `tries` counts since it was last (re)sent."""

    id: str
    webhook_id: str
    job_id: str | None
    type: str
    data: dict[str, Any]
    created_at: datetime
    attempt: int
    tries: int
    url: str
    format: MessageFormat
    secrets: tuple[str, ...] = field(repr=False)


def announce(session: Session, event: EventRow, *, project: str, status: JobStatus, labels: dict[str, str]) -> None:
    """Write a message to every webhook of the project that wants this event. To be part of the event's transaction."""
    if event.type not in ANNOUNCED:
        return
    hooks = select(WebhookRow.id, WebhookRow.events).where(WebhookRow.project == project, col(WebhookRow.enabled))
    # So locked, none can be deleted before this transaction ends, which would fail it and the event with it.
    found = session.connection().execute(hooks.with_for_update(read=True, key_share=True))
    wanted = [webhook_id for webhook_id, events in found if event.type in events]
    if not wanted:
        return
    facts = JobFacts(
        job_id=event.job_id,
        status=status,
        metadata=labels,
        number=event.number,
        stage=event.stage,
        message=event.message[:MAX_MESSAGE],
        attempt=event.data.get("attempt"),
        error=_error(event.data),
    ).model_dump(mode="json")
    for webhook_id in wanted:
        _add(session, webhook_id, event.type, facts, job_id=event.job_id, created_at=event.created_at)


def _error(data: Mapping[str, Any]) -> ErrorInfo | None:
    if "code" not in data:
        return None
    error = ErrorInfo.model_validate(data)
    return error.model_copy(update={"message": error.message[:MAX_MESSAGE]})


def try_out(session: Session, webhook_id: str) -> DeliveryRow:
    """Write a test message to a webhook. Raises: WebhookNotFound; WebhookDisabled."""
    _enabled(session, webhook_id)
    facts = TrialFacts(webhook_id=webhook_id, message="This is a test of your webhook.").model_dump(mode="json")
    return _add(session, webhook_id, TEST_EVENT, facts, job_id=None, created_at=now())


def _add(
    session: Session, webhook_id: str, type_: str, facts: dict[str, Any], *, job_id: str | None, created_at: datetime
) -> DeliveryRow:
    row = DeliveryRow(
        id=f"msg_{uuid7().hex}",
        webhook_id=webhook_id,
        job_id=job_id,
        type=type_,
        data=facts,
        status=DeliveryStatus.PENDING,
        next_attempt_at=now(),
        created_at=created_at,
    )
    session.add(row)
    session.flush()
    return row


def page(
    session: Session, webhook_id: str, *, limit: int, after: str | None = None, status: DeliveryStatus | None = None
) -> tuple[list[DeliveryRow], bool]:
    """Deliveries of a webhook, newest first, and whether more follow. Raises: CursorNotFound."""
    query = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
    if after is not None:
        if session.exec(query.where(DeliveryRow.id == after)).first() is None:
            raise CursorNotFound(f"`after` names no delivery of webhook {webhook_id}: {after}", param="after")
        query = query.where(DeliveryRow.id < after)
    if status is not None:
        query = query.where(DeliveryRow.status == status)
    rows = session.exec(query.order_by(col(DeliveryRow.id).desc()).limit(limit + 1)).all()
    return list(rows[:limit]), len(rows) > limit


def resend(session: Session, webhook_id: str, delivery_id: str) -> DeliveryRow:
    """Make a message due now, with all its attempts before it. Raises: WebhookNotFound, DeliveryNotFound;
    WebhookDisabled.
    """
    _enabled(session, webhook_id)
    row = _locked(session, delivery_id)
    if row is None or row.webhook_id != webhook_id:
        raise DeliveryNotFound(
            f"Webhook {webhook_id} has no delivery {delivery_id}. List them with "
            f"GET /v1/webhooks/{webhook_id}/deliveries; they are kept for {KEPT.days} days."
        )
    row.status, row.next_attempt_at, row.attempts_forgiven = DeliveryStatus.PENDING, now(), row.attempt
    session.flush()
    return row


def claim(session: Session, *, limit: int, per_webhook: int, lease: timedelta, max_tries: int) -> list[DeliveryClaim]:
    """Take up to `limit` messages that are due, few of one webhook, so that a slow receiver holds up no other.

    What falls due while its webhook is disabled is given up, and what no sender lived to record `max_tries` times.
    """
    at = now()
    due = col(DeliveryRow.next_attempt_at) <= at
    place = func.row_number().over(
        partition_by=col(DeliveryRow.webhook_id), order_by=(col(DeliveryRow.next_attempt_at), col(DeliveryRow.id))
    )
    placed = select(col(DeliveryRow.id), place.label("place")).where(due).subquery()
    rows = session.exec(
        select(DeliveryRow)
        .where(due, col(DeliveryRow.id).in_(select(placed.c.id).where(placed.c.place <= per_webhook)))
        .order_by(col(DeliveryRow.next_attempt_at), col(DeliveryRow.id))
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    hooks = {
        hook.id: hook
        for hook in session.exec(select(WebhookRow).where(col(WebhookRow.id).in_({row.webhook_id for row in rows})))
    }
    claimed = []
    for row in rows:
        hook = hooks[row.webhook_id]
        row.attempt += 1
        if not hook.enabled:
            _give_up(row, "The webhook is disabled.")
        elif row.attempt - row.attempts_forgiven > max_tries:
            _give_up(row, "Nobody lived to record the attempts before.")
        else:
            row.next_attempt_at = at + lease
            claimed.append(_claimed(row, hook))
    return claimed


def _give_up(row: DeliveryRow, reason: str) -> None:
    row.status, row.next_attempt_at = DeliveryStatus.FAILED, None
    _note(row, DeliveryAttempt(number=row.attempt, at=now(), seconds=0.0, error=reason))


def _claimed(row: DeliveryRow, hook: WebhookRow) -> DeliveryClaim:
    return DeliveryClaim(
        id=row.id,
        webhook_id=row.webhook_id,
        job_id=row.job_id,
        type=row.type,
        data=row.data,
        created_at=row.created_at,
        attempt=row.attempt,
        tries=row.attempt - row.attempts_forgiven,
        url=hook.url,
        format=MessageFormat(hook.format),
        secrets=webhooks.signing_secrets(hook),
    )


def succeed(session: Session, claim: DeliveryClaim, made: DeliveryAttempt) -> None:
    """Record that a message was taken. A sender whose lease ran out records nothing, here and in `fail`."""
    found = _current(session, claim)
    if found is None:
        return
    hook, row = found
    _note(row, made)
    row.status, row.next_attempt_at = DeliveryStatus.SUCCEEDED, None
    hook.failing_since = None


def fail(
    session: Session,
    claim: DeliveryClaim,
    made: DeliveryAttempt,
    *,
    retry_in: timedelta | None,
    gone: bool,
    failing_limit: timedelta,
) -> DisabledReason | None:
    """Record that a message was not taken, and when it is tried again, if it is.

    The webhook is disabled when its receiver is `gone`, or when nothing arrived there for `failing_limit`; returns why.
    """
    found = _current(session, claim)
    if found is None:
        return None
    hook, row = found
    _note(row, made)
    hook.failing_since = hook.failing_since or now()
    reason = None
    if gone:
        reason = DisabledReason.GONE
    elif now() - hook.failing_since >= failing_limit:
        reason = DisabledReason.FAILING
    if reason is not None:
        webhooks.disable(hook, reason)
    if retry_in is None or not hook.enabled:
        row.status, row.next_attempt_at = DeliveryStatus.FAILED, None
    else:
        row.next_attempt_at = now() + retry_in
    return reason


def forget(session: Session) -> None:
    """Delete deliveries that nobody asks about any more."""
    session.exec(delete(DeliveryRow).where(col(DeliveryRow.created_at) < now() - KEPT))


def _enabled(session: Session, webhook_id: str) -> WebhookRow:
    hook = webhooks.lock(session, webhook_id)
    if not hook.enabled:
        raise WebhookDisabled(f"Webhook {webhook_id} is disabled: enable it with PATCH /v1/webhooks/{webhook_id}.")
    return hook


def _current(session: Session, claim: DeliveryClaim) -> tuple[WebhookRow, DeliveryRow] | None:
    try:
        hook = webhooks.lock(session, claim.webhook_id)
    except WebhookNotFound:
        return None
    row = _locked(session, claim.id)
    if row is None or row.status != DeliveryStatus.PENDING or row.attempt != claim.attempt:
        return None
    return hook, row


def _locked(session: Session, delivery_id: str) -> DeliveryRow | None:
    return session.exec(
        select(DeliveryRow)
        .where(DeliveryRow.id == delivery_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).first()


def _note(row: DeliveryRow, made: DeliveryAttempt) -> None:
    row.attempts = [*row.attempts, made.model_dump(mode="json")][-KEPT_ATTEMPTS:]
