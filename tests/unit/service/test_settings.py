from __future__ import annotations

from pathlib import Path

import pytest
import typer
from pydantic import ValidationError

from pdtrim.contract.access import Quotas, Scope
from service import queue
from service.commands.run import configured
from service.db.session import connect, migrate
from service.settings import Settings


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PDTRIM_{name.upper()}", raising=False)


def test_with_nothing_set_everything_lies_in_one_folder(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    places = (settings.database_url, settings.broker_url, settings.artifacts_url, str(settings.scratch_dir))
    assert all(str(tmp_path) in place for place in places)


@pytest.mark.parametrize("name", ["a%40b", "a?b#c", "a b", "ä@b:c", "a%b"])
def test_the_data_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / name)
    database = connect(settings.database_url)
    migrate(database)
    database.dispose()
    queue.check(settings)

    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in (tmp_path / name).iterdir()} == {"pdtrim.db", "broker"}


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_name_of_postgresql_is_understood(scheme: str) -> None:
    url = Settings(database_url=f"{scheme}://u:p%40@h:5433/n?sslmode=require").database_url
    assert url == "postgresql+psycopg://u:p%40@h:5433/n?sslmode=require"


@pytest.mark.parametrize("url", ["mysql://u:secret@h/n", "postgresql+asyncpg://h/n", "h/n", "postgres:h/n", "://"])
def test_an_address_of_no_database_that_we_can_use_is_refused_in_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDTRIM_DATABASE_URL", url)
    with pytest.raises(typer.Exit):
        configured()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "PDTRIM_DATABASE_URL: give postgresql://user:password@host/name" in line
    assert "secret" not in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_without_a_key_the_gateway_listens_on_this_machine_only(host: str) -> None:
    assert Settings(host=host).binds_loopback
    with pytest.raises(ValidationError, match="PDTRIM_API_KEY"):
        Settings(host="0.0.0.0")
    assert not Settings(host="gateway.internal", api_key="a-long-secret").binds_loopback


def test_the_environment_is_read_and_a_source_that_could_match_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PDTRIM_ALLOWED_SOURCES", '["hf://meta-llama", "s3://models/"]')
    assert Settings().allowed_sources == ["hf://meta-llama", "s3://models/"]
    monkeypatch.setenv("PDTRIM_ALLOWED_SOURCES", '["/models"]')
    with pytest.raises(ValidationError, match="neither reference nor begins with"):
        Settings()


def test_finished_jobs_stay_unless_a_retention_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().retention_days is None
    monkeypatch.setenv("PDTRIM_RETENTION_DAYS", "0.5")
    assert Settings().retention_days == 0.5
    monkeypatch.setenv("PDTRIM_RETENTION_DAYS", "0")
    with pytest.raises(ValidationError, match="retention_days"):
        Settings()


@pytest.mark.parametrize(
    "rate", ["100", "0/minute", "10/fortnight", "10 per minute", "-1/second", "10/minute; 1/second"]
)
def test_a_rate_is_a_number_and_a_time(rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(rate_limit="none", failed_auth_limit="5/day").failed_auth_limit == "5/day"
    monkeypatch.setenv("PDTRIM_RATE_LIMIT", rate)
    with pytest.raises(ValidationError, match="rate_limit"):
        Settings()


def test_quotas_are_any_amount_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().quotas == Quotas()
    monkeypatch.setenv("PDTRIM_MAX_RUNNING_JOBS", "3")
    assert Settings().quotas == Quotas(max_running_jobs=3)


@pytest.mark.parametrize(
    ("issuer", "audience", "reason"),
    [
        ("https://login.example.com", None, "PDTRIM_OIDC_AUDIENCE"),
        ("http://login.example.com", "pdtrim", "https://"),
        ("login.example.com", "pdtrim", "https://"),
    ],
)
def test_an_issuer_cannot_be_forged_and_needs_an_audience(issuer: str, audience: str | None, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Settings(oidc_issuer=issuer, oidc_audience=audience)


def test_an_issuer_lets_the_gateway_listen_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTRIM_OIDC_ISSUER", "https://login.example.com/realms/ml")
    monkeypatch.setenv("PDTRIM_OIDC_AUDIENCE", "pdtrim")
    monkeypatch.setenv("PDTRIM_OIDC_SCOPES", '{"viewer": "read"}')

    assert Settings(host="0.0.0.0").oidc_scopes == {"viewer": Scope.READ}
