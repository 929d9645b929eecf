"""Liveness, and readiness with what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import DependencyUnavailable
from service import queue
from service.api import examples
from service.api.deps import DatabaseDep, SettingsDep, StoreDep
from service.api.problems import documented, problem
from service.db.session import schema_is_current

router = APIRouter(tags=["health"])
log = logging.getLogger(__name__)

CHECK_SECONDS = 5.0


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Check(BaseModel):
    """One server that the gateway needs."""

    ok: bool
    detail: str = Field(default="", description="What is wrong.")


class Readiness(BaseModel):
    """Whether the gateway can do its work."""

    status: Literal["ready", "unavailable"]
    checks: dict[str, Check]


@router.get("/healthz", summary="Liveness", operation_id="healthz", response_model=Alive)
async def healthz() -> Alive:
    """Answers as long as the process does, without a thread; asks nothing of database, broker or store."""
    return Alive()


@router.get(
    "/readyz",
    summary="Readiness",
    operation_id="readyz",
    response_model=Readiness,
    responses={
        200: examples.response(examples.READY, "The schema is current, broker and store are there."),
        **documented(DependencyUnavailable),
    },
)
async def readyz(
    request: Request, settings: SettingsDep, database: DatabaseDep, store: StoreDep
) -> Readiness | Response:
    """Database schema current, broker reachable, store writable; else 503 whose `checks` name what is wrong."""
    checks: dict[str, Check] = {}

    async def run(name: str, check: Callable[[], None]) -> None:
        checks[name] = await _outcome(name, check)

    async with anyio.create_task_group() as group:
        group.start_soon(run, "database", lambda: _check_schema(database))
        group.start_soon(run, "broker", lambda: queue.check(settings))
        group.start_soon(run, "store", store.check_writable)
    wrong = [f"{name}: {check.detail}" for name, check in sorted(checks.items()) if not check.ok]
    if not wrong:
        return Readiness(status="ready", checks=checks)
    found = Readiness(status="unavailable", checks=checks).model_dump(mode="json")["checks"]
    return problem(request, DependencyUnavailable("; ".join(wrong)), extensions={"checks": found})


async def _outcome(name: str, check: Callable[[], None]) -> Check:
    try:
        with anyio.fail_after(CHECK_SECONDS):
            await to_thread.run_sync(check, abandon_on_cancel=True)
    except TimeoutError:
        return Check(ok=False, detail=f"no answer within {CHECK_SECONDS:g} s")
    except Exception as error:
        log.warning("not ready: %s: %s", name, error, exc_info=True)
        return Check(ok=False, detail=_first_line(error))
    return Check(ok=True)


def _check_schema(database: Database) -> None:
    if not schema_is_current(database):
        raise DependencyUnavailable("the schema is not the newest; restart the gateway, which migrates it")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
