"""Every request of the client, once: coroutines on a wire that `Client` and `AsyncClient` offer in their own ways."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import BaseModel, ValidationError

from pdtrim.client.errors import (
    RETRY_S,
    AnswerLost,
    ClientError,
    CorruptDownload,
    JobFailed,
    NothingToDownload,
    Patience,
    ServiceError,
    UnsafeName,
    is_in_flight,
    is_limit,
    may_pass,
    refusal,
    silence,
    unexpected,
)
from pdtrim.client.notebook import NotebookEstimate, NotebookFrontier, live_progress
from pdtrim.client.transports import Transport
from pdtrim.contract.checkpoints import checkpoint_files
from pdtrim.contract.jobs import Artifact, Event, Job, JobStatus, Page, StageName
from pdtrim.contract.manifests import Runtime
from pdtrim.contract.spec import JobSpec

Answer = TypeVar("Answer", bound=BaseModel)
J = TypeVar("J", bound=Job)
FINAL_EVENTS = {"job.succeeded", "job.failed", "job.cancelled"}
"""With one of these as the last, the stream ended because the job did. A resumed job has such in its middle, too."""
PATIENCE_S = 60.0
"""How long streams and downloads keep trying to reach a service that went away."""
STREAM_TIMEOUT_S = 60.0
SAFE = {"GET", "HEAD"}
PAGE = 100


class Sender:
    """Sends requests over a wire and reads the answers. Raises: ClientError, in one of its kinds."""

    def __init__(self, wire: Transport, url: str, patience_s: float) -> None:
        self.wire = wire
        self.url = url.rstrip("/")
        self._patience_s = patience_s

    def patience(self) -> Patience:
        """As much as there is, for one undertaking."""
        return Patience(self.url, self._patience_s)

    async def fetch(self, kind: type[Answer], method: str, path: str, **request: Any) -> Answer:
        """The answer as a model."""
        return self.read(kind, (await self.ask(method, path, **request)).content)

    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer. A limit is waited for where sending again is safe."""
        patience = self.patience()
        while True:
            try:
                return await self._ask_once(method, path, **request)
            except ServiceError as error:
                if method not in SAFE or not is_limit(error):
                    raise
                await self.wire.sleep(patience.pause_s(error))

    async def submit(self, kind: type[Answer], path: str, body: Any, key: str | None) -> Answer:
        """The answer to a POST that may be sent again: it carries an Idempotency-Key, a fresh one unless given.

        What was lost on its way, or came too early, is sent again.
        """
        headers = {"Idempotency-Key": f'"{key or uuid4()}"'}
        patience = self.patience()
        lost = False
        while True:
            try:
                return await self.fetch(kind, "POST", path, json=body, headers=headers)
            except ClientError as error:
                lost = lost or isinstance(error, AnswerLost)
                if not is_limit(error) and not (lost and (may_pass(error) or is_in_flight(error))):
                    raise
                await self.wire.sleep(patience.pause_s(error))

    async def _ask_once(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = await self.wire.request(method, path, **request)
        except httpx.RequestError as error:
            raise silence(self.url, error) from error
        if not response.is_success:
            raise refusal(self.url, response)
        return response

    def read(self, kind: type[Answer], content: bytes | str) -> Answer:
        """The content as a model. Raises: UnexpectedAnswer."""
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise unexpected(self.url) from error


class _NothingLeft(Exception):
    """The job is over, and all its events have come."""


class Jobs(Generic[J]):
    """All about jobs, which are handed out as `kind`, after `adopt` has seen them."""

    def __init__(self, sender: Sender, kind: type[J], page: type[Page[J]], adopt: Callable[[J], None]) -> None:
        self._sender, self._kind, self._page, self._adopt = sender, kind, page, adopt

    async def create(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> J:
        """Submit a job. What was lost on its way, or came too early, is sent again, which never makes a second job.

        With an `idempotency_key` of your own, neither does a second call within 24 hours.
        """
        return await self._submit("/v1/jobs", said(spec), idempotency_key)

    async def estimate(self, spec: JobSpec | Mapping[str, Any]) -> NotebookEstimate:
        """What a job would make and take; it is checked as by `create`, and not submitted."""
        return await self._sender.fetch(NotebookEstimate, "POST", "/v1/jobs/estimate", json=said(spec))

    async def get(self, job_id: str) -> J:
        """The job as it is now."""
        return await self._fetch("GET", job_path(job_id))

    async def jobs(
        self, *, status: JobStatus | None = None, metadata: Mapping[str, str] | None = None
    ) -> AsyncGenerator[J]:
        """Every job, newest first, page by page; only those in a state, and with every label of `metadata`."""
        after: str | None = None
        while True:
            page = await self.page(limit=PAGE, after=after, status=status, metadata=metadata)
            for job in page.data:
                yield job
            if not page.has_more:
                return
            after = page.last_id

    async def page(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        status: JobStatus | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[J]:
        """A page of jobs, newest first; read on with `after` set to its `last_id` while `has_more` is true."""
        params = given(limit=limit, after=after, status=status)
        params |= {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        page = await self._sender.fetch(self._page, "GET", "/v1/jobs", params=params)
        for job in page.data:
            self._adopt(job)
        return page

    async def cancel(self, job_id: str) -> J:
        """Ask the service to stop a job."""
        return await self._fetch("POST", f"{job_path(job_id)}/cancel")

    async def pause(self, job_id: str) -> J:
        """Ask the service to stop a job until it is resumed."""
        return await self._fetch("POST", f"{job_path(job_id)}/pause")

    async def resume(self, job_id: str) -> J:
        """Have a paused, failed or cancelled job go on from its last saved state."""
        return await self._fetch("POST", f"{job_path(job_id)}/resume")

    async def delete(self, job_id: str) -> None:
        """Delete a finished or paused job with its events and artifacts, for good."""
        await self._sender.ask("DELETE", job_path(job_id))

    async def frontier(self, job_id: str) -> NotebookFrontier:
        """The best loss that the job found for every number of removed blocks, with the sets."""
        return await self._sender.fetch(NotebookFrontier, "GET", f"{job_path(job_id)}/frontier")

    async def export(
        self,
        job_id: str,
        *,
        prefill: int,
        decode: int,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> J:
        """Cut another export from the job's frontier: a job that gives up so many blocks, sent as safely as `create`.

        Equal numbers give one checkpoint. By default it has the labels of the job.
        """
        counts: dict[str, Any] = {"prefill": {"remove_blocks": prefill}, "decode": {"remove_blocks": decode}}
        labels = {} if metadata is None else {"metadata": dict(metadata)}
        return await self._submit(f"{job_path(job_id)}/exports", counts | labels, idempotency_key)

    async def manifests(
        self,
        job_id: str,
        runtime: Runtime | str,
        *,
        device: str | None = None,
        sequences: int | None = None,
        tokens: int | None = None,
        image: str | None = None,
    ) -> str:
        """YAML that serves the job's checkpoints by a runtime, such as `compose` or `vllm` (plain Kubernetes)."""
        params = given(runtime=runtime, device=device, sequences=sequences, tokens=tokens, image=image)
        return (await self._sender.ask("GET", f"{job_path(job_id)}/manifests", params=params)).text

    async def wait(self, job_id: str, *, progress: bool | Callable[[Event], None] = False) -> J:
        """The job once it has succeeded; a paused one is waited for.

        With `progress`, bars (on a terminal or in a notebook) or lines show how far it is, or a function is told.
        Raises: JobFailed, which has the job, when it failed or was cancelled.
        """
        with live_progress() if progress is True else nullcontext(progress or _ignore) as show:
            async with aclosing(self.events(job_id)) as events:
                async for event in events:
                    show(event)
        ended = await self.get(job_id)
        if ended.status != JobStatus.SUCCEEDED:
            raise JobFailed(ended)
        return ended

    async def artifacts(self, job_id: str, *, stage: StageName | None = None) -> AsyncGenerator[Artifact]:
        """Every artifact of a job, page by page."""
        params = given(limit=PAGE, stage=stage)
        while True:
            page = await self._sender.fetch(Page[Artifact], "GET", f"{job_path(job_id)}/artifacts", params=params)
            for artifact in page.data:
                yield artifact
            if not page.has_more:
                return
            params["after"] = page.last_id

    async def events(self, job_id: str, *, after: int = 0) -> AsyncGenerator[Event]:
        """The job's events above number `after` as they happen, until its last.

        A connection that breaks is taken up again after the last event that came. A paused job is waited for.
        """
        patience = self._sender.patience()
        while True:
            try:
                last = None
                async with aclosing(self._stream(job_id, after, patience)) as stream:
                    async for event in stream:
                        after, last = event.number, event.type
                        yield event
                if last in FINAL_EVENTS:
                    return
                # It broke off: that the job is over by now does not say that all its events have come.
                await self._sender.wire.sleep(RETRY_S)
            except _NothingLeft:
                return
            except (httpx.RequestError, ClientError) as error:
                if not may_pass(error):
                    raise
                await self._sender.wire.sleep(patience.pause_s(error))

    async def _stream(self, job_id: str, after: int, patience: Patience) -> AsyncGenerator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        sender, wire = self._sender, self._sender.wire
        path = f"{job_path(job_id)}/events"
        async with wire.stream("GET", path, headers=headers, timeout=STREAM_TIMEOUT_S) as response:
            if response.status_code == 204:
                raise _NothingLeft
            if not response.is_success:
                await wire.read(response)
                raise refusal(sender.url, response)
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise unexpected(sender.url)
            patience.heard()
            async for message in wire.messages(response):
                # A keep-alive comment comes out of the parser as a message without data.
                if message.data:
                    yield sender.read(Event, message.data)

    async def download_all(
        self,
        job_id: str,
        folder: str | Path = ".",
        *,
        stage: StageName | None = None,
        only: str = "",
        on_bytes: Callable[[Artifact, int], None] = lambda artifact, held: None,
    ) -> list[Path]:
        """Download a job's checkpoints below `folder`, or what `stage` left; where the files are now.

        `only` takes files whose names begin with it (`decode/`), and `on_bytes` hears how many bytes of each are there.
        Raises: as `download`; before anything is downloaded, NothingToDownload and UnsafeName.
        """
        found = [file async for file in self.artifacts(job_id, stage=stage)]
        wanted = [file for file in (found if stage else checkpoint_files(found)) if file.name.startswith(only)]
        if not wanted:
            raise NothingToDownload(await self.get(job_id), "checkpoints" if stage is None else stage, only)
        targets = [_below(Path(folder), file.name) for file in wanted]
        for file, target in zip(wanted, targets, strict=True):
            await self.download(job_id, file, target, on_bytes=partial(on_bytes, file))
        return targets

    async def download(
        self, job_id: str, artifact: Artifact, path: Path, *, on_bytes: Callable[[int], None] = lambda held: None
    ) -> Path:
        """Download an artifact to `path`, which appears only when it is whole; an interrupted download goes on.

        A file at `path` that is the artifact already is left alone. `on_bytes` hears how many bytes are there.
        Raises: CorruptDownload when the content's SHA-256 is not the recorded one; what was downloaded is deleted.
        """
        if (
            path.is_file()
            and path.stat().st_size == artifact.size
            and await self._sender.wire.call(partial(_sha256, path)) == artifact.sha256
        ):
            on_bytes(artifact.size)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f".{path.name}.{artifact.sha256[:12]}.partial")
        partial_file.touch()
        if partial_file.stat().st_size > artifact.size:
            partial_file.unlink()
            partial_file.touch()
        patience = self._sender.patience()
        while (held := partial_file.stat().st_size) < artifact.size:
            try:
                await self._append(f"{job_path(job_id)}/artifacts/{artifact.id}/content", partial_file, on_bytes)
            except (httpx.RequestError, ClientError) as error:
                if not may_pass(error):
                    raise
                if partial_file.stat().st_size > held:
                    patience.heard()
                await self._sender.wire.sleep(patience.pause_s(error))
            else:
                break
        found = await self._sender.wire.call(partial(_sha256, partial_file))
        if found != artifact.sha256:
            partial_file.unlink()
            raise CorruptDownload(f"{artifact.name}: downloaded SHA-256 {found}, recorded {artifact.sha256}; try again")
        on_bytes(artifact.size)
        return partial_file.replace(path)

    async def _append(self, path: str, partial_file: Path, on_bytes: Callable[[int], None]) -> None:
        held = partial_file.stat().st_size
        wire = self._sender.wire
        # Ranges count encoded bytes, so nothing may be compressed on the way.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
        async with wire.stream("GET", path, headers=headers) as response:
            if not response.is_success:
                await wire.read(response)
                raise refusal(self._sender.url, response)
            with partial_file.open("ab" if response.status_code == 206 else "wb") as file:
                held = file.tell()
                async for chunk in wire.chunks(response):
                    file.write(chunk)
                    held += len(chunk)
                    on_bytes(held)

    async def ready(self) -> bool:
        """Whether the service answers and says that it can take jobs."""
        try:
            return (await self._sender.wire.request("GET", "/readyz")).is_success
        except httpx.RequestError:
            return False

    async def close(self) -> None:
        """Close the connections."""
        await self._sender.wire.close()

    async def _fetch(self, method: str, path: str) -> J:
        return self._adopted(await self._sender.fetch(self._kind, method, path))

    async def _submit(self, path: str, body: dict[str, Any], key: str | None) -> J:
        return self._adopted(await self._sender.submit(self._kind, path, body, key))

    def _adopted(self, job: J) -> J:
        self._adopt(job)
        return job


def said(body: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """What is sent of a body: what was set."""
    return body.model_dump(mode="json", exclude_unset=True) if isinstance(body, BaseModel) else dict(body)


def given(**params: Any) -> dict[str, Any]:
    """The parameters that are not None."""
    return {name: value for name, value in params.items() if value is not None}


def job_path(job_id: str) -> str:
    """Where a job is, whatever its id is made of."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _ignore(event: Event) -> None:
    """What is told to nobody."""


def _below(folder: Path, name: str) -> Path:
    """Where an artifact goes. A service may not choose a place outside the folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise UnsafeName(
            f"the service names an artifact {name!r}, which would lie outside {folder}; nothing was downloaded"
        )
    return folder / relative


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
