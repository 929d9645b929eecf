"""A whole job over HTTP on a model larger than its worker may take: the most that was resident in each stage.

    python -m benchmarks.large_job --blocks 30 --gigabytes 1.8

The embedded service (`pdtrim up`) with `PDTRIM_MEMORY_BYTES`, in a temporary folder; the random bfloat16 Llama of
`large.py` in five shards, and the reference model's tokenizer; scoring, greedy removal, healing by adapters for a few
steps, export, evaluation. Linux is asked for the most memory that was resident in each process of the service, mapped
files included, from the beginning of a stage to its end. Takes about ten times the model's size of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.large import write_model
from pdtrim.client import Client
from pdtrim.contract.jobs import Job, JobStatus, StageStatus
from pdtrim.contract.results import EvaluationResult
from pdtrim.display.tables import models_table
from tests.processes import processes_of, running, wait_until

TOKENIZER = Path(__file__).parents[1] / "workers" / "reference_model"
POLL_S = 0.3
PATIENCE_S = 4 * 3600


def specification(model: Path, steps: int) -> dict[str, Any]:
    """A job of every stage on few and short windows."""
    return {
        "model": model.as_uri(),
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": 2},
        "data": {"source": "builtin:stdlib"},
        "calibration": {"windows": 2, "window_tokens": 32, "copying": 0.0},
        "search": {"algorithm": "greedy"},
        "distillation": {
            "trainable": "lora",
            "lora": {"rank": 8, "alpha": 16},
            "heal_tokens": 2 * 32 * steps,
            "batch_windows": 2,
        },
        "evaluation": {"windows": 4, "speed_tokens": 2, "speed_repeats": 1},
    }


def most_resident(process: psutil.Process) -> int:
    """Bytes that were resident at most since the count was last begun anew."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def begin_anew(process: psutil.Process) -> None:
    """Count from what is resident now."""
    with suppress(OSError):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def watched(client: Client, job_id: str, data_dir: Path) -> Iterator[tuple[Job, int]]:
    """The job as it goes on, and the most bytes that any process of the service held since the last time."""
    while True:
        processes = processes_of("", data_dir)
        job = client.get(job_id)
        most = 0
        for process in processes:
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                most = max(most, most_resident(process))
                begin_anew(process)
        yield job, most
        if job.status.final:
            return
        time.sleep(POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--gigabytes", type=float, default=1.8, help="what a worker may take")
    parser.add_argument("--steps", type=int, default=3, help="of healing, for each half")
    parser.add_argument("--port", type=int, default=21200)
    parser.add_argument("--folder", type=Path, help="where to work, in place of a temporary folder")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        write_model(model, args.blocks)
        for path in TOKENIZER.glob("tokenizer*.json"):
            shutil.copyfile(path, model / path.name)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PDTRIM_")} | {
            "PDTRIM_DATA_DIR": str(folder / "data"),
            "PDTRIM_MEMORY_BYTES": str(int(args.gigabytes * 1e9)),
        }
        log = folder / "up.log"
        peaks: dict[str, int] = {}
        with running(["up", "--port", str(args.port)], environment, log):
            wait_until(lambda: log.exists() and "PDTrim Service is up." in log.read_text(), seconds=600)
            with Client(f"http://127.0.0.1:{args.port}") as client:
                job_id = client.create(specification(model, args.steps)).id
                for job, most in watched(client, job_id, folder / "data"):
                    at_work = [stage.name for stage in job.stages if stage.status == StageStatus.RUNNING]
                    for stage in at_work:
                        peaks[stage] = max(peaks.get(stage, 0), most)
        said = log.read_text()

    print(
        f"Source: {size / 1e9:.2f} GB in 5 shards; a worker may take {args.gigabytes} GB. torch {torch.__version__}\n"
    )
    print("| stage | seconds | peak resident MB | way |\n|---|---|---|---|")
    for done in job.stages:
        if done.started_at is not None and done.finished_at is not None:
            seconds = (done.finished_at - done.started_at).total_seconds()
            print(f"| {done.name} | {seconds:.0f} | {peaks.get(done.name, 0) / 1e6:.0f} | {way(done.metrics)} |")
    if job.status != JobStatus.SUCCEEDED:
        raise SystemExit(f"{job.status}: {job.error}\n{said[-4000:]}")
    found = job.result(EvaluationResult)
    assert found is not None
    print()
    for row in models_table(found.models).rows:
        print("| " + " | ".join(row) + " |")


def way(metrics: Any) -> str:
    """How a stage held its models, where its result says so."""
    prefill = getattr(metrics, "prefill", None)
    how = getattr(prefill, "how", None)
    return str(getattr(metrics, "way", None) or getattr(how, "way", None) or "streamed")


if __name__ == "__main__":
    main()
