"""What a worker says of itself."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from workers.running.announcing import look


def test_a_worker_says_what_it_has_and_how_fast_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.running.announcing.PROBE_SECONDS", 0.0)
    found = look("default", tmp_path / "scratch")
    assert (found.queue, found.kind, found.count) == ("default", "cpu", 1)
    assert found.memory_bytes == found.host_bytes == psutil.virtual_memory().total
    assert found.name
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.bytes_per_second < 1e13
    assert 1e-8 < found.call_seconds < 1e-2
