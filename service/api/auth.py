"""Who asks, and whether they may now: checked before anything else of a request under /v1 is read."""

from __future__ import annotations

import hmac
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

from fastapi import Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from sqlalchemy import Engine as Database
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from pdtrim.contract.access import DEFAULT_PROJECT, PROJECT_PATTERN, Rate, Scope
from pdtrim.contract.errors import (
    DependencyUnavailable,
    MissingProject,
    MissingScope,
    PDTrimError,
    RateLimited,
    Unauthorized,
)
from service.api import oidc
from service.api.problems import database_unavailable, problem
from service.api.rates import Allowance, Rates
from service.api.sessions import Sessions
from service.db import keys
from service.db.session import DATABASE_FAULTS, transaction
from service.settings import Settings

log = logging.getLogger(__name__)

FAILED = "failed-authentication"
"""Name of the policy under which an address may send what does not open."""
READING = ("GET", "HEAD")
JWT = re.compile(r"ey[\w-]*\.[\w-]+\.[\w-]*")

# Only declares the scheme in the OpenAPI document; `GateMiddleware` is what checks.
declared = Security(
    HTTPBearer(
        auto_error=False,
        scheme_name="ApiKey",
        description="A key that `pdtrim keys create` made, the one in `PDTRIM_API_KEY`, or a token of the OpenID "
        "provider in `PDTRIM_OIDC_ISSUER`, when there are any. GET and HEAD need the scope `read`, everything else "
        "`submit`; `admin` includes both.",
    )
)


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and what it may do there. `api_key` is the prefix of the key that was sent, if one was.

    `policy` and `who` say whose requests are counted with this one: a key's, a token's subject's, or an address's.
    """

    project: str
    scopes: frozenset[Scope]
    policy: str
    who: str
    api_key: str | None = None
    rate_limit: Rate | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, error: PDTrimError, headers: Mapping[str, str]) -> None:
        super().__init__(error.message)
        self.error, self.headers = error, headers


class Gate:
    """Decides who comes in, whichever way they brought their token. Raised refusals say what to answer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._key = None if settings.api_key is None else settings.api_key.get_secret_value().encode()
        self._provider = (
            None
            if settings.oidc_issuer is None
            else oidc.Provider(settings.oidc_issuer, audience=settings.oidc_audience or "")
        )
        self._rates = Rates(settings.broker_url)

    def enter(self, database: Database, token: str, *, address: str, method: str) -> tuple[Caller, Allowance | None]:
        """Whose request it is, and what is left to them. `token` is decoded as headers are, as Latin-1.

        Raises: Refused; database faults.
        """
        # First, whoever else guesses from this address: behind a proxy that tells nobody's, it is everyone's.
        caller = self._caller(database, token, address)
        if caller is None:
            # Who sends nothing guesses nothing, but is counted nevertheless.
            policy, rate = (
                (FAILED, self._settings.failed_auth_limit) if token else ("address", self._settings.rate_limit)
            )
            allowance = _granted(self._rates.spend(policy, rate, address))
            refusal = Unauthorized("Send the header `Authorization: Bearer <key>` with a key of this service.")
            raise Refused(refusal, {"WWW-Authenticate": "Bearer", **_told(allowance)})
        rate = caller.rate_limit or self._settings.rate_limit
        allowance = _granted(self._rates.spend(caller.policy, rate, caller.who))
        needed = Scope.READ if method in READING else Scope.SUBMIT
        if not caller.may(needed):
            missing = MissingScope(f"This needs the scope `{needed}`; yours has {_listed(caller)}.")
            challenge = f'Bearer error="insufficient_scope", scope="{needed}"'
            raise Refused(missing, {"WWW-Authenticate": challenge, **_told(allowance)})
        return caller, allowance

    def _caller(self, database: Database, token: str, address: str) -> Caller | None:
        # Header values are decoded as Latin-1; encoding them so gives the bytes that were sent.
        if self._key is not None and hmac.compare_digest(token.encode("latin-1"), self._key):
            return Caller(DEFAULT_PROJECT, frozenset({Scope.ADMIN}), "key", "operator")
        if self._provider is not None and JWT.fullmatch(token):
            return self._of_provider(self._provider, token)
        with transaction(database) as session:
            row = keys.valid(session, token)
            if row is not None:
                scopes = frozenset(map(Scope, row.scopes))
                return Caller(row.project, scopes, "key", row.prefix, row.prefix, row.rate_limit)
            if self._key is None and self._provider is None and not keys.exist(session):
                return Caller(DEFAULT_PROJECT, frozenset({Scope.ADMIN}), "address", address)
        return None

    def _of_provider(self, provider: oidc.Provider, token: str) -> Caller | None:
        """The caller that a provider's token stands for. Raises: Refused."""
        try:
            claims = provider.verify(token)
        except oidc.InvalidToken as error:
            log.info("a token does not open: %s", error)
            return None
        except oidc.ProviderAway as error:
            log.warning("%s", error)
            away = DependencyUnavailable(
                "The OpenID provider does not answer, so the token cannot be checked. Try again."
            )
            raise Refused(away, {"Retry-After": str(math.ceil(oidc.PAUSE_S))}) from error
        return _of_claims(claims, self._settings)


class GateMiddleware:
    """ASGI middleware: a path under /v1 needs `Authorization: Bearer …` with the scope for its method, not too often.

    What only reads may come with a browser's session instead. Routes find the `Caller` in the request's state.
    """

    def __init__(self, app: ASGIApp, gate: Gate, sessions: Sessions) -> None:
        self._app = app
        self._gate = gate
        self._sessions = sessions

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            caller, allowance = await run_in_threadpool(
                self._gate.enter,
                scope["app"].state.database,
                self._token(request),
                address=address_of(scope),
                method=request.method,
            )
        except Refused as refused:
            await problem(request, refused.error, headers=refused.headers)(scope, receive, send)
            return
        except DATABASE_FAULTS as error:
            await database_unavailable(request, error)(scope, receive, send)
            return

        async def send_with_allowance(message: Message) -> None:
            if message["type"] == "http.response.start" and allowance is not None:
                MutableHeaders(scope=message).update(allowance.headers)
            await send(message)

        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send_with_allowance)

    def _token(self, request: Request) -> str:
        if "Authorization" in request.headers or request.method not in READING:
            return _bearer(request.headers)
        session = self._sessions.read(request.headers)
        return "" if session is None else session.token


def warn_if_open(database: Database, settings: Settings) -> None:
    """Say in the log that no key is asked for."""
    with transaction(database) as session:
        if settings.api_key is None and settings.oidc_issuer is None and not keys.exist(session):
            log.warning("no API key is set: everyone on this machine can use http://%s", settings.host)


def _granted(allowance: Allowance | None) -> Allowance | None:
    """An allowance that grants a request. Raises: Refused for another."""
    if allowance is None or allowance.granted:
        return allowance
    limit, wait = allowance.limit, allowance.reset_s
    if allowance.policy == FAILED:
        detail = f"This one does not open, as too many did not that came from your address. Wait {wait} s."
    else:
        detail = f"{limit.amount} requests in {limit.get_expiry()} s are the most here. Wait {wait} s."
    raise Refused(RateLimited(detail), allowance.headers)


def _told(allowance: Allowance | None) -> dict[str, str]:
    return {} if allowance is None else allowance.headers


def _of_claims(claims: dict[str, Any], settings: Settings) -> Caller:
    """The caller that a token's claims describe. Raises: Refused for one without a project."""
    project = oidc.claim(claims, settings.oidc_project_claim)
    if not isinstance(project, str) or not re.fullmatch(PROJECT_PATTERN, project):
        missing = MissingProject(f"The token's claim `{settings.oidc_project_claim}` has to name a project.")
        raise Refused(missing, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    said = oidc.words(oidc.claim(claims, settings.oidc_scopes_claim))
    scopes = frozenset(settings.oidc_scopes[word] for word in said if word in settings.oidc_scopes)
    return Caller(project, scopes, "subject", str(claims["sub"]))


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def address_of(scope: AsgiScope) -> str:
    """Whom a connection comes from. Who has one IPv6 address has the 2^64 around it, too."""
    host: str = scope["client"][0] if scope.get("client") else ""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or f"{IPv6Address(int(address) >> 64 << 64)}/64")
    return str(address)


def _listed(caller: Caller) -> str:
    return ", ".join(f"`{scope}`" for scope in Scope if scope in caller.scopes) or "none"
