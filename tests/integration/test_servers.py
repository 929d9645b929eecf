"""The servers that other tests stand on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time

import boto3
import psycopg
import pytest
import redis
from botocore.exceptions import ClientError

from tests import servers


def test_every_test_gets_a_database_of_its_own(postgres_url: str, postgres_database_url: str) -> None:
    with psycopg.connect(postgres_database_url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE own (id uuid DEFAULT gen_random_uuid())")
        found = connection.execute("SELECT current_database(), count(*) FROM own").fetchone()

    assert found is not None
    assert found[1] == 0
    assert found[0] not in postgres_url


def test_valkey_answers_and_starts_empty(empty_redis_url: str) -> None:
    with redis.Redis.from_url(empty_redis_url) as client:
        assert client.dbsize() == 0
        client.set("key", "value")
        assert client.get("key") == b"value"


def test_s3_refuses_a_wrong_secret(s3: servers.S3Server) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint_url,
        region_name=s3.region,
        aws_access_key_id=s3.access_key_id,
        aws_secret_access_key="wrong",
    )

    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client.list_objects_v2(Bucket=s3.bucket)


def test_a_server_dies_with_a_killed_test_process() -> None:
    script = (
        "import os, signal\n"
        "from tests.servers import seaweedfs\n"
        "with seaweedfs() as server:\n"
        "    print(server.endpoint_url, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # What a killed process leaves is tidied up here; below a test's own folder the paths of sockets get too long.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        killed = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )

        port = int(killed.stdout.rsplit(":", 1)[1])
        deadline = time.monotonic() + 10
        while _listens(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _listens(port)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((servers.HOST, port)) == 0
