from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from service.api import connections
from service.settings import Settings
from tests.gateway import listening

POST = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
SECONDS = 0.5
LATEST = 10 * SECONDS
"""When it has to be over, however busy the machine is."""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "UNREAD_SECONDS"):
        monkeypatch.setattr(connections, name, SECONDS)
    with listening(Settings(data_dir=tmp_path, max_connections=5)) as found:
        yield found


def connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    made = socket.create_connection((host, int(port)), timeout=5)
    # Small, so that an answer that is not read soon waits at the gateway.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n", POST, POST + b"{"])
def test_a_request_that_stops_coming_is_given_up(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        assert 0.5 * SECONDS < seconds_until_closed(connection) < LATEST


def test_a_request_that_comes_byte_by_byte_is_given_up_as_soon(url: str) -> None:
    began = time.monotonic()
    with connected(url) as connection, suppress(ConnectionError):
        for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(SECONDS / 10)
    assert time.monotonic() - began < LATEST


def test_a_second_request_on_a_connection_has_as_much_time(url: str) -> None:
    with connected(url) as connection:
        for _ in range(3):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1.5 * SECONDS)
        connection.sendall(b"GET")
        assert 0.5 * SECONDS < seconds_until_closed(connection) < LATEST


def test_an_answer_that_nobody_reads_is_given_up(url: str) -> None:
    with connected(url) as connection:
        sent = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200
        connection.setblocking(False)
        connection.send(sent)
        time.sleep(6 * SECONDS)
        connection.setblocking(True)
        assert seconds_until_closed(connection) < 10 * SECONDS


def test_beyond_the_bound_who_waited_longest_for_a_request_goes_and_others_are_answered(url: str) -> None:
    half_open = [connected(url) for _ in range(5)]
    try:
        half_open[0].sendall(b"GET / HTTP/1.1\r\n")
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert seconds_until_closed(half_open[0]) < SECONDS / 2
        half_open[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert half_open[-1].recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for connection in half_open:
            connection.close()
