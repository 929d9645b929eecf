"""Schemathesis against a running gateway on real servers, for a minute at most; `make schemathesis` sends more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.api_fuzz.run import KEY, Target, run, target


@pytest.fixture
def running(tmp_path: Path, postgres_database_url: str, empty_redis_url: str) -> Iterator[Target]:
    settings = Settings(data_dir=tmp_path, database_url=postgres_database_url, broker_url=empty_redis_url)
    with target(settings, tmp_path) as found:
        yield found


@pytest.mark.parametrize(("key", "examples"), [(KEY, 3), (None, 1)], ids=["with a key", "without"])
def test_the_interface_is_as_its_document_says(
    running: Target, key: str | None, examples: int, record_property: Callable[[str, object], None]
) -> None:
    found = run(running, seed=1, examples=examples, key=key)

    assert not found.failed, found.output
    assert found.requests > 500, found.output
    record_property(f"requests by Schemathesis, {'with' if key else 'without'} a key", found.requests)
