"""One search, unbroken and with its worker killed: `python -m tests.faults.killed_plan KILLS SEED`.

Exits with 1 when the plan or what the search recorded is not, byte for byte, that of the unbroken run.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from pdtrim.client import Client
from pdtrim.contract.jobs import JobStatus, StageName
from tests.processes import processes_of, running, wait_until
from tests.servers import free_ports

PRODUCTS = ("plan.json", "search.json")
SHORT = {"PDTRIM_LEASE_SECONDS": "3", "PDTRIM_RECONCILE_SECONDS": "0.5", "PDTRIM_RESEND_SECONDS": "1"}
MOST_SECONDS = 1800.0


def _environment(data_dir: Path, kills: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PDTRIM_", "AWS_"))}
    attempts = {"PDTRIM_MAX_ATTEMPTS": str(kills + 2)}
    return kept | SHORT | attempts | {"PDTRIM_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}


def _products(client: Client, job_id: str) -> dict[str, str]:
    """SHA-256 of what the removal stage recorded."""
    found = {a.name: a.sha256 for a in client.artifacts(job_id) if a.stage == StageName.REMOVAL}
    return {name: found[name] for name in PRODUCTS}


def _kill_while_searching(
    client: Client, job_id: str, environment: dict[str, str], folder: Path, kills: int, rng: random.Random
) -> None:
    """Start a worker for each of the first attempts at the search, and kill all its processes."""
    for attempt in range(1, kills + 1):

        def begun(attempt: int = attempt) -> bool:
            return client.get(job_id).stages[1].attempt >= attempt

        with running(["worker"], environment, folder / "worker.log"):
            wait_until(begun, seconds=MOST_SECONDS, what=f"attempt {attempt} at the search")
            time.sleep(rng.uniform(0.0, 15.0))
            for process in processes_of("celery", folder / "data"):
                process.kill()


def _end(client: Client, job_id: str, environment: dict[str, str], folder: Path) -> None:
    """Have a worker bring a job to its end."""
    with running(["worker"], environment, folder / "worker.log"):
        wait_until(lambda: client.get(job_id).status.final, seconds=MOST_SECONDS, what="the job to end")


def main(kills: int, seed: int) -> int:
    """Prints how the two runs compare."""
    with tempfile.TemporaryDirectory(prefix="pdtrim-killed-") as name:
        folder = Path(name)
        data_dir = folder / "data"
        spec = {
            "model": "reference",
            "prefill": {"remove_blocks": 3},
            "decode": {"remove_blocks": 5},
            "calibration": {"windows": 48},
            "distillation": {"enabled": False},
            "evaluation": {"windows": 2, "speed_tokens": 1, "speed_repeats": 1},
            "seed": seed,
        }
        (port,) = free_ports(1)
        environment = _environment(data_dir, kills) | {"PDTRIM_PORT": str(port)}
        url = f"http://127.0.0.1:{port}"
        with running(["gateway"], environment, folder / "gateway.log"), Client(url) as client:
            wait_until(client.ready, what="the gateway to be ready")
            unbroken = client.create(spec).id
            _end(client, unbroken, environment, folder)
            killed = client.create(spec).id
            _kill_while_searching(client, killed, environment, folder, kills, random.Random(seed))
            _end(client, killed, environment, folder)
            jobs = [client.get(unbroken), client.get(killed)]
            same = _products(client, unbroken) == _products(client, killed)
        attempts = [job.stages[1].attempt for job in jobs]
        ended = all(job.status == JobStatus.SUCCEEDED for job in jobs)
        print(f"attempts at the search: unbroken {attempts[0]}, killed {attempts[1]}; same bytes: {same}")
        return 0 if same and ended and attempts[1] > kills else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
