"""`pdtrim ping`, by which a cluster asks whether a worker lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.processes import running, wait_until


def ping(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdtrim.command", "ping"]
    return subprocess.run(command, env=environment, cwd=folder, check=False, capture_output=True, text=True)


def test_a_ping_tells_a_worker_that_answers_from_none(
    environment: dict[str, str], empty_redis_url: str, tmp_path: Path
) -> None:
    environment = environment | {"PDTRIM_BROKER_URL": empty_redis_url}
    log = tmp_path / "worker.log"
    with running(["worker"], environment, log):
        # Asking costs seconds, and a worker takes some to start.
        wait_until(lambda: "ready" in log.read_text(), what="the worker to start")
        wait_until(lambda: ping(environment, tmp_path).returncode == 0, what="the worker to answer")
    gone = ping(environment, tmp_path)
    assert (gone.returncode, "no worker on" in gone.stderr) == (1, True)


def test_a_ping_forgives_a_broker_that_is_away(environment: dict[str, str], tmp_path: Path) -> None:
    done = ping(environment | {"PDTRIM_BROKER_URL": "redis://127.0.0.1:1/0"}, tmp_path)
    assert (done.returncode, "out of reach" in done.stdout + done.stderr) == (0, True)
