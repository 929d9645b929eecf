from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine as Database

from service.db.session import connect
from tests import databases


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated, empty database of each kind that is supported."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/jobs.db"
        databases.provide(url)
    else:
        url = request.getfixturevalue("postgres_database_url")
    database = connect(url)
    yield database
    database.dispose()
