"""Refuses request bodies beyond a size, counted while they are read, so that no header has to be believed."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware that lets a body of at most `max_bytes` through.

    FastAPI's own `max_body_size` answers in plain text and outside of our middleware.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                # Of all exceptions, FastAPI passes only this one on from where it reads the body.
                raise HTTPException(
                    413, f"The body is larger than {self.max_bytes} bytes, the most this service takes."
                )
            return message

        await self.app(scope, receive_counted if scope["type"] == "http" else receive, send)
