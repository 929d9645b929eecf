"""SQLite databases with the schema and no rows: copies of one, which are made faster than migrations run."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from sqlalchemy import make_url

from service.db.session import connect, migrate


def provide(url: str) -> None:
    """Make sure that there is a database at `url`, where that is a file of SQLite's."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and not (path := Path(parsed.database)).exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_migrated())


@cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "migrated.db"
        database = connect(f"sqlite:///{path}")
        migrate(database)
        database.dispose()  # Which writes what was in the log into the file.
        return path.read_bytes()
