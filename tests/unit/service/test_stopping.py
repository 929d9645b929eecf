from __future__ import annotations

import asyncio
import time
from threading import Event, current_thread

import pytest

from service import stopping
from service.stopping import Interrupted, go_on, interrupt, interruptible, reasons


class Stopped(Exception):
    pass


def stop() -> None:
    raise Stopped


def test_what_a_call_returns_or_raises_comes_out() -> None:
    assert interruptible(go_on, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        interruptible(go_on, lambda: 1 // 0)


def test_a_call_that_nobody_waits_for_any_more_goes_on_in_a_thread_that_ends_with_the_process() -> None:
    going_on = Event()

    def call() -> tuple[str, bool]:
        going_on.wait(60)
        return current_thread().name, current_thread().daemon

    async def leave() -> None:
        async with asyncio.timeout(0.05):
            await asyncio.wrap_future(answer)

    answer = stopping.begun(call, "a question")
    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    going_on.set()
    assert answer.result(60) == ("a question", True)


def test_a_call_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ENDING_S", 0.1)
    hanging, ended = Event(), Event()

    def check() -> None:
        if hanging.is_set():
            raise Stopped

    def hang() -> None:
        hanging.set()
        ended.wait(60)

    started = time.monotonic()
    with pytest.raises(Stopped):
        interruptible(check, hang)
    assert time.monotonic() - started < 5
    ended.set()


def test_a_call_that_is_told_to_stop_clears_up_first() -> None:
    begun, cleared = Event(), Event()

    def check() -> None:
        if begun.is_set():
            raise Stopped

    def work() -> None:
        begun.set()
        try:
            while True:
                check()
        finally:
            time.sleep(0.1)
            cleared.set()

    with pytest.raises(Stopped):
        interruptible(check, work)
    assert cleared.is_set()


def test_nothing_is_begun_when_it_is_too_late() -> None:
    with pytest.raises(Stopped):
        interruptible(stop, lambda: pytest.fail(f"begun in {current_thread()}"))


def test_a_stop_passes_a_library_that_takes_every_exception_for_a_fault() -> None:
    def library() -> None:
        try:
            interrupt(stop)
        except Exception:  # noqa: BLE001
            return

    with pytest.raises(Interrupted):
        library()
    with pytest.raises(Stopped), reasons():
        library()
