"""The commands that run the service, or parts of it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Annotated

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from pdtrim.client import Client, ClientError
from pdtrim.command.children import stopped_by_signals
from pdtrim.command.connection import USAGE, console, fail
from pdtrim.command.jobs import fetch, follow
from pdtrim.contract.jobs import JobStatus
from pdtrim.display.jobs import job_page
from service.commands.demo_job import DEMO_SPEC
from service.commands.embedded import Embedded, EmbeddedFailure, worker_name
from service.db.session import connect
from service.db.session import migrate as migrate_database
from service.observing import logs, tracing
from service.queue import BROKER_ERRORS, broker_queue, celery_app
from service.settings import Settings

DataDir = Annotated[Path, typer.Option("--data-dir", envvar="PDTRIM_DATA_DIR", help="Folder that keeps everything.")]
WORKER_PACKAGES = ("torch", "transformers", "safetensors", "datasets", "peft")
PING_SECONDS = 5.0
SWITCH_SECONDS = 0.0005
"""How long one of the gateway's threads computes while others wait, of which there are several for each request."""
# Importing the tasks first pins them: Celery would rather take a folder `workers` where the user happens to be.
# What is imported stays: going through it again and again for garbage took a quarter of the time to start.
CELERY = (
    "import gc; gc.disable(); import workers.tasks, celery.__main__; gc.freeze(); gc.enable(); celery.__main__.main()"
)


def configured(**given: object) -> Settings:
    """The settings; what is wrong with them ends the command."""
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        fail("; ".join(map(_named, error.errors())), code=USAGE)
    except SettingsError as error:
        fail(f"{error}; is it JSON?", code=USAGE)


def _named(error: ErrorDetails) -> str:
    variable = f"PDTRIM_{'_'.join(map(str, error['loc'])).upper()}: " if error["loc"] else ""
    return variable + error["msg"].removeprefix("Value error, ")


def _require_worker() -> None:
    missing = [name for name in WORKER_PACKAGES if find_spec(name) is None]
    if missing:
        fail(f"a worker needs {', '.join(missing)}: pip install 'pdtrim[worker]'")


def gateway() -> None:
    """Run the gateway alone, on PDTRIM_HOST and PDTRIM_PORT; workers run elsewhere.

    Example: `PDTRIM_DATABASE_URL=postgresql://… PDTRIM_BROKER_URL=redis://… pdtrim gateway`
    """
    # What is imported stays: going through it again and again for garbage took a quarter of the time to start.
    gc.disable()
    # Only this command needs the web framework, and every command waits for what is imported above.
    import uvicorn

    from service.api.connections import server_options
    from service.app import create_app

    settings = configured()
    logs.configure(settings)
    tracing.configure("pdtrim-gateway")
    # Open event streams would hold up a stop for ever; clients take them up again elsewhere.
    # Without a configuration of its own, uvicorn's log goes where ours does; our access log says more than its.
    app = create_app(settings)
    # What is there by now stays. Looking through all of it for garbage stopped every request for a third of a second.
    gc.collect()
    gc.freeze()
    gc.enable()
    sys.setswitchinterval(SWITCH_SECONDS)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=2,
        log_config=None,
        access_log=False,
        **server_options(settings),
    )


def worker(
    queue: Annotated[
        list[str] | None,
        typer.Option(help="Take stages of this queue alone; may be given again. By default of all."),
    ] = None,
) -> None:
    """Run one worker: it takes one stage at a time, on the GPU if there is one.

    Example: `PDTRIM_DATABASE_URL=… PDTRIM_BROKER_URL=… PDTRIM_ARTIFACTS_URL=… pdtrim worker --queue gpu-80g`
    """
    _require_worker()
    settings = configured()
    for name in queue or ():
        if name not in settings.queues:
            fail(f"there is no queue {name!r}; PDTRIM_QUEUES has {', '.join(settings.queues)}", code=USAGE)
    queues = ",".join(broker_queue(name) for name in queue or settings.queues)
    options = ["--concurrency=1", "--pool=prefork", f"--queues={queues}", "--without-gossip", "--without-mingle"]
    named = f"--hostname={worker_name(os.getpid())}"
    command = [sys.executable, "-P", "-c", CELERY, "--quiet", "-A", "workers.tasks", "worker", named, *options]
    # OpenMP's threads spin while they wait; on a machine that others use too, for much longer than it pays.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Libraries' progress bars are no log lines.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # What evaluation tasks download stays in the scratch folder, unless the operator has a place for it.
    if "HF_HOME" not in os.environ:
        for cache in ("HUB", "DATASETS", "MODULES"):
            os.environ.setdefault(f"HF_{cache}_CACHE", f"{settings.scratch_dir}/huggingface/{cache.lower()}")
    sys.stdout.flush()
    os.execv(sys.executable, command)


def ping() -> None:
    """Ask the workers of this machine for a sign of life; fails when none answers. For health checks.

    A broker that is out of reach is no fault of theirs: whoever restarted them would stop a stage that goes on.

    Example: `PDTRIM_BROKER_URL=redis://… pdtrim ping`
    """
    workers = {"pattern": f"pdtrim-*@{socket.gethostname()}", "matcher": "glob"}
    try:
        answers = celery_app(configured().broker_url).control.ping(timeout=PING_SECONDS, limit=1, **workers)
    except BROKER_ERRORS as error:
        console.print(f"The broker is out of reach: {error}", markup=False, highlight=False, soft_wrap=True)
        return
    if not answers:
        fail(f"no worker on {socket.gethostname()} answered within {PING_SECONDS:g} s")
    console.print(f"{', '.join(name for answer in answers for name in answer)} is there.", highlight=False)


def reconcile() -> None:
    """Run the reconciler alone: it queues again what dead workers left, sends what was lost, deletes what is too old.

    As many may run as you like. Gateways run it too, unless PDTRIM_RECONCILE_IN_GATEWAY is false.

    Example: `PDTRIM_DATABASE_URL=… PDTRIM_BROKER_URL=… PDTRIM_ARTIFACTS_URL=… pdtrim reconcile`
    """
    # As for `gateway`: the S3 library takes its time to import.
    from service.storage import open_store
    from service.upkeep.reconciler import Reconciler

    settings = configured()
    logs.configure(settings)
    tracing.configure("pdtrim-reconciler")
    database = connect(settings.database_url)
    store = open_store(settings.artifacts_url, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region)
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with Reconciler(database, settings, store):
        logging.getLogger(__name__).info("the reconciler is running")
        stopping.wait()
    database.dispose()


def migrate() -> None:
    """Bring the database to the newest schema; the gateway does the same when it starts.

    Example: `PDTRIM_DATABASE_URL=postgresql://… pdtrim migrate`
    """
    migrate_database(connect(configured().database_url))
    console.print("The database's schema is current.")


def up(
    port: Annotated[
        int, typer.Option(envvar="PDTRIM_PORT", min=0, max=65535, help="Port of the gateway; 0 takes a free one.")
    ] = 8000,
    data_dir: DataDir = Path("pdtrim-data"),
) -> None:
    """Run the whole service here: gateway, worker, SQLite and a folder of artifacts. Ctrl-C stops it.

    Jobs may name files below the current folder, unless PDTRIM_ALLOWED_SOURCES says otherwise. Other PDTRIM_ settings
    count too: with PDTRIM_DATABASE_URL, PDTRIM_BROKER_URL or PDTRIM_ARTIFACTS_URL, real servers are used.

    Example: `pdtrim up --port 8080 --data-dir /var/lib/pdtrim`
    """
    _require_worker()
    settings = configured(port=port, data_dir=data_dir)
    console.print("Starting the gateway and a worker …")
    try:
        with stopped_by_signals(), Embedded(settings, Path.cwd(), _tell) as service:
            _welcome(service)
            try:
                service.wait()
            except KeyboardInterrupt:
                console.print("Stopping …")
    except EmbeddedFailure as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped before it had started")
    console.print("Stopped. Jobs that were running go on with the next `pdtrim up`.", highlight=False)


def _tell(message: str) -> None:
    console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _welcome(service: Embedded) -> None:
    lines = [
        ("Service", service.url),
        ("Dashboard", f"{service.url}/ui"),
        ("Interface", f"{service.url}/docs"),
        ("Logs", str(service.logs)),
    ]
    if service.shares_folder:
        lines.append(("Jobs may read", Path.cwd().as_uri()))
    console.print("[bold]PDTrim Service is up.[/] Ctrl-C stops it.")
    example = "echo '{model: reference, prefill: {remove_blocks: 2}, decode: {remove_blocks: 4}}' > job.yaml"
    text = "\n".join(f"{name:<14} {value}" for name, value in lines)
    text += f"\n\nIn another shell:\n{example}\npdtrim submit job.yaml --watch --url {service.url}\n"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def demo(data_dir: DataDir = Path("pdtrim-data")) -> None:
    """Prune the reference model once, end to end over HTTP: start the service, submit, watch, report, stop.

    Leaves the checkpoints in DATA_DIR/demo. Needs no network, no GPU and a few minutes.

    Example: `pdtrim demo`
    """
    _require_worker()
    settings = configured(port=0, data_dir=data_dir)
    folder = settings.data_dir / "demo"
    console.print("Starting the gateway and a worker …")
    try:
        with stopped_by_signals(), Embedded(settings, Path.cwd(), _tell) as service, service.client() as client:
            console.print(f"The service runs at {service.url} (logs in {service.logs}).", highlight=False)
            _demo_job(service, client, folder)
    except EmbeddedFailure as error:
        fail(str(error))
    except ClientError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped before the end; nothing runs any more")
    load = f'AutoModelForCausalLM.from_pretrained("{folder / "decode"}")'
    console.print(
        f"Checkpoints  {folder / 'prefill'}\n             {folder / 'decode'}", highlight=False, soft_wrap=True
    )
    console.print(f"Load one     {load}", highlight=False, soft_wrap=True, markup=False)
    console.print("The service is stopped.")


def _demo_job(service: Embedded, client: Client, folder: Path) -> None:
    job = client.create(DEMO_SPEC)
    console.print(
        f"Submitted {job.id}: prefill keeps of 3 blocks only what makes keys and values, decode is without 2.\n",
        highlight=False,
    )
    job = follow(client, job.id)
    console.print(job_page(job))
    if job.status != JobStatus.SUCCEEDED:
        fail(f"the job has {job.status}; the worker's log is {service.logs / 'worker.log'}")
    fetch(client, job.id, folder, None, "")
