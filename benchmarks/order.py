"""When each of some equal jobs ended that were submitted at once to a service with one worker.

    python -m benchmarks.order

The embedded service, real stages on a tiny model. One job goes before, so that the first that counts finds all loaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from service.commands.embedded import Embedded
from service.settings import Settings
from tests.tiny_job import tiny_spec, write_tiny_model


def ended_after(folder: Path, count: int) -> list[float]:
    """Seconds from the first of `count` submissions to the end of each job, in the order of submission."""
    spec = tiny_spec(write_tiny_model(folder / "model"))
    settings = Settings(data_dir=folder / "data", port=0)
    with Embedded(settings, folder, print) as service, service.client() as client:
        client.wait(client.create(spec).id)
        submitted_at = time.time()
        job_ids = [client.create(spec).id for _ in range(count)]
        jobs = [client.wait(job_id) for job_id in job_ids]
    return [job.finished_at.timestamp() - submitted_at for job in jobs if job.finished_at is not None]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6)
    count = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder:
        seconds = ended_after(Path(folder), count)
    print("| job | ended after s | of the last's time |\n|---|---|---|")
    for number, took in enumerate(seconds, 1):
        print(f"| {number} | {took:.1f} | {took / max(seconds):.2f} |")


if __name__ == "__main__":
    main()
