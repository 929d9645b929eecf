"""Every response and log line carries the request's id; an exception that no route answered becomes a problem with it.

Plain ASGI: middleware that wraps responses would buffer streams or leave them running after a disconnect.
"""

from __future__ import annotations

import logging
import re

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars
from uuid_utils import uuid7

from service.api.problems import InternalError, problem
from service.observing.redaction import redact

log = logging.getLogger(__name__)

HEADER = "X-Request-ID"
SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestIds:
    """Takes over a client's request id or makes one, and is the last to see an exception."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if SANE.fullmatch(given) and redact(given) == given else uuid7().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except Exception:
                log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
                if started:
                    raise  # The server then cuts the connection, so that the client sees the answer is incomplete.
                response = problem(Request(scope), InternalError(InternalError.DETAIL))
                await response(scope, receive, send_with_id)
