"""How the client's one implementation, which is asynchronous, reaches the service: with an event loop, or without.

`BlockingTransport` never waits for an event loop, so `run` drives what is built on it to its end in one step. That is
how one set of coroutines serves both clients, and why the blocking one may be used where a loop runs already (a
notebook).
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from ipaddress import ip_address
from typing import Any, Protocol, TypedDict, TypeVar

import anyio
import httpx
from anyio import to_thread
from httpx_sse import EventSource, ServerSentEvent

T = TypeVar("T")
READ_BYTES = 1 << 16


class Options(TypedDict):
    """What both of httpx's clients are made with."""

    base_url: str
    headers: dict[str, str]
    timeout: float
    follow_redirects: bool
    trust_env: bool


DEFAULT_URL = "http://127.0.0.1:8000"
"""Where `pdtrim up` answers."""


def address(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """Where the service is and the key to it: as given, else as PDTRIM_URL and PDTRIM_API_KEY say, else on this machine
    and without a key."""
    return url or os.environ.get("PDTRIM_URL") or DEFAULT_URL, api_key or os.environ.get("PDTRIM_API_KEY") or None


def options(url: str, api_key: str | None, timeout_s: float) -> Options:
    """How to talk to a service. Raises: ValueError for what is no http(s) URL."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is no URL of a service; it looks like http://127.0.0.1:8000")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": timeout_s,
        "follow_redirects": True,
        # HTTP_PROXY is set on many machines, and no proxy reaches this one's own loopback.
        "trust_env": not _is_loopback(parsed.host),
    }


class Transport(Protocol):
    """Requests, streams and pauses. Requests raise httpx.RequestError when they get no answer."""

    async def request(self, method: str, url: str, **request: Any) -> httpx.Response:
        """An answer with its body."""
        ...

    def stream(self, method: str, url: str, **request: Any) -> AbstractAsyncContextManager[httpx.Response]:
        """An answer whose body is still to be read."""
        ...

    async def read(self, response: httpx.Response) -> None:
        """Read the body of a streamed answer."""
        ...

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body of a streamed answer as it comes."""
        ...

    def messages(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        """The server-sent events of a streamed answer as they come."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Pause."""
        ...

    async def call(self, work: Callable[[], T]) -> T:
        """The result of work that takes long without waiting for anything."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class AsyncTransport:
    """With asyncio."""

    def __init__(self, options: Options) -> None:
        self._http = httpx.AsyncClient(**options)

    async def request(self, method: str, url: str, **request: Any) -> httpx.Response:
        return await self._http.request(method, url, **request)

    def stream(self, method: str, url: str, **request: Any) -> AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream(method, url, **request)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes(READ_BYTES)

    def messages(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        return EventSource(response).aiter_sse()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def call(self, work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work)

    async def close(self) -> None:
        await self._http.aclose()


class BlockingTransport:
    """Without an event loop: whatever takes time, blocks."""

    def __init__(self, options: Options) -> None:
        self._http = httpx.Client(**options)

    async def request(self, method: str, url: str, **request: Any) -> httpx.Response:
        return self._http.request(method, url, **request)

    @asynccontextmanager
    async def stream(self, method: str, url: str, **request: Any) -> AsyncIterator[httpx.Response]:
        with self._http.stream(method, url, **request) as response:
            yield response

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes(READ_BYTES):
            yield chunk

    async def messages(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        for message in EventSource(response).iter_sse():
            yield message

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def call(self, work: Callable[[], T]) -> T:
        return work()

    async def close(self) -> None:
        self._http.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine on a `BlockingTransport`."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("a blocking client cannot wait for an event loop")


def iterate(items: AsyncGenerator[T]) -> Iterator[T]:
    """What an asynchronous generator on a `BlockingTransport` yields."""
    try:
        while True:
            try:
                yield run(items.__anext__())
            except StopAsyncIteration:
                return
    finally:
        run(items.aclose())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
