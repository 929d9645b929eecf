"""The whole service on one machine: the gateway and one worker as supervised child processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from pdtrim.client import Client
from pdtrim.command.children import end_with_parent
from service.observing.logs import chosen_format
from service.queue import BROKER_ERRORS, celery_app
from service.settings import Settings

START_SECONDS = 120.0
"""Importing torch for the first time takes its time."""
STOP_SECONDS = 5.0
RESTARTS = 5
"""Restarts in a row that a child gets before all is stopped."""
STEADY_SECONDS = 60.0
"""A child that ran this long starts with a clean record."""
LOG_LINES = 5


def worker_name(pid: int) -> str:
    """What a worker is called on the broker: several may run on one machine."""
    return f"pdtrim-{pid}@{socket.gethostname()}"


class EmbeddedFailure(Exception):
    """The service did not start, or a child keeps dying; the message shows the end of its log."""


class Child:
    """A `pdtrim` command in a process group of its own, so that nothing it started outlives it."""

    def __init__(self, name: str, command: str, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.restarts = 0
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._started_at = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # -P: a folder `service` where the user happens to be is not ours.
                [sys.executable, "-P", "-m", "pdtrim.command", self._command],
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def restart(self, stopping: Event) -> None:
        """Start again after a death, unless all is `stopping`. Raises: EmbeddedFailure when that happened too often."""
        code = self.exit_code
        self.kill()
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self.restarts = 0
        if self.restarts >= RESTARTS:
            raise EmbeddedFailure(f"the {self.name} keeps dying (exit code {code}); {self.last_words()}")
        if not stopping.wait(min(2**self.restarts - 1, 10)):
            self.restarts += 1
            self.start()

    def ask_to_stop(self) -> None:
        """Let the process finish on its own."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Wait for the end until `deadline` (monotonic seconds)."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill whatever is left of the group. Only once: its number may soon be another's."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def last_words(self) -> str:
        """Where its log is, and how it ends."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").strip().splitlines()[-LOG_LINES:]
        return "\n".join([f"its log, {self.log}, ends:", *lines])


class Embedded:
    """Context manager: on entry the service runs, on exit no process of it is left; in between children that die are
    started again, and `tell` is told.

    `settings` say where things are; with port 0 a free one is taken. Unless the settings name the allowed sources,
    those who work on this machine may name files below `folder`. Raises: EmbeddedFailure.
    """

    def __init__(self, settings: Settings, folder: Path, tell: Callable[[str], None]) -> None:
        self.logs = settings.data_dir / "logs"
        self.shares_folder = "allowed_sources" not in settings.model_fields_set and settings.binds_loopback
        port = _free_port(settings)
        self.url = f"http://{_reachable(settings.host)}:{port}"
        self._settings = settings
        self._tell = tell
        shared = [folder.resolve().as_uri()] if self.shares_folder else []
        environment = os.environ | {
            "PDTRIM_ALLOWED_SOURCES": json.dumps([*settings.allowed_sources, *shared]),
            "PDTRIM_DATA_DIR": str(settings.data_dir),
            "PDTRIM_LOG_FORMAT": chosen_format(settings, sys.stderr),
            "PDTRIM_PORT": str(port),
            # The next start goes on with a stage that was handed back; one that was killed waits for its lease.
            "PDTRIM_SHUTDOWN_SECONDS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        self._gateway = Child("gateway", "gateway", environment, self.logs / "gateway.log")
        self._worker = Child("worker", "worker", environment, self.logs / "worker.log")
        self._stopping, self._ended = Event(), Event()
        self._failure: EmbeddedFailure | None = None
        self._supervisor = Thread(target=self._supervise, name="supervisor", daemon=True)

    def client(self, *, patience_s: float = 30.0) -> Client:
        """A client of the service, with its key."""
        key = self._settings.api_key
        return Client(self.url, api_key=key.get_secret_value() if key else None, patience_s=patience_s)

    def wait(self) -> None:
        """Wait until the service fails. Raises: EmbeddedFailure."""
        self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Embedded:
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            # The gateway first: it creates the tables that the worker needs.
            self._gateway.start()
            with self.client() as client:
                self._wait_for(self._gateway, client.ready)
            self._worker.start()
            self._wait_for(self._worker, self._worker_answers)
            self._supervisor.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._failure is not None and error is not self._failure and not isinstance(error, KeyboardInterrupt):
            raise self._failure from error

    def _wait_for(self, child: Child, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while child.exit_code is None and time.monotonic() < deadline:
            if ready():
                return
            time.sleep(0.1)
        raise EmbeddedFailure(f"the {child.name} did not start; {child.last_words()}")

    def _worker_answers(self) -> bool:
        name = worker_name(self._worker.pid or 0)
        try:
            return bool(celery_app(self._settings.broker_url).control.ping([name], timeout=1.0, limit=1))
        except BROKER_ERRORS:
            return False

    def _supervise(self) -> None:
        """Until all is stopping: start children that died again; stop all when one dies too often."""
        while not self._stopping.wait(0.5):
            for child in (self._gateway, self._worker):
                code = child.exit_code
                if code is None:
                    continue
                self._tell(f"The {child.name} ended with exit code {code}; starting it again (log: {child.log}).")
                try:
                    child.restart(self._stopping)
                except EmbeddedFailure as error:
                    self._failure = error
                    self._end_children()
                    self._ended.set()
                    return

    def _stop(self) -> None:
        self._stopping.set()
        try:
            if self._supervisor.is_alive():
                self._supervisor.join()
        finally:
            self._end_children()

    def _end_children(self) -> None:
        children = (self._worker, self._gateway)
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for child in children:
                child.ask_to_stop()
            for child in children:
                child.wait(deadline)
        finally:
            # Also when a second Ctrl-C ends the waiting.
            for child in children:
                child.kill()


def _free_port(settings: Settings) -> int:
    """The port that the gateway will get. Raises: EmbeddedFailure when something listens on it already."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise EmbeddedFailure(
                f"port {settings.port} of {settings.host} cannot be had ({error.strerror}); is the service running "
                "already? Choose another with --port."
            ) from error
        port: int = probe.getsockname()[1]
        return port


def _reachable(host: str) -> str:
    """What to write in a URL of this machine for a gateway that binds to `host`."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        address = ip_address("::1" if isinstance(address, IPv6Address) else "127.0.0.1")
    return f"[{address}]" if isinstance(address, IPv6Address) else str(address)
