"""The Python client of the HTTP interface."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from httpx_sse import EventSource

from service.contract.errors import Problem
from service.contract.jobs import Artifact, Event, Job, JobStatus, Page, StageName
from service.contract.spec import JobSpec

FINAL_EVENTS = {"job.succeeded", "job.failed", "job.cancelled"}
PATIENCE_S = 60.0
"""How long a stream keeps trying to reach a gateway that went away."""
READ_BYTES = 1 << 20


class ServiceError(Exception):
    """The service refused a request; `problem` is its RFC 9457 answer."""

    def __init__(self, problem: Problem) -> None:
        where = f" ({problem.param})" if problem.param else ""
        super().__init__(f"{problem.title}{where}: {problem.detail}")
        self.problem = problem


class ServiceUnreachable(Exception):
    """Nothing that speaks this interface answers at the URL."""


class CorruptDownload(Exception):
    """A downloaded file's SHA-256 is not the recorded one."""


class Client:
    """Talks to one service. A context manager; also usable from notebooks without `with`.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     job = client.create({"model": "reference", "prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 4}})
    ...     for event in client.events(job.id):
    ...         print(event.message)

    Every method raises ServiceError for what the service refuses and ServiceUnreachable when it does not answer.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, follow_redirects=True)

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
        """Submit a job."""
        body = spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)
        return Job.model_validate(self._json("POST", "/v1/jobs", json=body))

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return Job.model_validate(self._json("GET", f"/v1/jobs/{job_id}"))

    def jobs(self, *, limit: int = 20, after: str | None = None, status: JobStatus | None = None) -> Page[Job]:
        """A page of jobs, newest first."""
        wanted = {"limit": limit, "after": after, "status": status}
        params = {name: value for name, value in wanted.items() if value is not None}
        return Page[Job].model_validate(self._json("GET", "/v1/jobs", params=params))

    def cancel(self, job_id: str) -> Job:
        """Ask the service to stop a job."""
        return Job.model_validate(self._json("POST", f"/v1/jobs/{job_id}/cancel"))

    def artifacts(self, job_id: str, *, stage: StageName | None = None) -> Iterator[Artifact]:
        """Every artifact of a job, page by page."""
        params: dict[str, Any] = {"limit": 100} | ({"stage": stage.value} if stage else {})
        while True:
            page = Page[Artifact].model_validate(self._json("GET", f"/v1/jobs/{job_id}/artifacts", params=params))
            yield from page.data
            if not page.has_more:
                return
            params["after"] = page.last_id

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The job's events above number `after` as they happen, until its last.

        A connection that breaks is taken up again where it ended, for up to `PATIENCE_S` without an answer.
        """
        silent_since = time.monotonic()
        while True:
            try:
                for event in self._stream(job_id, after):
                    after, silent_since = event.number, time.monotonic()
                    yield event
                    if event.type in FINAL_EVENTS:
                        return
                if JobStatus(self.get(job_id).status).final:
                    return
            except (httpx.TransportError, ServiceUnreachable) as error:
                if time.monotonic() - silent_since > PATIENCE_S:
                    raise ServiceUnreachable(f"{self._url} has not answered for {PATIENCE_S:.0f} s: {error}") from error
                time.sleep(0.5)

    def _stream(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers, timeout=60) as response:
            if response.status_code == 204:
                return
            if not response.is_success:
                response.read()
                raise self._refusal(response)
            for message in EventSource(response).iter_sse():
                yield Event.model_validate_json(message.data)

    def download(
        self, job_id: str, artifact: Artifact, path: Path, *, on_bytes: Callable[[int], None] = lambda count: None
    ) -> Path:
        """Download an artifact to `path`, which appears only when it is whole; an interrupted download goes on.

        Raises: CorruptDownload when the content's SHA-256 is not the recorded one; what was downloaded is deleted.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{artifact.sha256[:12]}.partial")
        start = partial.stat().st_size if partial.exists() else 0
        if start > artifact.size:
            partial.unlink()
            start = 0
        on_bytes(start)
        if start < artifact.size or artifact.size == 0:
            self._append(f"/v1/jobs/{job_id}/artifacts/{artifact.id}/content", partial, start, on_bytes)
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != artifact.sha256:
            partial.unlink()
            raise CorruptDownload(f"{artifact.name}: downloaded SHA-256 {found}, recorded {artifact.sha256}; try again")
        return partial.replace(path)

    def _append(self, url: str, partial: Path, start: int, on_bytes: Callable[[int], None]) -> None:
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                with partial.open("ab" if response.status_code == 206 else "wb") as file:
                    for piece in response.iter_bytes(READ_BYTES):
                        file.write(piece)
                        on_bytes(len(piece))
        except httpx.TransportError as error:
            raise ServiceUnreachable(f"the download broke off: {error}; run it again to go on") from error

    def ready(self) -> bool:
        """Whether the service answers and says that it can take jobs."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.TransportError:
            return False

    def _json(self, method: str, url: str, **request: Any) -> Any:
        try:
            response = self._http.request(method, url, **request)
        except httpx.TransportError as error:
            raise ServiceUnreachable(
                f"{self._url} does not answer ({error}); start the service with `pdtrim up`, or give its --url"
            ) from error
        if not response.is_success:
            raise self._refusal(response)
        return response.json()

    def _refusal(self, response: httpx.Response) -> ServiceError | ServiceUnreachable:
        if response.headers.get("Content-Type", "").startswith("application/problem+json"):
            return ServiceError(Problem.model_validate_json(response.content))
        return ServiceUnreachable(f"{self._url} answered {response.status_code}, but not as PDTrim Service does")
