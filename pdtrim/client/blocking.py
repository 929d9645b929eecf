"""`Client`: the requests of `pdtrim.client.core`, each of which blocks until it is answered."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import PrivateAttr

from pdtrim.client.core import PATIENCE_S, Jobs, Sender
from pdtrim.client.notebook import NotebookJob
from pdtrim.client.transports import BlockingTransport, address, iterate, options, run
from pdtrim.client.webhooks import WebhookCalls
from pdtrim.contract.jobs import Page

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    request: Callable[Concatenate[Jobs[ClientJob], P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    @wraps(request)
    def ask(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(request(client._jobs, *args, **kwargs))

    return ask


def _iterating(
    request: Callable[Concatenate[Jobs[ClientJob], P], AsyncGenerator[T]],
) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @wraps(request)
    def ask(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate(request(client._jobs, *args, **kwargs))

    return ask


def _of_job(
    request: Callable[Concatenate[Jobs[ClientJob], str, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ClientJob, P], T]:
    @wraps(request)
    def ask(job: ClientJob, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(request(job._jobs, job.id, *args, **kwargs))

    return without_id(ask)


def _iterating_of_job(
    request: Callable[Concatenate[Jobs[ClientJob], str, P], AsyncGenerator[T]],
) -> Callable[Concatenate[ClientJob, P], Iterator[T]]:
    @wraps(request)
    def ask(job: ClientJob, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate(request(job._jobs, job.id, *args, **kwargs))

    return without_id(ask)


def _of_webhooks(
    request: Callable[Concatenate[WebhookCalls, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Webhooks, P], T]:
    @wraps(request)
    def ask(webhooks: Webhooks, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(request(webhooks._calls, *args, **kwargs))

    return ask


F = TypeVar("F", bound=Callable[..., Any])


def without_id(ask: F) -> F:
    """The function, which tells `help` that it takes no `job_id`: the job is the one it is called on."""
    signature = inspect.signature(ask)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "job_id"]
    ask.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return ask


class _JobMethods:
    """Apart from the model, whose attributes are its fields."""

    refresh = _of_job(Jobs["ClientJob"].get)
    wait = _of_job(Jobs["ClientJob"].wait)
    events = _iterating_of_job(Jobs["ClientJob"].events)
    cancel = _of_job(Jobs["ClientJob"].cancel)
    pause = _of_job(Jobs["ClientJob"].pause)
    resume = _of_job(Jobs["ClientJob"].resume)
    delete = _of_job(Jobs["ClientJob"].delete)
    frontier = _of_job(Jobs["ClientJob"].frontier)
    export = _of_job(Jobs["ClientJob"].export)
    manifests = _of_job(Jobs["ClientJob"].manifests)
    artifacts = _iterating_of_job(Jobs["ClientJob"].artifacts)
    download = _of_job(Jobs["ClientJob"].download_all)


class ClientJob(_JobMethods, NotebookJob):
    """A job as it was when it was fetched. Its methods ask the service, and return the job as it is then.

    >>> job = client.create(spec).wait(progress=True)
    >>> job.frontier().decode[-1].loss
    >>> job.export(prefill=2, decode=3).wait().download("model", only="decode/")
    """

    _jobs: Jobs[ClientJob] = PrivateAttr()


class Webhooks:
    """Webhooks of the key's project. Methods raise what those of the client raise."""

    def __init__(self, calls: WebhookCalls) -> None:
        self._calls = calls

    create = _of_webhooks(WebhookCalls.create)
    page = _of_webhooks(WebhookCalls.page)
    get = _of_webhooks(WebhookCalls.get)
    update = _of_webhooks(WebhookCalls.update)
    delete = _of_webhooks(WebhookCalls.delete)
    rotate_secret = _of_webhooks(WebhookCalls.rotate_secret)
    test = _of_webhooks(WebhookCalls.test)
    deliveries = _of_webhooks(WebhookCalls.deliveries)
    resend = _of_webhooks(WebhookCalls.resend)


class Client:
    """Talks to one service. A context manager; also usable from notebooks without `with`.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     job = client.create({"model": "reference", "prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 4}})
    ...     job = job.wait(progress=True)  # Raises JobFailed, with what to do about it.
    ...     job.download("model", only="decode/")

    The service is at `url`, by default where PDTRIM_URL says or on this machine; the key is `api_key`, by default
    PDTRIM_API_KEY.

    Every method raises ServiceError for what the service refuses, ServiceUnreachable when nothing answers, and
    UnexpectedAnswer when something else does. A limit (429) is waited for, within `patience_s`, where sending again is
    safe: on reading, on `create`, and on `export`. Raises: ValueError for what is no http(s) URL.
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
        sender = Sender(BlockingTransport(options(url, api_key, timeout_s)), url, patience_s)
        self._url = sender.url
        self._jobs = Jobs(sender, ClientJob, Page[ClientJob], self._adopt)
        self.webhooks = Webhooks(WebhookCalls(sender))

    def _adopt(self, job: ClientJob) -> None:
        job._jobs = self._jobs

    def __repr__(self) -> str:
        return f"Client({self._url!r})"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    create = _blocking(Jobs[ClientJob].create)
    estimate = _blocking(Jobs[ClientJob].estimate)
    get = _blocking(Jobs[ClientJob].get)
    jobs = _iterating(Jobs[ClientJob].jobs)
    page = _blocking(Jobs[ClientJob].page)
    wait = _blocking(Jobs[ClientJob].wait)
    events = _iterating(Jobs[ClientJob].events)
    cancel = _blocking(Jobs[ClientJob].cancel)
    pause = _blocking(Jobs[ClientJob].pause)
    resume = _blocking(Jobs[ClientJob].resume)
    delete = _blocking(Jobs[ClientJob].delete)
    frontier = _blocking(Jobs[ClientJob].frontier)
    manifests = _blocking(Jobs[ClientJob].manifests)
    export = _blocking(Jobs[ClientJob].export)
    artifacts = _iterating(Jobs[ClientJob].artifacts)
    download = _blocking(Jobs[ClientJob].download)
    download_all = _blocking(Jobs[ClientJob].download_all)
    ready = _blocking(Jobs[ClientJob].ready)
    close = _blocking(Jobs[ClientJob].close)
