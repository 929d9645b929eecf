"""What a worker says of itself."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from service.db import devices
from service.db.session import connect, transaction
from service.settings import Settings
from service.storage.local import LocalStore
from tests import databases
from workers.running.announcing import announce, look
from workers.running.attempt import Worker


def test_a_worker_says_what_it_has_and_how_fast_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.running.announcing.PROBE_SECONDS", 0.0)
    found = look(tmp_path / "scratch")
    assert (found.queue, found.kind, found.count) == ("default", "cpu", 1)
    assert found.memory_bytes == found.host_bytes == psutil.virtual_memory().total
    assert found.name
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.bytes_per_second < 1e13
    assert 1e-8 < found.call_seconds < 1e-2


def test_a_worker_is_known_in_every_queue_that_it_takes_stages_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.running.announcing.PROBE_SECONDS", 0.0)
    settings = Settings(data_dir=tmp_path)
    databases.provide(settings.database_url)
    database = connect(settings.database_url)
    announce(Worker(settings, database, LocalStore(tmp_path / "store"), "worker"), ["default", "large"]).join()
    with transaction(database) as session:
        found = devices.known(session)
    assert [one.queue for one in found] == ["default", "large"]


def test_a_worker_starts_all_the_same_where_that_cannot_be_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.running.announcing.PROBE_SECONDS", 0.0)
    settings = Settings(data_dir=tmp_path)
    empty = connect(settings.database_url)
    announce(Worker(settings, empty, LocalStore(tmp_path / "store"), "worker"), ["default"]).join()
    assert "is not recorded" in caplog.text
