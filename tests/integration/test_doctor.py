"""`pdtrim doctor` on real servers: what it finds in order, and what it finds wrong."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdtrim.command import app
from service.commands.installation import examine
from service.settings import Settings
from tests.servers import S3Server, free_ports

BEFORE_DEVICE = 5
"""Checks that ask no torch, which takes seconds to import."""


def test_an_installation_in_order_has_nothing_wrong(
    tmp_path: Path, postgres_database_url: str, redis_url: str, s3: S3Server, s3_url: str
) -> None:
    named = {
        "PDTRIM_DATA_DIR": str(tmp_path),
        "PDTRIM_DATABASE_URL": postgres_database_url,
        "PDTRIM_BROKER_URL": redis_url,
        "PDTRIM_ARTIFACTS_URL": s3_url,
        "PDTRIM_S3_ENDPOINT_URL": s3.endpoint_url,
    }

    done = CliRunner().invoke(app, ["doctor", "--json"], env=named | s3.environment)

    found = {one["check"]: one for one in json.loads(done.output)}
    assert (done.exit_code, [one for one in found.values() if one["status"] == "wrong"]) == (0, [])
    assert list(found) == ["versions", "database", "migrations", "broker", "store", "device", "scratch"]
    assert {found[name]["status"] for name in ("versions", "database", "migrations", "broker", "store")} == {"ok"}
    assert "torch" in found["device"]["detail"]


def test_each_thing_that_is_wrong_comes_with_what_to_do(
    tmp_path: Path,
    empty_postgres_database_url: str,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings(
        data_dir=tmp_path,
        database_url=empty_postgres_database_url,
        broker_url=f"redis://:broker-password@127.0.0.1:{free_ports(1)[0]}/0",
        artifacts_url="s3://no-such-bucket",
        s3_endpoint_url=s3.endpoint_url,
    )

    found = {one.check: one for one in islice(examine(settings), BEFORE_DEVICE)}

    assert [name for name, one in found.items() if one.status == "wrong"] == ["migrations", "broker", "store"]
    assert found["migrations"].remedy.startswith("pdtrim migrate")
    assert "PDTRIM_BROKER_URL" in found["broker"].remedy
    assert "broker-password" not in found["broker"].detail
    assert "Create the bucket" in found["store"].remedy


def test_a_database_that_is_away_is_told_from_a_schema_that_is_old(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    settings = Settings(data_dir=tmp_path, database_url=f"postgresql+psycopg://me:pass-word@127.0.0.1:{port}/jobs")

    _, database, migrations = islice(examine(settings), 3)

    assert (database.status, migrations.status) == ("wrong", "wrong")
    assert "PDTRIM_DATABASE_URL" in database.remedy
    assert "pass-word" not in database.detail + migrations.detail


def test_what_the_first_start_makes_is_neither_missed_nor_made(tmp_path: Path) -> None:
    data = tmp_path / "data"

    found = list(islice(examine(Settings(data_dir=data)), BEFORE_DEVICE))

    assert [one.status for one in found] == ["ok", "note", "note", "note", "note"]
    assert not data.exists()
