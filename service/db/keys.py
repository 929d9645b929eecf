"""API keys: `pdt_<prefix>_<secret>`, found by the prefix, of whose secret only a hash is kept.

The hash is a plain SHA-256: the secret is 256 random bits, which nobody finds by trying, so a slow hash as for
passwords would cost every request time and protect nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from datetime import datetime

from sqlmodel import Session, col, select

from pdtrim.contract.access import Quotas, Rate, Scope
from service.db.tables import ApiKeyRow, now

KEY = re.compile(r"pdt_([0-9a-f]{12})_([0-9a-f]{64})")


class NoSuchKey(Exception):
    """No key has this prefix."""


def create(
    session: Session,
    *,
    project: str,
    name: str,
    scopes: Collection[Scope],
    expires_at: datetime | None = None,
    rate_limit: Rate | None = None,
    quotas: Quotas | None = None,
) -> tuple[ApiKeyRow, str]:
    """A new key's row, and the key itself, which nothing but this return value knows."""
    prefix, secret = secrets.token_hex(6), secrets.token_hex(32)
    row = ApiKeyRow(
        prefix=prefix,
        secret_sha256=_hash(secret),
        project=project,
        name=name,
        scopes=[scope.value for scope in Scope if scope in scopes],
        expires_at=expires_at,
        rate_limit=rate_limit,
        **(quotas or Quotas()).model_dump(),
    )
    session.add(row)
    session.flush()
    return row, f"pdt_{prefix}_{secret}"


def valid(session: Session, key: str) -> ApiKeyRow | None:
    """The row of a key that opens; None for one that is unknown, wrong, revoked or expired."""
    parts = KEY.fullmatch(key)
    if parts is None:
        return None
    row = session.get(ApiKeyRow, parts[1])
    if row is None or not hmac.compare_digest(row.secret_sha256, _hash(parts[2])):
        return None
    if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now()):
        return None
    return row


def exist(session: Session) -> bool:
    """Whether a key was ever made. Revoking the last one must not open the service, so revoked ones count."""
    return session.exec(select(ApiKeyRow.prefix).limit(1)).first() is not None


def every(session: Session, project: str | None = None) -> list[ApiKeyRow]:
    """All keys, or those of a project, oldest first."""
    query = select(ApiKeyRow).order_by(col(ApiKeyRow.created_at), col(ApiKeyRow.prefix))
    if project is not None:
        query = query.where(ApiKeyRow.project == project)
    return list(session.exec(query).all())


def revoke(session: Session, prefix: str) -> ApiKeyRow:
    """Close a key for ever; closing it twice is no error. Raises: NoSuchKey."""
    row = session.get(ApiKeyRow, prefix)
    if row is None:
        raise NoSuchKey(f"no key has the prefix {prefix!r}; `pdtrim keys list` shows them")
    row.revoked_at = row.revoked_at or now()
    return row


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
