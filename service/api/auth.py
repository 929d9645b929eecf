"""Who asks: the key is checked before anything else of a request under /v1 is read."""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass

from fastapi import Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from sqlalchemy import Engine
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from service.api.problems import database_unavailable, problem
from service.contract.access import DEFAULT_PROJECT, Scope
from service.contract.errors import MissingScope, Unauthorized
from service.db import keys
from service.db.session import DATABASE_FAULTS, transaction
from service.settings import Settings

log = logging.getLogger(__name__)

# Only declares the scheme in the OpenAPI document; `ApiKey` is what checks.
declared = Security(
    HTTPBearer(
        auto_error=False,
        scheme_name="ApiKey",
        description="A key that `pdtrim keys create` made, or the one in `PDTRIM_API_KEY`, when there are any. "
        "GET and HEAD need the scope `read`, everything else `submit`; `admin` includes both.",
    )
)


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and what it may do there."""

    project: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


OPERATOR = Caller(DEFAULT_PROJECT, frozenset({Scope.ADMIN}))
"""The holder of PDTRIM_API_KEY; everyone, while no key exists at all."""


class ApiKey:
    """ASGI middleware: a path under /v1 needs `Authorization: Bearer <key>` with the scope for its method.

    Routes find the `Caller` in the request's state.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.key = _operator_key(settings)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            caller = await run_in_threadpool(_caller, scope["app"].state.engine, self.key, _token(request.headers))
        except DATABASE_FAULTS as error:
            await database_unavailable(request, error)(scope, receive, send)
            return
        needed = Scope.READ if scope["method"] in ("GET", "HEAD") else Scope.SUBMIT
        if caller is None:
            refusal = Unauthorized("Send the header `Authorization: Bearer <key>` with a key of this service.")
            response = problem(request, refusal, headers={"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)
        elif not caller.may(needed):
            missing = MissingScope(f"This needs a key with the scope `{needed}`; yours has {_listed(caller)}.")
            challenge = f'Bearer error="insufficient_scope", scope="{needed}"'
            await problem(request, missing, headers={"WWW-Authenticate": challenge})(scope, receive, send)
        else:
            scope.setdefault("state", {})["caller"] = caller
            await self.app(scope, receive, send)


def warn_if_open(engine: Engine, settings: Settings) -> None:
    """Say in the log that no key is asked for."""
    with transaction(engine) as session:
        if settings.api_key is None and not keys.exist(session):
            log.warning("no API key is set: everyone on this machine can use http://%s", settings.host)


def _operator_key(settings: Settings) -> bytes | None:
    return None if settings.api_key is None else settings.api_key.get_secret_value().encode()


def _caller(engine: Engine, operator_key: bytes | None, token: str) -> Caller | None:
    # Header values are decoded as Latin-1; encoding them so gives the bytes that were sent.
    if operator_key is not None and hmac.compare_digest(token.encode("latin-1"), operator_key):
        return OPERATOR
    with transaction(engine) as session:
        row = keys.valid(session, token)
        if row is not None:
            return Caller(row.project, frozenset(map(Scope, row.scopes)))
        return OPERATOR if operator_key is None and not keys.exist(session) else None


def _token(headers: Headers) -> str:
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _listed(caller: Caller) -> str:
    return ", ".join(f"`{scope}`" for scope in Scope if scope in caller.scopes)
