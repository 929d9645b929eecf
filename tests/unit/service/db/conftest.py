from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from service.db.session import connect, migrate


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A migrated, empty database of each kind that is supported."""
    sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/jobs.db" if sqlite else request.getfixturevalue("postgres_database_url")
    engine = connect(url)
    migrate(engine)
    yield engine
    engine.dispose()
