"""`pdtrim` processes under test, and those they started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.servers import free_ports


def wait_until(condition: Callable[[], bool], *, seconds: float = 120, what: str = "") -> None:
    """Raises: AssertionError when the condition does not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what or condition}"
        time.sleep(0.05)


def processes_of(command: str, data_dir: Path) -> list[psutil.Process]:
    """Living processes of a service with this data folder whose command line contains `command`."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("PDTRIM_DATA_DIR") == str(data_dir)
            if ours and command in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `pdtrim` process, ended with SIGINT as Ctrl-C does, or killed if that does not end it."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pdtrim.command", *command],
            env=dict(environment),
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def pdtrim_up(environment: Mapping[str, str], folder: Path) -> Iterator[str]:
    """The embedded service, run from `folder`. Yields its address once it is ready."""
    (port,) = free_ports(1)
    url, log = f"http://127.0.0.1:{port}", folder / "up.log"

    def told() -> int:
        return log.read_text().count("PDTrim Service is up.") if log.exists() else 0

    before = told()
    with running(["up", "--port", str(port)], environment, log):
        # The gateway answers sooner; who kills the worker by then keeps the service from starting.
        wait_until(lambda: told() > before, what=f"{url} to be up")
        yield url
