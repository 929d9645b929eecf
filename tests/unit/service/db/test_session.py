from __future__ import annotations

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.db import session
from service.db.session import connect


def test_nobody_waits_for_a_lock_or_holds_one_for_ever(postgres_database_url: str) -> None:
    database = connect(postgres_database_url)
    own = connect(f"{postgres_database_url}?options=-c%20lock_timeout%3D1min")
    with database.connect() as connection, own.connect() as other:
        assert connection.execute(text("SHOW lock_timeout")).scalar() == "10s"
        assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar() == "30s"
        assert other.execute(text("SHOW lock_timeout")).scalar() == "1min"
    database.dispose()
    own.dispose()


def backend(database: Database) -> int:
    with database.connect() as connection:
        return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def end(database: Database, pid: int) -> None:
    with database.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


def test_a_connection_that_ended_while_it_was_idle_is_replaced(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, other = connect(postgres_database_url), connect(postgres_database_url)
    monkeypatch.setattr(session, "IDLE_SECONDS", 0.0)
    first = backend(database)
    end(other, first)
    assert backend(database) != first
    database.dispose()
    other.dispose()


def test_a_connection_that_ended_just_after_its_use_fails_one_transaction(postgres_database_url: str) -> None:
    database, other = connect(postgres_database_url), connect(postgres_database_url)
    first = backend(database)
    end(other, first)
    with pytest.raises(OperationalError):
        backend(database)
    assert backend(database) != first
    database.dispose()
    other.dispose()
