"""`pdtrim keys` on a database, and the gateway that then opens to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdtrim.client import Client, ServiceError
from pdtrim.command import app
from service.commands.keys import COMMANDS
from service.db.session import connect, migrate
from service.settings import Settings
from tests.gateway import model
from tests.live_gateway import live

__all__ = ["model"]

Keys = Callable[..., Result]


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])


@pytest.fixture
def pdtrim_keys(settings: Settings) -> Keys:
    environment = {"PDTRIM_DATABASE_URL": settings.database_url, "COLUMNS": "200"}
    return lambda *arguments: CliRunner().invoke(app, ["keys", *arguments], env=environment)


def test_every_command_teaches_with_an_example() -> None:
    for name in COMMANDS:
        assert f"pdtrim keys {name}" in CliRunner().invoke(app, ["keys", name, "--help"]).output.split("Example:")[1]


def test_a_key_is_made_used_listed_and_revoked(settings: Settings, model: Path, pdtrim_keys: Keys) -> None:
    with live(settings, model) as gateway:
        made = json.loads(pdtrim_keys("create", "ci", "--project", "serving", "--expires-days", "9", "--json").output)
        with Client(gateway.url, api_key=made["key"]) as client:
            job = client.create(gateway.played.spec)
            listed = [json.loads(line) for line in pdtrim_keys("list", "--json").output.splitlines()]
            assert [one.id for one in client.page().data] == [job.id]

            revoked = json.loads(pdtrim_keys("revoke", made["prefix"], "--json").output)
            with pytest.raises(ServiceError, match="API key"):
                client.page()

    assert listed == [{name: value for name, value in made.items() if name != "key"}]
    assert (made["project"], made["scopes"], made["revoked_at"]) == ("serving", ["read", "submit"], None)
    assert made["key"].startswith(f"pdt_{made['prefix']}_")
    assert revoked["revoked_at"] is not None


def test_people_see_the_key_once_and_then_a_table(settings: Settings, pdtrim_keys: Keys) -> None:
    migrate(connect(settings.database_url))

    key = pdtrim_keys("create", "[bold]ci", "--scope", "admin").output.strip()
    table = pdtrim_keys("list", "--project", "default").output
    closed = pdtrim_keys("revoke", key.split("_")[1])

    assert all(part in table for part in (key.split("_")[1], "[bold]ci", "admin"))
    assert key.split("_")[2] not in table
    assert "opens nothing" in closed.output


def test_a_keys_own_limits_are_kept_and_shown(settings: Settings, pdtrim_keys: Keys) -> None:
    migrate(connect(settings.database_url))
    limits = ["--rate-limit", "100/minute", "--max-running-jobs", "2", "--max-queued-jobs", "10"]

    made = json.loads(pdtrim_keys("create", "ci", *limits, "--max-artifact-bytes", "5000000000", "--json").output)
    free = json.loads(pdtrim_keys("create", "free", "--rate-limit", "none", "--json").output)
    plain = json.loads(pdtrim_keys("create", "plain", "--json").output)
    listed = [json.loads(line) for line in pdtrim_keys("list", "--json").output.splitlines()]
    table = pdtrim_keys("list").output

    names = ("rate_limit", "max_running_jobs", "max_queued_jobs", "max_artifact_bytes")
    assert [[one[name] for name in names] for one in (made, free, plain)] == [
        ["100/minute", 2, 10, 5_000_000_000],
        ["none", None, None, None],
        [None] * 4,
    ]
    assert [one["rate_limit"] for one in listed] == ["100/minute", "none", None]
    for limit in ("100/minute", "2 running", "10 queued", "5.0 GB"):
        assert limit in table


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", "ci", "--project", "No Such"], 2, "is no project"),
        (["create", ""], 2, "1 to 128 printable"),
        (["create", "ci", "--expires-days", "0"], 2, "expires-days"),
        (["create", "ci", "--rate-limit", "100"], 2, "looks like 100/minute"),
        (["create", "ci", "--rate-limit", "0/minute"], 2, "looks like 100/minute"),
        (["create", "ci", "--max-running-jobs", "0"], 2, "max-running-jobs"),
        (["create", "ci", "--max-queued-jobs", "9" * 10], 2, "max-queued-jobs"),
        (["create", "ci", "--max-artifact-bytes", "9" * 20], 2, "max-artifact-bytes"),
        (["revoke", "nowhere"], 1, "no key has the prefix"),
    ],
)
def test_what_is_wrong_is_named(
    arguments: list[str], code: int, message: str, settings: Settings, pdtrim_keys: Keys
) -> None:
    migrate(connect(settings.database_url))

    refused = pdtrim_keys(*arguments)

    assert (refused.exit_code, message in refused.output) == (code, True), refused.output


def test_a_database_without_the_tables_is_named(pdtrim_keys: Keys) -> None:
    refused = pdtrim_keys("list")

    assert (refused.exit_code, "pdtrim migrate" in refused.output) == (1, True)
