"""Real servers for tests that ask for them; each starts once, when the first test of the run asks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
import redis

from tests import servers


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server's database `postgres`, shared by all tests: change nothing in it."""
    with servers.postgres() as url:
        yield url


@pytest.fixture
def postgres_database_url(postgres_url: str) -> Iterator[str]:
    """A fresh, empty PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield postgres_url.removesuffix("postgres") + name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Valkey server, shared by all tests."""
    with servers.valkey() as url:
        yield url


@pytest.fixture
def empty_redis_url(redis_url: str) -> str:
    """The Valkey server with nothing in it."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture(scope="session")
def s3() -> Iterator[servers.S3Server]:
    """An S3 server with a bucket, shared by all tests."""
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture
def s3_url(s3: servers.S3Server) -> str:
    """An S3 prefix under which there is nothing."""
    return f"s3://{s3.bucket}/{uuid.uuid4().hex}"
