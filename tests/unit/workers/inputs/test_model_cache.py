"""Which fetched models a worker's disk keeps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from service.stopping import go_on
from workers.inputs.model_cache import ModelCache

HOLD = """
import sys
from pathlib import Path
from workers.inputs.model_cache import ModelCache
with ModelCache(Path(sys.argv[1]), 100).using(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


class Usage(NamedTuple):
    """Bytes of a disk."""

    total: int
    used: int
    free: int


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "models", 100)


def fetch(cache: ModelCache, name: str, size: int) -> None:
    """As a worker does."""
    with cache.using(name) as folder:
        cache.make_room(name, size, go_on)
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes(size))


def kept(cache: ModelCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.is_dir()}


def test_the_model_used_least_recently_goes_for_another(cache: ModelCache) -> None:
    for name in ("one", "two", "three"):
        fetch(cache, name, 30)
    with cache.using("one"):
        pass
    fetch(cache, "four", 30)
    assert kept(cache) == {"one", "three", "four"}
    assert {path.name for path in cache.folder.glob("*.lock")} == {"one.lock", "three.lock", "four.lock"}
    fetch(cache, "five", 70)
    assert kept(cache) == {"four", "five"}


def test_a_model_that_is_there_costs_no_other(cache: ModelCache) -> None:
    fetch(cache, "one", 50)
    fetch(cache, "two", 50)
    fetch(cache, "one", 50)
    assert kept(cache) == {"one", "two"}


def test_a_model_in_use_by_another_process_stays_until_that_is_killed(cache: ModelCache) -> None:
    fetch(cache, "one", 60)
    command = [sys.executable, "-c", HOLD, str(cache.folder), "one"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        fetch(cache, "two", 60)
        assert kept(cache) == {"one", "two"}
        holder.kill()
    fetch(cache, "three", 60)
    assert kept(cache) == {"three"}


def test_a_model_that_is_still_fetched_counts_whole(cache: ModelCache) -> None:
    fetch(cache, "old", 20)
    with cache.using("slow") as folder:
        cache.make_room("slow", 60, go_on)
        folder.mkdir()  # and nothing came yet
        fetch(cache, "other", 40)
        assert kept(cache) == {"slow", "other"}


def test_models_of_a_version_that_held_none_go_by_their_folders_age(cache: ModelCache) -> None:
    for name, age in (("older", 1), ("newer", 2)):
        folder = cache.folder / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(50))
        os.utime(folder, (age, age))
    fetch(cache, "one", 50)
    assert kept(cache) == {"newer", "one"}


def test_a_full_disk_makes_room_below_the_bound(cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(cache, "one", 30)
    fetch(cache, "two", 30)
    full = Usage(1000, 980, 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    fetch(cache, "three", 30)
    assert kept(cache) == {"two", "three"}


def test_without_a_bound_models_take_half_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ModelCache(tmp_path / "models", None)
    usage = Usage(200, 0, 200)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    for name in ("one", "two", "three"):
        fetch(cache, name, 40)
    assert kept(cache) == {"two", "three"}


def test_many_workers_at_once_end_within_the_bound(cache: ModelCache) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            name = str((number + turn * 3) % 7)
            with cache.using(name) as folder:
                cache.make_room(name, 30, go_on)
                folder.mkdir(exist_ok=True)
                file = folder / "model.safetensors"
                file.write_bytes(bytes(30))
                assert file.stat().st_size == 30  # Nobody took it away.

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    fetch(cache, "last", 30)
    assert len(kept(cache)) <= 3


def test_a_stage_that_is_to_stop_does_not_wait_for_room(cache: ModelCache) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    check: Callable[[], None] = stop
    fetch(cache, "one", 60)
    with cache.using("two"), pytest.raises(Stop):
        cache.make_room("two", 60, check)
    assert kept(cache) == {"one"}


def test_a_file_that_its_user_misses_is_not_taken_for_a_lock_that_is_gone(cache: ModelCache) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"), cache.using("one") as folder:
        (folder / "config.json").read_text()
    fetch(cache, "two", 100)  # which waits for nobody
