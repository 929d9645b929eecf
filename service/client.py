"""The Python client of the HTTP interface."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ValidationError

from service.client_webhooks import Webhooks
from service.contract.errors import Problem, RequestInFlight
from service.contract.jobs import Artifact, Event, Job, JobStatus, Page, StageName
from service.contract.spec import JobSpec

Answer = TypeVar("Answer", bound=BaseModel)
FINAL_EVENTS = {"job.succeeded", "job.failed", "job.cancelled"}
"""With one of these as the last, the stream ended because the job did. A resumed job has such in its middle, too."""
PATIENCE_S = 60.0
"""How long streams and downloads keep trying to reach a service that went away."""
RETRY_S = 0.5
PASSING_STATUSES = {502, 503, 504}
SAFE = {"GET", "HEAD"}
LOST = (httpx.ReadError, httpx.ReadTimeout, httpx.WriteError, httpx.WriteTimeout, httpx.RemoteProtocolError)
"""What breaks a request that may have arrived."""
READ_BYTES = 1 << 16


class ClientError(Exception):
    """What every method of the client raises, in one of the kinds below."""


class ServiceError(ClientError):
    """The service refused a request; `problem` is its RFC 9457 answer.

    `retry_after` is how many seconds later, as it says, it is worth trying again.
    """

    def __init__(self, problem: Problem, *, retry_after: float | None = None) -> None:
        where = f" ({problem.param})" if problem.param else ""
        super().__init__(f"{problem.title}{where}: {problem.detail}")
        self.problem = problem
        self.retry_after = retry_after


class ServiceUnreachable(ClientError):
    """Nothing answers at the URL, or only a proxy that finds nothing behind it."""


class AnswerLost(ServiceUnreachable):
    """The connection broke after the request went out: what it asked for may have been done."""


class UnexpectedAnswer(ClientError):
    """Something answers at the URL, but not as this service does."""


class CorruptDownload(ClientError):
    """A downloaded file's SHA-256 is not the recorded one."""


class _Patience:
    """How long the service has been out of reach, or has asked to wait, without a break."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._seconds = url, seconds
        self._silent_since: float | None = None

    def heard(self) -> None:
        self._silent_since = None

    def wait(self, error: Exception) -> None:
        """Pause before the next try. Raises: ServiceUnreachable after too many; a limit that asks for too long."""
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        waited_s, pause_s = now - self._silent_since, RETRY_S
        if isinstance(error, ServiceError) and _is_limit(error):
            pause_s = max(RETRY_S, error.retry_after or 0.0)
            if waited_s + pause_s > self._seconds:
                raise error
        elif waited_s > self._seconds:
            raise ServiceUnreachable(f"{self._url} has not answered for {self._seconds:.0f} s: {error}") from error
        time.sleep(pause_s)


class Client:
    """Talks to one service. A context manager; also usable from notebooks without `with`.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     job = client.create({"model": "reference", "prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 4}})
    ...     for event in client.events(job.id):
    ...         print(event.message)

    Every method raises ServiceError for what the service refuses, ServiceUnreachable when nothing answers, and
    UnexpectedAnswer when something else does. A limit (429) is waited for, within `patience_s`, where sending again is
    safe: on reading, and on `create`. Raises: ValueError for what is no http(s) URL.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, patience_s: float = PATIENCE_S
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is no URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url!r} is no URL of a service; it looks like http://127.0.0.1:8000")
        self._url = url.rstrip("/")
        self._patience_s = patience_s
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=timeout_s,
            follow_redirects=True,
            # HTTP_PROXY is set on many machines, and no proxy reaches this one's own loopback.
            trust_env=not _is_loopback(parsed.host),
        )
        self.webhooks = Webhooks(self._fetch, self._ask)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def create(self, spec: JobSpec | Mapping[str, Any]) -> Job:
        """Submit a job. What was lost on its way, or came too early, is sent again, which never makes a second job."""
        body = spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)
        headers = {"Idempotency-Key": f'"{uuid4()}"'}
        patience = _Patience(self._url, self._patience_s)
        lost = False
        while True:
            try:
                return self._fetch(Job, "POST", "/v1/jobs", json=body, headers=headers)
            except ClientError as error:
                lost = lost or isinstance(error, AnswerLost)
                if not _is_limit(error) and not (lost and (_may_pass(error) or _in_flight(error))):
                    raise
                patience.wait(error)

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return self._fetch(Job, "GET", _job_path(job_id))

    def jobs(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        status: JobStatus | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[Job]:
        """A page of jobs, newest first; only those with every label of `metadata`."""
        wanted: dict[str, Any] = {"limit": limit, "after": after, "status": status}
        params = {name: value for name, value in wanted.items() if value is not None}
        params |= {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._fetch(Page[Job], "GET", "/v1/jobs", params=params)

    def cancel(self, job_id: str) -> Job:
        """Ask the service to stop a job."""
        return self._fetch(Job, "POST", f"{_job_path(job_id)}/cancel")

    def pause(self, job_id: str) -> Job:
        """Ask the service to stop a job until it is resumed."""
        return self._fetch(Job, "POST", f"{_job_path(job_id)}/pause")

    def resume(self, job_id: str) -> Job:
        """Have a paused, failed or cancelled job go on from its last saved state."""
        return self._fetch(Job, "POST", f"{_job_path(job_id)}/resume")

    def delete(self, job_id: str) -> None:
        """Delete a finished or paused job with its events and artifacts, for good."""
        self._ask("DELETE", _job_path(job_id))

    def artifacts(self, job_id: str, *, stage: StageName | None = None) -> Iterator[Artifact]:
        """Every artifact of a job, page by page."""
        params: dict[str, Any] = {"limit": 100} | ({"stage": stage.value} if stage else {})
        while True:
            page = self._fetch(Page[Artifact], "GET", f"{_job_path(job_id)}/artifacts", params=params)
            yield from page.data
            if not page.has_more:
                return
            params["after"] = page.last_id

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The job's events above number `after` as they happen, until its last.

        A connection that breaks is taken up again after the last event that came. A paused job is waited for.
        """
        patience = _Patience(self._url, self._patience_s)
        while True:
            try:
                last = None
                for event in self._stream(job_id, after, patience):
                    after, last = event.number, event.type
                    yield event
                if last in FINAL_EVENTS or JobStatus(self.get(job_id).status).final:
                    return
                time.sleep(RETRY_S)
            except (httpx.RequestError, ClientError) as error:
                if not _may_pass(error):
                    raise
                patience.wait(error)

    def _stream(self, job_id: str, after: int, patience: _Patience) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream("GET", f"{_job_path(job_id)}/events", headers=headers, timeout=60) as response:
            if response.status_code == 204:
                return
            if not response.is_success:
                response.read()
                raise self._refusal(response)
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise self._unexpected()
            patience.heard()
            for message in EventSource(response).iter_sse():
                # A keep-alive comment comes out of the parser as a message without data.
                if message.data:
                    yield self._read(Event, message.data)

    def download(
        self, job_id: str, artifact: Artifact, path: Path, *, on_bytes: Callable[[int], None] = lambda held: None
    ) -> Path:
        """Download an artifact to `path`, which appears only when it is whole; an interrupted download goes on.

        A file at `path` that is the artifact already is left alone. `on_bytes` hears how many bytes are there.
        Raises: CorruptDownload when the content's SHA-256 is not the recorded one; what was downloaded is deleted.
        """
        if path.is_file() and path.stat().st_size == artifact.size and _sha256(path) == artifact.sha256:
            on_bytes(artifact.size)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{artifact.sha256[:12]}.partial")
        partial.touch()
        if partial.stat().st_size > artifact.size:
            partial.unlink()
            partial.touch()
        patience = _Patience(self._url, self._patience_s)
        while (held := partial.stat().st_size) < artifact.size:
            try:
                self._append(f"{_job_path(job_id)}/artifacts/{artifact.id}/content", partial, on_bytes)
            except (httpx.RequestError, ClientError) as error:
                if not _may_pass(error):
                    raise
                if partial.stat().st_size > held:
                    patience.heard()
                patience.wait(error)
            else:
                break
        found = _sha256(partial)
        if found != artifact.sha256:
            partial.unlink()
            raise CorruptDownload(f"{artifact.name}: downloaded SHA-256 {found}, recorded {artifact.sha256}; try again")
        on_bytes(artifact.size)
        return partial.replace(path)

    def _append(self, url: str, partial: Path, on_bytes: Callable[[int], None]) -> None:
        held = partial.stat().st_size
        # Ranges count encoded bytes, so nothing may be compressed on the way.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
        with self._http.stream("GET", url, headers=headers) as response:
            if not response.is_success:
                response.read()
                raise self._refusal(response)
            with partial.open("ab" if response.status_code == 206 else "wb") as file:
                held = file.tell()
                for piece in response.iter_bytes(READ_BYTES):
                    file.write(piece)
                    held += len(piece)
                    on_bytes(held)

    def ready(self) -> bool:
        """Whether the service answers and says that it can take jobs."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.RequestError:
            return False

    def _fetch(self, kind: type[Answer], method: str, url: str, **request: Any) -> Answer:
        return self._read(kind, self._ask(method, url, **request).content)

    def _ask(self, method: str, url: str, **request: Any) -> httpx.Response:
        patience = _Patience(self._url, self._patience_s)
        while True:
            try:
                return self._ask_once(method, url, **request)
            except ServiceError as error:
                if method not in SAFE or not _is_limit(error):
                    raise
                patience.wait(error)

    def _ask_once(self, method: str, url: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, url, **request)
        except httpx.RequestError as error:
            kind_of_silence = AnswerLost if isinstance(error, LOST) else ServiceUnreachable
            raise kind_of_silence(
                f"{self._url} does not answer ({error}); start the service with `pdtrim up`, or give its --url"
            ) from error
        if not response.is_success:
            raise self._refusal(response)
        return response

    def _read(self, kind: type[Answer], content: bytes | str) -> Answer:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise self._unexpected() from error

    def _unexpected(self) -> UnexpectedAnswer:
        return UnexpectedAnswer(f"{self._url} does not answer as PDTrim Service does; is it the right URL?")

    def _refusal(self, response: httpx.Response) -> ClientError:
        if response.headers.get("Content-Type", "").startswith("application/problem+json"):
            return ServiceError(self._read(Problem, response.content), retry_after=_seconds(response.headers))
        # A presigned link carries its credentials in the query.
        where = response.url.copy_with(query=None)
        if response.status_code in PASSING_STATUSES:
            # 503 comes from a proxy that passed nothing on; after 502 and 504 the service may have acted.
            kind_of_silence = ServiceUnreachable if response.status_code == 503 else AnswerLost
            return kind_of_silence(f"{where} answered {response.status_code}: nothing works behind it now")
        return UnexpectedAnswer(f"{where} answered {response.status_code}, but not as PDTrim Service does")


def _may_pass(error: Exception) -> bool:
    """Whether the next try may fare better."""
    if isinstance(error, ServiceError):
        return error.problem.status in PASSING_STATUSES or _is_limit(error)
    return isinstance(error, httpx.RequestError | ServiceUnreachable)


def _is_limit(error: Exception) -> bool:
    return isinstance(error, ServiceError) and error.problem.status == 429


def _seconds(headers: httpx.Headers) -> float | None:
    """`Retry-After`, where it is a number of seconds (our service sends no dates)."""
    given = headers.get("Retry-After", "")
    return float(given) if given.isdecimal() else None


def _in_flight(error: Exception) -> bool:
    return isinstance(error, ServiceError) and error.problem.code == RequestInFlight.code


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
