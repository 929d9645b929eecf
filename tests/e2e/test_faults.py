"""Delivery through faults: the short fault run, and the reconciler as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.db.session import connect, migrate
from tests.faults.cluster import ROOT
from tests.processes import running, wait_until


@pytest.mark.process
@pytest.mark.server
def test_jobs_through_faults_of_every_kind_end_as_they_have_to_and_nothing_is_lost_or_doubled(
    record_property: Callable[[str, object], None],
) -> None:
    """The script checks; `make faults` runs more than ten times as much. Fewer faults would leave a kind out."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", "--jobs", "12", "--faults", "19", "--seed", "0"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    record_property("Jobs through faults", done.stdout.strip().splitlines()[-1])


def test_the_reconciler_waits_for_its_database_and_ends_when_it_is_told_to(
    environment: dict[str, str], tmp_path: Path
) -> None:
    log, data_dir = tmp_path / "reconciler.log", Path(environment["PDTRIM_DATA_DIR"])
    with running(["reconcile"], environment | {"PDTRIM_RECONCILE_SECONDS": "0.1"}, log) as reconciler:
        wait_until(lambda: "the reconciler failed" in log.read_text(), what="the reconciler to miss its tables")
        database = connect(f"sqlite:///{data_dir / 'pdtrim.db'}")
        migrate(database)
        database.dispose()
        wait_until(lambda: "the reconciler works again" in log.read_text(), what="the reconciler to find its tables")
        reconciler.send_signal(signal.SIGTERM)
        assert reconciler.wait(10) == 0
