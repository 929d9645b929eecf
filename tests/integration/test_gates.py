"""What anyone may send who may submit, against a gateway on a real port that others use meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from pdtrim.contract.spec import JobSpec
from service.api.connections import HEAD_SECONDS
from service.settings import Settings
from tests.gateway import listening
from tests.hub import use_hub
from tests.processes import wait_until
from tests.servers import free_ports

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
    began = time.monotonic()
    JobSpec.model_validate(body)
    alone = time.monotonic() - began

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
