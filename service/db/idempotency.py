"""Idempotency keys: a request that is sent again creates nothing again, whichever gateway it reaches.

A request claims its key before it does anything; the primary key lets one of several through. The transaction that
creates the job settles the claim, and fails when another request took it over meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select
from uuid_utils import uuid7

from pdtrim.contract.errors import IdempotencyKeyReused, RequestInFlight
from service.db.tables import IdempotencyRow, now

KEPT = timedelta(hours=24)
ABANDONED = timedelta(seconds=45)
"""A claim so old is its gateway's legacy: longer than our client waits for an answer, shorter than it retries."""


@dataclass(frozen=True)
class KeyClaim:
    """The right to create a job under a key; the token tells it from a later claim of the same key."""

    project: str
    key: str
    token: str


@dataclass(frozen=True)
class Answered:
    """What a request with this key and body was answered before."""

    job_id: str
    response: Mapping[str, Any]


def claim(session: Session, project: str, key: str, fingerprint: str) -> KeyClaim | Answered:
    """Reserve a key of a project for a body's fingerprint, or give the answer that it stands for.

    Raises: IdempotencyKeyReused when the key stands for another body; RequestInFlight while that is not answered yet.
    """
    token = uuid7().hex
    try:
        with session.begin_nested():
            session.add(IdempotencyRow(project=project, key=key, fingerprint=fingerprint, token=token))
    except IntegrityError:
        return _taken(session, project, key, fingerprint, token)
    return KeyClaim(project, key, token)


def _taken(session: Session, project: str, key: str, fingerprint: str, token: str) -> KeyClaim | Answered:
    row = session.exec(
        select(IdempotencyRow)
        .where(IdempotencyRow.project == project, IdempotencyRow.key == key)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).first()
    if row is None:  # The request that held it has just been refused.
        raise RequestInFlight("A request with this Idempotency-Key was just being refused. Send yours again.")
    if row.job_id is None and row.reserved_at < now() - ABANDONED:
        row.fingerprint, row.token, row.reserved_at = fingerprint, token, now()
        return KeyClaim(project, key, token)
    if row.fingerprint != fingerprint:
        raise IdempotencyKeyReused(
            "This Idempotency-Key was sent with another body. Use a fresh key for every new request.",
            param="Idempotency-Key",
        )
    if row.job_id is None or row.response is None:
        raise RequestInFlight("The first request with this Idempotency-Key is still being worked on. Try again.")
    return Answered(row.job_id, row.response)


def settle(session: Session, claim: KeyClaim, job_id: str, response: Mapping[str, Any]) -> None:
    """Record the answer, in the transaction that creates the job. Raises: RequestInFlight when it was taken over."""
    settled = session.exec(
        update(IdempotencyRow).where(*_is(claim)).values(job_id=job_id, response=dict(response)).returning(_KEY)
    ).first()
    if settled is None:
        raise RequestInFlight("This request took so long that another with its Idempotency-Key went on. Try again.")


def release(session: Session, claim: KeyClaim) -> None:
    """Free the key of a request that created nothing."""
    session.exec(delete(IdempotencyRow).where(*_is(claim)))


def forget(session: Session) -> None:
    """Delete the keys of requests that nobody sends again."""
    session.exec(delete(IdempotencyRow).where(col(IdempotencyRow.reserved_at) < now() - KEPT))


_KEY = col(IdempotencyRow.key)


def _is(claim: KeyClaim) -> tuple[Any, ...]:
    return (
        IdempotencyRow.project == claim.project,
        IdempotencyRow.key == claim.key,
        IdempotencyRow.token == claim.token,
        col(IdempotencyRow.job_id).is_(None),
    )
