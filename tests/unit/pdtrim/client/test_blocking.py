from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent

from pdtrim.client import (
    Client,
    ClientError,
    CorruptDownload,
    JobFailed,
    NothingToDownload,
    ServiceError,
    ServiceUnreachable,
    UnexpectedAnswer,
    core,
)
from pdtrim.client.transports import BlockingTransport
from pdtrim.contract.errors import QueueQuotaExceeded
from pdtrim.contract.jobs import Artifact, ErrorInfo, JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.api import events as api_events
from service.api import problems
from service.settings import Settings
from tests.gateway import model
from tests.live_gateway import LiveGateway, live, relay
from tests.processes import wait_until
from tests.servers import free_ports

pytestmark = pytest.mark.server

__all__ = ["model"]


@pytest.fixture
def gateway(tmp_path: Path, model: Path) -> Iterator[LiveGateway]:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as running:
        yield running


@pytest.fixture
def client(gateway: LiveGateway) -> Iterator[Client]:
    with Client(gateway.url, patience_s=20) as connected:
        yield connected


def exported(gateway: LiveGateway, client: Client, content: bytes) -> tuple[str, Artifact]:
    """A job with one exported file."""
    job_id = gateway.played.create()
    for stage in StageName:
        files = {"decode/model.safetensors": content} if stage == StageName.EXPORT else {}
        gateway.played.store(job_id, stage, files)
    (artifact,) = client.artifacts(job_id)
    return job_id, artifact


def test_jobs_are_created_shown_listed_and_cancelled(gateway: LiveGateway, client: Client) -> None:
    spec = JobSpec.model_validate({**gateway.played.spec, "metadata": {"team": "serving"}})

    first = client.create(spec)
    second = client.create(gateway.played.spec)
    cancelled = client.cancel(second.id)

    assert client.get(first.id).spec == spec
    assert [job.id for job in client.page().data] == [second.id, first.id]
    assert [job.id for job in client.page(limit=1, after=second.id).data] == [first.id]
    assert [job.id for job in client.page(status=JobStatus.CANCELLED).data] == [second.id]
    assert [job.id for job in client.page(metadata={"team": "serving"}).data] == [first.id]
    assert cancelled.status == JobStatus.CANCELLED


def test_all_jobs_come_page_by_page(client: Client, gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "PAGE", 2)
    made = [client.create({**gateway.played.spec, "metadata": {"of": str(number % 2)}}).id for number in range(5)]

    assert [job.id for job in client.jobs()] == made[::-1]
    assert [job.id for job in client.jobs(metadata={"of": "0"})] == made[::-2]
    assert next(client.jobs()).cancel().status == JobStatus.CANCELLED


def test_waiting_for_a_job_that_fails_says_why_and_what_to_do(gateway: LiveGateway, client: Client) -> None:
    failed = client.create(gateway.played.spec)
    gateway.played.fail(failed.id, StageName.SCORING, ErrorInfo(code="out_of_memory", message="the GPU is full"))
    cancelled = client.create(gateway.played.spec).cancel()

    with pytest.raises(JobFailed, match=r"the GPU is full \(out_of_memory\) Resume it on a worker with more") as raised:
        failed.wait()
    assert (raised.value.code, raised.value.job.status) == ("out_of_memory", JobStatus.FAILED)
    with pytest.raises(JobFailed, match=f"{cancelled.id} was cancelled") as stopped:
        cancelled.wait()
    assert (stopped.value.code, stopped.value.remedy) == (None, None)
    with pytest.raises(NothingToDownload, match=f"{failed.id} is failed and has no file of its checkpoints"):
        failed.download()


def test_a_refusal_carries_the_problem(client: Client) -> None:
    with pytest.raises(ServiceError) as refused:
        client.create({"model": "reference", "prefill": {"remove_blocks": 3}, "decode": {"remove_blocks": 2}})

    problem = refused.value.problem
    assert (problem.status, problem.code, problem.param) == (422, "invalid_request", "prefill.remove_blocks")
    assert "prefill.remove_blocks" in str(refused.value)


def test_a_refusal_has_all_that_is_wrong(client: Client, gateway: LiveGateway) -> None:
    wrong = {"queue": "no-such", "evaluation": {"tasks": ["arc_easy"]}}
    with pytest.raises(ServiceError) as refused:
        client.create({**gateway.played.spec, **wrong})

    problem = refused.value.problem
    assert (problem.code, problem.param) == ("no_such_queue", "queue")
    assert [one.param for one in problem.errors or ()] == ["queue", "evaluation.tasks[0]"]
    assert "\n- queue: There is no queue 'no-such'" in str(refused.value)
    assert "\n- evaluation.tasks[0]: A task given by name reads a data set on the hub" in str(refused.value)


@pytest.mark.parametrize("job_id", ["job_1", "?", "../jobs", ""])
def test_an_id_stays_one_part_of_the_path(client: Client, job_id: str) -> None:
    with pytest.raises(ServiceError) as refused:
        client.get(job_id)

    assert refused.value.problem.status == 404


def test_a_key_is_sent(tmp_path: Path, model: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", api_key="secret", allowed_sources=["builtin:"])
    with live(settings, model) as gateway, Client(gateway.url) as keyless, Client(gateway.url, api_key="secret") as one:
        assert one.page().data == []
        with pytest.raises(ServiceError, match="API key"):
            keyless.page()


def test_the_environment_says_where_the_service_is_and_its_key(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PDTRIM_URL", raising=False)
    assert repr(Client()) == "Client('http://127.0.0.1:8000')"
    settings = Settings(data_dir=tmp_path / "data", api_key="secret", allowed_sources=["builtin:"])
    with live(settings, model) as gateway:
        monkeypatch.setenv("PDTRIM_URL", gateway.url)
        monkeypatch.setenv("PDTRIM_API_KEY", "secret")
        assert list(Client().jobs()) == []
        with pytest.raises(ServiceError, match="API key"):
            Client(api_key="another").page()


def test_a_proxy_is_not_asked_for_this_machine(gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_ports(1)[0]}")

    with Client(gateway.url) as client:
        assert client.ready()


def test_every_page_of_artifacts_is_read(gateway: LiveGateway, client: Client) -> None:
    job_id = gateway.played.create()
    names = [f"{number:03}.json" for number in range(101)]
    gateway.played.store(job_id, StageName.SCORING, dict.fromkeys(names, b"{}"))

    assert [artifact.name for artifact in client.artifacts(job_id)] == names
    assert list(client.artifacts(job_id, stage=StageName.EXPORT)) == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "nonsense"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no URL"):
        Client(url)


def test_a_service_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with Client(url, patience_s=0) as client:
        assert not client.ready()
        with pytest.raises(ServiceUnreachable, match=rf"{url} does not answer.*pdtrim up"):
            client.page()
        with pytest.raises(ServiceUnreachable, match=f"{url} has not answered"):
            list(client.events("job_1"))


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b"<html>", UnexpectedAnswer),
        (200, b'{"data": 1}', UnexpectedAnswer),
        (404, b"not here", UnexpectedAnswer),
        (502, b"bad gateway", ServiceUnreachable),
    ],
)
def test_another_server_at_the_url_is_told_from_a_proxy_before_the_service(
    status: int, body: bytes, error: type[ClientError]
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever).start()
        with Client(f"http://127.0.0.1:{server.server_port}", patience_s=0) as client:
            for ask in (client.page, lambda: list(client.events("job_1"))):
                with pytest.raises(error):
                    ask()
        server.shutdown()


def test_events_of_an_ended_job_are_read_to_the_last(gateway: LiveGateway, client: Client) -> None:
    job_id = gateway.played.create()
    gateway.played.run(job_id)

    found = list(client.events(job_id))

    assert [event.number for event in found] == list(range(1, len(found) + 1))
    assert found[-1].type == "job.succeeded"
    assert [event.number for event in client.events(job_id, after=3)] == [event.number for event in found[3:]]
    assert list(client.events(job_id, after=found[-1].number)) == []


def test_keep_alives_are_no_events(gateway: LiveGateway, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_events, "KEEP_ALIVE_SECONDS", 0.02)
    job_id = gateway.played.create()
    stream = client.events(job_id)
    first = next(stream)
    time.sleep(0.2)

    client.cancel(job_id)

    assert [first.type, *(event.type for event in stream)] == ["job.created", "job.cancelled"]


def test_a_resumed_job_is_followed_past_its_earlier_ends(gateway: LiveGateway, client: Client) -> None:
    job_id = gateway.played.create()
    client.cancel(job_id)
    client.resume(job_id)
    stream = client.events(job_id)
    found = [next(stream).type for _ in range(3)]
    assert client.pause(job_id).status == JobStatus.PAUSED
    assert client.resume(job_id).status == JobStatus.QUEUED
    gateway.played.run(job_id)

    found += [event.type for event in stream]

    assert found[:5] == ["job.created", "job.cancelled", "job.resumed", "job.paused", "job.resumed"]
    assert found[-1] == "job.succeeded"


def test_a_deleted_job_is_not_found(client: Client, gateway: LiveGateway) -> None:
    job_id = gateway.played.create()
    with pytest.raises(ServiceError, match="Possible now: pause, cancel"):
        client.delete(job_id)
    client.cancel(job_id)

    client.delete(job_id)

    for ask in (client.get, client.delete, client.resume, lambda job_id: list(client.events(job_id))):
        with pytest.raises(ServiceError) as refused:
            ask(job_id)
        assert refused.value.problem.code == "job_not_found"


def test_a_stream_goes_on_where_it_was_when_the_gateway_restarts(gateway: LiveGateway, client: Client) -> None:
    job_id = gateway.played.create()
    found = []

    for event in client.events(job_id):
        found.append(event)
        if event.type == "job.created":
            gateway.stop()
            held = gateway.played.claim(job_id, StageName.SCORING)
            threading.Timer(0.3, gateway.start).start()
        if event.type == "stage.started":
            gateway.stop()
            gateway.start()
            gateway.played.complete(held)
            client.cancel(job_id)

    assert [event.type for event in found] == ["job.created", "stage.started", "stage.succeeded", "job.cancelled"]
    assert [event.number for event in found] == [1, 2, 3, 4]


def test_a_stream_that_ends_early_is_taken_up_again_though_the_job_is_over(
    gateway: LiveGateway, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = gateway.played.create()
    client.cancel(job_id)
    whole, ends = BlockingTransport.messages, iter([True])

    async def first_ends_after_one(wire: BlockingTransport, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        async for message in whole(wire, response):
            yield message
            if next(ends, False):
                return

    monkeypatch.setattr(BlockingTransport, "messages", first_ends_after_one)
    assert [event.type for event in client.events(job_id)] == ["job.created", "job.cancelled"]


def test_a_create_whose_answer_is_lost_is_sent_again_and_makes_one_job(gateway: LiveGateway, client: Client) -> None:
    with relay(gateway.settings.port, break_after=[1, 40]) as broken, Client(broken.url, patience_s=20) as through:
        job = through.create(gateway.played.spec)

    assert [listed.id for listed in client.page().data] == [job.id]
    assert sum(request.startswith(b"POST /v1/jobs") for request in broken.requests) == 3


def test_every_create_makes_a_job_of_its_own(gateway: LiveGateway, client: Client) -> None:
    assert client.create(gateway.played.spec).id != client.create(gateway.played.spec).id


def test_a_create_whose_answers_are_all_lost_says_so(gateway: LiveGateway) -> None:
    with (
        relay(gateway.settings.port, break_after=[1] * 99) as broken,
        Client(broken.url, patience_s=1) as through,
        pytest.raises(ServiceUnreachable, match="has not answered"),
    ):
        through.create(gateway.played.spec)


def test_a_stream_goes_on_when_its_connection_breaks(gateway: LiveGateway) -> None:
    job_id = gateway.played.create()
    gateway.played.run(job_id)
    with relay(gateway.settings.port, break_after=[700, 900]) as broken, Client(broken.url, patience_s=20) as client:
        found = list(client.events(job_id))

    assert [event.number for event in found] == list(range(1, len(found) + 1))
    assert found[-1].type == "job.succeeded"
    assert sum(b"last-event-id" in request.lower() for request in broken.requests) == 3


def test_a_download_appears_whole_and_is_not_repeated(gateway: LiveGateway, client: Client, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    job_id, artifact = exported(gateway, client, content)
    target, heard = tmp_path / "to" / "model.safetensors", list[int]()

    client.download(job_id, artifact, target, on_bytes=heard.append)
    gateway.stop()
    client.download(job_id, artifact, target)
    gateway.start()

    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]
    assert heard == sorted(heard)
    assert heard[-1] == len(content)


def test_a_broken_download_goes_on_from_what_it_has(gateway: LiveGateway, client: Client, tmp_path: Path) -> None:
    content = os.urandom(2_000_000)
    job_id, artifact = exported(gateway, client, content)

    with relay(gateway.settings.port, break_after=[900_000]) as broken, Client(broken.url, patience_s=20) as through:
        through.download(job_id, artifact, tmp_path / "model")

    assert (tmp_path / "model").read_bytes() == content
    first, second = broken.requests
    assert b"Range: bytes=" not in first
    start = int(second.split(b"Range: bytes=")[1].split(b"-")[0])
    assert 500_000 < start <= 900_000


def test_a_later_run_goes_on_from_a_partial_file(gateway: LiveGateway, client: Client, tmp_path: Path) -> None:
    content = os.urandom(2_000_000)
    job_id, artifact = exported(gateway, client, content)
    with (
        relay(gateway.settings.port, break_after=[900_000]) as broken,
        Client(broken.url, patience_s=-1) as impatient,
        pytest.raises(ServiceUnreachable),
    ):
        impatient.download(job_id, artifact, tmp_path / "model")
    (partial,) = tmp_path.glob(".model.*.partial")
    held, heard = partial.stat().st_size, list[int]()

    client.download(job_id, artifact, tmp_path / "model", on_bytes=heard.append)

    assert held > 500_000
    assert heard[0] > held
    assert (tmp_path / "model").read_bytes() == content
    assert not partial.exists()


@pytest.mark.parametrize("held", [b"", b"x" * 500, b"x" * 1000, b"x" * 5000])
def test_a_corrupted_download_is_refused_whatever_was_held(
    gateway: LiveGateway, client: Client, tmp_path: Path, held: bytes
) -> None:
    job_id, artifact = exported(gateway, client, b"a" * 1000)
    target = tmp_path / "to" / "model"
    target.parent.mkdir()
    partial = target.with_name(f".model.{artifact.sha256[:12]}.partial")
    partial.write_bytes(held)
    stored = Path(artifact.uri.removeprefix("file://"))
    stored.chmod(0o644)
    stored.write_bytes(b"a" * 999 + b"b")

    with pytest.raises(CorruptDownload, match="try again"):
        client.download(job_id, artifact, target)

    assert list(target.parent.iterdir()) == []


def test_an_empty_artifact_is_an_empty_file(gateway: LiveGateway, client: Client, tmp_path: Path) -> None:
    job_id, artifact = exported(gateway, client, b"")

    assert client.download(job_id, artifact, tmp_path / "empty").read_bytes() == b""


def test_an_artifact_gone_from_the_store_is_said_at_once(gateway: LiveGateway, client: Client, tmp_path: Path) -> None:
    job_id, artifact = exported(gateway, client, b"weights")
    Path(artifact.uri.removeprefix("file://")).unlink()

    with pytest.raises(ServiceError) as refused:
        client.download(job_id, artifact, tmp_path / "model")

    assert refused.value.problem.code == "artifact_not_found"


@contextmanager
def limited(tmp_path: Path, model: Path, **limits: Any) -> Iterator[LiveGateway]:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()], **limits)
    with live(settings, model) as running:
        yield running


def test_reading_waits_as_long_as_the_service_asks(tmp_path: Path, model: Path) -> None:
    with limited(tmp_path, model, rate_limit="2/second") as gateway, Client(gateway.url, patience_s=20) as client:
        job_id = gateway.played.create()
        gateway.played.run(job_id)

        assert [client.get(job_id).id for _ in range(4)] == [job_id] * 4
        assert len(list(client.events(job_id))) > 0
        assert gateway.requests > 6


def test_a_wait_beyond_the_clients_patience_is_an_error_at_once(tmp_path: Path, model: Path) -> None:
    with limited(tmp_path, model, rate_limit="1/hour") as gateway, Client(gateway.url, patience_s=5) as client:
        client.page()
        started = time.monotonic()
        with pytest.raises(ServiceError, match="Too many requests") as refused:
            client.page()

    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 5
    assert time.monotonic() - started < 4


def test_what_is_not_safe_to_send_again_is_not_waited_for(tmp_path: Path, model: Path) -> None:
    with limited(tmp_path, model, rate_limit="1/hour") as gateway, Client(gateway.url, patience_s=20) as client:
        job_id = client.create(gateway.played.spec).id
        # The server counts a request when it has been answered.
        wait_until(lambda: gateway.requests == 1, what="the first request to be counted")
        with pytest.raises(ServiceError, match="Too many requests"):
            client.cancel(job_id)

        wait_until(lambda: gateway.requests > 1, what="the second request to be counted")
        assert gateway.requests == 2


def test_a_create_waits_for_room_in_the_queue(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.HEADERS, QueueQuotaExceeded, {"Retry-After": "1"})
    with limited(tmp_path, model, max_queued_jobs=1) as gateway, Client(gateway.url, patience_s=20) as client:
        first = client.create(gateway.played.spec)
        threading.Timer(0.2, gateway.played.claim, (first.id, StageName.SCORING)).start()
        second = client.create(gateway.played.spec)

        assert [job.id for job in client.page().data] == [second.id, first.id]
