"""Gateway processes under load: as `pdtrim gateway` runs them, with one route more that does nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import psycopg
import uvicorn
from fastapi import Depends
from sqlalchemy import Engine as Database

from pdtrim.contract.access import DEFAULT_PROJECT, Scope
from pdtrim.contract.jobs import Job
from pdtrim.contract.spec import JobSpec
from service.api.auth import declared
from service.api.deps import Project, SettingsDep, json_only
from service.api.idempotency import IdempotencyKey
from service.app import create_app
from service.db import jobs, keys, views
from service.db.session import connect, migrate, transaction
from service.observing import logs
from service.settings import Settings
from tests import servers
from tests.stored_jobs import store_job

NOTHING = "/v1/nothing"
SPEC = {
    "model": "reference",
    "prefill": {"remove_blocks": 2},
    "decode": {"remove_blocks": 4},
    "metadata": {"team": "serving", "run": "nightly"},
}
START_S = 60.0


@dataclass(frozen=True)
class Target:
    """A gateway on a database of its own."""

    url: str
    key: str
    database: Database
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """What the process has used so far."""
        used = self.process.cpu_times()
        return float(used.user + used.system)

    def resident_bytes(self) -> int:
        """What the process has in memory."""
        return int(self.process.memory_info().rss)


@contextmanager
def gateway(postgres_url: str, redis_url: str, name: str, folder: Path) -> Iterator[Target]:
    """A gateway process on a fresh database of the server, with a key made as for any user."""
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    database_url = postgres_url.removesuffix("postgres") + name
    database = connect(database_url)
    migrate(database)
    with transaction(database) as session:
        _, key = keys.create(session, project=DEFAULT_PROJECT, name="load", scopes=[Scope.ADMIN])
    (port,) = servers.free_ports(1)
    given = {
        "DATABASE_URL": database_url,
        "BROKER_URL": redis_url,
        "DATA_DIR": str(folder / name),
        "PORT": str(port),
        "LOG_FORMAT": "json",
        # No worker takes the jobs, and sending them again is not what is measured.
        "RESEND_SECONDS": "3600",
        # Counted as ever, and never reached.
        "RATE_LIMIT": "1000000/second",
    }
    environment = os.environ | {f"PDTRIM_{variable}": value for variable, value in given.items()}
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gateways"], env=environment, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log)
        yield Target(url, key, database, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(20)
        database.dispose()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the gateway did not start:\n{log.read_text()[-3000:]}")


def serve() -> None:
    """The gateway, and the route: it asks for a key, reads and checks a job, shows one, and writes nothing."""
    settings = Settings()
    logs.configure(settings)
    app = create_app(settings)
    database = connect(settings.database_url)
    with transaction(database) as session:
        row = store_job(session, JobSpec.model_validate(SPEC), project="nothing")
        shown = views.job(row, jobs.stages(session, [row.id])[row.id])
        session.rollback()
    database.dispose()

    @app.post(NOTHING, status_code=201, dependencies=[declared, Depends(json_only)])
    def nothing(spec: JobSpec, settings: SettingsDep, project: Project, idempotency_key: IdempotencyKey) -> Job:
        return shown

    gc.collect()
    gc.freeze()
    uvicorn.run(app, host=settings.host, port=settings.port, log_config=None, access_log=False)


if __name__ == "__main__":
    serve()
