from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PDTRIM_{name.upper()}", raising=False)


def test_with_nothing_set_everything_lies_in_one_folder(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    places = (settings.database_url, settings.broker_url, settings.artifacts_url, str(settings.scratch_dir))
    assert all(str(tmp_path) in place for place in places)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_without_a_key_the_gateway_listens_on_this_machine_only(host: str) -> None:
    assert Settings(host=host).binds_loopback
    with pytest.raises(ValidationError, match="PDTRIM_API_KEY"):
        Settings(host="0.0.0.0")
    assert not Settings(host="gateway.internal", api_key="a-long-secret").binds_loopback  # type: ignore[arg-type]


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
