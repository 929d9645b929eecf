"""How long a woken worker takes to find the most urgent stage, on PostgreSQL with a million jobs.

    python -m benchmarks.picking

Of the jobs so many wait, in one project and in many; the others are finished.
"""

from __future__ import annotations

import argparse
import time

from sqlalchemy import Engine as Database
from sqlalchemy import text

from benchmarks.filling import QUEUED_EVERY, fill
from benchmarks.gateways import SPEC
from service.db.session import connect, migrate, transaction
from service.db.tables import JobRow, StageRow
from service.db.urgency import most_urgent
from tests import servers

PICKS = 200
PROJECTS = 97


def have_wait(database: Database, every: int, projects: int) -> int:
    """Have one of so many jobs wait for its first stage, spread over so many projects; returns how many wait."""
    number = "('x' || right(id, 8))::bit(32)::int"
    with database.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        waiting = connection.execute(
            text(
                f"UPDATE jobs SET project = 'project-' || {number} % {projects}, status = 'queued', started_at = NULL, "
                f"finished_at = NULL WHERE {number} % {every} = 0 RETURNING id"
            )
        ).scalars()
        connection.execute(
            text("UPDATE stages SET status = 'queued', sent_at = now() WHERE position = 0 AND job_id = ANY(:ids)"),
            {"ids": list(waiting)},
        )
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
        return int(connection.execute(text("SELECT count(*) FROM stages WHERE status = 'queued'")).scalar_one())


def pick_ms(database: Database) -> list[float]:
    """Milliseconds of each of some picks, a transaction each, in ascending order."""
    took = []
    for _ in range(PICKS):
        began = time.perf_counter()
        with transaction(database) as session:
            assert most_urgent(session, ["default"], max_running_jobs=10**6) is not None
        took.append(1000 * (time.perf_counter() - began))
    return sorted(took)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10**6)
    count = parser.parse_args().jobs
    with servers.postgres() as url:
        database = connect(url)
        migrate(database)
        fill(database, SPEC, count=count, project="serving", tables=(JobRow, StageRow))
        print("| jobs | of them waiting | projects | median ms | p99 ms |\n|---|---|---|---|---|", flush=True)
        for every, projects in ((QUEUED_EVERY, 1), (QUEUED_EVERY, PROJECTS), (QUEUED_EVERY // 10, PROJECTS)):
            waiting = have_wait(database, every, projects)
            took = pick_ms(database)
            print(f"| {count:,} | {waiting:,} | {projects} | {took[PICKS // 2]:.1f} | {took[-3]:.1f} |", flush=True)
        database.dispose()


if __name__ == "__main__":
    main()
