"""API keys, on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Engine, text

from pdtrim.contract.access import Scope
from service.db import keys
from service.db.session import transaction
from service.db.tables import now


def create(engine: Engine, **changes: object) -> str:
    given = {"project": "ours", "name": "ci", "scopes": {Scope.SUBMIT, Scope.READ}, **changes}
    with transaction(engine) as session:
        return keys.create(session, **given)[1]  # type: ignore[arg-type]


def opens(engine: Engine, key: str) -> bool:
    with transaction(engine) as session:
        return keys.valid(session, key) is not None


def test_a_key_opens_its_project_and_its_secret_is_nowhere_in_the_database(engine: Engine) -> None:
    key = create(engine)

    with transaction(engine) as session:
        row = keys.valid(session, key)
        assert row is not None
        assert (row.project, row.name, row.scopes) == ("ours", "ci", ["read", "submit"])
    with engine.connect() as connection:
        stored = str(connection.execute(text("SELECT * FROM api_keys")).all())
    assert key.rpartition("_")[2] not in stored


def test_keys_are_random(engine: Engine) -> None:
    assert len({part for _ in range(20) for part in create(engine).split("_")[1:]}) == 40


def test_a_key_closes_when_it_expires_or_is_revoked(engine: Engine) -> None:
    lasting = create(engine, expires_at=now() + timedelta(hours=1))
    expired = create(engine, expires_at=now() - timedelta(seconds=1))
    revoked = create(engine)
    with transaction(engine) as session:
        first = keys.revoke(session, revoked.split("_")[1]).revoked_at
    with transaction(engine) as session:
        assert keys.revoke(session, revoked.split("_")[1]).revoked_at == first

    assert [opens(engine, key) for key in (lasting, expired, revoked)] == [True, False, False]


def test_another_secret_with_the_same_prefix_does_not_open(engine: Engine) -> None:
    one, other = create(engine), create(engine)

    assert not opens(engine, one.rpartition("_")[0] + "_" + other.rpartition("_")[2])


def test_keys_are_listed_by_project_and_unknown_ones_are_named(engine: Engine) -> None:
    with transaction(engine) as session:
        assert not keys.exist(session)
    ours, theirs = create(engine), create(engine, project="theirs")

    with transaction(engine) as session:
        assert keys.exist(session)
        assert [row.prefix for row in keys.every(session)] == [key.split("_")[1] for key in (ours, theirs)]
        assert [row.prefix for row in keys.every(session, "theirs")] == [theirs.split("_")[1]]
        with pytest.raises(keys.NoSuchKey, match="nowhere"):
            keys.revoke(session, "nowhere")
