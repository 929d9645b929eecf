"""API keys, on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import text

from pdtrim.contract.access import Scope
from service.db import keys
from service.db.session import transaction
from service.db.tables import now


def create(database: Database, **changes: object) -> str:
    given = {"project": "ours", "name": "ci", "scopes": {Scope.SUBMIT, Scope.READ}, **changes}
    with transaction(database) as session:
        return keys.create(session, **given)[1]  # type: ignore[arg-type]


def opens(database: Database, key: str) -> bool:
    with transaction(database) as session:
        return keys.valid(session, key) is not None


def test_a_key_opens_its_project_and_its_secret_is_nowhere_in_the_database(database: Database) -> None:
    key = create(database)

    with transaction(database) as session:
        row = keys.valid(session, key)
        assert row is not None
        assert (row.project, row.name, row.scopes) == ("ours", "ci", ["read", "submit"])
    with database.connect() as connection:
        stored = str(connection.execute(text("SELECT * FROM api_keys")).all())
    assert key.rpartition("_")[2] not in stored


def test_keys_are_random(database: Database) -> None:
    assert len({part for _ in range(20) for part in create(database).split("_")[1:]}) == 40


def test_a_key_closes_when_it_expires_or_is_revoked(database: Database) -> None:
    lasting = create(database, expires_at=now() + timedelta(hours=1))
    expired = create(database, expires_at=now() - timedelta(seconds=1))
    revoked = create(database)
    with transaction(database) as session:
        first = keys.revoke(session, revoked.split("_")[1]).revoked_at
    with transaction(database) as session:
        assert keys.revoke(session, revoked.split("_")[1]).revoked_at == first

    assert [opens(database, key) for key in (lasting, expired, revoked)] == [True, False, False]


def test_another_secret_with_the_same_prefix_does_not_open(database: Database) -> None:
    one, other = create(database), create(database)

    assert not opens(database, one.rpartition("_")[0] + "_" + other.rpartition("_")[2])


def test_keys_are_listed_by_project_and_unknown_ones_are_named(database: Database) -> None:
    with transaction(database) as session:
        assert not keys.exist(session)
    ours, theirs = create(database), create(database, project="theirs")

    with transaction(database) as session:
        assert keys.exist(session)
        assert [row.prefix for row in keys.every(session)] == [key.split("_")[1] for key in (ours, theirs)]
        assert [row.prefix for row in keys.every(session, "theirs")] == [theirs.split("_")[1]]
        with pytest.raises(keys.NoSuchKey, match="nowhere"):
            keys.revoke(session, "nowhere")
