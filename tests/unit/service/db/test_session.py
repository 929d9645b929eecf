from __future__ import annotations

from sqlalchemy import text

from service.db.session import connect


def test_nobody_waits_for_a_lock_or_holds_one_for_ever(postgres_database_url: str) -> None:
    engine = connect(postgres_database_url)
    own = connect(f"{postgres_database_url}?options=-c%20lock_timeout%3D1min")
    with engine.connect() as connection, own.connect() as other:
        assert connection.execute(text("SHOW lock_timeout")).scalar() == "10s"
        assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar() == "30s"
        assert other.execute(text("SHOW lock_timeout")).scalar() == "1min"
    engine.dispose()
    own.dispose()
