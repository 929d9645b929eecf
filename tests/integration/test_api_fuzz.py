"""Schemathesis against a running gateway on real servers, for a minute at most; `make schemathesis` sends more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.api_fuzz.run import KEY, PHASES, Target, run, target


@pytest.fixture
def running(tmp_path: Path, postgres_database_url: str, empty_redis_url: str) -> Iterator[Target]:
    settings = Settings(data_dir=tmp_path / "data", database_url=postgres_database_url, broker_url=empty_redis_url)
    with target(settings, tmp_path) as found:
        yield found


# Without a key all answers are alike: a few requests to each operation tell as much as every corner of its parameters.
@pytest.mark.parametrize(
    ("key", "phases", "at_least"), [(KEY, PHASES, 500), (None, "examples,fuzzing", 100)], ids=["with a key", "without"]
)
def test_the_interface_is_as_its_document_says(
    running: Target,
    key: str | None,
    phases: str,
    at_least: int,
    record_property: Callable[[str, object], None],
) -> None:
    found = run(running, seed=1, examples=3, key=key, phases=phases)

    assert not found.failed, found.output
    assert found.requests > at_least, found.output
    record_property(f"requests by Schemathesis, {'with' if key else 'without'} a key", found.requests)
