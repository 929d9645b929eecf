"""The gateway, as `pdtrim gateway` starts it, and requests whose head has no end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from service.api.connections import MAX_HEAD_BYTES
from tests.processes import running, wait_until
from tests.servers import free_ports

ENOUGH = 64 << 20
PIECE = b"x: " + b"y" * 4093 + b"\r\n"


@pytest.fixture
def address(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[str, int]]:
    (port,) = free_ports(1)
    with running(["gateway"], environment | {"PDTRIM_PORT": str(port)}, tmp_path / "gateway.log"):
        wait_until(lambda: _answers(port), what="the gateway to answer")
        yield ("127.0.0.1", port)


def _answers(port: int) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).is_success
    return False


def test_a_head_without_end_is_refused_and_the_connection_closed_and_a_long_one_is_read(
    address: tuple[str, int],
) -> None:
    for first in (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"GET /" + b"a" * MAX_HEAD_BYTES):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(first)
            sent = 0
            with suppress(ConnectionError):
                while sent < ENOUGH:
                    connection.sendall(PIECE)
                    sent += len(PIECE)
            answer = b""
            with suppress(ConnectionError):
                while piece := connection.recv(65536):
                    answer += piece
        assert sent < ENOUGH
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))

    assert _answers(address[1])
    long = {"X-Filler": "y" * (MAX_HEAD_BYTES - 4096)}
    assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz", headers=long, trust_env=False).is_success
