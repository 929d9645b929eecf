from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from service.db.session import connect
from tests.databases import write_migrated


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A migrated, empty database of each kind that is supported."""
    if request.param == "sqlite":
        write_migrated(tmp_path / "jobs.db")
        engine = connect(f"sqlite:///{tmp_path}/jobs.db")
    else:
        engine = connect(request.getfixturevalue("postgres_database_url"))
    yield engine
    engine.dispose()
