from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdtrim.contract.spec import JobSpec
from service.storage import StoredObject, StoreUnavailable
from service.storage.local import LocalStore
from tests.search_killed import context
from tests.tiny_job import tiny_spec
from workers.stages import saving as module
from workers.stages.context import StageContext
from workers.stages.saving import Pace, Saver, saving

STATE = {"weight": torch.arange(4.0)}


class Clock:
    """Passes as it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def surroundings(tmp_path: Path) -> StageContext:
    spec = JobSpec.model_validate(tiny_spec(tmp_path))
    made = context(tmp_path, spec, {})
    made.workdir.mkdir()
    return made


def through(surroundings: StageContext, put: Callable[[], None]) -> None:
    """Have `put` called before each file that is put into the store."""
    real = surroundings.store

    class Slow(LocalStore):
        def put_file(self, key: str, path: Path, check: Callable[[], None] = lambda: None) -> StoredObject:
            put()
            return real.put_file(key, path)

    surroundings.store = Slow(surroundings.workdir.parent / "store")


def test_a_store_that_takes_long_does_not_stop_the_stage(surroundings: StageContext) -> None:
    gate = threading.Event()

    def wait() -> None:
        gate.wait(30)

    through(surroundings, wait)
    start = time.monotonic()
    with saving(surroundings) as saver:
        saver.save("state", STATE)
        assert saver.is_busy()
        assert time.monotonic() - start < 10
        gate.set()
    kept = surroundings.load_tensors("state")
    assert kept is not None
    assert torch.equal(kept["weight"], STATE["weight"])


def test_at_the_end_what_was_not_begun_is_not_wanted_any_more(surroundings: StageContext) -> None:
    gate, puts = threading.Event(), list[float]()

    def wait() -> None:
        puts.append(time.monotonic())
        gate.wait(30)

    through(surroundings, wait)
    with saving(surroundings) as saver:
        for _ in range(3):
            saver.save("state", STATE)
        while not puts:
            time.sleep(0.01)
        gate.set()
    assert len(puts) <= 2  # The second may have begun when the first had ended.


def test_a_fault_shows_at_the_next_step_or_at_the_end(surroundings: StageContext) -> None:
    def fail() -> None:
        raise StoreUnavailable("full")

    through(surroundings, fail)

    def work(after: Callable[[Saver], None]) -> None:
        with saving(surroundings) as saver:
            saver.save("state", STATE)
            after(saver)

    def go_on(saver: Saver) -> None:
        while saver.is_busy():
            time.sleep(0.01)
        pytest.fail("nobody was told")

    with pytest.raises(StoreUnavailable):
        work(go_on)
    with pytest.raises(StoreUnavailable):
        work(lambda saver: None)


def test_what_stops_the_stage_is_raised_rather_than_what_saving_meets(surroundings: StageContext) -> None:
    def fail() -> None:
        raise StoreUnavailable("full")

    def work() -> None:
        with saving(surroundings) as saver:
            saver.save("state", STATE)
            raise KeyError

    through(surroundings, fail)
    with pytest.raises(KeyError):
        work()


def test_copying_takes_at_most_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    pace, saving_s, start = Pace(15.0), 0.0, clock.now
    while clock.now < start + 20_000:
        clock.now += 2.0  # a step
        if pace.due:
            with pace.paid():
                clock.now += 20.0
                saving_s += 20.0
    assert 0.04 < saving_s / (clock.now - start) <= 0.05


def test_cheap_states_are_saved_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, saves = Clock(), 0
    monkeypatch.setattr(module, "time", clock)
    pace = Pace(15.0)
    for _ in range(1000):
        clock.now += 1.0
        if pace.due:
            with pace.paid():
                saves += 1
    assert saves == 1000 // 15
