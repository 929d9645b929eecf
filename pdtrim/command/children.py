"""Child processes that serve something together: started in order, ended all at once."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import httpx

from pdtrim.serving.machine import Command

STOP_SECONDS = 15.0
"""A serving engine gives its memory back within seconds; what takes longer is killed."""
POLL_SECONDS = 0.5
HEALTH_SECONDS = 5.0
LOG_LINES = 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ChildDied(Exception):
    """A child ended by itself, or did not become healthy; the message shows the end of its log."""


class Child:
    """A process in a group of its own, so that nothing it started outlives it; it writes to a log alone."""

    def __init__(self, command: Command, log: Path) -> None:
        self.command = command
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command.arguments,
                env={**os.environ, **command.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def check(self) -> None:
        """Raises: ChildDied."""
        code = self._process.poll()
        if code is not None:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise ChildDied(f"{self.command.name} ended ({how}); {self.last_words()}")

    def healthy(self) -> bool:
        """Whether it answers that it is well."""
        try:
            return httpx.get(self.command.health, timeout=HEALTH_SECONDS, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def last_words(self) -> str:
        """Where its log is, and how it ends."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - (16 << 10)))
            lines = log.read().decode(errors="replace").strip().splitlines()[-LOG_LINES:]
        return "\n".join([f"its log, {self.log}, ends:", *lines])

    def signal(self, number: signal.Signals) -> None:
        """To the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ended(self) -> bool:
        """Whether the process is no more. What it started may be."""
        return self._process.poll() is not None

    def wait(self) -> None:
        """Wait for the end of a process that was killed."""
        self._process.wait()


class Children:
    """Context manager: on exit no child is left. `logs` is a folder; `tell` is told what goes on."""

    def __init__(self, logs: Path, tell: Callable[[str], None]) -> None:
        self._logs, self._tell = logs, tell
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, commands: Iterable[Command], *, within_seconds: float) -> None:
        """Start these together and wait until all are healthy. Raises: ChildDied."""
        begun = time.monotonic()
        fresh = [Child(command, self._logs / f"{command.name}.log") for command in commands]
        self._children += fresh
        waiting = list(fresh)
        while waiting:
            self.check()
            for child in [one for one in waiting if one.healthy()]:
                waiting.remove(child)
                self._tell(f"{child.command.name} is healthy after {time.monotonic() - begun:.0f} s")
            if waiting and time.monotonic() - begun > within_seconds:
                late = waiting[0]
                raise ChildDied(f"{late.command.name} is not healthy after {within_seconds:.0f} s; {late.last_words()}")
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Wait until a child ends, which none should. Raises: ChildDied."""
        while True:
            self.check()
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raises: ChildDied where one has ended."""
        for child in self._children:
            child.check()

    def stop(self) -> None:
        """End all, the last first; whatever is left of them is killed."""
        children, self._children = self._children[::-1], []
        for child in children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not all(child.ended() for child in children):
            time.sleep(0.1)
        for child in children:
            child.signal(signal.SIGKILL)
            child.wait()


def taken(host: str, ports: Iterable[int]) -> list[int]:
    """Those of the ports on which something listens already."""
    return [port for port in ports if not _free(host, port)]


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def end_with_parent() -> Callable[[], object] | None:
    """On Linux, what a child calls to be sent SIGTERM when this process is killed without a chance to stop it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return partial(prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A service manager's SIGTERM and a closed terminal's SIGHUP stop like Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # As under nohup.
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
