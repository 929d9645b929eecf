"""Real servers for tests that ask for them, each started once, when the first test asks; and marks for what is slow."""

from __future__ import annotations

import gc
import os
import shutil
import uuid
from collections.abc import Generator, Iterator
from functools import _lru_cache_wrapper
from pathlib import Path

import fastapi.dependencies.models
import pytest
import redis

from service.db.session import connect, migrate
from tests import servers

IN_MEMORY, ROOM_BYTES = Path("/dev/shm"), 8 * 2**30
SERVERS = {"postgres_url": "PostgreSQL", "redis_url": "Valkey (Redis)", "s3": "SeaweedFS (S3)"}
"""What runs on a real server, by the fixture that starts it."""
KINDS = {"postgresql": "postgres_url", "valkey": "redis_url", "s3": "s3"}
"""Parameters for which a fixture asks for a server only while it runs."""
# Several processes of tests share few cores, where PyTorch's threads would wait for each other in busy loops. The
# library reads this when PyTorch is first imported; the processes that tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MARKS = {**dict.fromkeys(SERVERS, "server"), "mlflow_url": "server", "browser": "browser", "environment": "process"}
"""What a test is marked with for a fixture that it uses, itself or through others."""


def pytest_configure() -> None:
    """Tests write to memory where there is room: what they commit need not outlive the machine."""
    if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > ROOM_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


@pytest.hookimpl(tryfirst=True)  # Before `-m` chooses by these marks.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = {*getattr(item, "fixturenames", ()), *_servers_of_parameters(item)}
        for mark in sorted({MARKS[name] for name in fixtures & MARKS.keys()}):
            item.add_marker(mark)
        item.user_properties += [("server", SERVERS[name]) for name in sorted(fixtures & SERVERS.keys())]
    # pytest-xdist deals them in as many runs as there are workers: each begins with its share of the long ones.
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    long = [item for item in items if item.get_closest_marker("process")]
    short = [item for item in items if not item.get_closest_marker("process")]
    edges = [len(short) * worker // workers for worker in range(workers + 1)]
    items[:] = [
        item for worker in range(workers) for item in long[worker::workers] + short[edges[worker] : edges[worker + 1]]
    ]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: the collector need not walk over all of PyTorch again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _applications() -> Iterator[None]:
    """FastAPI remembers thousands of endpoints, and with them whole applications, which every collection walks over."""
    yield
    for one in vars(fastapi.dependencies.models).values():
        if isinstance(one, _lru_cache_wrapper):
            one.cache_clear()


def _servers_of_parameters(item: pytest.Item) -> set[str]:
    """Fixtures of the servers that a parametrised test asks for through one of its parameters."""
    callspec = getattr(item, "callspec", None)
    parameters = () if callspec is None else callspec.params.values()
    return {KINDS[value] for value in parameters if isinstance(value, str) and value in KINDS}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ran on which server, and the figures that tests recorded."""
    for server in SERVERS.values():
        counts = ", ".join(
            f"{sum(('server', server) in report.user_properties for report in reports)} {outcome}"
            for outcome in ("passed", "failed", "skipped")
            if (reports := terminalreporter.getreports(outcome)) or outcome == "skipped"
        )
        terminalreporter.write_line(f"Tests on a real {server} server: {counts}")
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name != "server":
                terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server's database `postgres`, shared by all tests: change nothing in it."""
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_database(postgres_url: str) -> Iterator[str]:
    """Name of a PostgreSQL database with the schema and no rows, to copy: a copy is made faster than a migration."""
    with servers.postgres_database(postgres_url, template="template1") as url:
        database = connect(url)
        migrate(database)
        database.dispose()  # What is connected to cannot be copied.
        yield url.rpartition("/")[2]


@pytest.fixture
def postgres_database_url(postgres_url: str, migrated_database: str) -> Iterator[str]:
    """A fresh PostgreSQL database with the schema and no rows."""
    with servers.postgres_database(postgres_url, template=migrated_database) as url:
        yield url


@pytest.fixture
def empty_postgres_database_url(postgres_url: str) -> Iterator[str]:
    """A fresh PostgreSQL database without the schema."""
    with servers.postgres_database(postgres_url, template="template1") as url:
        yield url


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
