"""The commands that run the service, or parts of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError
from rich.panel import Panel

from service.cli.connection import console, fail
from service.cli.display import job_page
from service.cli.jobs import fetch, follow
from service.client import Client
from service.contract.jobs import JobStatus
from service.db.session import connect
from service.db.session import migrate as migrate_database
from service.embedded import Embedded, EmbeddedFailure
from service.queue import QUEUE
from service.settings import Settings

DataDir = Annotated[Path, typer.Option("--data-dir", envvar="PDTRIM_DATA_DIR", help="Folder that keeps everything.")]
DEMO_SPEC = {
    "model": "reference",
    "prefill": {"remove_blocks": 2},
    "decode": {"remove_blocks": 4},
    "calibration": {"windows": 16, "window_tokens": 128},
    "search": {"evaluations": 60},
    "distillation": {"heal_tokens": 40_960, "merge_tokens": 8192, "threshold": 0.965},
    "metadata": {"made-by": "pdtrim demo"},
}


def _settings(**overrides: object) -> Settings:
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        fail("; ".join(f"PDTRIM_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()))
        raise


def serve() -> None:
    """Run the gateway alone, on PDTRIM_HOST and PDTRIM_PORT; workers run elsewhere.

    Example: `PDTRIM_DATABASE_URL=postgresql+psycopg://… PDTRIM_BROKER_URL=redis://… pdtrim serve`
    """
    from service.app import create_app

    settings = _settings()
    # Open event streams would hold up a stop for ever; clients take them up again elsewhere.
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port, timeout_graceful_shutdown=2)


def worker() -> None:
    """Run one worker: it takes one stage at a time, on the GPU if there is one.

    Example: `PDTRIM_DATABASE_URL=… PDTRIM_BROKER_URL=… PDTRIM_ARTIFACTS_URL=… pdtrim worker`
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        fail("this installation has no worker: pip install 'pdtrim-service[worker]'")
    _settings()
    options = ["--concurrency=1", "--pool=prefork", f"--queues={QUEUE}", "--without-gossip", "--without-mingle"]
    command = [sys.executable, "-m", "celery", "-A", "workers.tasks", "worker", "--loglevel=INFO", *options]
    os.execv(sys.executable, command)


def migrate() -> None:
    """Bring the database to the newest schema; the gateway does the same when it starts.

    Example: `PDTRIM_DATABASE_URL=postgresql+psycopg://… pdtrim migrate`
    """
    migrate_database(connect(_settings().database_url))
    console.print("The database's schema is current.")


def up(
    port: Annotated[int, typer.Option(envvar="PDTRIM_PORT", help="Port of the gateway.")] = 8000,
    data_dir: DataDir = Path("pdtrim-data"),
) -> None:
    """Run the whole service here: gateway, worker, SQLite and a folder of artifacts. Ctrl-C stops it.

    Jobs may name files below the current folder. Example: `pdtrim up --port 8080`
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    settings = _settings(port=port, data_dir=data_dir)
    try:
        with Embedded(settings, Path.cwd()) as service:
            console.print(
                Panel(
                    f"Service    {service.url}\nInterface  {service.url}/docs\nLogs       {service.logs}\n\n"
                    f"In another shell:  pdtrim submit job.yaml --watch --url {service.url}\nCtrl-C stops it.",
                    title="PDTrim Service is up",
                    title_align="left",
                    expand=False,
                ),
                highlight=False,
            )
            while True:
                service.supervise(console.print)
                time.sleep(0.5)
    except EmbeddedFailure as error:
        fail(str(error))
    except KeyboardInterrupt:
        console.print("Stopped. Jobs that were running go on with the next `pdtrim up`.")


def demo(data_dir: DataDir = Path("pdtrim-data")) -> None:
    """Prune the reference model once, end to end over HTTP: start the service, submit, watch, report, stop.

    Example: `pdtrim demo`
    """
    settings = _settings(port=_free_port(), data_dir=data_dir)
    try:
        with Embedded(settings, Path.cwd()) as service, Client(service.url) as client:
            console.print(f"The service runs at {service.url} (logs in {service.logs}).", highlight=False)
            job_id = client.create(DEMO_SPEC).id
            console.print(f"Submitted {job_id}: prefill gives up 2 of 12 blocks, decode 4.", highlight=False)
            job = follow(client, job_id)
            console.print(job_page(job))
            if job.status != JobStatus.SUCCEEDED:
                fail(f"the job has {job.status}; the worker's log is {service.logs / 'worker.log'}")
            folder = settings.data_dir / "demo"
            fetch(client, job_id, folder, "")
    except EmbeddedFailure as error:
        fail(str(error))
    console.print(
        f"Checkpoints: {folder / 'prefill'} and {folder / 'decode'}\n"
        f'Load one:    AutoModelForCausalLM.from_pretrained("{folder / "decode"}")\n'
        "The service is stopped.",
        highlight=False,
        soft_wrap=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
