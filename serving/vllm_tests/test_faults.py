"""A pair through deaths of engines, clients that go away, leases that end, and more requests than it has room for."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_tests.checkpoints import Checkpoints, Pairs
from vllm_tests.running import (
    SEQUENCES,
    ServedPair,
    Server,
    complete,
    greedy,
    hand_over,
    metric,
    post,
    served,
    wait_for,
)

REQUESTS = 200
LEASE_SECONDS = 60
FIRST = "prefill"


@pytest.fixture(scope="module")
def checkpoints(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return pairs.copy("reference", tmp_path_factory.mktemp("checkpoints"), serving={"first_token": FIRST})


@pytest.fixture(scope="module")
def pair(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPair]:
    folder: Path = tmp_path_factory.mktemp("served")
    with served(folder, checkpoints.both, lease_seconds=LEASE_SECONDS) as started:
        wait_for(lambda: post(started.router.url, greedy([7, 8, 9], 2)).tokens is not None, what="the first answer")
        yield started


def test_more_requests_than_there_is_room_for_wait_and_none_gives_way(
    pair: ServedPair, checkpoints: Checkpoints
) -> None:
    cases = checkpoints.cases[-3:] * SEQUENCES
    answers = complete(pair.router.url, [case.prompt for case in cases], 200, at_once=len(cases))
    right = sum((a.tokens or [])[: len(c.prefill)] == c.prefill for a, c in zip(answers, cases, strict=True))

    print(f"\n{right} of {len(cases)} equal", *{answer.error for answer in answers})
    assert right == len(cases)
    assert metric(pair.decode, "vllm:num_preemptions_total") == 0


def test_what_prefill_kept_for_too_short_a_time_is_not_read(pair: ServedPair, checkpoints: Checkpoints) -> None:
    prompt = checkpoints.cases[-1].prompt
    answer = hand_over(pair, prompt, 4, meanwhile=lambda: time.sleep(LEASE_SECONDS + 2))

    assert answer.error.startswith("HTTP 500")
    assert "prefill kept its KV cache for too short a time" in pair.decode.log.read_text()


def test_no_request_hangs_or_is_answered_with_other_tokens_whatever_dies(
    pair: ServedPair, checkpoints: Checkpoints
) -> None:
    drawn = random.Random(5)
    work = [(drawn.choice(checkpoints.cases), drawn.random() < 0.2, drawn.uniform(0.05, 2)) for _ in range(REQUESTS)]
    ended: Counter[str] = Counter()
    up = threading.Event()
    up.set()

    def ask(number: int) -> str:
        case, leaves, after = work[number]
        up.wait()
        answer = post(pair.router.url, greedy(case.prompt, len(case.prefill)), **({"seconds": after} if leaves else {}))
        outcome = "right" if answer.tokens == case.prefill else "wrong" if answer.tokens is not None else "error"
        if outcome == "error":
            outcome = "left" if leaves else "hung" if "timed out" in answer.error else "error"
            time.sleep(2)  # Else all that are left fail while an engine is down.
        ended[outcome] += 1
        return outcome

    def kill(server: Server) -> None:
        server.kill()
        time.sleep(1)  # While clients ask on.
        up.clear()
        server.start()
        server.wait()
        up.set()

    with ThreadPoolExecutor(SEQUENCES) as pool:
        asked = [pool.submit(ask, number) for number in range(REQUESTS)]
        for due, server in ((30, pair.prefill), (80, pair.decode), (130, pair.prefill), (160, pair.decode)):
            wait_for(lambda due=due: ended.total() >= due, seconds=900, what=f"{due} requests")  # type: ignore[misc]
            kill(server)
        outcomes = Counter(future.result() for future in asked)

    print(f"\n{REQUESTS} requests: {dict(outcomes)}")
    assert outcomes.total() == REQUESTS
    assert (outcomes["wrong"], outcomes["hung"]) == (0, 0)
    assert outcomes["right"] > REQUESTS / 2
    answers = complete(pair.router.url, [case.prompt for case in checkpoints.cases], len(checkpoints.cases[0].prefill))
    assert [a.tokens for a in answers] == [case.prefill for case in checkpoints.cases]
