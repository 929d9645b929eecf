"""`AsyncClient`: the requests of `pdtrim.client.core` as they are, for an event loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from pydantic import PrivateAttr

from pdtrim.client.blocking import without_id
from pdtrim.client.core import PATIENCE_S, Jobs, Sender
from pdtrim.client.notebook import NotebookJob
from pdtrim.client.transports import AsyncTransport, address, options
from pdtrim.client.webhooks import WebhookCalls
from pdtrim.contract.jobs import Page

P = ParamSpec("P")
T = TypeVar("T")


def _of_job(
    request: Callable[Concatenate[Jobs[AsyncClientJob], str, P], T],
) -> Callable[Concatenate[AsyncClientJob, P], T]:
    @wraps(request)
    def ask(job: AsyncClientJob, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return request(job._jobs, job.id, *args, **kwargs)

    return without_id(ask)


class _JobMethods:
    """Apart from the model, whose attributes are its fields."""

    refresh = _of_job(Jobs["AsyncClientJob"].get)
    wait = _of_job(Jobs["AsyncClientJob"].wait)
    events = _of_job(Jobs["AsyncClientJob"].events)
    cancel = _of_job(Jobs["AsyncClientJob"].cancel)
    pause = _of_job(Jobs["AsyncClientJob"].pause)
    resume = _of_job(Jobs["AsyncClientJob"].resume)
    delete = _of_job(Jobs["AsyncClientJob"].delete)
    frontier = _of_job(Jobs["AsyncClientJob"].frontier)
    export = _of_job(Jobs["AsyncClientJob"].export)
    manifests = _of_job(Jobs["AsyncClientJob"].manifests)
    artifacts = _of_job(Jobs["AsyncClientJob"].artifacts)
    download = _of_job(Jobs["AsyncClientJob"].download_all)


class AsyncClientJob(_JobMethods, NotebookJob):
    """As `ClientJob`, with methods to be awaited; `events` and `artifacts` are for `async for`."""

    _jobs: Jobs[AsyncClientJob] = PrivateAttr()


class AsyncClient(Jobs[AsyncClientJob]):
    """As `Client`, with methods to be awaited; `jobs`, `events` and `artifacts` are for `async for`.

    >>> async with AsyncClient("http://127.0.0.1:8000") as client:
    ...     job = await client.create(spec)
    ...     async for event in job.events():
    ...         print(event.message)
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        url, api_key = address(url, api_key)
        sender = Sender(AsyncTransport(options(url, api_key, timeout_s)), url, patience_s)
        super().__init__(sender, AsyncClientJob, Page[AsyncClientJob], self._own)
        self.webhooks = WebhookCalls(sender)

    def _own(self, job: AsyncClientJob) -> None:
        job._jobs = self

    def __repr__(self) -> str:
        return f"AsyncClient({self._sender.url!r})"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
