"""Alembic's entry point: runs the migrations on the database that the caller hands over."""

from alembic import context
from sqlalchemy import text
from sqlmodel import SQLModel

import service.db.tables  # noqa: F401  (registers the tables with SQLModel.metadata)
from service.db.session import connect
from service.settings import Settings

# Any constant will do; it only has to be the same in every process that migrates.
LOCK_NUMBER = 7_364_401

database = context.config.attributes.get("database") or connect(Settings().database_url)
with database.connect() as connection:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Whoever migrates may take its time; and so may a migration that waits for a table.
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": LOCK_NUMBER})
        context.run_migrations()
    connection.commit()
