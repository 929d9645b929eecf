"""Queries on webhooks. Whoever changes a webhook and its deliveries locks the webhook first."""

from __future__ import annotations

import base64
import secrets
from datetime import timedelta
from typing import Any

from sqlalchemy import func
from sqlmodel import Session, col, select
from uuid_utils import uuid7

from pdtrim.contract.errors import CursorNotFound, TooManyWebhooks, WebhookNotFound
from pdtrim.contract.webhooks import MAX_WEBHOOKS, DisabledReason, WebhookChange, WebhookSpec
from service.db.tables import WebhookRow, now

ROTATION = timedelta(hours=24)
"""How long the secret before a rotation signs beside the new one."""


def create(session: Session, spec: WebhookSpec, *, project: str) -> WebhookRow:
    """A new webhook, enabled, with a secret. Raises: TooManyWebhooks."""
    held = session.exec(select(func.count()).where(WebhookRow.project == project)).one()
    if held >= MAX_WEBHOOKS:
        raise TooManyWebhooks(f"A project may have {MAX_WEBHOOKS} webhooks. Delete one that is not needed first.")
    row = WebhookRow(id=f"wh_{uuid7().hex}", project=project, secret=_new_secret(), **spec.model_dump(mode="json"))
    session.add(row)
    session.flush()
    return row


def get(session: Session, webhook_id: str) -> WebhookRow:
    """The webhook. Raises: WebhookNotFound."""
    row = session.get(WebhookRow, webhook_id)
    if row is None:
        raise _missing(webhook_id)
    return row


def check_project(session: Session, webhook_id: str, project: str) -> None:
    """Raises: WebhookNotFound when the project has no such webhook, whether another has it or not."""
    found = select(WebhookRow.id).where(WebhookRow.id == webhook_id, WebhookRow.project == project)
    if session.exec(found).first() is None:
        raise _missing(webhook_id)


def lock(session: Session, webhook_id: str) -> WebhookRow:
    """The webhook, locked against other changes until the transaction ends. Raises: WebhookNotFound."""
    row = session.exec(
        select(WebhookRow)
        .where(WebhookRow.id == webhook_id)
        # Events go on writing deliveries meanwhile: their reference to the webhook does not conflict with this lock.
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).first()
    if row is None:
        raise _missing(webhook_id)
    return row


def page(session: Session, project: str, *, limit: int, after: str | None = None) -> tuple[list[WebhookRow], bool]:
    """Webhooks of a project, newest first, and whether more follow. Raises: CursorNotFound."""
    query = select(WebhookRow).where(WebhookRow.project == project)
    if after is not None:
        if session.exec(query.where(WebhookRow.id == after)).first() is None:
            raise CursorNotFound(f"`after` names no webhook: {after}", param="after")
        query = query.where(WebhookRow.id < after)
    rows = session.exec(query.order_by(col(WebhookRow.id).desc()).limit(limit + 1)).all()
    return list(rows[:limit]), len(rows) > limit


def change(session: Session, webhook_id: str, wanted: WebhookChange) -> WebhookRow:
    """Change what is given. Raises: WebhookNotFound."""
    row = lock(session, webhook_id)
    given: dict[str, Any] = wanted.model_dump(mode="json", exclude_none=True, exclude={"enabled"})
    for name, value in given.items():
        setattr(row, name, value)
    if wanted.enabled:
        row.enabled, row.disabled_reason, row.failing_since = True, None, None
    elif wanted.enabled is False:
        disable(row, DisabledReason.REQUESTED)
    session.flush()
    return row


def disable(row: WebhookRow, reason: DisabledReason) -> None:
    """Let a locked webhook announce nothing more."""
    if row.enabled:
        row.enabled, row.disabled_reason = False, reason


def rotate(session: Session, webhook_id: str) -> WebhookRow:
    """A new secret; the one before signs beside it for a day. Raises: WebhookNotFound."""
    row = lock(session, webhook_id)
    row.previous_secret, row.previous_secret_until = row.secret, now() + ROTATION
    row.secret = _new_secret()
    session.flush()
    return row


def delete(session: Session, webhook_id: str) -> None:
    """Delete a webhook, and by cascade its deliveries. Raises: WebhookNotFound."""
    row = session.exec(select(WebhookRow).where(WebhookRow.id == webhook_id).with_for_update()).first()
    if row is None:
        raise _missing(webhook_id)
    session.delete(row)


def signing_secrets(row: WebhookRow) -> tuple[str, ...]:
    """The secrets that sign now, the newest first."""
    if row.previous_secret is None or row.previous_secret_until is None or row.previous_secret_until < now():
        return (row.secret,)
    return row.secret, row.previous_secret


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def _missing(webhook_id: str) -> WebhookNotFound:
    return WebhookNotFound(f"No webhook {webhook_id} exists. List the webhooks with GET /v1/webhooks.")
