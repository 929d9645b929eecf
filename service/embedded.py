"""The whole service on one machine: the gateway and one worker as supervised child processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from service.client import Client
from service.settings import Settings

START_SECONDS = 60.0
STOP_SECONDS = 5.0
RESTARTS = 5
"""Restarts in a row that a child gets before all is stopped."""
STEADY_SECONDS = 60.0
"""A child that ran this long starts with a clean record."""


class EmbeddedFailure(Exception):
    """The service did not start, or a child keeps dying; the message names its log."""


class Child:
    """A `pdtrim` command in a process group of its own, so that nothing it started outlives it."""

    def __init__(self, name: str, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.restarts = 0
        self._environment = environment
        self._start()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", self.name],
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def restart(self) -> None:
        """Start again after a death. Raises: EmbeddedFailure when that happened too often."""
        self._kill_group()
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self.restarts = 0
        if self.restarts >= RESTARTS:
            raise EmbeddedFailure(f"the {self.name} keeps dying (exit code {self.exit_code}); see {self.log}")
        time.sleep(min(2**self.restarts - 1, 10))
        self.restarts += 1
        self._start()

    def ask_to_stop(self) -> None:
        """Let the process finish on its own."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, deadline: float) -> None:
        """Wait until `deadline` (monotonic seconds), then kill whatever is left of the group."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._kill_group()
        self._process.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Embedded:
    """Context manager: on entry the service runs and is ready, on exit no process of it is left.

    `settings` say where things are; `folder` is what jobs may name files of, unless PDTRIM_ALLOWED_SOURCES says
    otherwise. Raises: EmbeddedFailure.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.url = f"http://{settings.host}:{settings.port}"
        self.logs = settings.data_dir / "logs"
        self._settings = settings
        self._environment = {
            "PDTRIM_ALLOWED_SOURCES": json.dumps([*settings.allowed_sources, folder.resolve().as_uri()]),
            **os.environ,
            "PDTRIM_DATA_DIR": str(settings.data_dir),
            "PDTRIM_PORT": str(settings.port),
            "PYTHONUNBUFFERED": "1",
        }
        self._children: list[Child] = []

    def __enter__(self) -> Embedded:
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            # The gateway first: it creates the tables that the worker needs.
            self._children.append(Child("serve", self._environment, self.logs / "gateway.log"))
            self._wait_until_ready()
            self._children.append(Child("worker", self._environment, self.logs / "worker.log"))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def supervise(self, tell: Callable[[str], None]) -> None:
        """Restart children that died; call it every now and then. Raises: EmbeddedFailure."""
        for child in self._children:
            if child.exit_code is not None:
                tell(f"The {child.name} ended with exit code {child.exit_code}; starting it again (log: {child.log}).")
                child.restart()

    def _wait_until_ready(self) -> None:
        key = self._settings.api_key
        gateway = self._children[0]
        with Client(self.url, api_key=key.get_secret_value() if key else None, timeout_s=5) as client:
            deadline = time.monotonic() + START_SECONDS
            while not client.ready():
                if gateway.exit_code is not None or time.monotonic() > deadline:
                    raise EmbeddedFailure(f"the gateway did not start on {self.url}; see {gateway.log}")
                time.sleep(0.1)

    def _stop(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for child in reversed(self._children):
            child.ask_to_stop()
        for child in reversed(self._children):
            child.stop(deadline)
        self._children.clear()
