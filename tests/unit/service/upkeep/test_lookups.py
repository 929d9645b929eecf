"""Names that are looked up by a resolver that answers, refuses, or says nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from threading import Event, current_thread

import pytest

from service.upkeep.lookups import Lookups


@pytest.fixture
def closing() -> Iterator[Event]:
    """What silent look-ups wait for."""
    event = Event()
    yield event
    event.set()


def test_a_name_is_looked_up_in_a_thread_that_ends_with_the_process() -> None:
    def find(host: str, port: int) -> list[str]:
        return [current_thread().name, str(current_thread().daemon)]

    assert asyncio.run(Lookups(find).addresses("a", 1)) == ["lookup", "True"]


def test_what_the_resolver_says_is_said() -> None:
    def find(host: str, port: int) -> list[str]:
        raise TimeoutError("the resolver's own")

    with pytest.raises(OSError, match="the resolver's own"):
        asyncio.run(Lookups(find).addresses("a", 1))


def test_a_look_up_without_an_answer_is_left_behind_and_holds_up_no_other_name(closing: Event) -> None:
    asked: list[str] = []

    def find(host: str, port: int) -> list[str]:
        asked.append(host)
        if host == "silent":
            closing.wait()
        return ["192.0.2.1"]

    lookups = Lookups(find, seconds=0.2)

    async def ask() -> list[object]:
        silent = [lookups.addresses("silent", 1) for _ in range(5)]
        return list(await asyncio.gather(lookups.addresses("quick", 1), *silent, return_exceptions=True))

    began = time.monotonic()
    # In another event loop, too, as the reconciler has one for each batch.
    for _ in range(2):
        quick, *others = asyncio.run(ask())
        assert quick == ["192.0.2.1"]
        assert {str(other) for other in others} == {"silent was not found within 0.2 s"}
    assert time.monotonic() - began < 2
    assert asked.count("silent") == 1  # One thread, however often it is asked for.


def test_so_many_names_are_looked_up_at_once_and_more_when_they_are_found(closing: Event) -> None:
    def find(host: str, port: int) -> list[str]:
        if host != "quick":
            closing.wait()
        return [host]

    lookups = Lookups(find, at_once=2, seconds=0.1)

    async def ask() -> None:
        await asyncio.gather(*(lookups.addresses(host, 1) for host in ("a", "b")), return_exceptions=True)
        with pytest.raises(OSError, match="quick is not looked up: 2 names are"):
            await lookups.addresses("quick", 1)
        closing.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                assert await lookups.addresses("quick", 1) == ["quick"]
                return
            except OSError:
                await asyncio.sleep(0.01)
        raise AssertionError("no thread came free")

    asyncio.run(ask())
