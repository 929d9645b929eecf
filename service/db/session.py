"""Engines and transactions, alike on PostgreSQL and SQLite."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, create_engine, event, make_url
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import Session

MIGRATIONS = Path(__file__).parent / "migrations"
DATABASE_FAULTS = (OperationalError, InterfaceError, PoolTimeout)
"""What may pass: the database is away, is restarting, ended the connection, or was too busy. All else is a mistake."""
IDLE_SECONDS = 1.0
"""A connection that was idle for longer is tried before it is used: the server may have restarted."""
POSTGRESQL_OPTIONS = "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s"
"""A process that is stopped in the middle of a transaction must not hold its locks against the others for ever."""
POSTGRESQL_WAITS = {
    # Without these, a connection to a server that vanished hangs as long as TCP likes: a quarter of an hour.
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
log = logging.getLogger(__name__)


def connect(url: str) -> Database:
    """Connections to `url`; SQLite gets WAL, foreign keys and write locks taken at the start of a transaction."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        database = create_engine(parsed, connect_args=waits(parsed))
        _ping_idle_connections(database)
        return database
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    database = create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(database, "connect")
    def _configure(connection: Any, record: Any) -> None:
        # sqlite3's own transaction handling would begin too late to be serialisable.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(database, "begin")
    def _begin(connection: Any) -> None:
        # A deferred transaction that reads and then writes fails at once when another wrote meanwhile.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return database


def _ping_idle_connections(database: Database) -> None:
    """As SQLAlchemy's `pool_pre_ping`, but not of connections that were in use just now: it is one more round trip.

    When the server restarts, the first statement to fail takes all its connections out of the pool.
    """

    @event.listens_for(database, "checkin")
    def _note(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    @event.listens_for(database, "checkout")
    def _ping(connection: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
        used_at = record.info.get("used_at")
        if used_at is None or time.monotonic() - used_at < IDLE_SECONDS:
            return
        try:
            database.dialect.do_ping(connection)
        except database.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error  # The pool then takes a new one.


def waits(url: URL) -> dict[str, Any]:
    """How long PostgreSQL may keep us waiting; what the URL says itself counts."""
    given = {**POSTGRESQL_WAITS, "options": POSTGRESQL_OPTIONS}
    return {name: value for name, value in given.items() if name not in url.query}


@contextmanager
def transaction(database: Database) -> Iterator[Session]:
    """A session that commits at the end of the block, or rolls back when the block raises."""
    with Session(database, expire_on_commit=False) as session, session.begin():
        yield session


def _alembic_config(database: Database) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database"] = database
    return config


def migrate(database: Database, to: str = "head") -> None:
    """Bring the database to the newest schema, or to a revision. Safe to call from several processes at once.

    A schema that a newer version made is left as it is: both versions run while an upgrade is rolled out, or back.
    """
    revision = _revision(database)
    if _is_newer(revision):
        log.warning("the database's schema is newer than this version of the service")
    elif to != "head" or revision != _known().head:
        command.upgrade(_alembic_config(database), to)


def schema_is_current(database: Database) -> bool:
    """Whether every migration of this version has been applied, be it by a newer one."""
    revision = _revision(database)
    return revision == _known().head or _is_newer(revision)


class _Known(NamedTuple):
    """What this version knows of revisions: the newest, and all."""

    head: str | None
    all: frozenset[str]


@cache
def _known() -> _Known:
    """Read once: every migration is a file, and health checks ask every few seconds."""
    directory = ScriptDirectory(str(MIGRATIONS))
    return _Known(directory.get_current_head(), frozenset(script.revision for script in directory.walk_revisions()))


def _revision(database: Database) -> str | None:
    with database.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _is_newer(revision: str | None) -> bool:
    """Whether the schema's revision is none that this version knows."""
    return revision is not None and revision not in _known().all
