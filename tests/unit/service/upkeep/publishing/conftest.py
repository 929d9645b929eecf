from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings
from tests.gateway import gateway, model

__all__ = ["gateway", "gateway_settings", "model"]


@pytest.fixture
def gateway_settings(tmp_path: Path) -> Settings:
    """Everything in one folder: SQLite, messages as files, artifacts as files."""
    return Settings(
        data_dir=tmp_path / "data", allowed_sources=["reference", "builtin:", (tmp_path / "models").as_uri()]
    )
