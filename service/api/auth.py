"""The API key: checked before anything of a request under /v1 is read."""

from __future__ import annotations

import hmac
import logging

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problems import problem
from service.contract.errors import Unauthorized
from service.settings import Settings

log = logging.getLogger(__name__)

# Only declares the scheme in the OpenAPI document; `ApiKey` is what checks.
declared = Security(
    HTTPBearer(auto_error=False, scheme_name="ApiKey", description="The key in `PDTRIM_API_KEY`, when one is set.")
)


class ApiKey:
    """ASGI middleware: every path under /v1 needs `Authorization: Bearer <key>` when the settings have a key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.key = None if settings.api_key is None else settings.api_key.get_secret_value().encode()
        if self.key is None:
            log.warning("no API key is set: everyone on this machine can use http://%s", settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and f"{scope['path']}/".startswith("/v1/")
        if guarded and self.key is not None and not _carries(Headers(scope=scope), self.key):
            error = Unauthorized("Send the header `Authorization: Bearer <key>` with the key of this service.")
            response = problem(Request(scope), error, headers={"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _carries(headers: Headers, key: bytes) -> bool:
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    # Header values are decoded as Latin-1; encoding them so gives the bytes that were sent.
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), key)
