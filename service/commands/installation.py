"""Whether an installation can work: versions, database, broker, store, device; and what to do where something cannot.

Nothing is changed: no schema is migrated, and what the first start makes is not made here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from pydantic import BaseModel, Field
from sqlalchemy import make_url

from service import queue
from service.db.session import connect, schema_is_current
from service.observing.redaction import redact
from service.settings import Settings
from service.storage import open_store

DISTRIBUTION = "pdtrim"
LEAST_SCRATCH_BYTES = 10 << 30
DEVICE_SECONDS = 120
ASK_TORCH = """
import json, torch
devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
print(json.dumps([torch.__version__, torch.version.cuda, [torch.cuda.get_device_name(number) for number in devices]]))
"""
"""Run by another process: this side of the service never imports torch."""


class Finding(BaseModel):
    """What came of one check."""

    check: str
    status: Literal["ok", "note", "wrong"] = Field(description="A note may be meant so.")
    detail: str
    remedy: str = Field(default="", description="What to do about it.")


class Wrong(Exception):
    """A check failed, and that is what to do."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.remedy = remedy


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check, one after the other. Addresses and errors are shown without secrets."""
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions,
        "database": lambda: _database(settings.database_url),
        "migrations": lambda: _migrations(settings.database_url),
        "broker": lambda: _broker(settings),
        "store": lambda: _store(settings),
        "device": _device,
        "scratch": lambda: _scratch(settings),
    }
    for name, check in checks.items():
        try:
            found = check()
        except Wrong as error:
            found = _finding("wrong", str(error), error.remedy)
        yield found.model_copy(update={"check": name, "detail": redact(found.detail)})


def _finding(status: Literal["ok", "note", "wrong"], detail: str, remedy: str = "") -> Finding:
    return Finding(check="", status=status, detail=detail, remedy=remedy)


def _versions() -> Finding:
    """Ours, and those of the packages that it asks for, with those of a worker where there is one."""
    try:
        ours, asked = version(DISTRIBUTION), map(Requirement, requires(DISTRIBUTION) or [])
    except PackageNotFoundError:
        raise Wrong(f"{DISTRIBUTION} is not installed for {sys.executable}.", f"pip install {DISTRIBUTION}") from None
    extras = ("", "worker") if _has_torch() else ("",)
    needed = [one for one in asked if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)]
    if unmet := [f"{one.name}{one.specifier} ({_installed(one.name)})" for one in needed if not _is_met(one)]:
        extra = "[worker]" if "worker" in extras else ""
        raise Wrong(f"Not as asked for: {', '.join(unmet)}.", f"pip install '{DISTRIBUTION}{extra}=={ours}'")
    python = ".".join(map(str, sys.version_info[:3]))
    return _finding("ok", f"{DISTRIBUTION} {ours} on Python {python}; its {len(needed)} packages fit.")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _is_met(requirement: Requirement) -> bool:
    found = _installed(requirement.name)
    return found != "missing" and requirement.specifier.contains(found, prereleases=True)


def _has_torch() -> bool:
    return find_spec("torch") is not None


def _not_there_yet(folder: Path) -> Finding | None:
    """The finding about what the first start makes."""
    return None if folder.exists() else _finding("note", f"{folder} is not there yet; the first start makes it.")


def _database(url: str | None) -> Finding:
    parsed = make_url(url or "")
    if parsed.get_backend_name() == "sqlite" and (new := _not_there_yet(Path(parsed.database or ""))):
        return new
    database = connect(parsed.render_as_string(hide_password=False))
    try:
        with database.connect() as connection:
            release = ".".join(map(str, connection.dialect.server_version_info or ()))
    except Exception as error:
        raise Wrong(
            f"{parsed.render_as_string()} does not answer: {_first_line(error)}",
            "Start it, or set PDTRIM_DATABASE_URL to where it is, with a user that may create tables.",
        ) from error
    finally:
        database.dispose()
    return _finding("ok", f"{parsed.render_as_string()} answers: {parsed.get_backend_name()} {release}.")


def _migrations(url: str | None) -> Finding:
    parsed = make_url(url or "")
    if parsed.get_backend_name() == "sqlite" and (new := _not_there_yet(Path(parsed.database or ""))):
        return new
    database = connect(parsed.render_as_string(hide_password=False))
    try:
        current = schema_is_current(database)
    except Exception as error:
        raise Wrong(f"The schema cannot be read: {_first_line(error)}", "See the database.") from error
    finally:
        database.dispose()
    if not current:
        raise Wrong("The schema is not this version's.", "pdtrim migrate; or start a gateway, which does the same.")
    return _finding("ok", "The schema is this version's, or a newer one's.")


def _broker(settings: Settings) -> Finding:
    url = settings.broker_url or ""
    parts = urlsplit(url)
    if parts.scheme == "filesystem":
        return _not_there_yet(Path(unquote(parts.path))) or _answers(url, lambda: queue.check(settings), "")
    return _answers(
        url, lambda: queue.check(settings), "Start Redis (6.2 or newer) or Valkey, or set PDTRIM_BROKER_URL to it."
    )


def _store(settings: Settings) -> Finding:
    url = settings.artifacts_url or ""
    parts = urlsplit(url)
    if parts.scheme == "file" and (new := _not_there_yet(Path(unquote(parts.path)))):
        return new

    lacking: list[str] = []

    def check() -> None:
        store = open_store(url, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region)
        lacking.extend(store.try_calls())

    found = _answers(
        url,
        check,
        "Create the bucket, set PDTRIM_ARTIFACTS_URL and PDTRIM_S3_ENDPOINT_URL to where it is, and AWS_* to a key "
        "that may list, read, write and delete in it."
        if parts.scheme == "s3"
        else "Let the user who runs this write to the folder, or set PDTRIM_ARTIFACTS_URL to another.",
    )
    if lacking:
        return _finding("note", f"{found.detail} It lacks {'; '.join(lacking)}.")
    return found


def _answers(url: str, check: Callable[[], None], remedy: str) -> Finding:
    try:
        check()
    except Exception as error:
        raise Wrong(f"{url} does not do what it should: {_first_line(error)}", remedy) from error
    return _finding("ok", f"{url} does what it should.")


def _device() -> Finding:
    if not _has_torch():
        remedy = f"To run a worker here: pip install '{DISTRIBUTION}[worker]'"
        return _finding("note", "There is no torch: this machine can run a gateway, not a worker.", remedy)
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=DEVICE_SECONDS, check=True
        )
        torch, cuda, devices = json.loads(asked.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no reason given").splitlines()[-1]
        raise Wrong(
            f"torch cannot be used: {last}", f"pip install --force-reinstall torch=={version('torch')}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Wrong(f"torch found no device within {DEVICE_SECONDS} s.", "Look at the driver: nvidia-smi") from error
    if devices:
        return _finding("ok", f"{', '.join(devices)}; torch {torch} for CUDA {cuda}.")
    if cuda is None and shutil.which("nvidia-smi"):
        raise Wrong(
            f"torch {torch} was built for the CPU, and this machine has an NVIDIA driver.",
            "pip install --force-reinstall torch, from the index for its CUDA version (https://pytorch.org/get-started)",
        )
    return _finding("note", f"torch {torch} sees no accelerator: a worker here computes on the CPU.")


def _scratch(settings: Settings) -> Finding:
    """Room for a model, and for what is exported, where a worker works."""
    folder = settings.scratch_dir or settings.data_dir
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < LEAST_SCRATCH_BYTES:
        return _finding(
            "note",
            f"{folder} has room for {free / 1e9:.1f} GB.",
            "A worker needs twice its model's bytes there: free some, or set PDTRIM_SCRATCH_DIR to another disk.",
        )
    return _finding("ok", f"{folder} has room for {free / 1e9:,.0f} GB.")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
