"""SQLite databases with the schema and no rows: copies of one, which are made faster than migrations run."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from service.db.session import connect, migrate


def write_migrated(path: Path) -> None:
    """A database file for `connect`, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_migrated())


@cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "migrated.db"
        engine = connect(f"sqlite:///{path}")
        migrate(engine)
        engine.dispose()  # Which writes what was in the log into the file.
        return path.read_bytes()
