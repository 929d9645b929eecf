"""What anyone may send who may submit, against a gateway on a real port that others use meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest
from pydantic import SecretStr

from pdtrim.contract.spec import JobSpec
from service.api.connections import HEAD_SECONDS
from service.checking import questions
from service.settings import Settings
from tests.gateway import listening, model
from tests.hub import use_hub
from tests.live_gateway import LiveGateway, live
from tests.processes import wait_until
from tests.servers import free_ports

__all__ = ["model"]

pytestmark = pytest.mark.slow

HALVES = {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
OTHERS = ("/healthz", "/v1/jobs", "/metrics", "/ui/jobs")


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub to which one can connect, and that never says anything."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=256)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        use_hub(monkeypatch, url)
        yield url


def test_a_hub_that_does_not_answer_holds_up_only_who_asks_for_it(silent_hub: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, allowed_sources=["reference", "builtin:", "hf://"])

    async def run(url: str) -> tuple[list[float], list[tuple[int, str | None, float]]]:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

            async def submit() -> tuple[int, str | None, float]:
                began = time.monotonic()
                answer = await client.post("/v1/jobs", json={"model": "hf://acme/tiny", **HALVES})
                return answer.status_code, answer.headers.get("Retry-After"), time.monotonic() - began

            for path in OTHERS:  # What is made at the first use.
                await client.get(path)
            submissions = [asyncio.create_task(submit()) for _ in range(45)]
            await asyncio.sleep(1)
            waited = []
            for _ in range(5):
                for path in OTHERS:
                    began = time.monotonic()
                    assert (await client.get(path)).status_code == 200
                    waited.append(time.monotonic() - began)
            honest = await client.post("/v1/jobs", json={"model": "reference", **HALVES})
            assert honest.status_code == 201, honest.text
            return waited, await asyncio.gather(*submissions)

    with listening(settings) as url:
        waited, submissions = asyncio.run(run(url))

    assert max(waited) < 0.5
    assert {(status, retry) for status, retry, _ in submissions} == {(503, "5")}
    assert max(seconds for *_, seconds in submissions) < 15


def test_a_silent_provider_of_tokens_holds_up_only_who_brings_one(silent_hub: str, tmp_path: Path) -> None:
    token = "eyJhbGciOiJFUzI1NiIsImtpZCI6ImEifQ.e30.AA"
    settings = Settings(
        data_dir=tmp_path, api_key=SecretStr("operator"), oidc_issuer=silent_hub, oidc_audience="pdtrim"
    )

    async def run(url: str) -> tuple[list[float], list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            ours = {"Authorization": "Bearer operator"}
            for path in OTHERS:
                await client.get(path, headers=ours)
            theirs = {"Authorization": f"Bearer {token}"}
            asked = [asyncio.create_task(client.get("/v1/jobs", headers=theirs)) for _ in range(60)]
            waited = []
            while not all(one.done() for one in asked):
                for path in OTHERS:
                    began = time.monotonic()
                    assert (await client.get(path, headers=ours)).status_code in (200, 303)
                    waited.append(time.monotonic() - began)
            return waited, await asyncio.gather(*asked)

    with listening(settings) as url:
        waited, answers = asyncio.run(run(url))

    # The provider is waited for for three seconds.
    assert max(waited) < 2
    assert {answer.status_code for answer in answers} == {503}
    assert all("Retry-After" in answer.headers for answer in answers)


def test_a_long_specification_is_read_while_others_are_answered(tmp_path: Path) -> None:
    rows = "".join("- {q: a, c: [x, y], t: 0}\n" for _ in range(7000))
    task = f"task: a\ndocs:\n{rows}doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: t\n"
    body = {"model": "reference", **HALVES, "evaluation": {"tasks": [task]}}
    began = time.thread_time()  # Of the processor alone: whatever else the machine does.
    JobSpec.model_validate(body)
    alone = time.thread_time() - began

    async def run(url: str) -> tuple[float, float]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await client.get("/healthz")
            began, longest = time.monotonic(), 0.0
            content = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            estimates = [
                asyncio.create_task(client.post("/v1/jobs/estimate", content=content, headers=headers))
                for _ in range(8)
            ]
            while not all(estimate.done() for estimate in estimates):
                asked = time.monotonic()
                await client.get("/healthz")
                longest = max(longest, time.monotonic() - asked)
            assert {(await estimate).status_code for estimate in estimates} == {200}
            return longest, time.monotonic() - began

    with listening(Settings(data_dir=tmp_path)) as url:
        longest, total = asyncio.run(run(url))

    assert total > 4 * alone
    assert longest < total / 2


def test_neither_taking_nor_showing_a_long_specification_holds_up_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[float] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        took.append(time.thread_time() - began)

    rows = [{"q": "a", "c": ["x", "y"], "t": 0}] * 10_000
    task = {"docs": rows, "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "t"}
    body = {"model": "reference", **HALVES, "evaluation": {"tasks": [{"task": name, **task} for name in "abc"]}}
    began = time.thread_time()
    JobSpec.model_validate(body)
    alone = time.thread_time() - began
    with listening(Settings(data_dir=tmp_path)) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.post("/v1/jobs", json=body)  # What is made at the first use.
        monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
        gc.freeze()  # What other tests left takes longer to look through than what is measured.
        for path, status in (("/v1/jobs", 201), ("/v1/jobs/estimate", 200)):
            assert client.post(path, json=body).status_code == status
        assert len(client.get("/v1/jobs").json()["data"]) == 2
        gc.unfreeze()

    assert max(took) < alone / 2  # Before, 1.5 of it.


THREADS = 40
"""Of the gateway, for what asks the database or the store."""


def test_requests_whose_clients_leave_while_they_wait_for_a_thread_are_dropped(tmp_path: Path, model: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as gateway, closing(_locked(settings)) as lock, ExitStack() as waiting:
        for _ in range(THREADS):
            waiting.enter_context(_sent(gateway, "GET", "/v1/jobs"))
        leaving = [_sent(gateway, "POST", "/v1/jobs", gateway.played.spec) for _ in range(20)]
        wait_until(lambda: gateway.under_way == THREADS + 20, seconds=10)
        for connection in leaving:
            connection.close()
        wait_until(lambda: gateway.under_way == THREADS, seconds=10, what="requests to be dropped")

        lock.rollback()
        wait_until(lambda: gateway.under_way == 0, seconds=30)

        assert gateway.played.client.get("/v1/jobs").json()["data"] == []


def test_requests_whose_clients_leave_while_they_wait_for_a_check_are_dropped_and_free_their_keys(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "AT_ONCE_OUTSIDE", 1)
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", "hf://"])
    body = {"model": "hf://acme/tiny", **HALVES}
    with _slow_hub() as hub, live(settings, model) as gateway:
        use_hub(monkeypatch, hub.url)
        with _sent(gateway, "POST", "/v1/jobs", body):
            wait_until(lambda: hub.asked == 1, seconds=10)
            keys = [f"left-{number}" for number in range(20)]
            leaving = [_sent(gateway, "POST", "/v1/jobs", body, {"Idempotency-Key": key}) for key in keys]
            wait_until(lambda: gateway.under_way == 21, seconds=10)
            for connection in leaving:
                connection.close()
            wait_until(lambda: gateway.under_way == 1, seconds=10, what="requests to be dropped")

            hub.answering.set()
            wait_until(lambda: gateway.under_way == 0, seconds=10)

        assert hub.asked == 1
        again = gateway.played.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": keys[0]})
        assert (again.status_code, again.json()["code"]) == (422, "source_unreadable")


def _locked(settings: Settings) -> sqlite3.Connection:
    """A connection that holds the lock without which nothing is read or written, until it rolls back."""
    connection = sqlite3.connect(settings.data_dir / "pdtrim.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def _sent(
    gateway: LiveGateway,
    method: str,
    path: str,
    body: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> socket.socket:
    """The connection on which a request has just been sent, whose answer nobody has read."""
    content = b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    connection = socket.create_connection(("127.0.0.1", gateway.settings.port), timeout=30)
    connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
    return connection


@dataclass
class SlowHub:
    """A hub that has no model, and says so once it is `answering`; `asked` counts who asked for one."""

    url: str = ""
    asked: int = 0
    answering: Event = field(default_factory=Event)


@contextmanager
def _slow_hub() -> Iterator[SlowHub]:
    hub = SlowHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/"):
                hub.asked += 1
                hub.answering.wait(30)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.answering.set()
            server.shutdown()
            thread.join()


SERVED = """
import sys, uvicorn
from service.api.connections import server_options
from service.app import create_app
from service.observing import logs
from service.api.connections import HEAD_SECONDS
from service.settings import Settings
settings = Settings()
logs.configure(settings)
uvicorn.run(create_app(settings), port=settings.port, log_config=None, access_log=False, **server_options(settings))
"""
FILES = 256


def test_half_open_connections_hold_up_nobody_and_are_closed_in_time(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "PDTRIM_DATA_DIR": str(tmp_path),
        "PDTRIM_PORT": str(port),
        "PDTRIM_LOG_FORMAT": "json",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVED],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
        )
    url = f"http://127.0.0.1:{port}"
    half_open: list[socket.socket] = []
    try:
        wait_until(lambda: answers(url), seconds=30)
        httpx.get(f"{url}/v1/jobs")
        job = httpx.post(f"{url}/v1/jobs", json={"model": "reference", **HALVES}).json()["id"]
        with httpx.stream("GET", f"{url}/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as stream:
            assert stream.headers["Content-Type"].startswith("text/event-stream")
            began = time.monotonic()
            for _ in range(400):
                connection = socket.create_connection(("127.0.0.1", port), timeout=30)
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
                half_open.append(connection)
            connected_after = time.monotonic() - began
            waited = []
            for path in (*OTHERS, *OTHERS):
                asked = time.monotonic()
                assert httpx.get(f"{url}{path}").status_code == 200
                waited.append(time.monotonic() - asked)
            for connection in half_open:
                connection.settimeout(30)
                with suppress(ConnectionError):
                    assert connection.recv(1) == b""
            closed_after = time.monotonic() - began
            # The stream of events was open all the while, and still is.
            httpx.post(f"{url}/v1/jobs/{job}/cancel")
            assert any("job.cancelled" in line for line in stream.iter_lines())
    finally:
        for connection in half_open:
            connection.close()
        process.terminate()
        process.wait(30)

    assert max(waited) < 1
    assert closed_after - connected_after < HEAD_SECONDS + 5
    assert log.stat().st_size < 100_000


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.HTTPError:
        return False
