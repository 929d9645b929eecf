"""Word of a job's new events, from the transaction that records them to the gateways whose clients wait for them.

PostgreSQL carries it (LISTEN and NOTIFY), and lets transactions that notify commit only one after the other: those that
create jobs, of which nobody can know yet, do not. On SQLite nothing carries it, and gateways look by themselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from psycopg import AsyncConnection
from sqlalchemy import Connection, func, select
from sqlalchemy import Engine as Database
from sqlmodel import Session

from service.db.session import waits

CHANNEL = "pdtrim_events"


def has_notices(by: Database | Connection) -> bool:
    """Whether a database carries notices."""
    return by.dialect.name == "postgresql"


def send(session: Session, job_id: str) -> None:
    """Tell whoever listens that a job has changed, once the transaction is committed."""
    if has_notices(session.get_bind()):
        session.execute(select(func.pg_notify(CHANNEL, job_id)))


async def listen(database: Database) -> AsyncIterator[str | None]:
    """None once it listens, then the ids of jobs that changed. It has a connection of its own.

    Raises: psycopg.Error when the connection cannot be made, or ends.
    """
    _, given = database.dialect.create_connect_args(database.url)
    async with await AsyncConnection.connect(**{**waits(database.url), **given}, autocommit=True) as connection:
        await connection.execute(f"LISTEN {CHANNEL}")
        yield None
        async for notice in connection.notifies():
            yield notice.payload
