from __future__ import annotations

import asyncio
import time
from functools import partial
from threading import Event, current_thread

import pytest

from pdtrim.contract.errors import DependencyUnavailable
from service.checking.questions import Room


def test_a_question_is_answered_in_a_thread_that_ends_with_the_process() -> None:
    thread = asyncio.run(Room(at_once=1).ask(current_thread))

    assert (thread.name, thread.daemon) == ("question", True)


def test_what_a_question_raises_is_raised() -> None:
    def question() -> None:
        raise TimeoutError("the store's own")

    with pytest.raises(TimeoutError, match="the store's own"):
        asyncio.run(Room(at_once=1).ask(question))


def test_a_question_without_an_answer_keeps_its_thread_and_holds_up_others_no_longer_than_they_wait() -> None:
    silent = Event()

    async def ask() -> None:
        room = Room(at_once=2, seconds=0.2)
        began = time.monotonic()
        outcomes = await asyncio.gather(*(room.ask(silent.wait) for _ in range(6)), return_exceptions=True)
        assert time.monotonic() - began < 1
        assert all(isinstance(outcome, DependencyUnavailable) for outcome in outcomes)
        with pytest.raises(DependencyUnavailable, match="within"):
            await room.ask(partial(int, 1))
        silent.set()
        assert await room.ask(partial(int, 1)) == 1

    asyncio.run(ask())


def test_more_questions_than_may_wait_are_refused_at_once() -> None:
    silent = Event()

    async def ask() -> None:
        room = Room(at_once=1, seconds=5, waiting=1)
        asked = [asyncio.create_task(room.ask(silent.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(DependencyUnavailable, match="Too many"):
            await room.ask(silent.wait)
        silent.set()
        assert await asyncio.gather(*asked) == [True, True]

    asyncio.run(ask())
