from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings
from tests.gateway import gateway, model, refusing

__all__ = ["gateway", "gateway_settings", "guarded_settings", "model", "refusing", "refusing_settings"]


@pytest.fixture
def gateway_settings(tmp_path: Path) -> Settings:
    """Everything in one folder: SQLite, messages as files, artifacts as files."""
    return Settings(
        data_dir=tmp_path / "data", allowed_sources=["reference", "builtin:", (tmp_path / "models").as_uri()]
    )


@pytest.fixture(scope="module")
def refusing_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """As for any gateway here, but that its reconciler sleeps: there is nothing to do."""
    folder = tmp_path_factory.mktemp("refusing")
    return Settings(data_dir=folder / "data", allowed_sources=["reference", "builtin:"], reconcile_seconds=3600.0)


@pytest.fixture(scope="module")
def guarded_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """For one gateway that many tests ask, each with keys of projects of its own."""
    return Settings(data_dir=tmp_path_factory.mktemp("guarded") / "data")
